"""What each page of the pool holds, written down for the live page while somebody looks at it.

A snapshot costs a look at every page, so it is taken seldom, and of all steps only in those that
come when one is due; nobody waits for it but the scheduler. Where nobody looks there is no file:
what is left of earlier looks would be wrong.
"""

from __future__ import annotations

import base64
import itertools
import json
import operator
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger

from paged_kv.core.schedule import NEVER, cdiv
from paged_kv.vllm.scheduler.manager import PagedManager
from paged_kv.vllm.watch import places

logger = init_logger(f"vllm.{__name__}")

KINDS = ("free", "cached", "prompt", "survivors", "newest", "shared", "moving")
_FREE, _CACHED, _PROMPT, _SURVIVORS, _NEWEST, _SHARED, _MOVING = range(len(KINDS))
GROUP = 8  # a page's byte is this times its layer group, and its kind
_LAST_GROUP = 255 // GROUP  # stands for all that come after it, too

LOOK = 0.5  # seconds between two looks at whether somebody watches
WATCHED = 10.0  # seconds for which one request for the map counts; busy browsers ask late
INTERVAL = 1.0  # seconds between two snapshots, at least
SHARE = 0.01  # of the time goes into snapshots, at most
MAX_ROWS = 256  # requests that are told of

_block_id = operator.attrgetter("block_id")
_ref_cnt = operator.attrgetter("ref_cnt")
_block_hash = operator.attrgetter("_block_hash")


def num_held(blocks: Sequence[Any]) -> int:
    """Pages of a request; those that it has given back are null pages at its start."""
    return len(blocks) - bisect_left(blocks, True, key=lambda block: not block.is_null)


def has_dropped(managers: Iterable[Any], request: Any) -> bool:
    """Whether a request that holds pages has dropped entries in one of these layer groups."""
    name, computed = request.request_id, request.num_computed_tokens
    return any(
        isinstance(m, PagedManager) and m.start(name) != NEVER and m.evicted(name, computed) > 0
        for m in managers
    )


