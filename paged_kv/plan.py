"""The plan: which layer gets which budget, made once from the configs, before any process starts.

It travels as plain JSON values in ``additional_config["paged_kv_plan"]``, so that every rank and
the scheduler read the same numbers. Layers are numbered over the whole model: pipeline ranks agree.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from paged_kv.config import CompressionConfig
from paged_kv.core import budgets
from paged_kv.core.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """Budgets by layer.

    Args:
        page_size: tokens per page.
        compress_prefill: as in CompressionConfig.
        budgets: (minimum, numerator, denominator) of Schedule for each compressed layer.
        num_groups: KV cache groups that the compressed layers fall into.
        num_other_groups: the rest (skipped and sliding-window layers).
        layers_per_page: layers that a page of vLLM's pool has room for.
        formats: page format of each layer; None for pages as the engine has them. Empty: all None.
        residual_pages: as in CompressionConfig.
    """

    page_size: int
    compress_prefill: bool
    budgets: dict[int, tuple[int, int, int]]
    num_groups: int
    num_other_groups: int
    layers_per_page: int
    formats: tuple[str | None, ...] = ()
    residual_pages: int = 0

    def format(self, layer: int) -> str | None:
        """The page format of a layer, None for pages as the engine has them."""
        return self.formats[layer] if layer < len(self.formats) else None

    def schedule(self, layer: int) -> Schedule | None:
        """The schedule of a layer, None for one that keeps everything."""
        if layer not in self.budgets:
            return None
        minimum, numerator, denominator = self.budgets[layer]
        return Schedule(self.page_size, minimum, numerator, denominator, self.compress_prefill)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can carry, and from_json reads."""
        budgets = {str(k): list(v) for k, v in self.budgets.items()}
        return {**vars(self), "budgets": budgets, "formats": list(self.formats)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The plan that to_json wrote."""
        loaded = {int(layer): tuple(budget) for layer, budget in values["budgets"].items()}
        return cls(**{**values, "budgets": loaded, "formats": tuple(values["formats"])})

    def describe(self) -> str:
        """One line: what each run of layers gets."""
        runs: list[tuple[int, int, str]] = []
        for layer, (minimum, numerator, denominator) in sorted(self.budgets.items()):
            text = f"{minimum} entries"
            if numerator:
                text = f"{numerator / denominator:.3g} of the tokens, at least {minimum}"
            if runs and runs[-1][1] == layer - 1 and runs[-1][2] == text:
                runs[-1] = (runs[-1][0], layer, text)
            else:
                runs.append((layer, layer, text))
        return "; ".join(f"layers {first}-{last}: {text}" for first, last, text in runs)


def make_plan(
    config: CompressionConfig, page_size: int, num_layers: int, full_layers: list[int]
) -> Plan:
    """Budgets for the layers with full attention that are not skipped.

    Args:
        config: what the user asked for.
        page_size: tokens per page.
        num_layers: all layers of the model.
        full_layers: those with full attention; the others are left as they are.

    Raises:
        ValueError: no such layer is left, a tier's budget is too small, or vLLM would make too many
            groups.
    """
    config.check_page_size(page_size)
    absent = [layer for layer in config.skip_layers if layer not in full_layers]
    if absent:
        raise ValueError(
            f"skip_layers names {absent}, but the layers with full attention are {full_layers}"
        )
    layers = [layer for layer in full_layers if layer not in config.skip_layers]
    if not layers:
        raise ValueError(f"skip_layers {list(config.skip_layers)} leaves no layer to compress")
    hybrid = len(full_layers) < num_layers
    num_tiers = min(config.tiers, len(layers)) if config.is_pyramid and not hybrid else 1
    sizes = budgets.tier_sizes(len(layers), num_tiers)
    tiers = _tier_budgets(config, page_size, sizes)
    by_layer = dict(
        zip(layers, [b for b, n in zip(tiers, sizes, strict=True) for _ in range(n)], strict=True)
    )
    others = [len(config.skip_layers), num_layers - len(full_layers)]
    groups = _check_groups(config, page_size, _bucket_sizes(tiers, sizes), others)
    return Plan(page_size, config.compress_prefill, by_layer, *groups)


def _tier_budgets(
    config: CompressionConfig, page_size: int, sizes: list[int]
) -> list[tuple[int, int, int]]:
    weights = budgets.pyramid(sum(sizes), len(sizes), Fraction(str(config.pyramid_beta)))
    if isinstance(config.budget, Fraction):
        fractions = budgets.tier_fractions(weights, sizes, config.budget)
        return [(config.min_budget, f.numerator, f.denominator) for f in fractions]
    if len(sizes) == 1:
        return [(config.budget, 0, 1)]
    pages = budgets.tier_pages(weights, sizes, Fraction(config.budget, page_size))
    needed = config.min_entries(page_size)
    if min(pages) * page_size < needed:
        raise ValueError(
            f"budget {config.budget} with pyramid_beta {config.pyramid_beta} and "
            f"{len(sizes)} tiers leaves the last layers {min(pages) * page_size} entries; they "
            f"need {needed} ({config.describe_minimum(page_size)}): raise budget or lower "
            "pyramid_beta"
        )
    return [(count * page_size, 0, 1) for count in pages]


def _bucket_sizes(tiers: list[tuple[int, int, int]], sizes: list[int]) -> list[int]:
    """Layers of each distinct budget: tiers can come to the same."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for budget, size in zip(tiers, sizes, strict=True):
        counts[budget] += size
    return list(counts.values())


def _check_groups(
    config: CompressionConfig, page_size: int, tiers: list[int], others: list[int]
) -> tuple[int, int, int]:
    """num_groups, num_other_groups and layers_per_page of Plan. Raises ValueError: too many."""
    buckets = tiers + [size for size in others if size]
    groups = budgets.num_groups(buckets)
    if sum(groups) <= config.max_groups:
        size = budgets.group_size(buckets)
        return sum(groups[: len(tiers)]), sum(groups[len(tiers) :]), size
    raise ValueError(
        f"these options need {sum(groups)} KV cache groups, more than max_groups "
        f"{config.max_groups}: vLLM makes groups as small as the smallest set of layers with equal "
        f"budgets, and the sets have {buckets} layers. "
        f"{_working_splits(config, page_size, sum(tiers) + others[0], others[1])}"
    )


def _working_splits(
    config: CompressionConfig, page_size: int, num_full: int, num_sliding: int
) -> str:
    """Names (skipped layers, tiers) that stay within max_groups."""
    works = []
    most_tiers = config.max_groups if config.is_pyramid and not num_sliding else 1
    for skipped in range(num_full):
        for num_tiers in range(1, min(most_tiers, num_full - skipped) + 1):
            sizes = budgets.tier_sizes(num_full - skipped, num_tiers)
            try:
                tiers = _bucket_sizes(_tier_budgets(config, page_size, sizes), sizes)
            except ValueError:  # too small for the last tier
                continue
            buckets = [size for size in [*tiers, skipped, num_sliding] if size]
            if sum(budgets.num_groups(buckets)) <= config.max_groups:
                works.append((skipped, num_tiers))
    shown = ", ".join(f"{skipped} skipped with tiers {tiers}" for skipped, tiers in works[:12])
    return (
        f"Splits that work: {shown}" if works else "No split of this model works; raise max_groups"
    )
