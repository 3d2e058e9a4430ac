"""Who is where in the tiers: the scheduler's accounting. It moves nothing itself.

    pages --save--> host slots --demote--> file slots
      ^--load------ host slots <--promote--    |          full: the oldest request is forgotten

A request is on one tier as a whole. vLLM resumes the request that was preempted last, so the oldest
one makes room: it goes to the file, and from there it is forgotten, to be computed again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

FULL = "fallback_full"
IO_ERROR = "fallback_io_error"
STALE = "fallback_stale"
RESET = "fallback_reset"


@dataclass
class Swapped:
    """A request in the tiers.

    Args:
        num_tokens: computed before it was preempted.
        pages: logical indices of its pages, of each layer group.
        host: its host slots: of all pages, then of its rows of rings; empty while in the file.
        file: its file slots; empty while it is not.
    """

    num_tokens: int
    pages: tuple[tuple[int, ...], ...]
    host: tuple[int, ...] = ()
    file: tuple[int, ...] = ()

    @property
    def is_loadable(self) -> bool:
        """Whether it is in host memory, complete."""
        return bool(self.host) and not self.file

    @property
    def is_promoted(self) -> bool:
        """Whether it is on its way from the file to host memory."""
        return bool(self.host and self.file)

    def in_slots(self, pages: Sequence[Mapping[int, int]]) -> SwappedPages:
        """These pages of it, and where they lie.

        Args:
            pages: page id by logical index, of each layer group.
        """
        slots = iter(self.host)
        slots_of_groups = [dict(zip(indices, slots, strict=False)) for indices in self.pages]
        return SwappedPages(
            tuple(tuple(page_ids.values()) for page_ids in pages),
            tuple(
                tuple(slot_by_index[index] for index in page_ids)
                for slot_by_index, page_ids in zip(slots_of_groups, pages, strict=True)
            ),
            tuple(slots),
        )


class Ledger:
    """The slots of the tiers and who has them.

    Args:
        capacity: of the smallest rank.
        num_ranks: workers; each has the same slots.
    """

    def __init__(self, capacity: Capacity, num_ranks: int) -> None:
        self.capacity = capacity
        self.num_ranks = num_ranks
        self.swapped: dict[str, Swapped] = {}  # the oldest first
        self.counts: Counter[str] = Counter()
        # First in, first out: a slot that was given back rests until its copy has been made.
        self._host = deque(range(capacity.host_slots))
        self._file = deque(range(capacity.file_slots))
        self._loaded: list[int] = []  # host slots to be read in the step that is being scheduled
        self._arrived: Counter[str] = Counter()
        self._commands: list[Command] = []
        self._largest = 0

    @property
    def used(self) -> tuple[int, int]:
        """Slots that are taken: (host, file)."""
        return (
            self.capacity.host_slots - len(self._host),
            self.capacity.file_slots - len(self._file),
        )

    def save(self, request_id: str, num_tokens: int, pages: Sequence[Mapping[int, int]]) -> bool:
        """A request is preempted. False: nothing of it is kept.

        Args:
            request_id: its name.
            num_tokens: it has computed.
            pages: page id by logical index, of each layer group.
        """
        assert request_id not in self.swapped
        num_pages = sum(map(len, pages))
        count = num_pages + self.capacity.ring_slots
        if not self._make_room(count):
            self.counts[FULL] += 1
            return False
        self._largest = max(self._largest, count)
        slots = tuple(self._host.popleft() for _ in range(count))
        request = Swapped(num_tokens, tuple(tuple(group) for group in pages), slots)
        self.swapped[request_id] = request
        self._commands.append(Save(request_id, request.in_slots(pages)))
        self.counts["swapped_out_requests"] += 1
        self.counts["swapped_out_pages"] += num_pages
        self.counts["swapped_out_bytes"] += count * self.capacity.slot_bytes * self.num_ranks
        return True

    def promote(self, request_id: str) -> bool:
        """A request shall come back from the file. False: there is no room; it is forgotten.

        One at a time: vLLM asks for all that wait, and they would drive each other out.
        """
        request = self.swapped[request_id]
        if any(other.is_promoted for other in self.swapped.values()):
            return True
        if not self._make_room(len(request.file), keep=request_id):
            self.drop(request_id, FULL)
            return False
        request.host = tuple(self._host.popleft() for _ in request.file)
        self._commands.append(Promote(request_id, request.file, request.host))
        self.counts["promoted_requests"] += 1
        return True

    def load(
        self, request_id: str, pages: Sequence[Mapping[int, int]], num_tokens: int, restored: int
    ) -> None:
        """A request is resumed.

        Args:
            request_id: its name.
            pages: page id to be written by logical index, of each layer group.
            num_tokens: that it has now.
            restored: of these, the ones that a prefix hit has not given.
        """
        request = self.swapped.pop(request_id)
        assert request.is_loadable
        self._commands.append(Load(request_id, request.in_slots(pages), num_tokens))
        self._loaded += request.host
        self.counts["swapped_in_requests"] += 1
        self.counts["swapped_in_pages"] += sum(map(len, pages))
        self.counts["restored_tokens"] += restored

    def drop(self, request_id: str, reason: str | None = None) -> None:
        """A request has ended, or (for this reason) will be computed again."""
        request = self.swapped.pop(request_id)
        self._host += request.host
        self._file += request.file
        self._arrived.pop(request_id, None)
        self._commands.append(Forget(request_id))
        if reason is not None:
            self.counts[reason] += 1

    def finish(self, finished: Finished) -> None:
        """The workers report."""
        for request_id in finished.failed & set(self.swapped):
            self.drop(request_id, IO_ERROR)
        for request_id, ranks in finished.promoted.items():
            request = self.swapped.get(request_id)
            if request is None or not request.is_promoted:
                continue  # dropped meanwhile
            self._arrived[request_id] += ranks
            if self._arrived[request_id] == self.num_ranks:
                del self._arrived[request_id]
                self._file += request.file
                request.file = ()

    def end_step(self) -> list[Command]:
        """What the workers have to do in the step that has been scheduled."""
        self._host += self._loaded
        self._loaded = []
        # Room for a preemption as large as any so far, made in the background; nobody pays for it.
        in_host = [name for name, request in self.swapped.items() if request.is_loadable]
        is_short = len(self._host) < self._largest and len(in_host) > 1
        if is_short and len(self.swapped[in_host[0]].host) <= len(self._file):
            self._demote(in_host[0])
        commands, self._commands = self._commands, []
        return commands

    def _make_room(self, count: int, keep: str | None = None) -> bool:
        """Whether so many host slots are free, after the oldest ones have gone."""
        if count > self.capacity.host_slots:
            return False
        while len(self._host) < count:
            oldest = self._oldest_in_host(keep)
            if oldest is None:
                return False  # the others are on their way up, or being loaded
            if not self._demote(oldest, keep):
                self.drop(oldest, FULL)
        return True

    def _oldest_in_host(self, keep: str | None) -> str | None:
        candidates = (name for name, request in self.swapped.items() if request.is_loadable)
        return next((name for name in candidates if name != keep), None)

    def _demote(self, request_id: str, keep: str | None = None) -> bool:
        """Moves a request to the file, where the oldest ones make room; False: it is too large."""
        request = self.swapped[request_id]
        if len(request.host) > self.capacity.file_slots:
            return False
        while len(self._file) < len(request.host):
            in_file = (n for n, other in self.swapped.items() if other.file and other.host == ())
            oldest = next((name for name in in_file if name != keep), None)
            if oldest is None:
                return False
            self.drop(oldest, FULL)
        request.file = tuple(self._file.popleft() for _ in request.host)
        self._commands.append(Demote(request_id, request.host, request.file))
        self._host += request.host
        request.host = ()
        self.counts["demoted_requests"] += 1
        return True
