"""Budgets per layer: a pyramid in a few tiers, in whole pages or as fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from paged_kv.core.schedule import MAX_DENOMINATOR


def tier_sizes(num_layers: int, num_tiers: int) -> list[int]:
    """num_layers split into num_tiers runs whose sizes differ by at most one, larger ones first."""
    base, extra = divmod(num_layers, num_tiers)
    return [base + (tier < extra) for tier in range(num_tiers)]


def pyramid(num_layers: int, num_tiers: int, beta: Fraction) -> list[Fraction]:
    """Budget of each tier relative to the mean over layers, largest (first layers) first.

    Layer k of m gets L_k = L_0 (1 + (k / m) (1 / beta - 1)), with L_0 such that the mean over
    layers is 1; a tier gets the mean of its layers ("Memory Reduction for LLM Inference via
    KV-Cache Compression").
    """
    shape = [1 + Fraction(k, num_layers) * (1 / beta - 1) for k in range(num_layers)]
    mean = sum(shape, Fraction()) / num_layers
    weights: list[Fraction] = []
    start = 0
    for size in tier_sizes(num_layers, num_tiers):
        weights.append(sum(shape[start : start + size], Fraction()) / size / mean)
        start += size
    return weights


def tier_pages(
    weights: Sequence[Fraction], sizes: Sequence[int], budget_pages: Fraction
) -> list[int]:
    """Whole pages per tier, so that the mean over layers comes as near budget_pages as it can.

    Rounds down, then hands the pages that are left to the tiers that lost most by rounding.
    """
    exact = [weight * budget_pages for weight in weights]
    pages = [int(value) for value in exact]
    lost = (size * (all_ - whole) for size, all_, whole in zip(sizes, exact, pages, strict=True))
    left = sum(lost, Fraction())
    order = sorted(range(len(exact)), key=lambda tier: (pages[tier] - exact[tier], tier))
    for tier in order:
        if sizes[tier] <= left:
            pages[tier] += 1
            left -= sizes[tier]
    return pages


def tier_fractions(
    weights: Sequence[Fraction], sizes: Sequence[int], fraction: Fraction
) -> list[Fraction]:
    """Fraction kept per tier, with a denominator up to MAX_DENOMINATOR, never 0.

    None keeps more than everything; the others share the rest.
    """
    result = [Fraction(0)] * len(weights)
    open_tiers = list(range(len(weights)))
    total = fraction * sum(sizes)
    while open_tiers:
        scale = total / sum((weights[tier] * sizes[tier] for tier in open_tiers), Fraction())
        full = [tier for tier in open_tiers if weights[tier] * scale >= 1]
        for tier in full or open_tiers:
            result[tier] = Fraction(1) if full else weights[tier] * scale
        if not full:
            break
        open_tiers = [tier for tier in open_tiers if tier not in full]
        total -= sum(sizes[tier] for tier in full)
    least = Fraction(1, MAX_DENOMINATOR)
    return [max(least, kept.limit_denominator(MAX_DENOMINATOR)) for kept in result]
