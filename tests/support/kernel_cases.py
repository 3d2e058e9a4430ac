"""Random cases for the kernels over packed pages, whichever implementation runs them.

Blocks begin as bytes 0xff: NaN in every float format and every scale, so that whoever reads a slot
that holds nothing shows it. Unused places of a table hold what is no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from paged_kv.core.page_formats import FORMATS
from paged_kv.kernels import packed_reference
from paged_kv.kernels.operands import Queries, Segment, Side, Terms
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.quant import make_layout

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 64, 80, 128)
PAGE_SIZES = (16, 32, 48, 128)
NO_PAGES = (-1, -(2**31), 2**31 - 1)


class Row(NamedTuple):
    """A sequence: new tokens, entries it holds (the tokens' included), how many of them in the
    second segment."""

    tokens: int
    entries: int
    residual: int = 0


class Case(NamedTuple):
    """An attention to compute. dtype is the queries' and the native pages'."""

    rows: tuple[Row, ...] = (Row(1, 40),)
    page_format: str = "native"
    dtype: torch.dtype = torch.float32
    key_size: int = 64
    value_size: int = 64
    page_size: int = 16
    kv_heads: int = 2
    group: int = 3
    softcap: float = 0.0
    sinks: bool = False
    weights: bool = False
    scores: bool = False
    decay: float = 1.0
    seed: int = 0

    @property
    def layout(self) -> PageLayout:
        return make_layout(
            self.page_format, self.dtype, self.key_size, self.value_size, self.page_size
        )


class Problem(NamedTuple):
    """A case's operands."""

    queries: Queries
    segments: list[Segment]
    terms: Terms
    side: Side
    value_size: int


def entry_counts(page_size: int, most: int) -> st.SearchStrategy[int]:
    """Entries of a row: mostly about a page's end."""
    edges = [n for p in (1, 2, 5) for n in (p * page_size - 1, p * page_size, p * page_size + 1)]
    return st.sampled_from([0, 1, *(n for n in edges if n <= most)]) | st.integers(0, most)


@st.composite
def cases(
    draw: st.DrawFn,
    formats: Sequence[str] = FORMATS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    sizes: Sequence[int] = HEAD_SIZES,
    page_sizes: Sequence[int] = PAGE_SIZES,
    max_rows: int = 4,
    max_entries: int = 700,
    max_tokens: int = 40,
    segments: int = 2,
) -> Case:
    """Any attention; max_tokens 1 for decoding only, segments 1 for no residual."""
    page_size = draw(st.sampled_from(page_sizes))
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        entries = draw(entry_counts(page_size, max_entries))
        tokens = draw(st.sampled_from([1, 1, 0, max_tokens]) | st.integers(0, max_tokens))
        residual = draw(st.integers(0, entries)) if segments == 2 else 0
        rows.append(Row(min(tokens, entries), entries, residual))
    key_size = draw(st.sampled_from(sizes))
    return Case(
        rows=tuple(rows),
        page_format=draw(st.sampled_from(formats)),
        dtype=draw(st.sampled_from(dtypes)),
        key_size=key_size,
        value_size=draw(st.sampled_from([key_size, *sizes])),
        page_size=page_size,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 9)),
        softcap=draw(st.sampled_from([0.0, 2.5])),
        sinks=draw(st.booleans()),
        weights=draw(st.booleans()),
        scores=draw(st.booleans()),
        decay=draw(st.sampled_from([1.0, 0.97, 0.5])),
        seed=draw(st.integers(0, 2**31)),
    )


