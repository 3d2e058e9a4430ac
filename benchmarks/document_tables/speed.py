"""What servers do, and what a sequence takes in them."""

from __future__ import annotations

from collections.abc import Sequence

from document_tables.lines import Row, head, line, rows_of


def sequences(rows: Sequence[Row]) -> list[str]:
    """What a sequence takes of the pool, counted in engines, and how many decode at once."""
    lines = head("cache", "pages", "MB of a sequence", "sequences at once")
    for row in rows_of("memory", rows):
        megabytes, at_once = f"{row['score'] / 1e6:.1f}", f"{row['decode_sequences']:.1f}"
        lines.append(line([_name(row), row["page_format"], megabytes, at_once]))
    return lines


def throughput(rows: Sequence[Row]) -> list[str]:
    """Tokens per second of each load and case."""
    lines = head("requests", "pool", "cache", "tokens/s", "x plain", "running", "preemptions")
    for row in rows_of("throughput", rows):
        load = f"{row['requests']} of {row['input_len']:,} + {row['output_len']:,}"
        cells = [load, _pool(row), _name(row), f"{row['score']:.0f}", f"{row['ratio']:.2f}"]
        lines.append(line([*cells, str(row["running"]), f"{row['preemptions']:.0f}"]))
    return lines


def latency(rows: Sequence[Row]) -> list[str]:
    """Times of each case, in milliseconds: median, and of the slowest hundredth."""
    lines = head("cache", "first token", "slowest", "between tokens", "slowest", "preemptions")
    names = ("ttft_ms", "ttft_p99_ms", "itl_ms", "itl_p99_ms")
    for row in rows_of("latency", rows):
        times = [f"{row[name]:,.0f}" for name in names]
        lines.append(line([_name(row), *times, f"{row['preemptions']:.0f}"]))
    return lines


def _name(row: Row) -> str:
    return f"`{row['policy']}`" + (f" {row['budget']:,}" if row["budget"] else "")


def _pool(row: Row) -> str:
    return f"{100 * row['share']:.0f} %"
