"""What a request has beside its pages: rows of rings, which others get when it is preempted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from paged_kv.vllm.swap.needs import RingRows

Tensor = torch.Tensor


class Rings(NamedTuple):
    """Rings with a row for each of some requests.

    Args:
        requests: who has which row.
        row_bytes: of a row in all rings.
        of_row: the row's parts of the rings, in an order that never changes.
    """

    requests: RingRows
    row_bytes: int
    of_row: Callable[[int], list[Tensor]]


class RingSlots:
    """Rows of swapped requests, in host slots.

    Args:
        rings: all that requests have rows of.
        slot_bytes: size of a slot.
    """

    def __init__(self, rings: Sequence[Rings], slot_bytes: int) -> None:
        self.rings = rings
        self.num_slots = -(-sum(ring.row_bytes for ring in rings) // slot_bytes)
        self._first_tokens: dict[str, list[int | None]] = {}  # of each ring; None: had no row

    def save(self, request_id: str, slots: Sequence[Tensor]) -> None:
        """Writes a request's rows to slots, uint8 [slot_bytes] each."""
        firsts: list[int | None] = []
        place = 0
        for ring in self.rings:
            row = ring.requests.row_of(request_id)
            firsts.append(None if row is None else int(ring.requests.first_token[row]))
            if row is not None:
                for piece, bytes_ in _pieces(ring.of_row(row), slots, place):
                    piece.copy_(bytes_, non_blocking=True)
            place += ring.row_bytes
        self._first_tokens[request_id] = firsts

    def begin_load(self, request_id: str) -> None:
        """A request is resumed in this step: it will get rows that begin where its old ones did."""
        for ring, first in zip(self.rings, self._first_tokens[request_id], strict=True):
            if first is not None:
                ring.requests.resume(request_id, first)

    def load(self, request_id: str, slots: Sequence[Tensor]) -> None:
        """The reverse of save, into the rows that the request has now."""
        place = 0
        for ring, first in zip(self.rings, self._first_tokens.pop(request_id), strict=True):
            row = ring.requests.row_of(request_id)
            if row is not None and first is not None:
                parts = ring.of_row(row)
                fresh = [part.new_empty(part.shape) for part in parts]
                for piece, bytes_ in _pieces(fresh, slots, place):
                    bytes_.copy_(piece, non_blocking=True)
                for part, new in zip(parts, fresh, strict=True):
                    part.copy_(new)
            place += ring.row_bytes

    def forget(self, request_id: str) -> None:
        """The request ended, or will be computed again."""
        self._first_tokens.pop(request_id, None)


def _pieces(
    parts: Sequence[Tensor], slots: Sequence[Tensor], place: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(bytes of a slot, bytes of a part) of equal length, for parts from a place in slots on."""
    size = len(slots[0])
    for part in parts:
        data = part.contiguous().view(-1).view(torch.uint8)
        while len(data):
            slot, offset = divmod(place, size)
            count = min(len(data), size - offset)
            yield slots[slot][offset : offset + count], data[:count]
            data, place = data[count:], place + count
