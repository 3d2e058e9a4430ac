"""Attention that a model's queries give on average, and that entries got of late."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paged_kv.core.options import choice, number, text
from paged_kv.core.schedule import MAX_TOKENS
from paged_kv.kernels import ops
from paged_kv.policies.base import EngineFacts, ScoringPolicy
from paged_kv.policies.entries import share
from paged_kv.policies.query_files import check_shape, find, load
from paged_kv.policies.query_statistics import GATHERED
from paged_kv.policies.region import Region
from paged_kv.policies.written import Written

AGEING = 3.0  # expected attention falls with this power of the age
YOUTH = 256  # tokens; below this age, age hardly counts


class CalibratedAttention(ScoringPolicy):
    """Entries that the model's queries attend to, by statistics of these, and have attended to.

    After Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution" (2510.00636), with statistics of the model instead of the request:
    an entry is rated once, from its key and value. To the ratings the attention that entries got is
    added, fading with the age of the query, where the attention kernels sum it anyway.
    """

    options = {
        "fading": choice(
            "auto", "on", "off", help="whether attention counts; auto: where it costs nothing"
        ),
        "half_life": number(512, 1, 1e6, "tokens after which attention counts half"),
        "statistics": text(
            "",
            "file of paged-kv calibrate queries; none: this model's, if there is one; "
            f"{GATHERED}: of the first tokens",
        ),
    }
    reads = frozenset({"ratings", "rotary", "query_statistics"})

    @classmethod
    def settled(cls, options: Mapping[str, Any], engine: EngineFacts) -> dict[str, Any]:
        """Whether attention counts, and the model's file. Raises ValueError: it is another's."""
        decided = dict(options)
        if options["fading"] == "auto":
            decided["fading"] = "on" if engine.sums_attention else "off"
        if not options["statistics"]:
            file = find(engine.model)
            decided["statistics"] = GATHERED if file is None else str(file)
        if decided["statistics"] != GATHERED:
            check_shape(Path(decided["statistics"]).expanduser(), engine.shape)
        return decided

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(num_sink_tokens, recent_window, options)
        if self.settings["fading"] == "on":
            self.reads = type(self).reads | {"scores"}
        file = self.settings["statistics"]
        if file not in ("", GATHERED):
            self.query_statistics = load(Path(file).expanduser())

    @property
    def score_decay(self) -> float | None:
        """Half after so many tokens."""
        return 0.5 ** (1 / self.settings["half_life"]) if "scores" in self.reads else None

    def rate(self, entries: Written) -> torch.Tensor:
        """Expected attention, averaged over the group, times the norm of the value."""
        rotary, queries = entries.facts.rotary, entries.facts.queries
        assert rotary is not None, "the policy reads rotary"
        assert queries is not None, "the policy reads query_statistics"
        expected = queries.of(entries.layers, entries.heads, entries.keys.device)
        held = entries.keys, entries.values, entries.positions
        return ops.expected_attention(*held, rotary, expected)

    def score(self, region: Region) -> torch.Tensor:
        """Share of what is expected, + share of what was seen."""
        free = ~self.protected(region)
        age = region.num_tokens[:, None, None] - region.positions.clamp_max(MAX_TOKENS)
        fallen = (age.clamp_min(0) + YOUTH).to(region.ratings.dtype) ** -AGEING
        expected = share(region.ratings * fallen, free)
        if "scores" not in self.reads:
            return expected
        return expected + share(region.scores, free)
