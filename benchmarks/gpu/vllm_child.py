"""One engine of vllm_runs.py, in this process: does what its case says, and prints a RESULT.

tokens      requests whose prompts fit a step together, in one batch
chunked     prompts that take several steps each
prefix      the same requests twice: the second time their prompts are in the prefix cache
speed       more and longer requests, timed
preempted   all that run are preempted again and again: swapped to host memory, or computed anew
reference   a tiny model in float32, token by token against the reference loop of the tests
nearly      the same in bfloat16, by the attention that vLLM chooses: log-probabilities on average
profile     ten steps of decoding under torch's profiler
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import common
from vllm_cases import BUDGET, POLICIES, UNREACHED, Case

from paged_kv.bench.settings import kv_bytes_per_token, random_prompts
from paged_kv.vllm.driver.workload import EngineSettings, RunResult, Workload

PAGE = 32
STEPS = 10  # profiled
# (requests, tokens of a prompt, of an output) by kind: on a GPU, and in a trial.
SIZES = {
    "tokens": ((32, 128, 256), (2, 40, 12)),
    "chunked": ((8, 1500, 128), (2, 150, 12)),
    "prefix": ((8, 512, 128), (2, 96, 12)),
    "speed": ((128, 128, 1024), (4, 40, 150)),
    "preempted": ((24, 3072, 192), (4, 96, 24)),
    "profile": ((16, 250, 128), (2, 90, 60)),  # some compact in the steps that are profiled
}
CHUNK = (512, 64)  # tokens of a step, for chunked
GRAPHS = [1, 2, 4, 8, 16, 32, 64, 128]  # sequences
PREEMPT_EVERY = (64, 8)
# What makes the host wait for the GPU, or reads from it, by the profiler's names.
WAITS = ("Memcpy DtoH", "Synchronize")
# Of logits: what a GPU's order of sums may differ by from a CPU's. A lost entry is 1e-3 or more.
NOISE = 3e-4
# Of log-probabilities in bfloat16, on average: 0.09 on a CPU, with a policy and without; 1.7 where
# an engine and the loop dropped by different rules.
NEAR = 0.3


def start(args: argparse.Namespace, case: Case, longest: int) -> Any:
    """The engine of a case."""
    from paged_kv.vllm.driver.engine import Engine

    requests, *_ = size_of(args, case)
    policy = dict(POLICIES[case.policy])
    if args.small and policy.get("budget") == BUDGET:
        policy["budget"] = 128 if case.policy.startswith("pyramidal") else 96
    tokens = int(requests * longest * case.pool) + PAGE * 8
    settings = EngineSettings(
        args.model,
        tokens * kv_bytes_per_token(Path(args.model)) * (2 if args.device == "cpu" else 1),
        max_model_len=longest,
        policy=policy,
        max_num_seqs=requests,
        prefix_caching=case.kind == "prefix",
    )
    more: dict[str, Any] = {"enforce_eager": not case.graphs, "skip_tokenizer_init": True}
    if args.device == "cuda":
        more["gpu_memory_utilization"] = 0.15  # others are there; the pool's bytes are given
    else:  # plain vLLM has other kernels on a CPU: tokens are the same in float32 only
        more["dtype"] = "float32"
    if case.graphs:  # of every size that a run decodes with there is a graph; more take longer
        more["compilation_config"] = {"cudagraph_capture_sizes": GRAPHS}
    if case.kind == "tokens":  # all prompts in one step
        more["max_num_batched_tokens"] = max(2048, requests * longest)
    if case.kind == "chunked":
        more["max_num_batched_tokens"] = CHUNK[args.small]
    return Engine(settings, **more)


def size_of(args: argparse.Namespace, case: Case) -> tuple[int, int, int]:
    return SIZES[case.kind][args.small]


def finish(engine: Any, workload: Workload) -> RunResult:
    *_, result = engine.run(workload)
    return result


def run(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Fields of all kinds but reference and profile."""
    requests, length, output = size_of(args, case)
    engine = start(args, case, -(-(length + output) // PAGE) * PAGE)
    prompts = random_prompts(Path(args.model), requests, length, args.seed)
    every = PREEMPT_EVERY[args.small] if case.kind == "preempted" else 0
    workload = Workload(prompts, output, case.kind != "prefix", every)
    if case.kind in ("speed", "preempted"):
        finish(engine, Workload(prompts[:8], 40, workload.reset_prefix_cache))  # warms up
    first = finish(engine, workload)
    tokens, result = [first.outputs], first
    if case.kind == "prefix":
        result = finish(engine, workload)
        tokens.append(result.outputs)
    Path(args.tokens).write_text(json.dumps(tokens))
    fields = about(engine) | {
        "tokens_per_second": round(workload.output_tokens / result.seconds, 1),
        "seconds": round(result.seconds, 2),
        "start_s": round(engine.seconds, 1),
        "pool_pages": engine.info().num_pages,
        "peak_running": result.peak_running,
        "preemptions": result.preemptions,
        "computed_tokens": result.computed_tokens,
        "prefix_hits": result.prefix_hits,
        "different": len({tuple(own) for own in first.outputs}),
    }
    if case.kind == "prefix":
        assert result.prefix_hits, "the second time no prompt was in the prefix cache"
    if case.kind == "preempted":
        assert result.preemptions, "nothing was preempted"
    return fields


def about(engine: Any) -> dict[str, Any]:
    """Which model runner and attention backend there are."""
    worker = engine.core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    mode = worker.vllm_config.compilation_config.cudagraph_mode
    runner = type(worker.model_runner)
    return {
        "runner": f"{runner.__module__}.{runner.__name__}",
        "backend": ", ".join(sorted(backends)),
        "cudagraph_mode": getattr(mode, "name", str(mode)),
    }


def profile(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """How often the host waited in some steps in which sequences decode, and compact."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    requests, length, output = size_of(args, case)
    engine = start(args, case, length + output)
    prompts = random_prompts(Path(args.model), requests, length, args.seed)
    prompts = [own[: length - 3 * place] for place, own in enumerate(prompts)]  # not in step
    steps = engine.steps(Workload(prompts, output))
    for _ in islice(steps, output // 2):
        pass
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if args.device == "cuda" else []
    with profiled(activities=activities) as profiler:
        taken = len(list(islice(steps, STEPS)))
    assert taken == STEPS, f"{taken} steps were left to profile"
    counts = {
        event.key: event.count
        for event in profiler.key_averages()
        if any(word in event.key for word in WAITS)
    }
    return about(engine) | {"steps": STEPS, "waits": dict(sorted(counts.items()))}


def reference(args: argparse.Namespace, case: Case) -> dict[str, Any]:
    """Raises AssertionError: a token is not the reference loop's, or too many are far from it."""
    import engines
    import policy_loop
    import reference_check
    import tiny_models
    from reference_loop import Rule, load_model

    gpu, exact = args.device == "cuda", case.kind == "reference"
    if gpu:
        reference_check.FLOAT_NOISE, policy_loop.TIE = NOISE, 1e-4
    model = tiny_models.saved("llama", Path(args.tokens).parent / Path(args.tokens).stem)
    policy, budgets = dict(POLICIES[case.policy]), [UNREACHED] * 6
    if case.policy.startswith("pyramidal"):
        policy["budget"], budgets = 128, [160] * 2 + [128] * 2 + [96] * 2
    elif policy["budget"] != UNREACHED:
        policy["budget"], budgets = 96, [96] * 6
    if not exact:
        round_weights(model)
    errors: list[float] = []

    def record(*operands: Any) -> None:
        errors.extend(error for *_, error in reference_check.differences(*operands[:-1]))

    prompts = tiny_models.prompts_of(20, 96, 101, 203, seed=args.seed)
    check = reference_check.check_output if exact else record
    with engines.engine(model, policy, **small_engine(gpu, exact)) as llm:
        _, loops = policy_loop.complete_and_check(
            llm, load_model(model), prompts, Rule(budgets), policy, 70, 1e-3 if gpu else 2e-4, check
        )
    drops = sum(loop.num_drops for loop in loops)
    assert drops > 50 or UNREACHED in budgets, f"only {drops} compactions"
    fields = {"drops": drops, "ties": sum(loop.num_ties for loop in loops)}
    if not exact:
        fields["logprob_error"] = round(sum(errors) / len(errors), 4)
        assert fields["logprob_error"] < NEAR, f"log-probabilities differ by {fields}"
    return fields


def small_engine(gpu: bool, exact: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM, for prompts in chunks and small pages."""
    settings: dict[str, Any] = {
        "max_num_batched_tokens": 100,
        "kv_cache_memory_bytes": 64 << 20,
        "skip_tokenizer_init": True,
        "block_size": PAGE,
        "dtype": "float32" if exact else "bfloat16",
    }
    if gpu:
        settings |= {"gpu_memory_utilization": 0.05, "enforce_eager": True}
    if gpu and exact:  # FlashAttention has no float32, and Triton's kernel multiplies it in TF32
        settings |= {"attention_config": {"backend": "FLEX_ATTENTION"}}
    return settings


def round_weights(model: str) -> None:
    """To bfloat16, in which an engine then has the same as the loop."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for weight in whole.parameters():
        weight.data = weight.data.bfloat16().float()
    whole.save_pretrained(model)


def main() -> None:
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--case", type=json.loads, required=True)
    for name in ("--model", "--tokens", "--device"):
        add(name, required=True)
    add("--seed", type=int, required=True)
    add("--small", action="store_true")
    args = parser.parse_args()
    case = Case(**args.case)
    kinds = {"profile": profile, "reference": reference, "nearly": reference}
    fields = kinds.get(case.kind, run)(args, case)
    print("RESULT " + json.dumps(fields), flush=True)


if __name__ == "__main__":
    assert common.PLACES[0] in sys.path
    main()
