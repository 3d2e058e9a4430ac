"""The worker's side of the swap: executes the scheduler's commands on the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Event, Tensor
from vllm.logger import init_logger

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import make_layout
from paged_kv.tiers.swap_tiers import SwapTiers
from paged_kv.vllm.swap.commands import (
    Capacity,
    Command,
    Copy,
    Demote,
    Finished,
    Forget,
    Load,
    Promote,
    Save,
)
from paged_kv.vllm.swap.contents import Contents, Converted, Part, Raw, Side, aligned
from paged_kv.vllm.swap.state import States, rings_of
from paged_kv.vllm.worker.layer_group import make_pages
from paged_kv.vllm.worker.layout import stack_layers
from paged_kv.vllm.worker.residual import Residual
from paged_kv.vllm.worker.step import Compactor

logger = init_logger(f"vllm.{__name__}")
GIB = 1 << 30


class Copier:
    """Copies between the caches of a worker and its tiers.

    Args:
        runner: vLLM's model runner (V1 or V2).
        kv_cache_config: the layer groups and the number of pages.
        config: the options.
        compactor: has side data and a query ring; None without a policy.
        residual: has rings of native pages; None for none.
        layouts: of the layers whose pages are packed.

    Raises:
        ValueError: the tiers hold nothing, or cannot be made; see SwapTiers.
    """

    def __init__(
        self,
        runner: Any,
        kv_cache_config: Any,
        config: CompressionConfig,
        compactor: Compactor | None,
        residual: Residual | None,
        layouts: Mapping[str, PageLayout],
    ) -> None:
        vllm_config = runner.vllm_config
        self.layers = vllm_config.compilation_config.static_forward_context
        self.config = config
        self.num_pages = kv_cache_config.num_blocks
        self.compactor, self.layouts = compactor, layouts
        self.spilled = compactor.spilled if compactor is not None else None
        builders = [[tuple(one.layer_names) for one in group] for group in runner.attn_groups]
        self.contents = [
            Contents(self._parts(names), group.kv_cache_spec.block_size)
            for names, group in zip(builders, kv_cache_config.kv_cache_groups, strict=True)
        ]
        slot_bytes = max(one.num_bytes for one in self.contents)
        self.states = States(rings_of(compactor, residual), slot_bytes)
        self.is_gpu = runner.device.type != "cpu"
        parallel = vllm_config.parallel_config
        self.tiers = self._make_tiers(slot_bytes, parallel.world_size)
        self._loads: list[Load] = []
        self._saved = self._loaded = _nothing

    def begin_step(self, commands: Sequence[Command]) -> None:
        """Executes commands in their order; loads begin, and wait for load."""
        self._loads = []
        for command in commands:
            match command:
                case Save():
                    self._save(command)
                case Demote():
                    self.tiers.demote(*command, ready=self._saved)
                case Promote():
                    self._saved()  # a GPU's copies may still be writing these slots,
                    self._loaded()  # or reading them
                    self.tiers.promote(*command)
                case Forget():
                    self.tiers.forget(command.request_id)
                    self.states.forget(command.request_id)
                    if self.spilled is not None:
                        self.spilled.drop(command.request_id)
                case Load():
                    self.states.begin_load(command.request_id)
                    self._loads.append(command)

    def load(self) -> None:
        """Restores the requests that are resumed in this step; the metadata of it is built."""
        for command in self._loads:
            for contents, page_ids, slots in self._groups(command.copy):
                contents.load(page_ids, slots, self.tiers.host, command.num_tokens)
            rows = [self.tiers.host[slot] for slot in command.copy.state_slots]
            self.states.load(command.request_id, rows)
        if self._loads:
            self._loaded = self._event()
        self._loads = []

    def finished(self) -> Finished | None:
        """Background work that came to an end since the last call."""
        promoted, failed = self.tiers.take_finished()
        if not (promoted or failed):
            return None
        return Finished(dict.fromkeys(promoted, 1), failed)

    def close(self) -> None:
        """Gives the tiers back."""
        self.tiers.close()

    def _save(self, command: Save) -> None:
        copy = command.copy
        self.tiers.wait([slot for some in (*copy.slots, copy.state_slots) for slot in some])
        for contents, page_ids, slots in self._groups(copy):
            contents.save(page_ids, slots, self.tiers.host)
        self.states.save(command.request_id, [self.tiers.host[slot] for slot in copy.state_slots])
        self._saved = self._event()
        if self.spilled is not None:
            self.spilled.keep(command.request_id)

    def _groups(self, copy: Copy) -> Iterator[tuple[Contents, Sequence[int], Sequence[int]]]:
        return zip(self.contents, copy.page_ids, copy.slots, strict=True)

    def _event(self) -> Callable[[], None]:
        """Waits for the copies that have been started."""
        if not self.is_gpu:
            return _nothing
        event = Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def _parts(self, builders: list[tuple[str, ...]]) -> list[Part]:
        parts: list[Part] = []
        for names in builders:
            parts += self._pages(names)
            compactor = self.compactor
            if compactor is not None and not compactor.positional and names[0] in compactor.layers:
                for store in compactor.stores_of(names):
                    parts += [Side(self._by_page(one)) for one in store.side.tensors.values()]
        return parts

    def _pages(self, names: tuple[str, ...]) -> list[Part]:
        layers = [self.layers[name] for name in names]
        raw: list[Part] = [
            Raw(self._by_page(stack)) for stack in stack_layers([one.kv_cache for one in layers])
        ]
        if self.config.swap_format == NATIVE:
            return raw
        first = layers[0]
        converted: list[Part] = []
        for pages in make_pages(names, self.layers, self.layouts):
            sizes = first.head_size, pages.values.size, pages.page_size
            layout = make_layout(self.config.swap_format, first.dtype, *sizes)
            if pages.num_pages != self.num_pages:
                logger.warning("kv-swap-format is not used: the kernel's pages are not vLLM's")
                return raw
            converted.append(Converted(pages, layout))
        if sum(one.num_bytes for one in converted) < sum(one.num_bytes for one in raw):
            return converted
        return raw

    def _by_page(self, tensor: Tensor) -> Tensor:
        """[layers, pages, ...], whatever the kernel takes for a page."""
        return tensor.unflatten(1, (self.num_pages, -1))

    def _make_tiers(self, slot_bytes: int, num_ranks: int) -> SwapTiers:
        config = self.config
        slot_bytes = aligned(slot_bytes)
        host, file = (
            int(space * GIB) // num_ranks // slot_bytes
            for space in (config.swap_space, config.swap_dir_space)
        )
        least = 1 + self.states.num_slots
        if host < least:
            raise ValueError(
                f"kv-swap-space {config.swap_space} GiB holds no request: one of a page takes "
                f"{least * slot_bytes * num_ranks / GIB:.4f} GiB"
            )
        self.capacity = Capacity(slot_bytes, host, file, self.states.num_slots)
        logger.info(
            "paged_kv swap: %d pages of %d bytes in memory, %d in %s",
            host,
            slot_bytes,
            file,
            config.swap_dir or "files",
        )
        return SwapTiers(slot_bytes, host, file, config.swap_dir, pin=self.is_gpu)


def _nothing() -> None:
    """There is nothing to wait for: a CPU's copies are complete when they return."""
