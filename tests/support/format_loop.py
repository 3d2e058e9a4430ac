"""The reference loops with page formats: what is stored passes through a codec of paged_kv.quant.

An entry is read as its codec gives it back, by the token itself too. With residual pages the newest
entries are read as they were computed: those from the first position of the newest pages on, as far
as the request has computed them itself.

A number on the border of two codes comes out as one or the other by float32 noise alone, and a
model can make much of it. So the loop stores what the engine was given to store, after a look
whether that is what it has computed itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import engines
import torch
from engines import Tokens
from policy_loop import Losers, PolicySequence, recorded_losers
from pressure_starts import loop_arguments, recorded_starts
from reference_check import check_output
from reference_loop import Chunk, Rule, Sequence_

from paged_kv.quant import make_layout

TOLERANCE = 2e-4  # of logprobs, as without formats
MERGING = 1e-3  # the same: noise can put what a merge makes into the neighbouring code
CLOSE = 1e-3  # of keys and values; for the same reason no less
Pair = tuple[torch.Tensor, torch.Tensor]  # key and value, [heads, dim]


class Written:
    """What layers were given to store.

    own: (request, layer) -> the tokens in the order in which they were computed.
    prefixes: (tokens up to this one, layer) -> the first, which the prefix cache has.
    """

    def __init__(self) -> None:
        self.own: dict[tuple[str, int], list[Pair]] = defaultdict(list)
        self.prefixes: dict[tuple[bytes, int], Pair] = {}

    def note(self, runner: Any, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """A layer stores the keys and values [tokens, heads, dim] of a batch."""
        batch = runner.input_batch
        starts = runner.query_start_loc.np
        for row, request in enumerate(batch.req_ids):
            first = int(batch.num_computed_tokens_cpu[row])
            for index, token in enumerate(range(starts[row], starts[row + 1])):
                pair = key[token].clone(), value[token].clone()
                self.own[request, layer].append(pair)
                known = batch.token_ids_cpu[row, : first + index + 1].tobytes()
                self.prefixes.setdefault((known, layer), pair)


@contextmanager
def recorded_writes(llm: Any) -> Iterator[Written]:
    """What the engine stores, layer by layer."""
    runner, written = engines.worker(llm).model_runner, Written()
    layers = runner.compilation_config.static_forward_context
    stores = {}
    for index, (name, layer) in enumerate(layers.items()):
        stores[name] = store = layer.impl.do_kv_cache_update

        def storing(of, key, value, *rest, index=index, store=store):
            written.note(runner, index, key, value)
            store(of, key, value, *rest)

        layer.impl.do_kv_cache_update = storing
    try:
        yield written
    finally:
        for name, store in stores.items():
            layers[name].impl.do_kv_cache_update = store


class Stored(Sequence_):
    """Before Sequence_, or a subclass, among the bases: what its entries pass through."""

    formats: tuple[str, ...]  # of each layer
    residual_pages: int
    written: Written
    request: str

    def clear(self) -> None:
        super().clear()
        size, page = self.model.config.head_dim, self.rule.page_size
        self.layouts = [make_layout(f, torch.float32, size, size, page) for f in self.formats]
        if not hasattr(self, "num_read"):
            self.num_read = [0] * len(self.formats)  # of written.own
        self.first_own = 0
        empty = torch.zeros(self.model.config.num_key_value_heads, 0, size)
        self.raw = [(empty, empty) for _ in self.formats]  # of all tokens since first_own

    def restart(self, tokens: Tokens) -> None:
        self.hit = tokens
        try:
            super().restart(tokens)
        finally:
            del self.hit
        self.first_own = len(tokens)
        self.raw = [(keys[:, :0], values[:, :0]) for keys, values in self.raw]

    def extend(self, layer, keys, values):
        new = self.followed(layer, keys, values)
        self.raw[layer] = tuple(torch.cat(p, 1) for p in zip(self.raw[layer], new, strict=True))
        layout = self.layouts[layer]
        codecs = zip((layout.key, layout.value), new, strict=True)
        stored = super().extend(layer, *(codec.decode(codec.encode(x)) for codec, x in codecs))
        count = self.num_native(self.num_tokens + keys.shape[1]) if self.residual_pages else 0
        if not count or self.formats[layer] == "native":
            return stored
        pairs = zip(stored, self.raw[layer], strict=True)
        return tuple(torch.cat([old[:, :-count], raw[:, -count:]], 1) for old, raw in pairs)

    def followed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """What the engine stored for these tokens: what is computed here, but for noise."""
        if hasattr(self, "hit"):
            tokens = torch.tensor(self.hit, dtype=torch.int32).numpy()
            ends = range(1, len(tokens) + 1)
            pairs = [self.written.prefixes[tokens[:end].tobytes(), layer] for end in ends]
            return [torch.stack(parts, 1) for parts in zip(*pairs, strict=True)]
        first = self.num_read[layer]
        self.num_read[layer] = first + keys.shape[1]
        pairs = self.written.own[self.request, layer][first : self.num_read[layer]]
        found = [torch.stack(parts, 1) for parts in zip(*pairs, strict=True)]
        for mine, theirs in zip((keys, values), found, strict=True):
            torch.testing.assert_close(mine, theirs, atol=CLOSE, rtol=CLOSE)
        return found

    def num_native(self, num_tokens: int) -> int:
        """The newest entries that are read as they were computed, after so many tokens."""
        size = self.rule.page_size
        pages = -(-num_tokens // size) - self.residual_pages
        first = max(pages, -(-self.first_own // size), 0) * size
        return max(0, num_tokens - first)


class StoredSequence(Stored, Sequence_):
    """Without a policy, or under streaming."""


class StoredPolicySequence(Stored, PolicySequence):
    """Under a policy that looks at entries: it sees them as they are stored, merged ones too."""

    def _compact(self, layer: int, num_losers: int) -> None:
        held, parts = self.held[layer], (self.keys[layer], self.values[layer])
        super()._compact(layer, num_losers)
        # Where the entries that are left were before: positions rise in every list.
        place = torch.searchsorted(held, self.held[layer])[..., None]
        layout, new = self.layouts[layer], (self.keys[layer], self.values[layer])
        for codec, store, before, after in zip(
            (layout.key, layout.value), (self.keys, self.values), parts, new, strict=True
        ):
            unchanged = (after == before.take_along_dim(place, 1)).all(-1, keepdim=True)
            store[layer] = torch.where(unchanged, after, codec.decode(codec.encode(after)))


class EveryChunk(Rule):
    """For residual pages: what a token reads depends on where its chunk ends."""

    def drops_between(self, before: int, after: int, start: int) -> bool:
        return True


def make(
    model: Any,
    rule: Rule,
    begins: tuple[Any, ...],
    formats: Any,
    config: dict[str, Any],
    dropped: Losers,
    written: tuple[str, Written],
) -> Stored:
    """The loop of one request; begins: see pressure_starts.loop_arguments."""
    start, scored = begins
    policy = config.get("policy", "full") not in ("full", "streaming")
    base = StoredPolicySequence if policy else StoredSequence
    fixed = {"formats": tuple(formats), "residual_pages": config.get("residual_pages", 0)}
    fixed |= dict(zip(("request", "written"), written, strict=True))
    more = (config, dropped, scored) if policy else ()
    return type(base.__name__, (base,), fixed)(model, rule, start, *more)


def complete_and_check(
    llm: Any,
    model: Any,
    waves: list[list[Tokens]],
    rule: Rule,
    formats: Any,
    config: dict[str, Any],
    max_tokens: int,
) -> list[list[Chunk]]:
    """Waves of prompts, each token compared with the loop. Returns the chunks of all."""
    differences, found = {}, []
    tolerance = MERGING if config.get("policy") == "value_merge" else TOLERANCE
    with recorded_writes(llm) as written:
        for wave in waves:
            with (
                engines.recorded_chunks(llm) as recorded,
                recorded_losers(llm) as dropped,
                recorded_starts(llm) as starts,
            ):
                outputs = engines.complete(llm, wave, max_tokens, logprobs=0)
            for prompt, output, (name, chunks) in zip(wave, outputs, recorded.items(), strict=True):
                begins = loop_arguments(starts, name, len(prompt))
                given = formats, config, dropped[name], (name, written)
                sequence = make(model, rule, begins, *given)
                if differs := check_output(sequence, prompt, output, chunks, tolerance):
                    differences[f"{name}, prompt of {len(prompt)}"] = differs
                found.append(chunks)
    assert not differences, differences
    return found
