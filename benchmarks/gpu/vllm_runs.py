"""Real vLLM with paged_kv: is it right, is it as fast as it should be, does the host wait?

Each case (vllm_cases.py) is an engine in a process of its own (vllm_child.py), on a random model in
the shape of Llama 3.2 1B. What must be right runs several at once (--at-once), what is timed one
after another. Lines of cases that are compared with plain vLLM have

same_tokens   share of the tokens that are plain's; of unreached as many as of plain_again, which
              should be all
eager_tokens  with CUDA graphs: share of those without; a policy's should not be far below plain's
ratio         tokens per second by plain's
waits         of a profile: copies to the host and synchronizations in ten steps; none
              more often than plain's by half a step

and a figure that is wanted is there with whether it was met.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import vllm_cases
from vllm_cases import Case

CHILD = Path(__file__).with_name("vllm_child.py")
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "initializer_range": 0.06,  # wide enough that outputs vary
}
Result = dict[str, Any]


class Runs:
    """The cases, and what came of them.

    Args:
        args: of the command line.
        folder: for what processes leave behind.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.part = common.Part("vllm_runs", args)
        self.results: dict[str, Result] = {}
        self.model = str(folder / "model")

    def make_model(self) -> None:
        """Random weights, written once."""
        if self.args.small:
            import tiny_models

            self.model = tiny_models.saved("llama", self.folder)
            return
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(self.part.seed)
        config = AutoConfig.for_model(
            "llama", **SHAPE, num_hidden_layers=self.args.layers,
            architectures=["LlamaForCausalLM"], dtype="bfloat16",
        )  # fmt: skip
        with torch.device(self.args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(self.model)
        del model
        if self.args.device == "cuda":
            torch.cuda.empty_cache()

    def child(self, case: Case, at_once: int) -> Result:
        """Runs a case beside so many others; its fields, or error or skipped."""
        left = self.part.seconds_left
        if left <= 0:
            return {"skipped": "the time is up"}
        command = [sys.executable, str(CHILD), "--case", json.dumps(case._asdict())]
        command += ["--model", self.model, "--tokens", str(self.tokens_of(case.name))]
        command += ["--device", self.args.device, "--seed", str(self.part.seed)]
        command += ["--small"] * self.args.small
        try:
            done = subprocess.run(
                command, env=environment(case, at_once, self.folder), capture_output=True,
                text=True, timeout=left + 5,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            told = (late.stderr or b"").decode(errors="replace")
            self.log(case, told)
            return {"error": "the time was up while it ran"}
        self.log(case, done.stdout + done.stderr)
        for line in done.stdout.splitlines():
            if line.startswith("RESULT ") and done.returncode == 0:
                found: Result = json.loads(line.removeprefix("RESULT "))
                return found
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        return {"error": f"exit code {done.returncode}: {last}"[:600]}

    def tokens_of(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '_').replace('+', '_')}.json"

    def tokens(self, name: str) -> list[int]:
        """Of all requests of a case, one after another."""
        rounds = json.loads(self.tokens_of(name).read_text())
        return [token for outputs in rounds for output in outputs for token in output]

    def log(self, case: Case, text: str) -> None:
        """All that a process said, in this process's log."""
        print(f"\n======== {case.name}\n{text[-100_000:]}", file=sys.stderr, flush=True)

    def run(self, cases: Sequence[Case], at_once: int) -> None:
        """Lines of the cases, in order; plain's results are there before those that need them."""
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            running = [(case, pool.submit(self.child, case, at_once)) for case in cases]
            for case, future in running:
                found = future.result()
                self.results[case.name] = self.line(case, found)

    def line(self, case: Case, found: Result) -> Result:
        """Prints it; returns all of its fields."""
        if "skipped" in found:
            self.part.line(case.name, None, **found)
            return found
        fields = case._asdict() | {"mode": "graphs" if case.graphs else "eager"}
        for name in ("same", "wanted", "graphs"):
            del fields[name]
        fields["asked_runner"] = fields.pop("runner")
        fields |= found
        if "error" in found:
            self.part.line(case.name, False, **fields)
            return fields
        plain = self.ran(case.against)
        if case.policy != "plain" and plain is not None:
            fields |= self.compared(case, found, plain)
        if case.graphs and case.kind == "tokens" and self.ran(case.eager):
            fields["eager_tokens"] = self.same(case.name, case.eager)
        if case.wanted:
            fields |= common.wanted(fields, case.wanted)
        self.part.line(case.name, "error" not in fields, **fields)
        return fields

    def ran(self, name: str) -> Result | None:
        """The fields of a case that has come to its end. An error may be that it differs."""
        fields = self.results.get(name)
        return fields if fields and {"tokens_per_second", "waits"} & set(fields) else None

    def same(self, name: str, other: str) -> float:
        """Share of the tokens of two cases that are the same."""
        pairs = list(zip(self.tokens(name), self.tokens(other), strict=True))
        return round(sum(a == b for a, b in pairs) / len(pairs), 5)

    def compared(self, case: Case, found: Result, plain: Result) -> Result:
        """Fields of a comparison with plain vLLM; error if what must be the same is not."""
        if case.kind == "profile":
            # A wait more in most steps; the profiler's own, and a step in flight, make one or two.
            beyond = {n: count - plain["waits"].get(n, 0) for n, count in found["waits"].items()}
            more = {name: count for name, count in beyond.items() if count >= found["steps"] / 2}
            error = {"error": f"waits more often than plain vLLM: {more}"} if more else {}
            return {"same_waits": not more} | error
        if "tokens_per_second" not in found:
            return {}
        ratio = found["tokens_per_second"] / plain["tokens_per_second"]
        share = self.same(case.name, case.against)
        fields: Result = {"same_tokens": share, "ratio": round(ratio, 4)}
        least = 1.0
        if case.policy != "plain_again" and (again := self.ran(case.again)):
            least = again.get("same_tokens", 1.0)
        if case.same and share < least:
            fields["error"] = f"{share:.2%} of the tokens are plain's, not {least:.2%}"
        return fields


def environment(case: Case, at_once: int, folder: Path) -> dict[str, str]:
    """Of a case's process, one of so many."""
    from paged_kv.vllm.driver.engine import engine_environment, usable_cores

    own = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // at_once)),
        "VLLM_CACHE_ROOT": str(folder / f"cache_{case.policy}"),  # no two compile into one
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if case.runner == "v2" else "0",
        "PYTHONPATH": os.pathsep.join([*common.PLACES, os.environ.get("PYTHONPATH", "")]),
    }
    return os.environ | engine_environment() | own


