"""The rows of a cache: what each of them holds in each layer. Data only; see sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import FORMATS, NATIVE, layer_formats
from paged_kv.core.schedule import NEVER
from paged_kv.hf.allocator import Int64s
from paged_kv.hf.arena import Geometry
from paged_kv.hf.counters import Counters
from paged_kv.hf.groups import layer_groups
from paged_kv.hf.modes import keeps
from paged_kv.hf.pool import PagePool
from paged_kv.hf.providers import Provider
from paged_kv.hf.rings import CacheQueries, CacheResidual
from paged_kv.hf.rope import Rope
from paged_kv.hf.spilled import RowStores
from paged_kv.hf.step import Step
from paged_kv.hf.tables import PageTables
from paged_kv.kernels.operands import Terms
from paged_kv.store import query_gathering

_BY_ROW = ("num_tokens", "prompt_lens", "pressed", "settled")  # int64 [rows]


class Rows:
    """Rows of one cache, in the layers that it holds.

        num_tokens    int64 [rows], tokens processed
        prompt_lens   int64 [rows], tokens of a prompt; NEVER until its end, if that is not known
        pressed       int64 [rows], tokens at which pages ran out; NEVER until then, 0 if a row is
                      held to its budget however many there are
        settled       int64 [rows], tokens that no crop can take back
        size          int64 [layers, rows], entries
        tables        which pages they are in
        ring          the last queries of each row, residual its newest pages once more
        spilled       what it has on lower tiers
        terms         how each layer computes attention, as soon as it has
        step          the forward pass that has begun and not ended

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
        self.may_shrink = True  # nothing is under way that a compaction would disturb
        self.num_passes = 0  # since the last crop
        self.clear()

    def clear(self) -> None:
        """No rows; nothing is remembered. The pages must have been released."""
        num_layers = len(self.layers)
        window = self.policy.observation_window if self.policy else 0
        self.num_tokens = np.zeros(0, dtype=np.int64)
        self.prompt_lens = np.zeros(0, dtype=np.int64)
        self.pressed = np.zeros(0, dtype=np.int64)
        self.settled = np.zeros(0, dtype=np.int64)
        self.size = np.zeros((num_layers, 0), dtype=np.int64)
        grows = [group.schedule is None or group.schedule.numerator > 0 for group in self.groups]
        self.tables = PageTables(self.pool, self.formats, self.is_private, not any(grows))
        self.ring = CacheQueries(num_layers, window)
        self.residual = CacheResidual(num_layers, self.residual_pages, self.pool.page_size)
        space = self.compression.spill_space()
        self.spilled = RowStores(space, [group.layers for group in self.groups])
        self.terms: list[Terms] = [Terms(1.0)] * num_layers
        self.counters = Counters()
        self.query_statistics = query_gathering.source(self.policy)
        self.step: Step | None = None
        self.knows_prompts = False
        self.is_late = False  # a compaction was put off
        self.is_torn = False  # one was interrupted: entries have moved that the tables still name

    @property
    def num_rows(self) -> int:
        """Sequences."""
        return len(self.num_tokens)

    @property
    def starts(self) -> Int64s:
        """int64 [rows]: tokens from which each is held to its budget, or NEVER."""
        return np.maximum(self.prompt_lens, self.pressed)

    @property
    def reads_scores(self) -> bool:
        """Whether each step's attention is added up."""
        return self.policy is not None and "scores" in self.policy.reads

    @property
    def reads_rotary(self) -> bool:
        """Whether the policy undoes RoPE."""
        return self.policy is not None and "rotary" in self.policy.reads

    @property
    def geometry(self) -> Geometry:
        """What keys and values look like; a step has begun before."""
        return self.tables.parts[0].arena.geometry._replace(page_format=NATIVE)

    @property
    def device(self) -> torch.device:
        """Where the pages are; a step has begun before."""
        return self.tables.parts[0].arena.geometry.device

    def rope_after(self, length: int) -> Rope | None:
        """What rows hold keys of after a forward pass over so many tokens; see Rope.after."""
        reader = self.compression.policy if self.reads_rotary else None
        return None if self.rotary is None else self.rotary.after(length, reader)

    @keeps
    def add_rows(
        self,
        num_rows: int,
        prompt_lens: Sequence[int] | None = None,
        pressed: Sequence[int] | None = None,
    ) -> None:
        """Empty rows at the end.

        Args:
            num_rows: how many.
            prompt_lens: tokens of each prompt, before which nothing is dropped (without
                compress_prefill); None: a prompt is what comes in steps of several tokens.
            pressed: tokens at which pages are going to run out, if that is known: with
                start=pressure.
        """
        self.knows_prompts = prompt_lens is not None
        lens = [NEVER] * num_rows if prompt_lens is None else list(prompt_lens)
        waits = self.compression.waits_for_pressure
        when = list(pressed) if waits and pressed is not None else [NEVER * waits] * num_rows
        self.num_tokens = np.pad(self.num_tokens, (0, num_rows))
        self.settled = np.pad(self.settled, (0, num_rows))
        self.prompt_lens = np.append(self.prompt_lens, np.array(lens, dtype=np.int64))
        self.pressed = np.append(self.pressed, np.array(when, dtype=np.int64))
        self.size = np.pad(self.size, ((0, 0), (0, num_rows)))
        for rows in (self.tables, self.ring, self.residual, self.spilled):
            rows.add_rows(num_rows)

    @keeps
    def select_rows(self, indices: Sequence[int]) -> None:
        """Row i is what row indices[i] was: reorders, repeats and drops rows."""
        assert self.step is None, "a step has not ended"
        index = np.asarray(indices, dtype=np.int64)
        for name in _BY_ROW:
            setattr(self, name, getattr(self, name)[index])
        self.size = self.size[:, index]
        for rows in (self.tables, self.ring, self.residual, self.spilled):
            rows.select_rows(index)

    def bind(self, geometry: Geometry) -> None:
        """What keys and values look like. Raises ValueError: see PagePool.arena."""
        if not self.tables.parts:
            self.tables.bind(geometry)
            self.spilled.space = self.compression.spill_space(geometry.device.type == "cuda")
            if self.residual_pages:
                self.residual.bind_geometry(geometry)
            for part in self.tables.parts:
                part.arena.need_side(self.policy)

    def written(self, counts: Int64s) -> npt.NDArray[np.bool_]:
        """bool [layers, rows, width]: shared pages that a step writes to."""
        shared = self.tables.shared()
        if self.reads_scores:  # each page of a row
            return shared & (counts[:, None] > 0)
        last = np.arange(shared.shape[2]) == (self.tables.count - 1)[..., None]
        is_partial = (counts > 0) & (self.size % self.pool.page_size > 0)
        return shared & last & is_partial[..., None]
