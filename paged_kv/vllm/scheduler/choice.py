"""Which of the requests that can shrink do: as few as give enough pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from paged_kv.vllm.scheduler.shrinking import ShrinkingManager


class Candidate(NamedTuple):
    """A running request that can shrink.

    Args:
        request: vLLM's.
        start: tokens from which it would be held to its budget.
        surplus: pages that it would leave, in all layer groups; others may hold some of them.
    """

    request: Request
    start: int
    surplus: int


class _Gain(NamedTuple):
    """What it brings that a request shrinks.

    Args:
        num_pages: that come back, net.
        num_copies: pages that are needed for copies before that.
        left: pages that it leaves; others may hold them.
    """

    num_pages: int
    num_copies: int
    left: list[KVCacheBlock]


def choose(
    managers: Sequence[ShrinkingManager], candidates: Sequence[Candidate], short: int, spare: int
) -> list[tuple[Candidate, int]]:
    """Those that shall shrink, and the pages that each gives back.

    Pages that others hold, too, come back with their last holder: if it takes all of the candidates
    to win pages, all of them shrink.

    Args:
        managers: of the compressed layer groups.
        candidates: in the order in which they are asked.
        short: pages that are wanted.
        spare: pages that may be taken for copies.
    """
    released: Counter[int] = Counter()  # how many of the chosen leave each page
    chosen: list[tuple[Candidate, int]] = []
    together: list[Candidate] = []
    for candidate in candidates:
        if short <= 0:
            return chosen
        gain = _gain(managers, candidate, released)
        if gain.num_pages > 0 and gain.num_copies <= spare:
            released.update(block.block_id for block in gain.left)
            chosen.append((candidate, gain.num_pages))
            short, spare = short - gain.num_pages, spare - gain.num_copies
        else:
            together.append(candidate)
    if short <= 0:
        return chosen
    gains = []
    for candidate in together:
        gains.append(_gain(managers, candidate, released))
        released.update(block.block_id for block in gains[-1].left)
    if sum(gain.num_pages for gain in gains) > 0 and sum(g.num_copies for g in gains) <= spare:
        chosen += zip(together, (gain.num_pages for gain in gains), strict=True)
    return chosen


def _gain(
    managers: Sequence[ShrinkingManager], candidate: Candidate, released: Counter[int]
) -> _Gain:
    left: list[KVCacheBlock] = []
    num_copies = num_kept = 0
    for manager in managers:
        pages, copies, kept = manager.shrinking(candidate.request.request_id, candidate.start)
        left += pages
        num_copies, num_kept = num_copies + copies, num_kept + kept
    freed = sum(block.ref_cnt - released[block.block_id] == 1 for block in left)
    return _Gain(freed - num_kept, num_copies, left)
