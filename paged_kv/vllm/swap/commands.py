"""What the scheduler's side of the swap asks of the workers: plain data, executed in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)


class SwappedPages(NamedTuple):
    """Pages of a request and where they lie in the host tier.

    Args:
        page_ids: of each layer group of vLLM.
        slots: host slot of each page, of each layer group.
        ring_slots: host slots of its rows of rings; see ring_slots.py.
    """

    page_ids: tuple[tuple[int, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    ring_slots: tuple[int, ...]


class Save(NamedTuple):
    """Pages to host slots, before anything of this step is written."""

    request_id: str
    pages: SwappedPages


class Load(NamedTuple):
    """Host slots to pages, before this step's forward pass. num_tokens: what they hold."""

    request_id: str
    pages: SwappedPages
    num_tokens: int


class Demote(NamedTuple):
    """Host slots to file slots."""

    request_id: str
    source: tuple[int, ...]
    target: tuple[int, ...]


class Promote(NamedTuple):
    """File slots to host slots; the worker reports when all of them are there."""

    request_id: str
    source: tuple[int, ...]
    target: tuple[int, ...]


class Forget(NamedTuple):
    """The request ended, or will be computed again."""

    request_id: str


Command = Save | Load | Demote | Promote | Forget


@dataclass
class SwapMetadata(KVConnectorMetadata):
    """What the workers do in a step.

    Args:
        commands: in this order; loads wait for the forward pass to begin.
        begun: whether the worker has executed what comes before the step.
    """

    commands: list[Command] = field(default_factory=list)
    begun: bool = False


@dataclass
class Finished(KVConnectorWorkerMetadata):
    """What the background work of the ranks has come to.

    Args:
        promoted: ranks that have all of a request's slots in host memory again.
        failed: requests of which a rank has lost something.
    """

    promoted: dict[str, int]
    failed: set[str]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Finished:
        """Both ranks' reports."""
        assert isinstance(other, Finished)
        promoted = dict(self.promoted)
        for request_id, ranks in other.promoted.items():
            promoted[request_id] = promoted.get(request_id, 0) + ranks
        return Finished(promoted, self.failed | other.failed)


@dataclass
class Capacity(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler when it has made its tiers.

    Args:
        slot_bytes: of a slot: one page of one layer group, in the layers of this rank.
        host_slots: in memory.
        file_slots: in the file; 0 without a directory.
        ring_slots: host slots that the rows of one request take; 0: there are no rings.
    """

    slot_bytes: int
    host_slots: int
    file_slots: int
    ring_slots: int
