"""The plan: which layer keeps how much, made once from the options, before anything runs.

It is the same in every engine. What vLLM adds (the KV cache groups that its layers fall into) is in
paged_kv.vllm.plan. Layers are numbered over the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from paged_kv.config import CompressionConfig
from paged_kv.core import budgets
from paged_kv.core.schedule import Schedule

Budget = tuple[int, int, int]  # minimum, numerator, denominator of Schedule


@dataclass(frozen=True)
class Plan:
    """Budgets by layer.

    Args:
        page_size: tokens per page.
        compress_prefill: as in CompressionConfig.
        budgets: of each compressed layer; the others keep everything.
        waits_for_pressure: as in CompressionConfig.
    """

    page_size: int
    compress_prefill: bool
    budgets: dict[int, Budget]
    waits_for_pressure: bool = field(default=False, kw_only=True)

    def schedule(self, layer: int) -> Schedule | None:
        """The schedule of a layer, None for one that keeps everything."""
        if layer not in self.budgets:
            return None
        minimum, numerator, denominator = self.budgets[layer]
        return Schedule(self.page_size, minimum, numerator, denominator, self.compress_prefill)

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
        ValueError: no such layer is left, or a step's budget is too small.
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
    num_steps = min(config.pyramid_steps, len(layers)) if config.is_pyramid and not hybrid else 1
    sizes = budgets.step_sizes(len(layers), num_steps)
    steps = step_budgets(config, page_size, sizes)
    by_layer = [budget for budget, size in zip(steps, sizes, strict=True) for _ in range(size)]
    return Plan(
        page_size,
        config.compress_prefill,
        dict(zip(layers, by_layer, strict=True)),
        waits_for_pressure=config.waits_for_pressure,
    )


def step_budgets(config: CompressionConfig, page_size: int, sizes: list[int]) -> list[Budget]:
    """The budget of each step of a pyramid; of all layers, where there is one step.

    Args:
        config: what the user asked for.
        page_size: tokens per page.
        sizes: layers of each step.

    Raises:
        ValueError: the last step's budget leaves no page to evict.
    """
    weights = budgets.pyramid(sum(sizes), len(sizes), Fraction(str(config.pyramid_beta)))
    if isinstance(config.budget, Fraction):
        fractions = budgets.step_fractions(weights, sizes, config.budget)
        return [(config.min_budget, f.numerator, f.denominator) for f in fractions]
    if len(sizes) == 1:
        return [(config.budget, 0, 1)]
    pages = budgets.step_pages(weights, sizes, Fraction(config.budget, page_size))
    needed = config.min_entries(page_size)
    if min(pages) * page_size < needed:
        raise ValueError(
            f"budget {config.budget} with pyramid_beta {config.pyramid_beta} and "
            f"{len(sizes)} pyramid_steps leaves the last layers {min(pages) * page_size} entries; "
            f"they need {needed} ({config.describe_minimum(page_size)}): raise budget or lower "
            "pyramid_beta"
        )
    return [(count * page_size, 0, 1) for count in pages]
