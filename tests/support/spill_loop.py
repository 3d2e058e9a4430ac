"""The reference loop with spill: every KV head has a list of what it holds and one of what it lost.

It decides by itself who goes, who comes back and who is forgotten; nothing is told by the engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from policy_definitions import DEFINITIONS
from policy_loop import PolicySequence
from reference_loop import Rule
from spill_definition import Entry, Spilling, exchange


class SpillSequence(PolicySequence):
    """The cache of one sequence under a policy that drops entries, with spill.

    Args:
        model: see PolicySequence.
        rule: see PolicySequence.
        prompt_len: see PolicySequence.
        config: the engine's options; those of spill may not be left out.
    """

    def __init__(self, model: Any, rule: Rule, prompt_len: int, config: dict[str, Any]) -> None:
        names = Spilling.__dataclass_fields__
        self.spilling = Spilling(**{name: config[name] for name in names if name in config})
        super().__init__(model, rule, prompt_len, config, {})

    def clear(self) -> None:
        super().clear()
        layers, heads = range(len(self.held)), range(self.num_heads)
        self.tier: list[list[list[Entry]]] = [[[] for _ in heads] for _ in layers]
        self.num_fetched = 0

    def _compact(self, layer: int, num_losers: int) -> None:
        heads = [self._head(layer, head, num_losers) for head in range(self.num_heads)]
        kept = []
        for index, head in enumerate(heads):
            head.siblings = heads
            losers = DEFINITIONS[self.name](head, self.config)[0]
            own = self.tier[layer][index]
            result = exchange(self.name, self.config, head, losers, own, self.spilling)
            entries, self.tier[layer][index], count = result
            kept.append(entries)
            self.num_fetched += count

        def rows(name: str) -> torch.Tensor:
            every = [[getattr(one, name) for one in entries] for entries in kept]
            return torch.from_numpy(np.array(every))

        self.keys[layer], self.values[layer] = rows("key").float(), rows("value").float()
        self.held[layer], self.scores[layer] = rows("position"), rows("score").float()
        self.weights[layer] = torch.ones(self.held[layer].shape)
        self.num_drops += len(heads)
