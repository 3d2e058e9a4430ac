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
import numpy.typing as npt
import torch

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import FORMATS, NATIVE, layer_formats
from paged_kv.hf import row_compaction
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry, PackedArena
from paged_kv.hf.groups import layer_groups
from paged_kv.hf.layer_step import LayerStep
from paged_kv.hf.marks import Marks, check_crop, remove
from paged_kv.hf.modes import keeps
from paged_kv.hf.observed import QueryRing
from paged_kv.hf.packed_step import PackedStep
from paged_kv.hf.paged_attention import Terms
from paged_kv.hf.pool import PagePool
from paged_kv.hf.providers import Provider
from paged_kv.hf.residual import Residual
from paged_kv.hf.rope import Rope
from paged_kv.hf.spilled import SpilledRows
from paged_kv.hf.stats import CacheStats, Counters, snapshot
from paged_kv.hf.step import Step
from paged_kv.hf.tables import PageTables

Tensor = torch.Tensor
NEVER = 1 << 60  # a prompt's length while its end is not known
MAX_DRAFT = 256  # passes after which no crop is waited for: nobody guesses so many tokens


class Sequences:
    """Rows of one cache, in the layers that it holds.

    Args:
        compression: what each layer keeps.
        layers: indices in the model of the layers held here.
        num_layers: of the model.
        pool: where pages come from.
        is_private: whether no other cache uses the pool, but for copies of this one.
        provider: of attention in steps of one token; None: SDPA.

    Raises:
        ValueError: the budgets do not fit the model or the page size; a file of page formats is
            not one, or not of this model.
    """

    def __init__(
        self,
        compression: CompressionConfig,
        layers: Sequence[int],
        num_layers: int,
        pool: PagePool,
        is_private: bool,
        provider: Provider | None = None,
    ) -> None:
        self.pool, self.is_private, self.provider = pool, is_private, provider
        self.layers = np.array(layers, dtype=np.int64)
        self.index = {layer: index for index, layer in enumerate(layers)}
        self.policy = compression.create_policy() if compression.enabled else None
        self.compression, self.compress_prefill = compression, compression.compress_prefill
        self.page_format = compression.page_format
        self.formats = [self.page_format] * len(layers)
        if self.page_format not in FORMATS:  # a file that has them by layer
            by_layer = layer_formats(self.page_format, num_layers)
            self.formats = [by_layer[layer] for layer in layers]
        self.residual_pages = compression.residual_pages
        self.groups = layer_groups(
            compression, pool.page_size, self.layers, num_layers, self.formats
        )
        self.rotary: Rope | None = None  # the model's, for what the rows hold
        self.waits_for_crop = False  # tokens of a step are not final before crop
        self.num_passes = 0  # since the last crop
        self.clear()

    def clear(self) -> None:
        """No rows; nothing is remembered. The pages must have been released."""
        num_layers = len(self.layers)
        window = self.policy.observation_window if self.policy else 0
        self.num_tokens = np.zeros(0, dtype=np.int64)
        self.prompt_lens = np.zeros(0, dtype=np.int64)
        self.size = np.zeros((num_layers, 0), dtype=np.int64)  # entries
        self.settled = np.zeros(0, dtype=np.int64)  # tokens that no crop can take back
        grows = [one.schedule is None or one.schedule.numerator > 0 for one in self.groups]
        self.tables = PageTables(self.pool, self.formats, self.is_private, not any(grows))
        self.residual = Residual(num_layers, self.residual_pages, self.pool.page_size)
        self.ring, self.marks = QueryRing(num_layers, window), Marks()
        self.spilled = SpilledRows(self.compression, [one.layers for one in self.groups])
        self.terms: list[Terms] = [Terms(1.0)] * num_layers
        self.counters = Counters()
        self.step: Step | None = None
        self.knows_prompts = False
        self.is_late = False  # a compaction was put off

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return len(self.num_tokens)

    @property
    def reads_scores(self) -> bool:
        """Whether each step's attention is added up."""
        return self.policy is not None and "scores" in self.policy.reads

    @keeps
    def add_rows(self, num_rows: int, prompt_lens: Sequence[int] | None = None) -> None:
        """Empty rows at the end.

        Args:
            num_rows: how many.
            prompt_lens: tokens before which nothing is dropped (without compress_prefill); None: a
                prompt is what comes in steps of several tokens.
        """
        self.knows_prompts = prompt_lens is not None
        lens = [NEVER] * num_rows if prompt_lens is None else list(prompt_lens)
        self.num_tokens = np.pad(self.num_tokens, (0, num_rows))
        self.settled = np.pad(self.settled, (0, num_rows))
        self.prompt_lens = np.append(self.prompt_lens, np.array(lens, dtype=np.int64))
        self.size = np.pad(self.size, ((0, 0), (0, num_rows)))
        for rows in (self.tables, self.ring, self.residual, self.spilled):
            rows.add_rows(num_rows)

    @keeps
    def select_rows(self, indices: Sequence[int]) -> None:
        """Row i is what row indices[i] was: reorders, repeats and drops rows."""
        assert self.step is None, "a step has not ended"
        index = np.asarray(indices, dtype=np.int64)
        self.num_tokens, self.prompt_lens = self.num_tokens[index], self.prompt_lens[index]
        self.size, self.settled = self.size[:, index], self.settled[index]
        for rows in (self.tables, self.ring, self.residual, self.spilled, self.marks):
            rows.select_rows(index)

    def release(self) -> None:
        """Gives all pages back; the rows are gone."""
        self.step = None
        self.select_rows([])
        self.clear()
        if self.is_private and not self.pool.num_held:  # copies may hold some
            self.pool.free_memory()

    def rope_after(self, length: int) -> Rope | None:
        """What rows hold keys of after a forward pass over so many tokens; see Rope.after."""
        reads = self.policy is not None and "rotary" in self.policy.reads
        reader = self.compression.policy if reads else None
        return None if self.rotary is None else self.rotary.after(length, reader)

    @keeps
    def begin(self, counts: Int64s, geometry: Geometry) -> None:
        """A forward pass begins; counts [rows]: new tokens of each row.

        Raises:
            PoolFull: nothing has changed.
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
        self._prompt_ends(counts)
        self.marks.note(self, counts)
        need = -(-(self.size + counts) // self.pool.page_size) - self.tables.count
        copies = self._written(counts)
        self.pool.check(
            int(need.sum() + copies.sum()),
            f"a step of {counts.sum()} tokens in {len(self.layers)} layers and {self.num_rows} "
            "sequences",
        )
        self.tables.own(copies)
        self.tables.extend(need)
        self.ring.note(self.num_tokens, counts)
        if self.residual_pages:
            self.residual.note(self.num_tokens, counts)
        self.step = Step(self.tables, self.size, self.num_tokens, counts)
        self.counters.note_bytes(self.tables.num_bytes[0] + self.residual.num_bytes)

    def _written(self, counts: Int64s) -> npt.NDArray[np.bool_]:
        """bool [layers, rows, width]: shared pages that a step writes to."""
        shared = self.tables.shared()
        if self.reads_scores:  # each page of a row
            return shared & (counts[:, None] > 0)
        last = np.arange(shared.shape[2]) == (self.tables.count - 1)[..., None]
        is_partial = (counts > 0) & (self.size % self.pool.page_size > 0)
        return shared & last & is_partial[..., None]

    def bind(self, geometry: Geometry) -> None:
        """What keys and values look like. Raises ValueError: see PagePool.arena."""
        if not self.tables.parts:
            self.tables.bind(geometry)
            if self.residual_pages:
                self.residual.bind(geometry)
            names = {"positions"} if self.policy else set()
            reads = self.policy.reads if self.policy else frozenset()
            for arena, _ in self.tables.parts:
                arena.need_side(names | (set(reads) & {"weights", "scores"}))

    @property
    def geometry(self) -> Geometry:
        """What keys and values look like; a step has begun before."""
        return self.tables.parts[0].arena.geometry._replace(page_format=NATIVE)

    def _prompt_ends(self, counts: Int64s) -> None:
        """A step of several tokens is a prompt's; one of one token ends it: then it compacts."""
        if self.knows_prompts or self.compress_prefill:
            late = self.is_late
        elif counts.max(initial=0) > 1:
            self.prompt_lens = np.full_like(self.prompt_lens, NEVER)
            return
        else:
            late = self.is_late or bool((self.prompt_lens == NEVER).any())
            self.prompt_lens = np.zeros_like(self.prompt_lens)
        if late and not (self.waits_for_crop and self.num_passes <= MAX_DRAFT):
            self.is_late = True  # until it is done
            self.compact(has_begun=True)
            self.is_late = False

    @property
    def _device(self) -> torch.device:
        return self.tables.parts[0].arena.geometry.device

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Stores a layer's new entries and attends to all that each row holds.

        Args:
            layer: index in the model.
            query: [rows, heads, q, head_dim], after RoPE; all rows have q new tokens.
            key: [rows, kv_heads, q, head_dim].
            value: [rows, kv_heads, q, size].
            terms: see Terms.

        Returns:
            [rows, heads, q, size].
        """
        flat = key.transpose(0, 1).flatten(1, 2), value.transpose(0, 1).flatten(1, 2)
        return self._enter(layer, terms, *flat).attend(0, query, key, value)

    def attend_ragged(
        self,
        layer: int,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        terms: Terms,
    ) -> list[Tensor]:
        """attend for rows with different numbers of new tokens, which may be 0.

        Args:
            layer: index in the model.
            queries: of each row, [heads, tokens, head_dim].
            keys: of each row, [kv_heads, tokens, head_dim].
            values: of each row, [kv_heads, tokens, size].
            terms: see Terms.

        Returns:
            of each row, [heads, tokens, size].
        """
        run = self._enter(layer, terms, torch.cat(list(keys), 1), torch.cat(list(values), 1))
        return run.attend_ragged(queries, keys, values)

    @keeps
    def _enter(self, layer: int, terms: Terms, keys: Tensor, values: Tensor) -> LayerStep:
        """A layer attends in this step; its new entries are stored, [kv_heads, tokens, size]."""
        assert self.step is not None, "no step has begun"
        index = self.index[layer]
        self.terms[index] = terms._replace(bias=None)  # that is of this step, masks and all
        self.step.store(index, keys, values)
        if not isinstance(self.tables.arena(index), PackedArena):
            return LayerStep(self, index, terms)
        if self.residual_pages:
            self.residual.write(index, keys, values)
        return PackedStep(self, index, terms)

    def end(self) -> None:
        """The step's tokens are held from now on; then what is due compacts."""
        step = self.step
        assert step is not None, "no step has begun"
        assert len(step.done) == len(self.layers), "a layer has not attended"
        self.size += step.counts
        self.num_tokens += step.counts
        self.step = None
        self.is_late = self.waits_for_crop
        self.num_passes += 1
        if not self.waits_for_crop:
            self.compact()

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
        check_crop(self, count)
        self.num_passes = 0
        if count:
            remove(self, count)
        if not self.waits_for_crop:
            return
        self.is_late = False
        if not self.knows_prompts:
            self.prompt_lens = np.zeros_like(self.prompt_lens)
        self.compact()

    @keeps
    def compact(self, has_begun: bool = False) -> None:
        """Every layer that holds more of a row than its schedule says gives up the surplus.

        Args:
            has_begun: whether a next step has begun; without it the rows are not as they were.
        """
        for schedule, layers in self.groups:
            if schedule is None:
                continue
            evicted = schedule.evicted(self.num_tokens, self.prompt_lens)
            surplus = self.size[layers[0]] - (self.num_tokens - evicted)
            rows = np.flatnonzero(surplus > 0)
            if rows.size:
                with torch.autocast(self._device.type, enabled=False):
                    row_compaction.run(self, layers, rows, surplus[rows])
                self.tables.trim()
                self.settled[rows] = self.num_tokens[rows] + has_begun
                self.marks.keep(self.settled, self.num_tokens)

    def stats(self) -> CacheStats:
        """What is held, and what was given up."""
        return snapshot(self)


def interrupted() -> ValueError:
    """What a cache says in which some layers have seen more than others."""
    return ValueError(
        "an error interrupted the last forward pass of this cache; call reset() (it gives its "
        "pages back) or use a new one"
    )
