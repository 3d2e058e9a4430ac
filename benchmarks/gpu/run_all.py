"""All parts of the GPU run, each in a process of its own, in the time that there is.

Every part gets its share of the time that is left; what it does not need goes to those after it. A
part skips the cases that would begin too late, and is killed a little after its time. One that
crashes is told, and the others go on.

In --out: lines.jsonl with the lines of all parts, and a log of each. On stdout: a line for each
part that has run, what failed in it, and at the end the figures that are wanted. The exit code is 1
if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
LEAST = 2.0  # seconds with which a part is begun
CPU_TRIAL = {
    "kernels_right": ["--select", "cases_meet_every_way or (store_move and native-64)"],
    "memcheck": [],
    "racecheck": [],
    "kernels_fast": shlex.split(
        "--sequences 1 --entries 20 --heads 2 --kv-heads 1 --head-dim 16 --formats native "
        "--write-tokens 2 --move-layers 1 --move-pages 2 --copy-mb 1 --rounds 1 --most-sets 1"
    ),
    "hf_speed": shlex.split(
        "--contexts 200 --layers 2 --budget 128 --policies streaming --rounds 1"
    ),
    "vllm_runs": ["--small", "--cases", "prefix streaming"],
}


class Part(NamedTuple):
    """What is run, and its share of the time."""

    script: str
    share: float
    arguments: list[str]
    sanitizer: str | None = None


PARTS = {  # what tells most first
    "vllm_runs": Part("vllm_runs", 12, []),
    "kernels_right": Part("kernels_right", 3, ["--workers", "8"]),
    "kernels_fast": Part("kernels_fast", 4, []),
    "hf_speed": Part("hf_speed", 3, []),
    "memcheck": Part("kernels_right", 1, ["--few"], "memcheck"),
    "racecheck": Part("kernels_right", 1, ["--few"], "racecheck"),
}
UNSUPPORTED = "Device not supported"  # a sanitizer's word for a machine that keeps it out


def command(name: str, args: argparse.Namespace, seconds: float) -> list[str] | str:
    """Of a part; or why it cannot be run."""
    part = PARTS[name]
    before: list[str] = []
    if part.sanitizer:
        found = shutil.which("compute-sanitizer")
        if found is None or args.device == "cpu":
            return "no compute-sanitizer here"
        before = [found, "--tool", part.sanitizer, "--error-exitcode", "9"]
    own = part.arguments if args.device == "cuda" else CPU_TRIAL[name]
    options = ["--device", args.device, "--seconds", f"{seconds:.0f}"]
    options += [] if args.seed is None else ["--seed", str(args.seed)]
    script = str(args.scripts / f"{part.script}.py")
    more = shlex.split(getattr(args, name) or "")
    return [*before, sys.executable, script, *options, *own, *more]


class Outcome:
    """What came of a part."""

    def __init__(self, sanitizer: str | None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.exit_code = 0
        self.killed = False
        self.sanitizer = sanitizer
        self.unsupported = False

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("ok") is False]

    @property
    def skipped(self) -> int:
        return sum(line.get("ok") is None for line in self.lines)

    @property
    def ok(self) -> bool | None:
        """None: it says nothing. What a sanitizer, which is slow, did not reach is no fault."""
        if self.unsupported:
            return None
        if self.sanitizer and self.killed:
            return False if self.failed else None
        return self.exit_code == 0 and bool(self.lines) and not self.failed and not self.killed


def run_part(words: list[str], name: str, out: Path, limit: float) -> Outcome:
    """Runs a part for `limit` seconds at most; its lines go to lines.jsonl, all else to its log."""
    found = Outcome(PARTS[name].sanitizer)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if PARTS[name].sanitizer:  # torch's own caching would hide what lies outside a tensor
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    (out / f"{name}.log").write_text(shlex.join(words) + "\n")
    with (out / f"{name}.log").open("a") as log, (out / "lines.jsonl").open("a") as file:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip

        def kill() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
                found.killed = True

        clock = threading.Timer(limit, kill)
        clock.start()
        assert process.stdout is not None
        for text in process.stdout:
            if not text.startswith("{"):  # a sanitizer's words
                found.unsupported |= UNSUPPORTED in text
                log.write(text)
                log.flush()
                continue
            found.lines.append({**json.loads(text), "part": name})
            file.write(json.dumps(found.lines[-1]) + "\n")
            file.flush()
        found.exit_code = process.wait()
        clock.cancel()
    return found


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def brief(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("case", "error") if key in line}


def wanted(lines: list[dict[str, Any]]) -> None:
    """A table of the figures that are wanted: met, missed, or not measured."""
    rows = [
        (f"{line['part']}: {line['case']}", f"{name} {figure}", line.get(name), line["met"][name])
        for line in lines
        for name, figure in line.get("wanted", {}).items()
    ]
    for case, figure, found, met in rows:
        word = {True: "met", False: "MISSED", None: "not measured"}[met]
        print(f"{case:44} {figure:28} {found!s:>10}  {word}")


def main() -> int:
    args = make_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lines.jsonl").write_text("")
    end = time.monotonic() + args.seconds
    lines: list[dict[str, Any]] = []
    failed: list[str] = []
    skipped: list[str] = []
    for place, name in enumerate(args.parts):
        left = end - time.monotonic()
        shares = [PARTS[other].share for other in args.parts[place:]]
        seconds = left * shares[0] / sum(shares)
        words: list[str] | str = "the time is up"
        if seconds >= LEAST:
            words = command(name, args, seconds)
        if isinstance(words, str):
            skipped.append(name)
            tell(part=name, ok=None, skipped=words)
            continue
        start = time.monotonic()
        found = run_part(words, name, args.out, seconds + args.grace)
        lines += found.lines
        failed += [name] * (found.ok is False)
        skipped += [name] * (found.ok is None)
        told = {"part": name, "ok": found.ok, "exit_code": found.exit_code}
        told |= {"seconds": round(time.monotonic() - start, 1), "lines": len(found.lines)}
        told |= {"skipped": found.skipped, "killed": found.killed}
        tell(**told, failed=[brief(line) for line in found.failed][:10])
    wanted(lines)
    took = round(args.seconds - (end - time.monotonic()), 1)
    tell(part="run_all", ok=not failed, failed=failed, skipped=skipped, seconds=took)
    return int(bool(failed))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_results"), metavar="DIR",
        help="default gpu_results")  # fmt: skip
    add("--seconds", type=float, default=400.0, metavar="S", help="for all parts (default 400)")
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART",
        help=f"in this order (default {' '.join(PARTS)})")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: a trial with the smallest cases (default cuda)")  # fmt: skip
    add("--seed", type=int, default=None, metavar="N", help="of the random inputs")
    add("--grace", type=float, default=15.0, metavar="S",
        help="after which a part that overruns its time is killed (default 15)")  # fmt: skip
    add("--scripts", type=Path, default=HERE, help=argparse.SUPPRESS)  # tests have others
    for name in PARTS:
        flag = f"--{name.replace('_', '-')}"
        add(flag, default="", metavar="ARGUMENTS", help=f"more arguments of {name}, in quotes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
