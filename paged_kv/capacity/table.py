"""The table of `paged-kv capacity`: a block for the model, a line for each case, what to note."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from paged_kv.capacity.cases import Engine
from paged_kv.capacity.estimate import Refused
from paged_kv.capacity.model import Model
from paged_kv.capacity.sizes import show_size
from paged_kv.core.schedule import cdiv
from paged_kv.model_rules import DTYPE_BYTES

WIDTH = 100
_HEADS = (
    ("", "", "", "KiB per", "prompt:", "", "decode:", "", "seqs at", "", "vLLM"),
    ("policy", "budget", "format", "token", "kept", "MiB", "kept", "MiB", "once", "gain", "says"),
)


def bytes_per_token(model: Model) -> int:
    """Of keys and values in the model's dtype, in all layers, on all ranks."""
    return 2 * model.num_layers * model.kv_heads * model.head_dim * DTYPE_BYTES[model.dtype]


def describe(model: Model, engine: Engine) -> list[str]:
    """What the figures are of."""
    sliding = model.num_sliding
    kinds = f" ({sliding} with a sliding window of {model.window:,})" if sliding else ""
    output = engine.max_len - engine.prompt_len
    ranks = f" of each of {engine.num_ranks} ranks" if engine.num_ranks > 1 else ""
    return [
        f"{model.name}: {model.num_layers} layers{kinds}, {model.kv_heads} KV heads of "
        f"{model.head_dim}: {show_size(bytes_per_token(model))} per token in {model.dtype}",
        f"Sequences of {engine.max_len:,} tokens ({engine.prompt_len:,} + {output:,}), pages of "
        f"{engine.page_size}, {show_size(engine.memory)}{ranks} for the KV cache",
    ]


def table_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Two lines of heads and one for each row: names to the left, numbers to the right."""
    lines = [*_HEADS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    gap = "  " if sum(widths) + 2 * len(widths) - 2 <= WIDTH else " "
    for line in lines:
        cells = [f"{line[0]:{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        yield gap.join(cells).rstrip()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["policy"],
        "" if row["budget"] is None else str(row["budget"]),
        row["page_format"].rpartition("/")[2],
        _digits(row["bytes_per_token"] / 1024),
        f"{row['prompt_entries']:.0f}",
        _digits(row["prompt_bytes"] / 1024**2),
        f"{row['decode_entries']:.0f}",
        _digits(row["decode_bytes"] / 1024**2),
        _digits(row["sequences"]),
        f"{row['gain']:.2f}x",
        _digits(row["vllm_max_concurrency"]),
    )


def _digits(value: float) -> str:
    """Three digits or more, no more than two of them behind the point."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def left_out(refused: Iterable[Refused]) -> list[str]:
    """What has no row and why, each reason once."""
    about: dict[str, list[str]] = {}
    for case, error in refused:
        names = (str(name) for name in (case.policy, case.budget, case.page_format) if name)
        about.setdefault(str(error), []).append(" ".join(names))
    return [f"left out: {', '.join(names)}: {error}" for error, names in about.items()]


def notes(
    rows: Sequence[dict[str, Any]], refused: Iterable[Refused], engine: Engine
) -> Iterator[str]:
    """Lines with what the figures do not say, each once for all rows that it is about."""
    for line in left_out(refused):
        yield from _wrapped(line)
    about: dict[str, list[str]] = {}
    keys = ["policy", "budget"]
    if len({row["page_format"] for row in rows}) > 1:
        keys.append("page_format")
    for row in rows:
        name = " ".join(str(row[key]) for key in keys if row[key])
        for note in _notes(row, engine):
            about.setdefault(note, []).append(name)
    for note, names in about.items():
        yield from _wrapped(f"{', '.join(names)}: {note}")
    if max(row["sequences"] for row in rows) > engine.max_num_seqs:
        yield from _wrapped(f"at most {engine.max_num_seqs} sequences run at once (max_num_seqs)")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="* ", subsequent_indent="  ")


def _notes(row: dict[str, Any], engine: Engine) -> Iterator[str]:
    if not row["starts"]:
        yield f"vLLM does not start: {row['pages'] - 1:,} pages hold no sequence of such length"
    longest = row["longest_prompt"]
    if longest is not None and longest < engine.prompt_len:
        yield (
            f"prompts of at most {longest:,} tokens fit: without compress_prefill they are held "
            "whole until their end"
        )
    if row["waits_for_pressure"]:
        yield "nothing is dropped while there are pages; figures hold once there are none"
    if row["prompt_piece"]:
        yield f"prompts come in pieces of {row['prompt_piece']:,} tokens"
    if row["side_bytes_per_page"]:
        yield f"{show_size(row['side_bytes_per_page'])} of side data beside each page"
    for key, what in (("query_ring_bytes", "last queries"), ("residual_bytes", "residuals")):
        if row[key]:
            yield f"{show_size(row[key])} taken off for {what}"
    groups = Counter[tuple[int, str]]()
    for group in row["groups"]:
        each = cdiv(group["layers"], group["groups"])
        groups[each, group["kind"]] += group["groups"]
    if groups.total() > 1:
        named = (f"{count} of {layers} layers ({kind})" for (layers, kind), count in groups.items())
        yield f"KV cache groups: {', '.join(named)}"
    yield from _tier_notes(row["tiers"])


def _tier_notes(tiers: dict[str, Any]) -> Iterator[str]:
    if swap := tiers.get("swap"):
        yield (
            f"swap holds {swap['host_slots']:,} pages in memory and {swap['file_slots']:,} in "
            f"files, {show_size(swap['slot_bytes'])} each: {swap['sequences']:,} sequences"
        )
    if spill := tiers.get("spill"):
        yield (
            f"spill takes up to {show_size(spill['host_bytes_per_sequence'])} of host memory and "
            f"{show_size(spill['file_bytes_per_sequence'])} of files per sequence, all ranks "
            "together"
        )
