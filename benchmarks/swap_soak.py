"""Random load on an engine that swaps: does it lose memory, pages, requests or tokens?

Requests arrive and are aborted at random, with random priorities, in a pool that is too small for
them; now and then all that run are preempted. Host memory for swapped pages is short, too, so that
some go to a file and some must be computed again. Whatever ends must have the tokens that it has in
an undisturbed engine; where the two likeliest tokens are closer than rounding, either will do. (Not
what was computed again under a policy: its answer was in one chunk then, before anything of it was
dropped.) At the end all pages and slots must be free, and resident memory must not have grown.

A line says what happened; the exit code is 1 if anything of this does not hold.
"""

import argparse
import ctypes
import os
import random
import tempfile
import time
from typing import Any

import torch
from tqdm import tqdm

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.vllm.driver.engine import engine_environment

GIB = 1 << 30
LONGEST_PROMPT, LONGEST_OUTPUT = 320, 160
AT_ONCE = 4  # requests whose longest form fits into the pool
NUM_REQUESTS = 8  # different ones
NEAR_TIE = 1e-3  # of log-probabilities, in float32
WARM_UP = 1 / 3  # of the time: allocators keep what they were given
GROWTH_ALLOWED = 8.0  # MB after that, however long it takes

CASES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "streaming": {"policy": "streaming", "budget": 256},
}


class Soak:
    """An engine under random load.

    Args:
        args: of the command line.
        options: of paged_kv.
        directory: for swapped pages.
    """

    def __init__(self, args: argparse.Namespace, options: dict[str, Any], directory: str) -> None:
        from vllm import LLM

        token_bytes = kv_bytes_per_token(args.model, "float32")
        pool_tokens = AT_ONCE * (LONGEST_PROMPT + LONGEST_OUTPUT + DEFAULT_PAGE_SIZE)
        self.llm = LLM(
            str(args.model),
            dtype="float32",
            enforce_eager=True,
            block_size=DEFAULT_PAGE_SIZE,
            max_model_len=LONGEST_PROMPT + LONGEST_OUTPUT,
            max_num_batched_tokens=512,
            max_num_seqs=4 * AT_ONCE,
            kv_cache_memory_bytes=pool_tokens * token_bytes,
            scheduling_policy="priority",
            additional_config={
                "paged_kv": {
                    **options,
                    "swap_space": pool_tokens / 2 * token_bytes / GIB,
                    "swap_dir": directory,
                    "swap_dir_space": pool_tokens / 2 * token_bytes / GIB,
                }
            },
        )
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.ledger = self.scheduler.connector.ledger
        self.exact_again = options["policy"] == "full"
        self.again: set[str] = set()  # requests that were computed again
        self._watch_fallbacks()
        self.random = random.Random(args.seed)
        prompts = random_prompts(args.model, NUM_REQUESTS, LONGEST_PROMPT, args.seed)
        self.prompts = [one[: self.random.randint(16, LONGEST_PROMPT)] for one in prompts]
        self.lengths = [self.random.randint(16, LONGEST_OUTPUT) for _ in prompts]
        self.running: dict[str, int] = {}  # request id -> which of the prompts
        self.counts = dict.fromkeys(("steps", "requests", "aborts", "resets", "compared"), 0)
        self.counts |= dict.fromkeys(("near_ties", "different"), 0)
        self.expected = self._undisturbed()

    def run(self, seconds: float) -> list[tuple[float, float]]:
        """Load for so long, then until nothing is left; (minutes, resident MB) once a second."""
        resident = []
        start = time.monotonic()
        with tqdm(total=round(seconds), unit="s") as bar:
            while (now := time.monotonic() - start) < seconds:
                self._disturb()
                self._step()
                if now >= len(resident):
                    resident.append((now / 60, resident_mb()))
                    bar.update(round(now) - bar.n)
        while self.running:
            self._step()
        return resident

    def results(self) -> dict[str, Any]:
        """What has happened, and what is left over."""
        pool = self.scheduler.kv_cache_manager.block_pool
        counts = self.ledger.counts
        fallbacks = sum(number for name, number in counts.items() if name.startswith("fallback"))
        managers = getattr(self.scheduler, "paged_managers", [])
        names = ("swapped_out", "swapped_in", "demoted", "promoted")
        return {
            **self.counts,
            **{name: counts[f"{name}_requests"] for name in names},
            "fallbacks": fallbacks,
            "pages_left": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "slots_left": sum(self.ledger.used),
            "requests_left": len(self.scheduler.requests)
            + len(self.ledger.swapped)
            + sum(len(manager._sequences) for manager in managers),
        }

    def _undisturbed(self) -> list[tuple[list[int], list[float]]]:
        """Tokens of each prompt, and by how much each was likelier than the next."""
        found = []
        for first in range(0, NUM_REQUESTS, AT_ONCE):
            some = slice(first, first + AT_ONCE)
            prompts = [{"prompt_token_ids": one} for one in self.prompts[some]]
            params = [sampling(length, logprobs=2) for length in self.lengths[some]]
            for output in self.llm.generate(prompts, params, use_tqdm=False):
                (one,) = output.outputs
                tops = [sorted(top.logprob for top in each.values()) for each in one.logprobs]
                found.append((list(one.token_ids), [top[-1] - top[-2] for top in tops]))
        assert not self.ledger.counts, "this was to be undisturbed"
        return found

    def _watch_fallbacks(self) -> None:
        save, drop = self.ledger.save, self.ledger.drop

        def watched_save(request_id: str, *args: Any) -> bool:
            kept: bool = save(request_id, *args)
            self.again |= set() if kept else {_name(request_id)}
            return kept

        def watched_drop(request_id: str, reason: str | None = None) -> None:
            self.again |= set() if reason is None else {_name(request_id)}
            drop(request_id, reason)

        self.ledger.save, self.ledger.drop = watched_save, watched_drop

    def _disturb(self) -> None:
        if len(self.running) < 3 * AT_ONCE and self.random.random() < 0.3:
            name, which = str(self.counts["requests"]), self.random.randrange(NUM_REQUESTS)
            self.engine.add_request(
                name,
                {"prompt_token_ids": self.prompts[which]},
                sampling(self.lengths[which]),
                priority=self.random.randrange(3),
            )
            self.running[name] = which
            self.counts["requests"] += 1
        if self.running and self.random.random() < 0.01:
            name = self.random.choice(list(self.running))
            self.engine.abort_request([name])
            del self.running[name]
            self.counts["aborts"] += 1
        if self.random.random() < 0.02:
            self.engine.reset_prefix_cache(reset_running_requests=True)
            self.counts["resets"] += 1

    def _step(self) -> None:
        for output in self.engine.step():
            name, (one,) = output.request_id, output.outputs
            if name in self.running:  # not aborted meanwhile
                which = self.running.pop(name)
                if self.exact_again or name not in self.again:
                    self._compare(which, one.token_ids)
        self.counts["steps"] += 1

    def _compare(self, which: int, tokens: list[int]) -> None:
        expected, leads = self.expected[which]
        self.counts["compared"] += 1
        assert len(tokens) == len(expected)
        for token, other, lead in zip(tokens, expected, leads, strict=True):
            if token != other:
                self.counts["near_ties" if lead < NEAR_TIE else "different"] += 1
                break


