"""The sequences of one cache: what each row holds in each layer, and the steps that change it.

A step is a forward pass of the model:

    begin(counts)            pages for the new tokens of every row, in all layers; or PoolFull
    attend(layer, q, k, v)   in each layer: stores the new entries, attends to all that is held
    end()                    the tokens count from now on; layers over their budget compact

The new entries of a row lie behind those that it holds. Until end() nothing that was held before
has changed, except scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paged_kv.core.schedule import NEVER
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry, PackedArena
from paged_kv.hf.compacted_rows import CompactedRows
from paged_kv.hf.layer_step import LayerStep
from paged_kv.hf.marks import check_crop, remove
from paged_kv.hf.modes import keeps
from paged_kv.hf.packed_step import PackedStep
from paged_kv.hf.paged_attention import Bias
from paged_kv.hf.stats import CacheStats, snapshot
from paged_kv.hf.step import Step, interrupted
from paged_kv.hf.tables import Bools
from paged_kv.kernels.operands import Terms
from paged_kv.store.query_gathering import QueryGathering

Tensor = torch.Tensor
MAX_DRAFT = 256  # passes after which no crop is waited for: nobody guesses so many tokens


class Sequences(CompactedRows):
    """Rows, and the steps that change them."""

    def release(self) -> None:
        """Gives all pages back; the rows are gone."""
        self.step = None
        self.select_rows([])
        self.clear()
        if self.is_private and not self.pool.num_held:  # copies may hold some
            self.pool.free_memory()

    @keeps
    def begin(self, counts: Int64s, geometry: Geometry) -> None:
        """A forward pass begins; counts [rows]: new tokens of each row.

        Raises:
            PoolFull: nothing has changed, but that rows may have shrunk.
            ValueError: the last step never ended, or these are keys of another model.
        """
        if self.step is not None:
            raise interrupted()
        self.bind(geometry)
        if self.geometry != geometry:
            raise ValueError(
                f"this cache holds {self.geometry}, but these keys and values are {geometry}: a "
                "cache serves one model, on one device, in one dtype; call reset()"
            )
        is_known = self.knows_prompts or self.compress_prefill
        is_prompt = not is_known and counts.max(initial=0) > 1
        if not is_prompt:
            self._prompt_ends(is_known)
        need, copies = self._find_room(counts)
        if is_prompt:
            self.prompt_lens = np.full_like(self.prompt_lens, NEVER)
        self.marks.note(self, counts)
        self.tables.own(copies)
        self.tables.extend(need)
        self.step = Step(self.tables, self.size, self.num_tokens, counts)
        self.step.plan_rings(self.ring, self.residual)
        self.counters.note_bytes(self.tables.num_bytes[0] + self.residual.num_bytes)

    def _find_room(self, counts: Int64s) -> tuple[Int64s, Bools]:
        """Of a step: new pages [layers, rows], shared ones [layers, rows, width] to copy.

        Raises:
            PoolFull: there is no room for them.
        """

        def find() -> tuple[Int64s, Bools]:
            need = -(-(self.size + counts) // self.pool.page_size) - self.tables.count
            return need, self.written(counts)

        self.pool.make_room(lambda: sum(int(part.sum()) for part in find()))
        need, copies = find()
        self.pool.check(
            int(need.sum() + copies.sum()),
            f"a step of {counts.sum()} tokens in {len(self.layers)} layers and {self.num_rows} "
            "sequences",
        )
        return need, copies

    def _prompt_ends(self, is_known: bool) -> None:
        """A step of several tokens is a prompt's; one of one token ends it: then it compacts.

        So does what was put off: since crop was waited for, or copies of pages found no room.
        """
        late = self.is_late
        if not is_known:
            late = late or bool((self.prompt_lens == NEVER).any())
            self.prompt_lens = np.zeros_like(self.prompt_lens)
        if late and not (self.waits_for_crop and self.num_passes <= MAX_DRAFT):
            self.is_late = True  # until it is done
            self.compact(has_begun=True)
            self.is_late = False

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        bias: Bias | None = None,
    ) -> Tensor:
        """Stores a layer's new entries and attends to all that each row holds.

        Args:
            layer: index in the model.
            query: [rows, heads, q, head_dim], after RoPE; all rows have q new tokens.
            key: [rows, kv_heads, q, head_dim].
            value: [rows, kv_heads, q, size].
            terms: see Terms.
            bias: of this step: masks and position biases; see LayerStep.

        Returns:
            [rows, heads, q, size].
        """
        flat = (part.transpose(0, 1).flatten(1, 2) for part in (query, key, value))
        return self._enter(layer, terms, bias, *flat).attend(0, query, key, value)

    def attend_ragged(
        self,
        layer: int,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        terms: Terms,
        bias: Bias | None = None,
    ) -> list[Tensor]:
        """attend for rows with different numbers of new tokens, which may be 0.

        Args:
            layer: index in the model.
            queries: of each row, [heads, tokens, head_dim].
            keys: of each row, [kv_heads, tokens, head_dim].
            values: of each row, [kv_heads, tokens, size].
            terms: see Terms.
            bias: of this step: masks and position biases; see LayerStep.

        Returns:
            of each row, [heads, tokens, size].
        """
        flat = (torch.cat(list(parts), 1) for parts in (queries, keys, values))
        layer_step = self._enter(layer, terms, bias, *flat)
        return layer_step.attend_ragged(queries, keys, values)

    @keeps
    def _enter(
        self,
        layer: int,
        terms: Terms,
        bias: Bias | None,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> LayerStep:
        """A layer attends in this step; its new entries, and last queries, are stored.

        Args:
            layer: index in the model.
            terms: see Terms.
            bias: see LayerStep.
            queries: [heads, tokens of all rows, head_dim].
            keys: [kv_heads, tokens of all rows, head_dim].
            values: [kv_heads, tokens of all rows, size].
        """
        assert self.step is not None, "no step has begun"
        index = self.index[layer]
        if index in self.step.done:  # of a forward pass in which a later layer failed
            raise interrupted()
        self.terms[index] = terms
        self.step.store(index, keys, values)
        if self.step.queries is not None:
            self.ring.write(index, queries.transpose(0, 1), self.step.queries)
        gathering = self.query_statistics
        if isinstance(gathering, QueryGathering) and not gathering.is_complete:
            assert self.rotary is not None, "the policy reads rotary"
            states = queries.transpose(0, 1), keys.transpose(0, 1)
            gathering.add(layer, *states, self.step.positions, self.rotary(), terms.scale)
        if not isinstance(self.tables.arena(index), PackedArena):
            return LayerStep(self, index, terms, bias)
        if self.step.newest is not None:
            new = keys.transpose(0, 1), values.to(keys.dtype).transpose(0, 1)
            self.residual.write(index, *new, self.step.newest)
        return PackedStep(self, index, terms, bias)

    def end(self) -> None:
        """The step's tokens are held from now on; then what is due compacts.

        Raises:
            ValueError: a layer has not attended; nothing has changed.
        """
        step = self.step
        assert step is not None, "no step has begun"
        step.check_done(self.layers)
        self.size += step.counts
        self.num_tokens += step.counts
        self.step = None
        if isinstance(self.query_statistics, QueryGathering):
            self.query_statistics.end_step(int(step.counts.sum()))
        self.is_late = self.waits_for_crop
        self.num_passes += 1
        if not self.waits_for_crop:
            self.compact_or_wait()

    @keeps
    def crop(self, count: int) -> None:
        """Every row loses its last `count` tokens.

        Where that was waited for, the others are final, and what is due compacts; what those tokens
        have overwritten (queries, scores, the residual) is lost. Otherwise all is as it was before
        them.

        Raises:
            ValueError: a row has fewer, or it cannot be as it was; nothing has changed.
        """
        assert self.step is None, "a step has not ended"
        if (self.num_tokens < count).any():
            raise ValueError(f"crop(-{count}): a sequence has {self.num_tokens.min()} tokens")
        check_crop(self, self.marks, count)
        self.num_passes = 0
        if count:
            self.may_shrink = False
            try:
                remove(self, self.marks, count)
            finally:
                self.may_shrink = True
        if not self.waits_for_crop:
            return
        self.is_late = False
        if not self.knows_prompts:
            self.prompt_lens = np.zeros_like(self.prompt_lens)
        self.compact_or_wait()

    def stats(self) -> CacheStats:
        """What is held, and what was given up."""
        return snapshot(self, self.marks.num_bytes)
