"""What the tokens must be: the definition, in plain transformers and with explicit dropping.

Shares no code with paged_kv. Every layer of a sequence holds the keys and values of an explicit
list of positions. A chunk of tokens attends to what its layer holds and, causally, to itself; then
each layer drops its oldest entries after the sinks until as many are gone as the rule says.

`reference_tokens` runs by itself, chunk by chunk. `reference_check` is told what an engine said, so
it can compute the chunks between two droppings in one go: the same arithmetic, 20 times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from engines import Tokens

Chunk = tuple[int, int]  # (start, end) of the tokens of one step


@dataclass(frozen=True)
class Rule:
    """What each layer drops.

    Args:
        budgets: entries to keep, by layer: a number, a fraction of the tokens, or None for all.
        page_size: entries are dropped in multiples of it.
        num_sinks: first entries, never dropped.
        min_budget: least that a fraction comes to.
        compress_prefill: drop before the end of the prompt too.
    """

    budgets: Sequence[int | Fraction | None]
    page_size: int = 32
    num_sinks: int = 4
    min_budget: int = 1
    compress_prefill: bool = False

    def num_evicted(self, layer: int, num_tokens: int, start: int) -> int:
        """Entries that are gone after num_tokens tokens, of which none is before `start`."""
        budget = self.budgets[layer]
        if budget is None or (num_tokens < start and not self.compress_prefill):
            return 0
        if isinstance(budget, Fraction):
            budget = max(self.min_budget, math.ceil(budget * num_tokens))
        return max(0, (num_tokens - budget) // self.page_size * self.page_size)

    def drops_between(self, before: int, after: int, start: int) -> bool:
        """Whether any layer drops something on the way from before to after tokens."""
        return any(
            self.num_evicted(layer, after, start) > self.num_evicted(layer, before, start)
            for layer in range(len(self.budgets))
        )


class Sequence_:
    """The cache of one sequence, and the model's forward pass over it.

    Args:
        model: of transformers.
        rule: what each layer drops.
        start: tokens before which nothing is dropped.
    """

    def __init__(self, model: Any, rule: Rule, start: int) -> None:
        self.model = model
        self.rule = rule
        self.start = start
        self.clear()

    def clear(self) -> None:
        """Forgets everything: nothing is processed yet."""
        config = self.model.config
        empty = torch.zeros(config.num_key_value_heads, 0, config.head_dim)  # [heads, kept, dim]
        num_layers = config.num_hidden_layers
        self.num_tokens = 0
        self.keys, self.values = [empty] * num_layers, [empty] * num_layers
        self.positions: list[list[int]] = [[] for _ in range(num_layers)]

    @torch.inference_mode()
    def process(self, tokens: Tokens) -> torch.Tensor:
        """Takes the next chunk; returns its last hidden states [tokens, hidden]. Drops nothing."""
        model = self.model.model
        positions = torch.arange(self.num_tokens, self.num_tokens + len(tokens))
        hidden = model.embed_tokens(torch.tensor(tokens))
        cos, sin = model.rotary_emb(hidden[None], positions[None])
        for index, layer in enumerate(model.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attention(index, layer.self_attn, normed, cos[0], sin[0])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            self.add(index, positions.tolist())
        self.num_tokens += len(tokens)
        return model.norm(hidden)

    def add(self, layer: int, positions: list[int]) -> None:
        """Tokens at these positions have come into a layer."""
        self.positions[layer] += positions

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new entries [heads, tokens, dim]; returns all, as attention reads them."""
        self.keys[layer] = torch.cat([self.keys[layer], keys], 1)
        self.values[layer] = torch.cat([self.values[layer], values], 1)
        return self.keys[layer], self.values[layer]

    def see(self, layer: int, query: torch.Tensor, weights: torch.Tensor) -> None:
        """Queries [heads, tokens, dim] and what they gave to the entries [heads, tokens, kept]."""

    def drop(self) -> None:
        """Drops what the rule says must be gone after the tokens so far."""
        for layer, kept in enumerate(self.positions):
            evicted = self.rule.num_evicted(layer, self.num_tokens, self.start)
            surplus = len(kept) - (self.num_tokens - evicted)
            if surplus == 0:
                continue
            oldest = [i for i, position in enumerate(kept) if position >= self.rule.num_sinks]
            gone = set(oldest[:surplus])
            left = [i for i in range(len(kept)) if i not in gone]
            self.positions[layer] = [kept[i] for i in left]
            self.keys[layer] = self.keys[layer][:, left]
            self.values[layer] = self.values[layer][:, left]

    def restart(self, tokens: Tokens) -> None:
        """Begins anew with a prefix hit of these tokens: raw entries, nothing dropped."""
        assert len(tokens) < self.start
        self.clear()
        if tokens:
            self.process(tokens)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary]."""
        return self.model.lm_head(hidden)

    def _attention(
        self, index: int, module: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        num_new = len(hidden)

        def heads(projection: Any) -> torch.Tensor:  # [heads, tokens, dim]
            return projection(hidden).view(num_new, -1, module.head_dim).transpose(0, 1)

        query = rotate(heads(module.q_proj), cos, sin)
        new_keys = rotate(heads(module.k_proj), cos, sin)
        new_values = heads(module.v_proj)
        keys, values = self.extend(index, new_keys, new_values)
        group = len(query) // len(keys)  # query heads per KV head
        scores = query @ keys.repeat_interleave(group, 0).transpose(1, 2) * module.scaling
        # Everything that was held is visible to every new token; among themselves they are causal.
        num_held = keys.shape[1] - num_new
        hidden_from = torch.ones(num_new, keys.shape[1], dtype=torch.bool).triu(num_held + 1)
        weights = scores.masked_fill(hidden_from, -math.inf).softmax(-1)
        self.see(index, query, weights)
        output = weights @ values.repeat_interleave(group, 0)
        return module.o_proj(output.transpose(0, 1).reshape(num_new, -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [heads, tokens, dim], in the convention of Llama: halves, not pairs."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def load_model(path: Any) -> Any:
    """The model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def one_by_one(prompt_len: int, num_tokens: int) -> list[Chunk]:
    """Chunks of a request that is never interrupted: its prompt whole, then token by token."""
    ends = range(prompt_len, prompt_len + num_tokens)
    return [(0, prompt_len), *pairwise(ends)]


def reference_tokens(
    model: Any, prompt: Tokens, chunks: list[Chunk], rule: Rule, num_tokens: int
) -> Tokens:
    """Greedy tokens. A chunk that starts elsewhere than the last one ended is a preempted request
    coming back, or a first prefix hit."""
    tokens = list(prompt)
    sequence = Sequence_(model, rule, len(prompt))
    for start, end in chunks:
        if start != sequence.num_tokens:
            sequence.restart(tokens[:start])
        hidden = sequence.process(tokens[start:end])
        sequence.drop()
        if end == len(tokens):  # not while something is recomputed
            tokens.append(int(sequence.logits(hidden[-1]).argmax()))
        if len(tokens) == len(prompt) + num_tokens:
            break
    return tokens[len(prompt) :]
