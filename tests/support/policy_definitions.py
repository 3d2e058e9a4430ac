"""What each policy does, one KV head at a time, written from the papers; no code of paged_kv.

SCORES[name](head, options) -> scores [m], for the policies that drop the lowest ones.
DEFINITIONS[name](head, options) -> (losers, keys, values, weights): the slots that go, and what all
entries hold afterwards. An option that is not given has its default.
"""

from __future__ import annotations

from collections.abc import Callable

from policy_heads import DEFAULTS, Head
from policy_merging import MERGING
from policy_scores import SCORES, lowest

__all__ = ["DEFAULTS", "DEFINITIONS", "SCORES", "Head"]


def _evict(name: str) -> Callable:
    def definition(head: Head, options: dict) -> tuple:
        losers = lowest(name, head, options, head.num_losers)
        return losers, head.keys, head.values, head.weights

    return definition


DEFINITIONS: dict[str, Callable[[Head, dict], tuple]] = {
    **{name: _evict(name) for name in SCORES},
    **MERGING,
}
