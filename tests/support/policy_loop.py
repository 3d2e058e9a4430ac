"""The reference loop for any policy: every KV head of every layer holds a list of its own.

Who goes is decided by policy_definitions, from what this loop has itself in its lists. Two entries
may have scores that float32 cannot tell apart; then the loop follows the engine, which is why it is
told what the engine dropped. Anything but such a tie is a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import engines
import torch
from engines import Tokens
from policy_definitions import DEFINITIONS, Head
from policy_heads import selector, with_defaults
from pressure_starts import loop_arguments, recorded_starts
from reference_check import check_output
from reference_loop import Chunk, Rule, Sequence_

from paged_kv import registry
from paged_kv.policies.base import PositionalPolicy

TIE = 1e-5  # relative, of scores
Losers = dict[tuple[int, int], list[set[int]]]  # (tokens, layer) -> positions, by KV head


class PolicySequence(Sequence_):
    """The cache of one sequence under a policy.

    Args:
        model: see Sequence_.
        rule: see Sequence_.
        start: see Sequence_.
        config: the engine's options, the policy's name among them.
        dropped: what the engine dropped.
        scored: in which run (the first is 0, and each restart begins another) scores begin, and
            with which token.
    """

    def __init__(
        self,
        model: Any,
        rule: Rule,
        start: int,
        config: dict[str, Any],
        dropped: Losers,
        scored: tuple[int, int] = (0, 0),
    ) -> None:
        self.num_heads = model.config.num_key_value_heads
        self.name = config["policy"].rpartition("+")[2]
        self.config = config
        self.dropped = dropped
        self.num_ties = self.num_drops = self.run = 0
        self.scored = scored
        super().__init__(model, rule, start)

    def clear(self) -> None:
        super().clear()
        layers = range(self.model.config.num_hidden_layers)
        self.held = [torch.zeros(self.num_heads, 0, dtype=torch.int64) for _ in layers]  # positions
        self.weights = [torch.zeros(self.num_heads, 0) for _ in layers]
        self.scores = [torch.zeros(self.num_heads, 0) for _ in layers]
        self.queries: list[list[torch.Tensor]] = [[] for _ in layers]  # [heads, tokens, dim]
        self.first_query = 0

    def restart(self, tokens: Tokens) -> None:
        """The queries of a prefix hit are not known, nor what they would have given."""
        self.run += self.num_tokens > 0
        super().restart(tokens)
        self.first_query = len(tokens)
        self.queries = [[] for _ in self.queries]
        self.scores = [torch.zeros_like(scores) for scores in self.scores]

    def add(self, layer: int, positions: list[int]) -> None:
        rows = torch.tensor(positions).expand(self.num_heads, -1)
        self.held[layer] = torch.cat([self.held[layer], rows], 1)
        self.weights[layer] = torch.cat([self.weights[layer], torch.ones(rows.shape)], 1)

    def see(self, layer: int, query: torch.Tensor, weights: torch.Tensor) -> None:
        self.queries[layer].append(query)
        num_new = query.shape[1]
        old = torch.nn.functional.pad(self.scores[layer], (0, num_new))
        given = weights.unflatten(0, (self.num_heads, -1))  # [kv_heads, group, queries, kept]
        name, options = selector(self.name, self.config)
        accumulate = DEFINITIONS[name].accumulate
        if accumulate is None:
            self.scores[layer] = old
            return
        options = with_defaults(name, options)
        for head, scores in enumerate(old):
            result = scores.double().numpy()
            for query in range(num_new):
                if (self.run, self.num_tokens + query) < self.scored:
                    continue
                shares = given[head, :, query].double().numpy()
                result = accumulate(result, shares, self.num_tokens + query, options)
            old[head] = torch.from_numpy(result)
        self.scores[layer] = old

    def drop(self) -> None:
        for layer in range(len(self.held)):
            evicted = self.rule.num_evicted(layer, self.num_tokens, self.start)
            surplus = self.held[layer].shape[1] - (self.num_tokens - evicted)
            if surplus:
                self._compact(layer, surplus)

    def _compact(self, layer: int, num_losers: int) -> None:
        heads = [self._head(layer, head, num_losers) for head in range(self.num_heads)]
        kept = []
        for index, head in enumerate(heads):
            head.siblings = heads
            losers, keys, values, weights = DEFINITIONS[self.name](head, self.config)
            places = self._places(layer, head, losers)
            assert len(places) == num_losers
            self.num_drops += 1
            if places != losers:
                self._check_tie(head, losers ^ places)
                self.num_ties += 1
            stay = [slot for slot in range(len(head.positions)) if slot not in places]
            kept.append([torch.as_tensor(array)[stay] for array in (keys, values, weights)])
            kept[-1] += [row[index][stay] for row in (self.held[layer], self.scores[layer])]
        keys, values, weights, held, scores = (
            torch.stack(parts) for parts in zip(*kept, strict=True)
        )
        self.keys[layer], self.values[layer] = keys.float(), values.float()
        self.weights[layer], self.held[layer] = weights.float(), held
        self.scores[layer] = scores

    def _places(self, layer: int, head: Head, losers: set[int]) -> set[int]:
        """Slots of what the engine dropped in a head; positions have no ties to be told of."""
        dropped = self.dropped.get((self.num_tokens, layer))
        if dropped is None and issubclass(registry.load(self.name), PositionalPolicy):
            return losers
        engine = self.dropped[self.num_tokens, layer][head.head]
        places = {slot for slot, position in enumerate(head.positions) if position in engine}
        assert len(places) == len(engine)
        return places

    def _check_tie(self, head: Head, differing: set[int]) -> None:
        score = DEFINITIONS[self.name].score
        assert score, f"{self.name} at {head.num_tokens}: other entries went"
        scores = score(head, self.config)
        values = [float(scores[slot]) for slot in differing]
        span = max(values) - min(values)
        assert span <= TIE * max(1e-3, max(map(abs, values))), (
            f"{self.name} at {head.num_tokens} tokens: scores of {sorted(values)} are no tie"
        )

    def _head(self, layer: int, head: int, num_losers: int) -> Head:
        config = self.model.config
        module = self.model.model.layers[layer].self_attn
        queries = torch.cat(self.queries[layer], 1).unflatten(0, (self.num_heads, -1))[head]
        everywhere = torch.arange(2 * config.max_position_embeddings)[None]  # and the next ones
        cos, sin = self.model.model.rotary_emb(queries, everywhere)
        half = config.head_dim // 2
        return Head(
            positions=self.held[layer][head].tolist(),
            num_tokens=self.num_tokens,
            num_losers=num_losers,
            num_sinks=self.config.get("num_sink_tokens", 4),
            recent_window=self.config.get("recent_window", 32),
            layer=layer,
            head=head,
            keys=self.keys[layer][head].double().numpy(),
            values=self.values[layer][head].double().numpy(),
            weights=self.weights[layer][head].double().numpy(),
            scores=self.scores[layer][head].double().numpy(),
            queries=queries.double().numpy(),
            query_positions=list(range(self.first_query, self.num_tokens)),
            scale=module.scaling,
            cos=cos[0, :, :half].double().numpy(),
            sin=sin[0, :, :half].double().numpy(),
        )


@contextmanager
def recorded_losers(llm: Any) -> Iterator[dict[str, Losers]]:
    """Positions that each compaction of the engine drops, by request."""
    result: dict[str, Losers] = defaultdict(dict)
    compactor = engines.worker(llm).compactor
    if compactor is None:  # without a policy
        yield result
        return
    note, runner = compactor._note, engines.worker(llm).model_runner

    def noting(holding, region, decided):
        batch = getattr(runner, "input_batch", None)  # V1 runner
        ids = (runner.execute_model_state.input_batch if batch is None else batch).req_ids
        names = [ids[one] if isinstance(one, int) else one for one in holding.owners]
        for event, request in enumerate(names):
            for index, layer in enumerate(region.layers.tolist()):
                key = int(region.num_tokens[event]), layer
                rows = zip(
                    region.positions[index, event], decided.losers[index, event], strict=True
                )
                result[request][key] = [set(row[lost].tolist()) for row, lost in rows]
        note(holding, region, decided)

    compactor._note = noting
    try:
        yield result
    finally:
        compactor._note = note


def complete_and_check(
    llm: Any,
    model: Any,
    prompts: list[Tokens],
    rule: Rule,
    config: dict[str, Any],
    max_tokens: int,
    tolerance: float = 2e-4,
    check: Callable[..., str | None] = check_output,
) -> tuple[list[list[Chunk]], list[PolicySequence]]:
    """All prompts in one batch, each token compared with the loop. Returns chunks and loops."""
    with (
        engines.recorded_chunks(llm) as recorded,
        recorded_losers(llm) as dropped,
        recorded_starts(llm) as starts,
    ):
        outputs = engines.complete(llm, prompts, max_tokens, logprobs=0)
    differences, sequences = {}, []
    for prompt, output, (name, chunks) in zip(prompts, outputs, recorded.items(), strict=True):
        start, scored = loop_arguments(starts, name, len(prompt))
        sequence = PolicySequence(model, rule, start, config, dropped[name], scored)
        sequences.append(sequence)
        if difference := check(sequence, prompt, output, chunks, tolerance):
            differences[f"prompt of {len(prompt)}"] = difference
    assert not differences, differences
    return list(recorded.values()), sequences
