"""Makes the tables in README.md and docs/ from benchmarks/results/*.jsonl.

    python benchmarks/tables.py           # writes them
    python benchmarks/tables.py --check   # exit code 1 and a line for each file that would change

A table stands between the comments `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from document_tables import answers, perplexity, speed
from document_tables.lines import Row, head, line

from paged_kv import results
from paged_kv.report.rows import is_full, latest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/results.md", "docs/results-answers.md", "docs/results-speed.md")
BLOCK = re.compile(r"(<!-- table ([a-z0-9-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def demo(_: Sequence[Row]) -> list[str]:
    """What `make demo` said: results/demo.json of one run, kept beside the rows."""
    report = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    settings, engines = report["settings"], report["engines"]
    plain = next(iter(engines.values()))
    megabytes = plain["pool_pages"] * plain["page_bytes"] / 1e6
    longest = round(plain["kv_cache_tokens"] / plain["kv_cache_sequences"])
    speeds = [f"{figures['tokens_per_second']:.0f}" for figures in engines.values()]
    speeds[-1] += f" ({report['speed_ratio']:.2f} x)"
    table = {
        f"SmolLM2-135M, {settings['requests']} requests of {settings['max_tokens']} tokens, "
        f"{megabytes:.0f} MB": list(engines),
        "---": ["---"] * len(engines),
        f"longest sequences ({longest} tokens) that can decode at once": [
            f"{figures['decode_sequences']:.1f}" for figures in engines.values()
        ],
        "preemptions": [str(figures["preemptions"]) for figures in engines.values()],
        "output tokens per second": speeds,
    }
    return [line([name, *cells]) for name, cells in table.items()]


def full(rows: Sequence[Row]) -> list[str]:
    """The full cache in every task."""
    lines = head("task", "score", "metric", "samples")
    for row in filter(is_full, rows):
        text = f" {row.get('text') or row.get('question') or ''}".rstrip()
        error = row["standard_error"]
        score = f"{row['score']:.3f}" + (f" ± {error:.3f}" if error is not None else "")
        lines.append(line([row["task"] + text, score, row["metric"], str(row["samples"])]))
    return lines


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "demo": demo,
    "full": full,
    "perplexity": perplexity.perplexity,
    "memory": perplexity.memory,
    "formats": perplexity.formats,
    "peers": perplexity.peers,
    "needle-hidden": partial(answers.needle, question="hidden"),
    "needle-seen": partial(answers.needle, question="seen"),
    "ruler": partial(answers.means, task="ruler", order=-1),
    "ruler-tasks": partial(answers.subtasks, task="ruler", budget=1024),
    "longbench": partial(answers.means, task="longbench", order=2),
    "longbench-tasks": partial(answers.subtasks, task="longbench", budget=64),
    "longbench-beside": partial(answers.beside, task="longbench", budget=64),
    "sequences": speed.sequences,
    "throughput": speed.throughput,
    "less-memory": partial(speed.less_memory, most=0.15),
    "latency": speed.latency,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or compares; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    rows, _ = latest(results.read(sorted(RESULTS.glob("*.jsonl"))))
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = BLOCK.sub(
            lambda block: block[1] + "\n".join(TABLES[block[2]](rows)) + "\n" + block[4], before
        )
        if after != before:
            stale.append(name)
            if not check:
                path.write_text(after, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'differs from benchmarks/results' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
