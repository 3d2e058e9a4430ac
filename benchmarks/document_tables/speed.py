"""What servers do, and what a sequence takes in them."""

from __future__ import annotations

from collections.abc import Sequence

from document_tables.lines import Row, head, line, rows_of
from paged_kv.bench.cases import PLAIN


def sequences(rows: Sequence[Row]) -> list[str]:
    """What a sequence takes of the pool, counted in engines, and how many decode at once."""
    lines = head("cache", "pages", "MB of a sequence", "sequences at once")
    for row in rows_of("memory", rows):
        megabytes, at_once = f"{row['score'] / 1e6:.1f}", f"{row['decode_sequences']:.1f}"
        lines.append(line([_name(row), row["page_format"], megabytes, at_once]))
    return lines


def throughput(rows: Sequence[Row]) -> list[str]:
    """Tokens per second of each load and case."""
    lines = head(
        "requests", "pool", "cache", "pages", "tokens/s", "x plain", "running", "preemptions"
    )
    for row in rows_of("throughput", rows):
        cells = [_load(row), _pool(row), _name(row), row["page_format"], f"{row['score']:.0f}"]
        cells += [f"{row['ratio']:.2f}", str(row["running"]), f"{row['preemptions']:.0f}"]
        lines.append(line(cells))
    return lines


def less_memory(rows: Sequence[Row], most: float) -> list[str]:
    """Tokens per second with a share of the memory, over plain vLLM's with all of it.

    Args:
        rows: of any tasks.
        most: the largest share of what all requests need uncompressed, in whole percent of a pool
            in whole pages.
    """
    served = rows_of("throughput", rows)
    ample = {_load(row): row for row in served if (row["policy"], row["share"]) == (PLAIN, 1)}
    lines = head("requests", "pool", "cache", "pages", "tokens/s", "x plain with all memory")
    for row in served:
        if round(row["share"], 2) <= most and _load(row) in ample:
            ratio = row["score"] / ample[_load(row)]["score"]
            cells = [_load(row), _pool(row), _name(row), row["page_format"]]
            lines.append(line([*cells, f"{row['score']:.0f}", f"{ratio:.2f}"]))
    return lines


def latency(rows: Sequence[Row]) -> list[str]:
    """Times of each case, in milliseconds: median, and of the slowest hundredth."""
    lines = head("cache", "first token", "slowest", "between tokens", "slowest", "preemptions")
    names = ("ttft_ms", "ttft_p99_ms", "itl_ms", "itl_p99_ms")
    for row in rows_of("latency", rows):
        times = [f"{row[name]:,.0f}" for name in names]
        lines.append(line([_name(row), *times, f"{row['preemptions']:.0f}"]))
    return lines


def _load(row: Row) -> str:
    return f"{row['requests']} of {row['input_len']:,} + {row['output_len']:,}"


def _name(row: Row) -> str:
    return f"`{row['policy']}`" + (f" {row['budget']:,}" if row["budget"] else "")


def _pool(row: Row) -> str:
    return f"{100 * row['share']:.0f} %"