def chosen(args: argparse.Namespace) -> list[list[Case]]:
    """Cases whose names have all words of one of --cases; a CPU has the V1 runner only, eager."""
    phases = vllm_cases.phases()
    if args.device == "cpu":
        known: set[str] = set()
        for phase in phases:
            here = {one.name: one for one in (case._replace(runner="v1", graphs=False)
                                              for case in phase)}  # fmt: skip
            phase[:] = [one for name, one in here.items() if name not in known]
            known |= set(here)
    if args.cases:
        words = [set(given.split()) for given in args.cases]
        for phase in phases:
            phase[:] = [
                case for case in phase if any(own <= set(case.name.split()) for own in words)
            ]
    if not any(phases):
        raise ValueError(f"--cases {args.cases}: no case has these words")
    return phases


def main() -> int:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", default=[], metavar="WORDS",
        help="only cases whose names have these words: 'speed v2 tight' (default all)")  # fmt: skip
    add("--at-once", type=int, default=6, metavar="N",
        help="processes of what is not timed (default 6)")  # fmt: skip
    add("--layers", type=int, default=16, metavar="N", help="of the model (default 16)")
    add("--small", action="store_true", help="a tiny model and short requests: a trial")
    add("--list", action="store_true", help="names of the cases")
    args = parser.parse_args()
    try:
        phases = chosen(args)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(*(case.name for phase in phases for case in phase), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args, Path(folder))
        try:
            runs.make_model()
        except Exception as error:
            runs.part.line("model", False, error=f"{type(error).__name__}: {error}"[:600])
            return runs.part.exit_code
        for phase in phases:
            runs.run([case for case in phase if case.kind in vllm_cases.KINDS], args.at_once)
            runs.run([case for case in phase if case.kind not in vllm_cases.KINDS], 1)
    return runs.part.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
