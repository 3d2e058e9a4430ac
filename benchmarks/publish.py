"""Makes benchmarks/results/*.jsonl, on SmolLM2: every policy in every task, and speed.

    python benchmarks/publish.py --data DIR              # all commands that are not there yet
    python benchmarks/publish.py --data DIR needle ruler # of these, anew if they are all there

Of two cores perplexity takes an hour, needle half an hour, ruler and longbench hours (one core
each, with OMP_NUM_THREADS=1), throughput half an hour for the first three pools alone, and three
quarters of an hour for its last two commands.
DIR has the texts: wiki.test.raw (WikiText-2), american_adventures.txt and news_from_nowhere.txt
(Project Gutenberg 18304 and 3261, without its header and footer), and longbench/ (see
docs/evaluation.md). A run that was stopped goes on where it was: see `paged-kv eval --help`, --out.
Then `python benchmarks/tables.py` makes the tables in the documents.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from paged_kv import results

PROGRAM = "paged-kv"
RESULTS = Path(__file__).resolve().parent / "results"
POLICIES = (
    "full,window,streaming,random,lru,h2o,attention,hybrid,snapkv,tova,knorm,keydiff,"
    "expected_attention,calibrated_attention,past_future,learned,cluster,pooling,value_merge,"
    "residual,pyramidal,pyramidal+streaming,pyramidal+snapkv"
)
BUDGETS = "--budget 128,256,512,1024"
TEXTS = ("wiki.test.raw", "american_adventures.txt", "news_from_nowhere.txt")
WINDOWS = "--offset 8000 --stride 20000 --windows 4 --prompt-tokens 2048 --score-tokens 256"
NEEDLES = (
    "--lengths 4096 --depths 0 25 50 75 100 --facts 2",
    "--lengths 4096 --facts 2 --question seen",
)
PEERS = (
    "full,dynamic,quantized-int4,quantized-int2,kvpress:snapkv,kvpress:expected_attention,"
    "kvpress:keydiff,kvpress:tova,kvpress:streaming_llm,kvpress:knorm"
)
ANSWERING = f"{POLICIES},truncate"  # with a text cut short as baseline
# Pooling that keeps a member of each window in place of a mean.
BEST = "pooling:mode=best"
LONGBENCH = "trec,triviaqa,qasper,samsum,multi_news"
# 64 entries are 8 pages, and of those that stay anyway no more than a quarter are the newest.
SMALL = '--page-size 8 --policy-config {"recent_window":16} --budget 64,128,256,512,1024'

LOAD = "--policy plain,plain-fp8,streaming,pyramidal --budget 256"
SERVED = "--policy plain,plain-fp8,pyramidal --budget 256 --rounds 2"

# name -> arguments of `paged-kv`, one after the other, into one file
RUNS: dict[str, list[str]] = {
    "perplexity": [
        f"eval perplexity --text {text} {WINDOWS} --policy {POLICIES} {BUDGETS}" for text in TEXTS
    ],
    "peers": [
        f"eval perplexity --text {TEXTS[0]} {WINDOWS} --policy {PEERS} --budget 256,512",
        f"eval perplexity --text {TEXTS[0]} {WINDOWS} --policy plain,plain-fp8",
    ],
    "formats": [
        f"eval perplexity --text {text} {WINDOWS} --policy full,streaming,pyramidal "
        "--budget 256,512 --page-format native,int8,fp8,int4"
        for text in TEXTS
    ],
    "needle": [
        f"eval needle {more} --policy {ANSWERING.replace('value_merge,', '')} {BUDGETS}"
        for more in NEEDLES
    ],
    "ruler": [
        f"eval ruler --length 4096 --examples 20 --max-new-tokens 64 --question seen "
        f"--policy {ANSWERING},{BEST} {BUDGETS}"
    ],
    "longbench": [
        f"eval longbench --data longbench --tasks {LONGBENCH} --examples 50 --max-new-tokens 64 "
        f"--question seen --policy {ANSWERING},{BEST} {SMALL}"
    ],
    "variants": [  # with full, to whose windows the differences are
        *(
            f"eval perplexity --text {text} {WINDOWS} --policy full,{BEST} {BUDGETS}"
            for text in TEXTS
        ),
        *(f"eval needle {more} --policy value_merge,{BEST} {BUDGETS}" for more in NEEDLES),
    ],
    "memory": [f"bench memory {LOAD} --page-format native,int8 --input-len 1024 --output-len 32"],
    # Nothing else may run beside these two.
    "throughput": [
        *(
            f"bench throughput {SERVED} {load}"
            for load in (
                "--requests 24 --input-len 256 --output-len 512 --pool 0.25,0.5,1.0",
                "--requests 8 --input-len 256 --output-len 512 --pool 0.5",
                "--requests 16 --input-len 1024 --output-len 256 --pool 0.5",
            )
        ),
        "bench throughput --policy plain,pyramidal --budget 256 --page-format native,int8 "
        "--rounds 2 --requests 8 --input-len 1024 --output-len 1024 --pool 0.15,1.0",
        "bench throughput --policy plain,streaming,h2o,snapkv,pyramidal --budget 256 --rounds 2 "
        "--requests 16 --input-len 512 --output-len 512 --pool 0.5",
    ],
    "latency": [
        f"bench latency {SERVED} --requests 24 --input-len 256 --output-len 512 --pool 0.5 "
        "--request-rate 0.5"
    ],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs; the exit code of the first run that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the texts")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(RUNS)
    if unknown:
        parser.error(f"NAME must be one of {', '.join(RUNS)}, not {', '.join(sorted(unknown))}")
    for name in args.names or RUNS:
        out = RESULTS / f"{name}.jsonl"
        missing = _missing(name, out)
        if args.names and not missing:
            out.unlink()
            missing = RUNS[name]
        for command in missing:
            words = [Path(sys.executable).with_name(PROGRAM), *command.split(), "--out", out]
            code = subprocess.run(words, cwd=args.data, env={**os.environ, **_offline()}).returncode
            if code:
                return code
        if missing:
            _only_of(name, out)
    return 0


def _missing(name: str, out: Path) -> list[str]:
    """The commands of a run that no row names."""
    done = {row["command"] for row in results.read([out])} if out.exists() else set()
    return [command for command in RUNS[name] if _line(command) not in done]


def _only_of(name: str, out: Path) -> None:
    """Leaves out rows of what was such a command once, and what may not be passed on."""
    lines = set(map(_line, RUNS[name]))
    rows = [row for row in results.read([out]) if row["command"] in lines]
    out.unlink()
    for row in rows:
        results.append(out, _without_answers(row) if name == "longbench" else row)


def _without_answers(row: results.Row) -> results.Row:
    """Answers repeat whole sentences of texts that are others': their ids and scores are ours."""
    if "examples" not in row:
        return row
    kept = [{"id": each["id"], "score": each["score"]} for each in row["examples"]]
    return {**row, "examples": kept}


def _line(command: str) -> str:
    """As rows have it."""
    return shlex.join([PROGRAM, *command.split()])


def _offline() -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