def _name(request_id: str) -> str:
    """What we called it: vLLM appends something."""
    return request_id.split("-")[0]


def sampling(length: int, **options: Any) -> Any:
    """Greedy, whatever the model would like."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options |= {"temperature": 0.0, "max_tokens": length, "ignore_eos": True}
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False, **options)


def resident_mb() -> float:
    """Resident memory of this process, without what malloc keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line that fits the points best."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    # oneDNN keeps what it compiled for each size of a step: 250 MB more after some minutes.
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16"
    bad = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as directory:
            soak = Soak(args, CASES[case], directory)
            resident = soak.run(60 * args.minutes / len(args.cases))
            settled = resident[int(WARM_UP * len(resident)) :]
            growth = slope(settled)
            grown = growth * (settled[-1][0] - settled[0][0])
            results = soak.results()
            soak.engine.engine_core.shutdown()
            files = len(os.listdir(directory))
        memory = {"resident_mb": round(resident[-1][1]), "mb_per_minute": round(growth, 2)}
        script.emit("swap_soak", args, {"case": case, **results, "files_left": files, **memory})
        left = [name for name in results if name.endswith("_left") and results[name]]
        if left or files or results["different"] or grown > GROWTH_ALLOWED:
            bad.append(case)
    if bad:
        raise SystemExit(f"swap_soak: something is wrong in {', '.join(bad)}: see the lines above")


if __name__ == "__main__":
    parser = script.make_parser(__doc__, minutes=30)
    script.add_cases(parser, *CASES)
    raise SystemExit(script.run(main, parser))
