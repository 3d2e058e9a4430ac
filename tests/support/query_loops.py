"""Statistics of queries in plain loops over numpy arrays; shares no code with paged_kv."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import query_files
import torch
from policy_heads import Head
from policy_scores import rotation
from reference_loop import Rule, Sequence_

from paged_kv.store.query_gathering import CONTEXT, DISTANCE, FIRST, NUM_KEYS  # numbers only

Statistics = dict[str, np.ndarray]


class Rope(NamedTuple):
    """RoPE as a model declares it.

    Args:
        frequencies: [rotary_dim / 2].
        scale: of cos and sin.
        neox: whether dimensions i and i + rotary_dim / 2 turn together.
    """

    frequencies: np.ndarray
    scale: float = 1.0
    neox: bool = True

    def matrix(self, position: int, size: int) -> np.ndarray:
        """What turns a query or key [size] to its position."""
        angles = position * self.frequencies[None]
        cos, sin = self.scale * np.cos(angles), self.scale * np.sin(angles)
        head = Head([0], 1, 0, 0, 0, cos=cos, sin=sin, neox=self.neox)
        return rotation(head, 0, size)


def gathered(
    queries: np.ndarray,
    keys: np.ndarray,
    positions: list[int],
    rope: Rope,
    scale: float,
    num_tokens: int,
) -> Statistics:
    """Of one layer: linear, quadratic [kv_heads, group, d], normaliser [kv_heads, group].

    Args:
        queries: [tokens, heads, d], after RoPE.
        keys: [tokens, kv_heads, d], after RoPE.
        positions: of the tokens.
        rope: see Rope.
        scale: of the logits.
        num_tokens: that are going to be looked at: says which keys count.
    """
    heads, size = queries.shape[1:]
    kv_heads = keys.shape[1]
    back = [np.linalg.inv(rope.matrix(position, size)) for position in positions]
    late = [at for at, position in enumerate(positions) if position >= FIRST]
    mean_turn = sum(rope.matrix(distance, size) for distance in range(DISTANCE)) / DISTANCE
    key_scale = rope.matrix(0, size)  # keys are turned, too: of that only the scale is left
    every = math.ceil(num_tokens / NUM_KEYS)
    some = [at for at in late if at % every == 0]
    names = "linear", "quadratic", "normaliser"
    result: dict[str, list[Any]] = {name: [] for name in names}
    for head in range(heads):
        raw = np.stack([back[at] @ queries[at, head] for at in late])
        mean, variance = raw.mean(0), raw.var(0)
        linear = scale * key_scale @ mean_turn @ mean
        quadratic = scale**2 / 2 * spread(variance, key_scale @ mean_turn, rope)
        own = [back[at] @ keys[at, head // (heads // kv_heads)] for at in some]
        contexts: dict[int, list[Any]] = {}
        for at, key in zip(some, own, strict=True):
            share = np.exp(linear @ key + quadratic @ key**2)
            contexts.setdefault(at // every // math.ceil(CONTEXT / every), []).append(share)
        normaliser = sum(
            len(shares) / len(some) * np.log(sum(shares) * CONTEXT / len(shares))
            for shares in contexts.values()
        )
        for name, part in zip(names, (linear, quadratic, normaliser), strict=True):
            result[name].append(part)
    return {
        name: np.array(parts).reshape(kv_heads, heads // kv_heads, *np.shape(parts[0]))
        for name, parts in result.items()
    }


def spread(variance: np.ndarray, turn: np.ndarray, rope: Rope) -> np.ndarray:
    """Variances that a pair has alike, after a turn that makes it shorter."""
    result, half = variance.copy(), len(rope.frequencies)
    for i in range(half):
        a, b = (i, i + half) if rope.neox else (2 * i, 2 * i + 1)
        alike = (variance[a] + variance[b]) / 2
        shorter = turn[a, a] ** 2 + turn[a, b] ** 2
        result[a] = result[b] = alike * shorter
    return result


class Watching(Sequence_):
    """The reference loop without any dropping, which remembers queries and keys."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, Rule([None] * model.config.num_hidden_layers), 0)
        self.queries: list[list[torch.Tensor]] = [[] for _ in self.keys]

    def see(self, layer: int, query: torch.Tensor, weights: torch.Tensor) -> None:
        self.queries[layer].append(query)


def of_model(model: Any, texts: list[list[int]], num_tokens: int) -> Statistics:
    """Of all layers of a Llama that has read these texts, one after the other."""
    loops = []
    for text in texts:
        loops.append(Watching(model))
        loops[-1].process(text)
    embedding = model.model.rotary_emb
    rope = Rope(embedding.inv_freq.double().numpy(), float(embedding.attention_scaling))
    positions = [position for text in texts for position in range(len(text))]
    layers = []
    for index, layer in enumerate(model.model.layers):
        queries = torch.cat([torch.cat(loop.queries[index], 1) for loop in loops], 1)
        keys = torch.cat([loop.keys[index] for loop in loops], 1)
        states = (part.transpose(0, 1).double().numpy() for part in (queries, keys))
        scale = layer.self_attn.scaling
        layers.append(gathered(*states, positions, rope, scale, num_tokens))
    return {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}


def assert_same(found: Any, expected: Statistics, tolerance: float = 1e-4) -> None:
    """found: Expected, or the same by name. Numbers are compared as parts of the largest."""
    parts = found if isinstance(found, dict) else found._asdict()
    assert set(parts) == set(expected) == set(query_files.statistics((1, 1, 1, 2)))
    for name, wanted in expected.items():
        part = np.asarray(parts[name], dtype=np.float64)
        assert part.shape == wanted.shape, name
        np.testing.assert_allclose(
            part, wanted, rtol=tolerance, atol=tolerance * abs(wanted).max(), err_msg=name
        )