class PageMap:
    """The map of one engine's pool.

    Args:
        scheduler: one of ours.
        engine_file: its scheduler's file; the map is beside it.
        recent_window: newest entries, which the policy never drops.
    """

    def __init__(self, scheduler: Any, engine_file: Path, recent_window: int) -> None:
        self._scheduler, self._recent_window = scheduler, recent_window
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._pool = self._managers[0].block_pool
        self._path = places.map_file(engine_file)
        self._watched_file = places.watched_file(engine_file.parent)
        self._numbers: dict[str, int] = {}  # of requests, by id: users may choose ids
        self._count = itertools.count(1)
        self._is_watched = self._is_written = False
        self._next_look = self._next = 0.0
        self._interval = INTERVAL  # to the next snapshot
        self._write()  # an idle engine takes no step in which it could answer who looks

    def update(self) -> None:
        """After a step: writes the map if it is due, or removes it if nobody looks."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK
            self._is_watched = self._was_asked()
        # If nothing is left to do, no step will follow in which that could be told.
        is_last = not any(self._scheduler.get_request_counts())
        if not self._is_watched:
            self._remove()
        elif now >= self._next or is_last:
            self._write()

    def snapshot(self) -> dict[str, Any]:
        """The map as JSON has it.

        pages: base64 of a byte for each page but vLLM's null page: GROUP x layer group + kind.
        requests: those that run: a number, its prompt's and its computed tokens, pages by layer
        group, whether it has dropped entries, how often it was preempted.
        """
        running, waiting = self._scheduler.get_request_counts()
        return {
            "kinds": KINDS,
            "group": GROUP,
            "pages": base64.b64encode(self.pages().tobytes()).decode(),
            "requests": self._rows(),
            "left_out": max(0, running - MAX_ROWS),
            "running": running,
            "waiting": waiting,
            "interval": self._interval,
        }

    def pages(self) -> npt.NDArray[np.uint8]:
        """uint8 [pages of the pool without the null page]; see snapshot."""
        size = self._pool.num_gpu_blocks
        codes = np.zeros(size, np.uint8)
        holders = np.zeros(size, np.int64)
        for manager in self._managers:
            ids, kinds = self._held(manager)
            codes[ids] = _code(manager.kv_cache_group_id, kinds)
            holders += np.bincount(ids, minlength=size)
        shared = holders > 1
        codes[shared] += _SHARED - codes[shared] % GROUP
        self._add_others(codes, holders == 0)
        return codes[1:]

    def _held(self, manager: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Ids of pages that requests hold in a layer group, and what they hold.

        | given back | survivors, or the prompt | newest |
        """
        held: list[Sequence[Any]] = []
        kinds, lengths = [], []
        for name, blocks in manager.req_to_blocks.items():
            request = self._scheduler.requests.get(name)
            if request is None:
                continue
            length = num_held(blocks)
            held.append(blocks[len(blocks) - length :])
            if has_dropped([manager], request):
                kind, end = _SURVIVORS, request.num_computed_tokens - self._recent_window
                newest = max(0, end) // manager.block_size
            else:
                kind, newest = _PROMPT, cdiv(request.num_prompt_tokens, manager.block_size)
            before = min(max(0, newest - (len(blocks) - length)), length)
            kinds += [kind, _NEWEST]
            lengths += [before, length - before]
        ids = np.fromiter(
            map(_block_id, itertools.chain.from_iterable(held)), np.int64, sum(lengths)
        )
        return ids, np.repeat(np.array(kinds, np.uint8), lengths)

    def _add_others(self, codes: npt.NDArray[np.uint8], others: npt.NDArray[np.bool_]) -> None:
        """Of pages that no request holds: those in the prefix cache, and those that are not free.

        The latter are under way: being copied, or freed when a step is done.
        """
        others[0] = False  # the null page
        ids = np.flatnonzero(others)
        blocks = list(itertools.compress(self._pool.blocks, others))
        if len(self._pool.cached_block_hash_to_block):
            hashes = list(map(_block_hash, blocks))
            cached = ids[np.fromiter(map(bool, hashes), np.bool_, len(hashes))]
            # The end of a hash is its layer group (vLLM's get_group_id); they are of one length.
            every = np.frombuffer(b"".join(filter(None, hashes)), np.uint8)
            length = len(every) // max(1, len(cached))
            codes[cached] = _code(every[length - 1 :: length or 1], _CACHED)
        if len(blocks) > self._pool.get_num_free_blocks():
            counts = np.fromiter(map(_ref_cnt, blocks), np.int64, len(blocks))
            codes[ids[counts > 0]] = _MOVING

    def _rows(self) -> list[dict[str, Any]]:
        shown = self._scheduler.running[:MAX_ROWS]
        names = [request.request_id for request in shown]
        self._numbers = {name: self._numbers.get(name) or next(self._count) for name in names}
        return [self._row(request) for request in shown]

    def _row(self, request: Any) -> dict[str, Any]:
        name = request.request_id
        return {
            "number": self._numbers[name],
            "prompt": request.num_prompt_tokens,
            "computed": request.num_computed_tokens,
            "pages": [num_held(m.req_to_blocks.get(name, ())) for m in self._managers],
            "has_dropped": has_dropped(self._managers, request),
            "preemptions": request.num_preemptions,
        }

    def _was_asked(self) -> bool:
        try:
            return time.time() - self._watched_file.stat().st_mtime < WATCHED
        except FileNotFoundError:
            return False

    def _write(self) -> None:
        """For readers a map is whole, or it is not there."""
        begin = time.monotonic()
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            new.write_text(json.dumps(self.snapshot()))
            new.rename(self._path)
            self._is_written = True
        except OSError as error:
            logger.warning_once("paged_kv: no map of the pool: %s", error)
        self._interval = max(INTERVAL, (time.monotonic() - begin) / SHARE)
        self._next = begin + self._interval

    def _remove(self) -> None:
        if self._is_written:
            self._path.unlink(missing_ok=True)
            self._is_written = False


def _code(group: Any, kind: Any) -> Any:
    return (np.minimum(group, _LAST_GROUP) * GROUP + kind).astype(np.uint8)
