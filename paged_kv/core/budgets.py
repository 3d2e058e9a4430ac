"""Budgets per layer: a pyramid in a few steps, in whole pages or as fractions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from paged_kv.core.schedule import MAX_DENOMINATOR


def step_sizes(num_layers: int, num_steps: int) -> list[int]:
    """num_layers split into num_steps runs whose sizes differ by at most one, larger ones first."""
    base, extra = divmod(num_layers, num_steps)
    return [base + (step < extra) for step in range(num_steps)]


def pyramid(num_layers: int, num_steps: int, beta: Fraction) -> list[Fraction]:
    """Budget of each step relative to the mean over layers, largest (first layers) first.

    Layer k of m gets L_k = L_0 (1 + (k / m) (1 / beta - 1)), with L_0 such that the mean over
    layers is 1; a step gets the mean of its layers ("Memory Reduction for LLM Inference via
    KV-Cache Compression").
    """
    shape = [1 + Fraction(k, num_layers) * (1 / beta - 1) for k in range(num_layers)]
    mean = sum(shape, Fraction()) / num_layers
    weights: list[Fraction] = []
    start = 0
    for size in step_sizes(num_layers, num_steps):
        weights.append(sum(shape[start : start + size], Fraction()) / size / mean)
        start += size
    return weights


def step_pages(
    weights: Sequence[Fraction], sizes: Sequence[int], budget_pages: Fraction
) -> list[int]:
    """Whole pages per step, so that the mean over layers comes as near budget_pages as it can.

    Rounds down, then hands the pages that are left to the steps that lost most by rounding.
    """
    exact = [weight * budget_pages for weight in weights]
    pages = [int(value) for value in exact]
    lost = (size * (all_ - whole) for size, all_, whole in zip(sizes, exact, pages, strict=True))
    remainder = sum(lost, Fraction())
    order = sorted(range(len(exact)), key=lambda step: (pages[step] - exact[step], step))
    for step in order:
        if sizes[step] <= remainder:
            pages[step] += 1
            remainder -= sizes[step]
    return pages


def step_fractions(
    weights: Sequence[Fraction], sizes: Sequence[int], fraction: Fraction
) -> list[Fraction]:
    """Fraction kept per step, with a denominator up to MAX_DENOMINATOR, never 0.

    None keeps more than everything; the others share the rest.
    """
    result = [Fraction(0)] * len(weights)
    open_steps = list(range(len(weights)))
    total = fraction * sum(sizes)
    while open_steps:
        scale = total / sum((weights[step] * sizes[step] for step in open_steps), Fraction())
        full = [step for step in open_steps if weights[step] * scale >= 1]
        for step in full or open_steps:
            result[step] = Fraction(1) if full else weights[step] * scale
        if not full:
            break
        open_steps = [step for step in open_steps if step not in full]
        total -= sum(sizes[step] for step in full)
    least = Fraction(1, MAX_DENOMINATOR)
    return [max(least, kept.limit_denominator(MAX_DENOMINATOR)) for kept in result]
