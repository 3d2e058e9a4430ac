"""What is compared: policies, budgets and page formats, and how vLLM would run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.core.options import shown
from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.variants import Variant

FIXED = {"policy": "--policy", "budget": "--budget", "page_format": "--page-format"}
CPU, GPU = "cpu", "gpu"
GPU_DTYPES = {  # format -> vLLM's --kv-cache-dtype, on a GPU
    NATIVE: "auto",
    "int8": "int8_per_token_head",
    "int4": "int4_per_token_head",
    "fp8": "fp8",
}
assert set(GPU_DTYPES) == set(FORMATS)


class Case(NamedTuple):
    """One line of the table.

    Args:
        policy: as the user wrote it.
        page_format: one of FORMATS, or a file of the calibration; on a GPU, vLLM's own of the name.
        config: the options; page_format is native on a GPU.
        finds_budget: whether the budget is what is asked for.
    """

    policy: str
    page_format: str
    config: CompressionConfig
    finds_budget: bool = False

    @property
    def budget(self) -> int | float | None:
        """As it is shown; None for what keeps everything, and while it is not found."""
        if self.finds_budget or not self.config.enabled:
            return None
        budget = self.config.budget
        return float(budget) if isinstance(budget, Fraction) else budget


@dataclass(frozen=True)
class Engine:
    """How vLLM runs.

    Args:
        memory: bytes for the KV cache, of each rank.
        prompt_len: tokens of a prompt.
        max_len: tokens of a sequence at its end (--max-model-len).
        page_size: tokens per page (--block-size).
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: of a step.
        concurrent_batches: steps in flight: with asynchronous scheduling, which vLLM has on GPUs
            only, two.
        num_ranks: of tensor parallelism.
        device: cpu or gpu.
        is_configured: whether memory is what --kv-cache-memory-bytes says.
    """

    memory: int
    prompt_len: int
    max_len: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    concurrent_batches: int = 1
    num_ranks: int = 1
    device: str = CPU
    is_configured: bool = True


def make_cases(
    variants: Sequence[Variant],
    budgets: list[int | Fraction] | None,
    formats: list[str],
    device: str,
) -> Iterator[Case]:
    """Every page format with every policy and budget; what keeps everything once for each format.

    Args:
        variants: see read_variants.
        budgets: of each; None: the largest that fits is asked for.
        formats: see Case.
        device: see Engine.

    Raises:
        ValueError: an option is wrong.
    """
    for page_format, variant in product(formats, variants):
        options = variant.stored_in(page_format, formats)
        options["page_format"] = _own_format(page_format, device)
        if variant.policy == registry.FULL:
            yield Case(variant.text, page_format, CompressionConfig.from_dict(options))
            continue
        for budget in [None] if budgets is None else budgets:
            sized = options if budget is None else {**options, "budget": budget}
            config = CompressionConfig.from_dict(sized)
            yield Case(variant.text, page_format, config, budget is None)


def _own_format(page_format: str, device: str) -> str:
    """The option page_format; on a GPU, where vLLM has pages of its own, it is left alone."""
    if device == CPU:
        return page_format
    if page_format not in GPU_DTYPES:
        raise ValueError(
            f"page-format on a GPU must be one of {', '.join(GPU_DTYPES)} (vLLM's own), "
            f"not {shown(page_format)}"
        )
    return NATIVE
