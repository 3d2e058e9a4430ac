"""Sinks and the newest entries."""

from __future__ import annotations

import numpy as np
import torch

from paged_kv.policies.base import Events, Moves, PositionalPolicy
from paged_kv.policies.region import Region


class Streaming(PositionalPolicy):
    """The first tokens (attention sinks) and the newest.

    StreamingLLM: Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (2309.17453); keys keep the rotation of their true positions, where the paper re-numbers them.
    """

    def score(self, region: Region) -> torch.Tensor:
        """The newer the better; equal where float32 cannot tell, and then the older goes first."""
        return region.positions.float()

    def moves(self, events: Events) -> Moves:
        """The sinks lie at the head; the losers are the oldest entries after them.

        slots   before             after                    before + sinks
                | sinks ........... losers ................ |  newest ...
        """
        before, after = events.evicted_before, events.evicted_after
        sinks = self.num_sink_tokens
        # A page can be smaller than the sinks: those past the freed pages stay where they are.
        count = np.minimum(sinks, after - before)
        event = np.repeat(np.arange(len(count)), count)
        offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        first_hole = np.maximum(after, before + sinks)
        return Moves(event, before[event] + offset, first_hole[event] + offset)
