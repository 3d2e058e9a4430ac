"""Attention over packed pages by Triton: sizes, scratch memory and launches."""

from __future__ import annotations

from math import log2
from typing import Any, NamedTuple

import torch
import triton

from paged_kv.kernels.operands import Queries, Segment, Side, Terms
from paged_kv.kernels.triton.attention import rotate_kernel, segment_kernel
from paged_kv.kernels.triton.parts import part_layout
from paged_kv.kernels.triton.sums import combine_kernel, kept_kernel, score_kernel

Tensor = torch.Tensor
ROW_QUERIES = 16  # query heads of a program: the rows of a matrix instruction
CHUNK_QUERIES = 32  # the same when rows have many new tokens
CHUNK_SIZE = 128  # the largest head for which their states fit a program's registers
TILE_NUMBERS = 1 << 11  # keys of a program's step
WARPS = 4
PROGRAMS = 4  # per multiprocessor, so that memory is kept busy
MAX_SPLITS = 32  # of a row's entries
INTERPRETED = 4  # multiprocessors that Triton's interpreter is taken to have
MOST_KEPT = 1 << 28  # bytes of a segment's probabilities: 64 x 32,768 entries of 64 query heads
KEPT_ENTRIES = 256  # of a program that adds them


class _Kept(NamedTuple):
    """What a segment's entries get, until the sums are known; see segment_kernel."""

    shares: Tensor
    peaks: Tensor


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        output: Tensor,
        queries: Queries,
        segments: list[Segment],
        terms: Terms,
        weights: Tensor | None,
    ) -> None:
        self.states, self.starts = queries
        self.segments, self.terms, self.weights = segments, terms, weights
        self.num_rows = len(queries.starts) - 1
        self.num_tokens, self.num_heads = self.states.shape[:2]
        self.num_kv_heads = segments[0].blocks.shape[1]
        self.group = self.num_heads // self.num_kv_heads
        self.size = triton.next_power_of_2(max(self.states.shape[2], output.shape[2]))
        # 16-bit queries lose nothing in TF32, whose products are exact; three of them come near
        # to a product of float32, and take more registers.
        wide = self.states.dtype == torch.float32
        chunked = self.num_tokens > self.num_rows and self.size <= CHUNK_SIZE and not wide
        least = triton.next_power_of_2(self.group)
        self.num_queries = max(CHUNK_QUERIES if chunked else ROW_QUERIES, least)
        self.precision = "tf32x3" if wide else "tf32"
        self.options = {
            "num_warps": 2 * WARPS if wide or chunked else WARPS,
            "enable_fp_fusion": True,
        }
        self.tile = max(16, min(64, TILE_NUMBERS * (2 if wide else 1) // self.size))
        counts = [segment.counts for segment in segments]
        self.totals = counts[0] if len(counts) == 1 else counts[0] + counts[1]
        self.befores = [torch.zeros_like(counts[0]), counts[0]][: len(counts)]
        token_blocks = self.num_tokens // (self.num_queries // self.group) + self.num_rows
        self.grid = token_blocks, self.num_kv_heads
        self.splits = [self._num_splits(segment) for segment in segments]

    def _num_splits(self, segment: Segment) -> int:
        """As many as fill the GPU, and no more than there are steps in the longest row."""
        wanted = PROGRAMS * _multiprocessors(self.states.device)
        tiles = -(-segment.table.shape[1] * segment.layout.page_size // self.tile)
        return max(1, min(MAX_SPLITS, tiles, wanted // (self.grid[0] * self.grid[1])))

    def rotated(self, segment: Segment) -> Tensor:
        """The queries as the segment's keys need them."""
        codec = segment.layout.key
        if codec.rotation == 1:
            return self.states
        result = torch.empty(self.states.shape, dtype=torch.float32, device=self.states.device)
        rotate_kernel[(self.num_tokens, self.num_heads)](
            result,
            self.states,
            *self.states.stride()[:2],
            SIZE=codec.size,
            BLOCK=codec.rotation,
            enable_fp_fusion=True,
        )
        return result

    def arguments(self, number: int, states: Tensor) -> dict[str, Any]:
        """What segment_kernel and score_kernel both take."""
        first, segment = self.segments[0], self.segments[number]
        words = segment.blocks.view(torch.int32)
        terms, weights = self.terms, self.weights
        return {
            "states": states,
            "starts": self.starts,
            "words": words,
            "table": segment.table,
            "counts": segment.counts,
            "befores": self.befores[number],
            "totals": self.totals,
            "side_table": first.table,
            "weights": weights,
            "scale": terms.scale,
            "softcap": terms.softcap,
            "token_step": states.stride(0),
            "head_step": states.stride(1),
            "table_step": segment.table.stride(0),
            "page_step": words.stride(0),
            "block_head_step": words.stride(1),
            "side_step": first.table.stride(0),
            "side_page_step": 0 if weights is None else weights.stride(0),
            "side_head_step": 0 if weights is None else weights.stride(1),
            "KEY": part_layout(segment.layout, "key"),
            "SIDE_PAGE": first.layout.page_size,
            "GROUP": self.group,
            "QUERIES": self.num_queries,
            "ENTRIES": self.tile,
            "SOFTCAP": bool(terms.softcap),
            "PRECISION": self.precision,
            **self.options,
        }


def _kept(call: _Call, segment: Segment) -> _Kept | None:
    """Memory for probabilities, if to keep them costs less than to read the keys again.

    So it is for one new token per row. Of more, products with keys cost less than memory.
    """
    entries = segment.table.shape[1] * segment.layout.page_size
    # Less than a step of 16-bit queries is lost; the largest is 1, the smallest that counts 6e-8.
    half = call.states.dtype != torch.float32
    dtype = torch.float16 if half else torch.float32
    count = call.num_tokens * call.num_heads * entries
    if call.num_tokens > call.num_rows or count * dtype.itemsize > MOST_KEPT:
        return None
    shape, steps = (call.num_tokens, call.num_heads), -(-entries // call.tile)
    new = call.states.new_empty
    return _Kept(new((*shape, entries), dtype=dtype), new((*shape, steps), dtype=torch.float32))


def attend(
    output: Tensor, queries: Queries, segments: list[Segment], terms: Terms, side: Side
) -> None:
    """Attention of new tokens to all that their rows hold; see protocol.Kernels.

    One token per row, or chunks of many; one segment or two.
    """
    if not output.numel():
        return
    call = _Call(output, queries, segments, terms, side.weights)
    shared = [call.arguments(i, call.rotated(segment)) for i, segment in enumerate(segments)]
    adds = side.scores is not None
    keeps = [_kept(call, segment) if adds else None for segment in segments]
    parts = _segments(call, output.shape[2], shared, keeps)
    shape = call.num_tokens, call.num_heads
    log_totals = output.new_empty(shape, dtype=torch.float32) if adds else None
    combine_kernel[shape](
        output,
        log_totals,
        *parts,
        terms.sinks,
        call.splits[0],
        sum(call.splits),
        *output.stride()[:2],
        SIZE=output.shape[2],
        SPLITS=triton.next_power_of_2(sum(call.splits)),
        ROTATION=segments[0].layout.value.rotation,
        enable_fp_fusion=True,
    )
    if side.scores is not None:
        assert log_totals is not None
        for number, kept in enumerate(keeps):
            _add_scores(side.scores, side.decay, log_totals, call, number, kept, shared[number])


def _segments(
    call: _Call, size: int, shared: list[dict[str, Any]], keeps: list[_Kept | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """mixed [tokens, heads, splits, size], peaks and sums [tokens, heads, splits], all float32."""
    shape = call.num_tokens, call.num_heads, sum(call.splits)
    parts = [call.states.new_empty(part, dtype=torch.float32) for part in ((*shape, size), shape)]
    mixed, peaks, sums = *parts, torch.empty_like(parts[1])
    for number, segment in enumerate(call.segments):
        shares, steps = keeps[number] or (None, None)
        segment_kernel[(*call.grid, call.splits[number])](
            mixed,
            peaks,
            sums,
            kept=shares,
            kept_peaks=steps,
            kept_step=0 if shares is None else shares.shape[-1],
            kept_peak_step=0 if steps is None else steps.shape[-1],
            num_rows=call.num_rows,
            first_split=sum(call.splits[:number]),
            num_splits=call.splits[number],
            all_splits=shape[2],
            VALUE=part_layout(segment.layout, "value"),
            **shared[number],
        )
    return mixed, peaks, sums


def _add_scores(
    scores: Tensor,
    decay: float,
    log_totals: Tensor,
    call: _Call,
    number: int,
    kept: _Kept | None,
    arguments: dict[str, Any],
) -> None:
    """What a segment's entries got; from what was kept, or by reading the keys again."""
    segment = call.segments[number]
    most = segment.table.shape[1] * segment.layout.page_size
    block = call.tile if kept is None else KEPT_ENTRIES
    grid = -(-most // block), call.num_rows, call.num_kv_heads
    target = {
        "score_page_step": scores.stride(0),
        "score_head_step": scores.stride(1),
        "log_decay": log2(decay),
        "FADES": decay < 1,
    }
    if kept is None:
        score_kernel[grid](scores, log_totals, **target, **arguments)
        return
    same = "starts", "counts", "befores", "totals", "side_table", "side_step", "SIDE_PAGE", "GROUP"
    kept_kernel[grid](
        scores,
        log_totals,
        *kept,
        kept_step=kept.shares.shape[-1],
        kept_peak_step=kept.peaks.shape[-1],
        STEP=call.tile,
        ENTRIES=KEPT_ENTRIES,
        **{name: arguments[name] for name in same},
        **target,
    )


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count
