"""The worker's side of the swap: executes the scheduler's commands on the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Event, Tensor
from vllm.logger import init_logger

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.quant import make_layout
from paged_kv.tiers.swap_tiers import SwapTiers
from paged_kv.vllm.swap.commands import (
    Capacity,
    Command,
    Demote,
    Finished,
    Forget,
    Load,
    Promote,
    Save,
    SwappedPages,
)
from paged_kv.vllm.swap.contents import Contents, Converted, Raw, Side, SlotPart, aligned
from paged_kv.vllm.swap.needs import LayerCaches, SpilledEntries
from paged_kv.vllm.swap.ring_slots import Rings, RingSlots

logger = init_logger(f"vllm.{__name__}")
GIB = 1 << 30


class Copier:
    """Copies between the caches of a worker and its tiers.

    Args:
        runner: vLLM's model runner (V1 or V2).
        kv_cache_config: the layer groups and the number of pages.
        config: the options.
        caches: what is copied.
        rings: all that requests have rows of.
        spilled: what requests have spilled; None: nobody spills.

    Raises:
        ValueError: the tiers hold nothing, or cannot be made; see SwapTiers.
    """

    def __init__(
        self,
        runner: Any,
        kv_cache_config: Any,
        config: CompressionConfig,
        caches: LayerCaches,
        rings: Sequence[Rings],
        spilled: SpilledEntries | None,
    ) -> None:
        vllm_config = runner.vllm_config
        self.config = config
        self.num_pages = kv_cache_config.num_blocks
        self.caches, self.spilled = caches, spilled
        builders = [[tuple(b.layer_names) for b in group] for group in runner.attn_groups]
        self.contents = [
            Contents(self._parts(names), group.kv_cache_spec.block_size)
            for names, group in zip(builders, kv_cache_config.kv_cache_groups, strict=True)
        ]
        slot_bytes = max(contents.num_bytes for contents in self.contents)
        self.ring_slots = RingSlots(rings, slot_bytes)
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
                    self.ring_slots.forget(command.request_id)
                    if self.spilled is not None:
                        self.spilled.drop(command.request_id)
                case Load():
                    self.ring_slots.begin_load(command.request_id)
                    self._loads.append(command)

    def load(self) -> None:
        """Restores the requests that are resumed in this step; the metadata of it is built."""
        for command in self._loads:
            for contents, page_ids, slots in self._groups(command.pages):
                contents.load(page_ids, slots, self.tiers.host, command.num_tokens)
            rows = [self.tiers.host[slot] for slot in command.pages.ring_slots]
            self.ring_slots.load(command.request_id, rows)
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
        pages = command.pages
        self.tiers.wait([slot for slots in (*pages.slots, pages.ring_slots) for slot in slots])
        for contents, page_ids, slots in self._groups(pages):
            contents.save(page_ids, slots, self.tiers.host)
        self.ring_slots.save(
            command.request_id, [self.tiers.host[slot] for slot in pages.ring_slots]
        )
        self._saved = self._event()
        if self.spilled is not None:
            self.spilled.keep(command.request_id)

    def _groups(
        self, pages: SwappedPages
    ) -> Iterator[tuple[Contents, Sequence[int], Sequence[int]]]:
        return zip(self.contents, pages.page_ids, pages.slots, strict=True)

    def _event(self) -> Callable[[], None]:
        """Waits for the copies that have been started."""
        if not self.is_gpu:
            return _nothing
        event = Event()
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def _parts(self, builders: list[tuple[str, ...]]) -> list[SlotPart]:
        parts: list[SlotPart] = []
        for names in builders:
            parts += self._pages(names)
            parts += [Side(self._by_page(tensor)) for tensor in self.caches.side(names)]
        return parts

    def _pages(self, names: tuple[str, ...]) -> list[SlotPart]:
        raw: list[SlotPart] = [Raw(self._by_page(stack)) for stack in self.caches.raw(names)]
        if self.config.swap_format == NATIVE:
            return raw
        first = self.caches.layer(names[0])
        converted: list[SlotPart] = []
        for pages in self.caches.pages(names):
            sizes = first.head_size, pages.values.size, pages.page_size
            layout = make_layout(self.config.swap_format, first.dtype, *sizes)
            if pages.num_pages != self.num_pages:
                logger.warning("kv-swap-format is not used: the kernel's pages are not vLLM's")
                return raw
            converted.append(Converted(pages, layout))
        return min(raw, converted, key=_num_bytes)

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
        least = 1 + self.ring_slots.num_slots
        if host < least:
            raise ValueError(
                f"kv-swap-space {config.swap_space} GiB holds no request: one of a page takes "
                f"{least * slot_bytes * num_ranks / GIB:.4f} GiB"
            )
        self.capacity = Capacity(slot_bytes, host, file, self.ring_slots.num_slots)
        logger.info(
            "paged_kv swap: %d pages of %d bytes in memory, %d in %s",
            host,
            slot_bytes,
            file,
            config.swap_dir or "files",
        )
        return SwapTiers(slot_bytes, host, file, config.swap_dir, pin=self.is_gpu)


def _num_bytes(parts: Sequence[SlotPart]) -> int:
    return sum(part.num_bytes for part in parts)


def _nothing() -> None:
    """There is nothing to wait for: a CPU's copies are complete when they return."""
