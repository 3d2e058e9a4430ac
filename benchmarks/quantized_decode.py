"""Decoding at a long context: pages of ours, native and quantized, against plain vLLM.

All engines live in one process and take turns, a few steps each, once their prompts are done. What
attention and writing take is measured in each layer; the rest of a step is the same for all.
Prompts are not computed, which would take most of an hour: their keys and values are random. How
long a step takes does not depend on them.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from paged_kv.bench import script
from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.core.schedule import cdiv
from paged_kv.vllm.driver.engine import MAX_BATCHED_TOKENS, Engine, engine_environment
from paged_kv.vllm.driver.workload import EngineSettings, Workload

PARTS = {"attention": "forward", "write": "do_kv_cache_update"}  # methods of a layer's impl


class Case:
    """An engine in the middle of its workload.

    Args:
        args: the script's.
        policy: options as in additional_config["paged_kv"].
    """

    def __init__(self, args: argparse.Namespace, policy: dict[str, Any]) -> None:
        # The first prompts to end decode while the others are computed.
        waiting = cdiv(args.requests * args.prompt_len, MAX_BATCHED_TOKENS) + args.requests
        num_steps = waiting + args.rounds * args.steps + 1
        max_len = args.prompt_len + num_steps + 1
        # A tenth more: vLLM keeps some pages free, and h2o's scores lie beside the pages.
        pages = 11 * args.requests * cdiv(max_len, args.page_size) // 10 + 1
        settings = EngineSettings(
            model=str(args.model),
            pool_bytes=pages * args.page_size * kv_bytes_per_token(args.model),
            max_model_len=max_len,
            policy=policy,
            block_size=args.page_size,
            max_num_seqs=args.requests,
        )
        self.engine = Engine(settings)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        runner = self.engine.core.model_executor.driver_worker.worker.model_runner
        for layer in runner.compilation_config.static_forward_context.values():
            for part, method in PARTS.items():
                setattr(layer.impl, method, self._timed(part, getattr(layer.impl, method)))
        prompts = random_prompts(args.model, args.requests, args.prompt_len, args.seed)
        self.steps = self.engine.steps(Workload(prompts, num_steps))
        with random_entries(runner):
            while (step := next(self.steps)).generated < args.requests or step.prefilled:
                pass
        self.rounds: list[dict[str, float]] = []

    def run(self, num_steps: int) -> None:
        """A round: milliseconds of a step and of its parts."""
        before, start = dict(self.seconds), time.perf_counter()
        for _ in range(num_steps):
            next(self.steps)
        round_ = {"step": time.perf_counter() - start}
        round_ |= {part: self.seconds[part] - before[part] for part in PARTS}
        self.rounds.append({part: 1e3 * value / num_steps for part, value in round_.items()})

    def result(self, plain: "Case", requests: int) -> dict[str, Any]:
        """Medians over rounds; ratios round by round."""
        steps = [round_["step"] for round_ in self.rounds]
        ratios = [p["step"] / own for p, own in zip(plain.rounds, steps, strict=True)]
        found = {
            "tokens_per_second": round(1e3 * requests / median(steps), 1),
            "ratio": round(median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
        for part in ("step", *PARTS):
            found[f"{part}_ms"] = round(median(round_[part] for round_ in self.rounds), 3)
        return found

    def _timed(self, part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed


@contextmanager
def random_entries(runner: Any) -> Iterator[None]:
    """The model computes nothing; all of its layers store random keys and values."""
    import torch
    from vllm.forward_context import get_forward_context

    layers = runner.compilation_config.static_forward_context
    hidden_size = runner.model_config.get_hidden_size()

    def forward(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        slots = get_forward_context().slot_mapping
        for name, layer in layers.items():
            shape = (2, len(input_ids), layer.num_kv_heads, layer.head_size)
            key, value = torch.randn(shape, dtype=layer.dtype)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots[name])
        return torch.zeros(len(input_ids), hidden_size, dtype=runner.model_config.dtype)

    runner.model.forward = forward
    try:
        yield
    finally:
        del runner.model.forward


def main(args: argparse.Namespace) -> None:
    os.environ.update(engine_environment())
    unreached = 2 * args.prompt_len + args.requests + args.rounds * args.steps + 100
    policies: dict[str, dict[str, Any]] = {
        script.PLAIN: {},
        "native": {"policy": "streaming", "budget": unreached},
        "int8": {"page_format": "int8"},
        "int4": {"page_format": "int4"},
        "fp8": {"page_format": "fp8"},
        "h2o": {"policy": "h2o", "budget": unreached},
    }
    cases = {name: Case(args, policies[name]) for name in (script.PLAIN, *args.cases)}
    for _ in range(args.rounds):
        for case in cases.values():
            case.run(args.steps)
    for name, case in cases.items():
        result = case.result(cases[script.PLAIN], args.requests)
        script.emit("quantized_decode", args, {"case": name, **result})


if __name__ == "__main__":
    parser = script.make_parser(__doc__, rounds=6, requests=8, prompt_len=7168)
    parser.add_argument(
        "--steps", type=script.positive, default=8, metavar="N", help="of a round (default 8)"
    )
    parser.add_argument(
        "--page-size",
        type=script.positive,
        default=DEFAULT_PAGE_SIZE,
        metavar="N",
        help=f"tokens per page (default {DEFAULT_PAGE_SIZE})",
    )
    choices = ("native", "int8", "int4", "fp8", "h2o")
    script.add_cases(parser, *choices, default=["native", "int8", "int4"])
    raise SystemExit(script.run(main, parser))