def make(case: Case) -> Problem:
    """The operands; fresh data for each seed."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = [row.tokens for row in case.rows]
    heads = case.kv_heads * case.group
    states = normal(generator, sum(tokens), heads, case.key_size).to(case.dtype)
    starts = torch.tensor([0, *tokens]).cumsum(0).int()
    total = [row.entries for row in case.rows]
    newest = [row.residual for row in case.rows]
    segments = [segment(case, case.layout, total, newest, generator)]
    if any(newest):
        native = make_layout("native", case.dtype, case.key_size, case.value_size, case.page_size)
        segments.append(segment(case, native, newest, [0] * len(newest), generator))
    slots = (len(segments[0].blocks), case.kv_heads, case.page_size)
    terms = Terms(
        scale=case.key_size**-0.5,
        softcap=case.softcap,
        sinks=normal(generator, heads) if case.sinks else None,
    )
    side = Side(
        weights=1 + 8 * torch.rand(slots, generator=generator) if case.weights else None,
        scores=torch.rand(slots, generator=generator) if case.scores else None,
        decay=case.decay,
    )
    return Problem(Queries(states, starts), segments, terms, side, case.value_size)


def segment(
    case: Case,
    layout: PageLayout,
    total: list[int],
    elsewhere: list[int],
    generator: torch.Generator,
) -> Segment:
    """Pages for `total` entries of each row; all but the last `elsewhere` of them are there."""
    size = case.page_size
    needed = [-(-count // size) for count in total]
    spare = 2
    blocks = poisoned_blocks(sum(needed) + spare, case.kv_heads, layout)
    free = torch.randperm(len(blocks), generator=generator).tolist()
    table = torch.tensor([NO_PAGES] * len(total)).repeat(1, 1 + max(needed, default=0))
    table = table[:, : max(needed, default=0) + 1].int()
    counts = []
    for row, count in enumerate(total):
        pages = [free.pop() for _ in range(needed[row])]
        table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        counts.append(count - elsewhere[row])
        fill(blocks, layout, torch.tensor(pages), counts[-1], generator)
    return Segment(blocks, layout, table, torch.tensor(counts, dtype=torch.int32))


def poisoned_blocks(pages: int, kv_heads: int, layout: PageLayout) -> Tensor:
    """uint8 [pages, kv_heads, block_bytes] of NaN, heads first in memory."""
    return torch.full((kv_heads, pages, layout.block_bytes), 255, dtype=torch.uint8).transpose(0, 1)


def fill(
    blocks: Tensor, layout: PageLayout, pages: Tensor, count: int, generator: torch.Generator
) -> None:
    """Random entries in the first slots of the pages."""
    slot = torch.arange(count)
    slots = (pages.long()[slot // layout.page_size] * layout.page_size) + slot % layout.page_size
    kv_heads = blocks.shape[1]
    keys = normal(generator, count, kv_heads, layout.key.size)
    values = normal(generator, count, kv_heads, layout.value.size)
    packed_reference.write(blocks, layout, keys, values, slots)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """With a few channels as large as a model's outliers."""
    numbers = torch.randn(shape, generator=generator)
    numbers[..., ::23] *= 3
    return numbers


def poisoned_output(problem: Problem) -> Tensor:
    """[tokens, heads, value_size] of NaN."""
    states = problem.queries.states
    return torch.full((*states.shape[:2], problem.value_size), torch.nan, dtype=states.dtype)


def expected(problem: Problem) -> tuple[Tensor, Tensor | None]:
    """(output, scores) of the reference; the problem's own scores stay."""
    output, scores = poisoned_output(problem), problem.side.scores
    scores = None if scores is None else scores.clone()
    side = problem.side._replace(scores=scores)
    packed_reference.attend(output, *problem[:3], side)
    return output, scores


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """float32 to a few roundings, the others to one step of their own; dtype: of another's."""
    steps = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    step = steps[found.dtype if dtype is None else dtype]
    torch.testing.assert_close(found, wanted, rtol=step, atol=step / 2)


# Entries that a format must survive: name -> float32 [8, size] of size.
SPECIAL = {
    "zeros": lambda size: torch.zeros(8, size),
    "constant": lambda size: torch.full((8, size), -1.7),
    "tiny": lambda size: torch.randn(8, size) * 1e-39,
    "small": lambda size: torch.randn(8, size) * 1e-30,
    "huge": lambda size: torch.randn(8, size) * 1e38,
    "halves": lambda size: torch.randint(-254, 255, (8, size)) / 2.0,  # rounds to even
    "one": lambda size: torch.eye(8, size),
    "negative zero": lambda size: -torch.zeros(8, size),
    "nan": lambda size: _with(torch.randn(8, size), torch.nan),
    "inf": lambda size: _with(torch.randn(8, size), torch.inf),
    "negative inf": lambda size: _with(torch.randn(8, size), -torch.inf),
}


def _with(numbers: Tensor, odd: float) -> Tensor:
    """Every second row has it, at another place."""
    for row in range(0, len(numbers), 2):
        numbers[row, (7 * row) % numbers.shape[1]] = odd
    return numbers


def assert_same_entries(layout: PageLayout, found: Tensor, wanted: Tensor) -> None:
    """Blocks with equal bytes; a scale that is NaN may be any NaN, and so may a native number."""
    for part in ("key", "value"):
        codec = getattr(layout, part)
        cut = layout.key.num_bytes
        column = layout.elements[:, :cut] if part == "key" else layout.elements[:, cut:]
        ours, theirs = (blocks[..., column] for blocks in (found, wanted))
        if codec.data_bytes == codec.size * 4:
            floats, data = torch.float32, 0
        elif codec.num_scales == 0:
            floats, data = codec.dtype, 0
        else:
            floats, data = torch.bfloat16, codec.data_bytes
        assert torch.equal(ours[..., :data], theirs[..., :data]), part
        numbers = [b[..., data:].contiguous().view(floats).float() for b in (ours, theirs)]
        torch.testing.assert_close(numbers[0], numbers[1], rtol=0, atol=0, equal_nan=True)
