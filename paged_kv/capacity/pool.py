"""vLLM's pool of pages, as it would be: its groups of layers, its size, what sequences hold of it.

The formulas are those that our plugin runs by (core.page_counts, core.memory_shares,
GroupedPlan); what is vLLM's own (pages of a sliding window) is written here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from paged_kv.capacity.cases import CPU, GPU_DTYPES, Case, Engine
from paged_kv.capacity.layers import LayerBytes, layer_bytes
from paged_kv.capacity.model import Model
from paged_kv.core import page_counts
from paged_kv.core.memory_shares import MemoryShares
from paged_kv.core.page_formats import NATIVE
from paged_kv.core.schedule import Schedule, cdiv
from paged_kv.plan import make_plan
from paged_kv.vllm.frontend import refusals
from paged_kv.vllm.frontend.grouping import group_layers, group_size, num_groups
from paged_kv.vllm.plan import GroupedPlan
from paged_kv.vllm.swap.options import check_together


class Groups(NamedTuple):
    """KV cache groups of layers that hold equally much.

    Args:
        schedule: of compressed layers; None for others.
        window: of the others: tokens of a sliding window, 0 for none.
        num_layers: in all of these groups.
        num_groups: how many.
    """

    schedule: Schedule | None
    window: int
    num_layers: int
    num_groups: int


class Held(NamedTuple):
    """The most that a sequence holds.

    Args:
        pages: of the pool.
        entries: mean over all layers of the model.
    """

    pages: int
    entries: float


@dataclass(frozen=True)
class Pool:
    """The pool of one case.

    Args:
        model: its sizes.
        engine: how vLLM runs.
        case: what is kept.

    Raises:
        ValueError: what the plugin would refuse.
    """

    model: Model
    engine: Engine
    case: Case

    @cached_property
    def layers(self) -> LayerBytes:
        """Bytes by layer."""
        return layer_bytes(self.model, self.engine, self.case)

    @cached_property
    def plan(self) -> GroupedPlan:
        """As the plugin makes it."""
        self._check()
        model, config, size = self.model, self.case.config, self.engine.page_size
        if config.enabled:
            plan = make_plan(config, size, model.num_layers, model.full_layers)
            grouped = group_layers(plan, config, model.num_sliding)
        else:
            sizes = [count for count in (len(model.full_layers), model.num_sliding) if count]
            others = sum(num_groups(sizes))
            grouped = GroupedPlan(size, False, {}, 0, others, group_size(sizes))
        if config.page_format != NATIVE:
            formats = self.layers.formats
            refusals.check_groups(grouped, config, formats, bool(model.num_sliding))
        return grouped

    def _check(self) -> None:
        """Refuses what the plugin would refuse. Raises ValueError."""
        model, config, engine = self.model, self.case.config, self.engine
        if (config.enabled or config.page_format != NATIVE) and not model.full_layers:
            raise refusals.unsupported(config, refusals.NO_FULL_ATTENTION)
        if config.enabled or config.page_format != NATIVE or config.swap_space:
            refusals.refuse(config, refusals.too_many_ranks(engine.num_ranks, model.kv_heads))
        if engine.device != CPU:
            self._check_cache_dtype()
            refusals.refuse_packed(config)
        refusals.check_residual(config)
        config.check_residual(engine.page_size, engine.max_len)
        check_together(config)

    def _check_cache_dtype(self) -> None:
        """As on a GPU, in the words of our options. Raises ValueError."""
        case = self.case
        try:
            refusals.check_cache_dtype(GPU_DTYPES[case.page_format], case.config)
        except ValueError:
            can_read = refusals.READABLE_DTYPES
            formats = [name for name, dtype in GPU_DTYPES.items() if dtype in can_read]
            reader = f"policy {case.policy}, which reads the cache"
            if case.config.swap_format != NATIVE:
                reader = f"swap_format {case.config.swap_format}, which converts it"
            raise ValueError(
                f"page-format on a GPU with {reader}, must be one of {', '.join(formats)}, not "
                f"{case.page_format}"
            ) from None

    @cached_property
    def groups(self) -> list[Groups]:
        """All of them."""
        plan, model = self.plan, self.model
        steps = Counter(plan.budgets.values())
        first = {budget: layer for layer, budget in reversed(plan.budgets.items())}
        kinds = [(plan.schedule(first[budget]), 0, count) for budget, count in steps.items()]
        kinds.append((None, 0, len(model.full_layers) - len(plan.budgets)))
        kinds.append((None, model.window, model.num_sliding))
        kinds = [kind for kind in kinds if kind[2]]
        counts = num_groups([kind[2] for kind in kinds])
        return [Groups(*kind, count) for kind, count in zip(kinds, counts, strict=True)]

    @cached_property
    def shares(self) -> MemoryShares[int]:
        """Who takes what of the memory."""
        plan, layers = self.plan, self.layers
        schedules = {layer: plan.schedule(layer) for layer in plan.budgets}
        return MemoryShares(
            page_bytes=dict(enumerate(layers.pages)),
            schedules={layer: each for layer, each in schedules.items() if each},
            side_bytes=dict.fromkeys(plan.budgets, layers.side) if layers.side else {},
            num_groups=plan.num_groups,
            layers_per_page=plan.layers_per_page,
            max_num_seqs=self.engine.max_num_seqs,
            observation_window=layers.observation_window,
            query_row_bytes=layers.query_row * len(plan.budgets),
            residual_pages=self.case.config.residual_pages,
            residual_row_bytes=layers.residual_row,
        )

    @cached_property
    def num_pages(self) -> int:
        """vLLM's null page included."""
        return self.shares.for_pages(self.engine.memory) // self.shares.pool_page_bytes

    @cached_property
    def prompt_chunk(self) -> int | None:
        """Tokens of a prompt's piece under compress_prefill; None: prompts are held whole."""
        if not self.plan.compress_prefill:
            return None
        max_len, most = self.engine.max_len, self.engine.max_num_batched_tokens
        return page_counts.prompt_chunk(self.plan.schedules(), max_len, 0, most)

    @cached_property
    def longest_prompt(self) -> int | None:
        """Tokens; None for any up to max_len."""
        if self.plan.budgets:
            return self.plan.longest_prompt(self.engine.max_len, self.num_pages)
        return None

    @property
    def reserved_pages(self) -> int:
        """Pages of a request by which vLLM checks its memory, and counts its concurrency."""
        limit = self.longest_prompt if self.engine.is_configured else None
        chunk = (self.prompt_chunk or 1) * self.engine.concurrent_batches
        max_len, size = self.engine.max_len, self.engine.page_size
        total = 0
        for group in self.groups:
            if group.schedule is not None:
                pages = page_counts.reserved_pages(group.schedule, size, max_len, chunk, limit)
            else:
                pages = self._admitted(max_len) if group.window else cdiv(max_len, size)
            total += group.num_groups * pages
        return total

    def while_prompting(self) -> Held:
        """Until the end of the prompt, which is held whole or in pieces."""
        chunk = (self.prompt_chunk or 1) * self.engine.concurrent_batches
        prompt_len = self.engine.prompt_len
        return self._held(prompt_len, prompt_len, chunk, self._admitted(prompt_len))

    def while_decoding(self) -> Held:
        """From the prompt's end to max_len."""
        engine, window = self.engine, self.model.window
        window_pages = page_counts.window_pages(
            window, engine.page_size, engine.max_len, engine.concurrent_batches
        )
        return self._held(engine.max_len, 0, 1, window_pages)

    def _held(self, num_tokens: int, start: int, chunk: int, window_pages: int) -> Held:
        size, pages, entries = self.engine.page_size, 0, 0
        for group in self.groups:
            if group.schedule is None:
                most = min(group.window or num_tokens, num_tokens)  # what is read
                pages += group.num_groups * (window_pages if group.window else cdiv(most, size))
            else:
                tokens = num_tokens, start, chunk
                most = group.schedule.max_retained(*tokens)
                pages += group.num_groups * page_counts.most_pages(group.schedule, size, *tokens)
            entries += group.num_layers * most
        return Held(pages, entries / self.model.num_layers)

    def _admitted(self, num_tokens: int) -> int:
        """Pages that vLLM reserves in a group with a sliding window, for prompts, too.

        See its SlidingWindowSpec.max_admission_blocks_per_request.
        """
        engine = self.engine
        in_flight = engine.concurrent_batches * engine.max_num_batched_tokens
        reserved = min(self.model.window - 1 + in_flight, num_tokens)
        return cdiv(reserved, engine.page_size) + 1
