"""The reference engine: a causal LM of transformers over explicit, contiguous caches.

Slow and plain, the definition that the engine on pages is compared with, and what evaluates
policies without vLLM. One sequence; the policy is applied directly:

    chunk of tokens -> attends to all that each layer holds and, causally, to itself
                    -> layers that hold more than their schedule says compact
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.core.schedule import Schedule
from paged_kv.eval.reference.attention import explicit, outside_window, plain
from paged_kv.eval.reference.compaction import compact
from paged_kv.eval.reference.layer import Layer, make_region
from paged_kv.eval.reference.layer_cache import Window
from paged_kv.eval.reference.packing import Packing
from paged_kv.hf import dispatch, seams
from paged_kv.hf.arguments import check_page_format
from paged_kv.kernels.operands import Terms
from paged_kv.model_rules import full_attention_layers, layer_windows
from paged_kv.plan import make_plan
from paged_kv.policies.base import Policy
from paged_kv.policies.region import Region
from paged_kv.store import query_gathering
from paged_kv.store.query_gathering import QueryGathering
from paged_kv.tiers.spill_memory import SpillSpace

Tensor = torch.Tensor


class ReferenceEngine(seams.Attends):
    """One sequence in a model under a policy.

    Args:
        model: a causal LM of transformers in float32. It is not changed.
        config: what each layer keeps.
        page_size: entries are dropped in multiples of it.
        prompt_len: without compress_prefill nothing is dropped before so many tokens.
        observe: last queries to remember, if more than the policy looks at: for forks.
        gathering: takes the queries, whether or not the policy reads their statistics: for forks,
            and to calibrate.
        scorers: policies that sum attention up beside the own one: for forks.

    Raises:
        ValueError: the budgets do not fit the model or the page size; the model is unsupported; or
            entries would be dropped under pressure only.
    """

    def __init__(
        self,
        model: Any,
        config: CompressionConfig,
        page_size: int = DEFAULT_PAGE_SIZE,
        prompt_len: int = 0,
        observe: int = 0,
        gathering: QueryGathering | None = None,
        scorers: Sequence[Policy] = (),
    ) -> None:
        text_config = model.config.get_text_config()
        if getattr(text_config, "num_kv_shared_layers", 0):
            raise ValueError("a model whose layers share their KV cache is not supported")
        dispatch.install()
        self.model = model
        self.page_size = page_size
        self.prompt_len = prompt_len
        self.num_tokens = 0
        self._rope = seams.rotary_of(model)
        self._num_layers = text_config.num_hidden_layers
        self._full = full_attention_layers(text_config, self._num_layers)  # only these have pages
        self._windows = layer_windows(text_config, self._num_layers)
        self._set_policy(config)
        self.gathering = gathering
        if gathering is None and self.policy is not None:
            found = query_gathering.source(self.policy)
            self.gathering = found if isinstance(found, QueryGathering) else None
        self._observed = max(observe, self.policy.observation_window if self.policy else 0)
        assert not (scorers and config.enabled), "a compaction would lose what others sum up"
        self._scorers |= {f"scores{n}": policy for n, policy in enumerate(_unlike(scorers))}
        check_page_format(config, text_config, page_size)
        formats = layer_formats(config.page_format, self._num_layers)
        self.layers = [
            Layer(
                index,
                Window(self._observed),
                Packing(name if index in self._full else NATIVE, config.residual_pages, page_size),
            )
            for index, name in enumerate(formats)
        ]

    def _set_policy(self, config: CompressionConfig) -> None:
        self.policy: Policy | None = None
        self._reader: str | None = None  # the policy's name, if it reads RoPE
        self._space: SpillSpace | None = None
        if config.spill:
            budgets = config.spill_budget, config.spill_host_budget
            self._space = SpillSpace(*budgets, config.spill_dir)
        self._scorers: dict[str, Policy] = {}  # by field of the layers' caches
        self.schedules: list[Schedule | None] = [None] * self._num_layers
        if config.waits_for_pressure:
            raise ValueError("start pressure needs a pool of pages; the reference engine has none")
        if config.enabled:
            decoder = self.model.config.get_text_config()
            config = config.settled(self.model.name_or_path, False, decoder)
            self.policy = config.create_policy()
            if "scores" in self.policy.reads:
                self._scorers = {"scores": self.policy}
            self._reader = config.policy if "rotary" in self.policy.reads else None
            plan = make_plan(config, self.page_size, self._num_layers, self._full)
            self.schedules = [plan.schedule(layer) for layer in range(self._num_layers)]

    @property
    def num_kept(self) -> list[int]:
        """Entries held, by layer: of those with a sliding window, what a query can still see."""
        pairs = zip(self._sizes(), self._windows, strict=True)
        return [min(size, window or size) for size, window in pairs]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held, as pages would store them."""
        return sum(
            layer.packing.num_bytes(*(layer.cache[part][:, -kept:] for part in ("keys", "values")))
            for layer, kept in zip(self.layers, self.num_kept, strict=True)
        )

    def _sizes(self) -> list[int]:
        return [layer.cache.size for layer in self.layers]

    def drops_at(self, num_tokens: int) -> bool:
        """Whether any layer drops something when this many tokens are processed, one by one."""
        before, after = num_tokens - 1, num_tokens
        return any(
            schedule.evicted(after, self.prompt_len) > schedule.evicted(before, self.prompt_len)
            for schedule in set(self.schedules)
            if schedule is not None
        )

    @torch.inference_mode()
    def process(self, tokens: Sequence[int], compact: bool = True) -> Tensor:
        """Takes the next chunk of tokens; then every layer whose schedule says so compacts.

        Args:
            tokens: at least one.
            compact: False leaves it to a later call, or to `compact`.

        Returns:
            the last hidden states [tokens, hidden]; see logits.
        """
        return step([self], [tokens], compact)[0]

    def begin(self, num_new: int) -> Tensor:
        """int64 [num_new]: the positions of the next tokens, which are now on their way."""
        end = self.num_tokens + num_new
        self._before, self._next_rope = self._sizes(), self._rope.after(end, self._reader)
        # Once for all layers: 3 % of the time where many engines decode.
        self._positions = torch.arange(self.num_tokens, end, device=self.model.device)
        one, zero = self._positions.new_tensor([[[1]], [[0]]], dtype=torch.float32)
        self._fields = {"positions": self._positions[None], "weights": one}
        self._fields |= dict.fromkeys(("scores", *self._scorers), zero)
        return self._positions

    def end(self, num_new: int) -> None:
        """The layers have taken them. Raises ValueError if they have not."""
        if self._sizes() != [size + num_new for size in self._before]:
            raise ValueError(
                f"{type(self.model).__name__} does not compute its attention through "
                "transformers' AttentionInterface"
            )
        self.num_tokens, self._rope = self.num_tokens + num_new, self._next_rope
        if self.gathering is not None:
            self.gathering.end_step(num_new)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocabulary] of hidden states [n, hidden]."""
        return seams.logits_of(self.model, hidden)

    def fork(self, config: CompressionConfig) -> ReferenceEngine:
        """A copy that goes on under another config: one prompt can serve many policies.

        Pages stay as they are: both configs have the same page format and residual.

        Raises:
            ValueError: the new policy needs what this engine did not record (scores, queries).
        """
        other = copy(self)
        other._set_policy(config)
        new = other.policy
        gathers = isinstance(query_gathering.source(new), QueryGathering)
        scores = "scores"
        if self.num_tokens and new is not None:
            if "scores" in new.reads:
                known = {policy.scores_key: name for name, policy in self._scorers.items()}
                if new.scores_key not in known:
                    raise ValueError(f"{config.policy} accumulates scores: it must see every token")
                scores = known[new.scores_key]
            if new.observation_window > self._observed:
                raise ValueError(
                    f"{config.policy} looks at {new.observation_window} queries, but only "
                    f"{self._observed} were recorded: raise observe"
                )
            if gathers and not self.gathering:
                raise ValueError(f"{config.policy} has no statistics of queries: give a gathering")
        other.gathering = deepcopy(self.gathering) if gathers or new is None else None
        other.layers = [layer.copy(scores) for layer in self.layers]
        return other

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        sliding_window: int | None,
    ) -> Tensor:
        """Called by the model in each layer; see paged_kv.hf.seams.Attends."""
        state = self.layers[layer]
        state.terms, cache, packing = terms, state.cache, state.packing
        num_new = query.shape[1]
        stored = dict(zip(("keys", "values"), packing.store(key, value), strict=True))
        cache.append(num_new, **stored, **self._fields)
        keys, values = (
            packing.attended(name, cache[name], self.num_tokens + num_new) for name in stored
        )
        state.window.append(query, self.num_tokens)
        self._gather(layer, query, key, terms)
        bias = outside_window(sliding_window, num_new, cache.size, key.device)
        if self._scorers or not terms.is_plain:
            states = query, keys, values, self._positions
            return explicit(cache, *states, terms, bias, self._scorers)
        return plain(query, keys, values, terms.scale, bias)

    def _gather(self, layer: int, query: Tensor, key: Tensor, terms: Terms) -> None:
        gathering, rope = self.gathering, self._next_rope
        if gathering is not None and not gathering.is_complete and layer in self._full:
            new = query.transpose(0, 1), key.transpose(0, 1), self._positions
            gathering.add(layer, *new, rope(), terms.scale)

    @torch.inference_mode()
    def compact(self) -> None:
        """Every layer that holds more than its schedule says drops or merges the surplus."""
        due = []
        for layer, schedule in zip(self.layers, self.schedules, strict=True):
            if schedule is None:
                continue
            evicted = schedule.evicted(self.num_tokens, self.prompt_len)
            surplus = layer.cache.size - (self.num_tokens - evicted)
            if surplus > 0:
                due.append((layer, surplus))
        if due:
            assert self.policy is not None
            rope, space = self._rope, self._space
            compact(self.policy, due, self.num_tokens, rope, self.gathering, space)

    def region(
        self, layers: Sequence[Layer], num_losers: int, reads: frozenset[str], window: int = 0
    ) -> Region:
        """What these layers, which are alike, hold; see make_region."""
        return make_region(layers, self.num_tokens, num_losers, reads, window, self._rope)


@torch.inference_mode()
def step(
    engines: Sequence[ReferenceEngine], tokens: Sequence[Sequence[int]], compact: bool = True
) -> Tensor:
    """Takes the next chunk of each engine's tokens, in one pass: weights are read once.

    Args:
        engines: of one model.
        tokens: of each engine, all of one length.
        compact: see ReferenceEngine.process.

    Returns:
        the last hidden states [engines, tokens, hidden]; see ReferenceEngine.logits.
    """
    model, num_new = engines[0].model, len(tokens[0])
    ids = torch.tensor([list(row) for row in tokens], dtype=torch.int64, device=model.device)
    positions = torch.stack([engine.begin(num_new) for engine in engines])
    inputs = {"input_ids": ids, "position_ids": positions, seams.ENGINE: list(engines)}
    output = model.base_model(**inputs, use_cache=False)
    for engine in engines:
        engine.end(num_new)
        if compact:
            engine.compact()
    hidden: Tensor = output.last_hidden_state
    return hidden


def _unlike(policies: Sequence[Policy]) -> list[Policy]:
    """One of those for whom scores mean the same, with or without spill."""
    return list({policy.scores_key: policy for policy in policies}.values())
