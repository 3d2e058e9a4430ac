"""What each policy does, one KV head at a time, written from the papers; no code of paged_kv.

DEFINITIONS[name](head, options) -> (losers, keys, values, weights): the slots that go, and what all
entries hold afterwards. The functions are in policy_scores (policies that drop the lowest scores)
and policy_merging (all others), and register themselves when these are imported: here.
"""

from __future__ import annotations

import policy_merging
import policy_scores
from policy_heads import DEFINITIONS, Head, is_free

__all__ = ["DEFINITIONS", "Head", "is_free", "policy_merging", "policy_scores"]
