"""`paged-kv capacity`: how many sequences fit into a GPU's memory, from a config.json alone.

One line for each page format, policy and budget, `full` first. Of a sequence the figures are the
most that it holds, with what lies beside its pages (side data, rings):

KiB per token    of its keys and values as pages store them, in all layers of a rank
prompt: kept     entries that a sequence holds until its prompt ends, mean over layers: all of it,
                 unless the options have compress_prefill
decode: kept     the same from then on
seqs at once     that can decode: the decode capacity in the log of a vLLM server
gain             of that over `full` with native pages
vLLM says        its own "Maximum concurrency", which counts prompts that are held whole

Policies and page formats that do not go together are named below (with --json on stderr).

--gpu-memory takes the weights off, of the usual dense decoders, and what vLLM leaves free. What a
step needs (activations, CUDA graphs) is not known here and vLLM's profiling takes it off, too: an
upper bound. --memory is what is left, as vLLM logs it ("Available KV cache memory"), or as
--kv-cache-memory-bytes says. No weights, GPU or vLLM are needed.
"""

from __future__ import annotations

import argparse
import json
import sys

from paged_kv import registry
from paged_kv.capacity.cases import CPU, FIXED, GPU, Engine, make_cases
from paged_kv.capacity.estimate import estimate
from paged_kv.capacity.model import Model, read_model
from paged_kv.capacity.sizes import read_size, show_size
from paged_kv.capacity.table import describe, left_out, notes, table_lines
from paged_kv.capacity.weights import FAMILIES, WEIGHT_BYTES, weight_bytes
from paged_kv.config import DEFAULT_PAGE_SIZE
from paged_kv.core.options import MOST
from paged_kv.core.page_formats import FORMATS, NATIVE
from paged_kv.core.readers import read_budget
from paged_kv.model_rules import DTYPE_BYTES
from paged_kv.option_table import DEFAULT_BUDGET
from paged_kv.variants import SHARED, SYNTAX, Variant, read_variants

CONTEXT = 8192
UTILIZATION = 0.92  # vLLM's default
# --max-num-batched-tokens and --max-num-seqs of vLLM's server, of each rank on a CPU; on GPUs by
# the least memory that has them, largest first.
CPU_DEFAULTS = (2048, 128)
GPU_DEFAULTS = {160 << 30: (16384, 1024), 70 << 30: (8192, 1024), 0: (2048, 256)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `paged-kv capacity`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a model's directory, or its config.json")
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument("--memory", metavar="SIZE", help="of each rank's KV cache: 40GiB, 80GB")
    memory.add_argument("--gpu-memory", metavar="SIZE", help="of each GPU; the weights are taken "
        f"off, of {', '.join(FAMILIES)} models")  # fmt: skip
    add("--weights-dtype", choices=WEIGHT_BYTES, metavar="D", help="of linear layers: "
        f"{', '.join(WEIGHT_BYTES)} (default: the model's; scales are not counted)")  # fmt: skip
    add("--gpu-memory-utilization", type=float, metavar="F",
        help=f"vLLM's option (default {UTILIZATION})")  # fmt: skip
    add("--device", choices=(CPU, GPU), help="whose page formats: ours on a CPU, vLLM's own on a "
        "GPU (default: gpu with --gpu-memory, else cpu)")  # fmt: skip
    add("--context", type=int, metavar="N", help=f"tokens of a prompt (default {CONTEXT}, or as "
        "many as the model takes)")  # fmt: skip
    add("--output", type=int, default=1024, metavar="N", help="generated after it (default 1024)")
    add("--policy", default=registry.FULL, metavar=SYNTAX,
        help="compared with full: see paged-kv policies")  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget", metavar="B[,B...]", help="entries kept per layer, or with a "
        f"point the fraction kept (default {DEFAULT_BUDGET})")  # fmt: skip
    budget.add_argument("--sequences", type=int, metavar="N", help="in place of a budget: the "
        "largest one with which so many decode at once")  # fmt: skip
    add("--policy-config", metavar="JSON", help=SHARED)
    add("--page-format", default=NATIVE, metavar="F[,F...]",
        help=f"{', '.join(FORMATS)}, or files of paged-kv calibrate formats")  # fmt: skip
    add("--dtype", choices=("auto", *DTYPE_BYTES), default="auto", help="vLLM's option")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="ranks (default 1)")
    add("--page-size", type=int, default=DEFAULT_PAGE_SIZE, metavar="N",
        help=f"tokens per page, vLLM's --block-size (default {DEFAULT_PAGE_SIZE})")  # fmt: skip
    for name in ("max-num-seqs", "max-num-batched-tokens"):
        add(f"--{name}", type=int, metavar="N", help="vLLM's option (default: as its server has)")
    add("--json", action="store_true", help="one JSON object per line instead of a table")


def main(args: argparse.Namespace) -> None:
    """Prints the table. Raises ValueError for what the user got wrong."""
    for name in ("context", "output", "tensor_parallel", "page_size", "sequences",
                 "max_num_seqs", "max_num_batched_tokens"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{name.replace('_', '-')} must be an integer >= 1, not {value}")
    variants = _variants(args)
    for name in ("sequences", "budget"):
        if getattr(args, name) is not None and len(variants) == 1:
            raise ValueError(f"{name} {getattr(args, name)} needs a --policy that has a budget")
    model = read_model(args.model, args.dtype)
    engine = read_engine(args, model)
    budgets = None
    if args.sequences is None:
        texts = (args.budget or str(DEFAULT_BUDGET)).split(",")
        budgets = [read_budget("budget", text) for text in texts]
    formats = args.page_format.split(",")
    cases = make_cases(variants, budgets, formats, engine.device)
    rows, refused = estimate(model, engine, cases, args.sequences)
    if args.json:
        for row in rows:
            print(json.dumps({"model": model.name, "memory_bytes": engine.memory, **row}))
        for line in left_out(refused):
            print(f"paged-kv: {line}", file=sys.stderr)
        return
    about = describe(model, engine) + _describe_gpu(args, model)
    print(*about, "", *table_lines(rows), sep="\n")
    if remarks := list(notes(rows, refused, engine)):
        print("", *remarks, sep="\n")


def _variants(args: argparse.Namespace) -> list[Variant]:
    """Full first, and once: all are compared with it. Raises ValueError."""
    full, others = (
        read_variants(policies, args.policy_config, FIXED)
        for policies in (registry.FULL, args.policy)
    )
    return [*full, *(variant for variant in others if variant.policy != registry.FULL)]


def read_engine(args: argparse.Namespace, model: Model) -> Engine:
    """How vLLM would run. Raises ValueError."""
    gpu = args.gpu_memory and read_size("gpu-memory", args.gpu_memory)
    device = args.device or (GPU if gpu else CPU)
    if gpu and device == CPU:
        raise ValueError("device cpu does not go with --gpu-memory: use --memory")
    share = args.gpu_memory_utilization
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"gpu-memory-utilization must be a number in (0, 1], not {share}")
    for name in ("weights_dtype", "gpu_memory_utilization"):
        value = getattr(args, name)
        if value is not None and not gpu:
            raise ValueError(f"{name.replace('_', '-')} {value} is for --gpu-memory")
    ranks, context = args.tensor_parallel, _context(args, model)
    if device == CPU:
        tokens, seqs = (ranks * value for value in CPU_DEFAULTS)
    else:
        tokens, seqs = next(found for least, found in GPU_DEFAULTS.items() if (gpu or 0) >= least)
    return Engine(
        memory=_left(args, model, gpu) if gpu else read_size("memory", args.memory),
        prompt_len=context,
        max_len=context + args.output,
        page_size=args.page_size,
        max_num_seqs=args.max_num_seqs or seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or tokens,
        concurrent_batches=1 if device == CPU else 2,
        num_ranks=ranks,
        device=device,
        is_configured=not gpu,
    )


def _context(args: argparse.Namespace, model: Model) -> int:
    """Tokens of a prompt. Raises ValueError: the model does not take so many."""
    limit, output = model.max_len or MOST, args.output
    context: int = args.context or max(1, min(CONTEXT, limit - output))
    if context + output > limit:
        raise ValueError(
            f"context {context} + output {output} must be at most {limit}, the longest sequence "
            f"of model {model.name}, not {context + output}"
        )
    return context


def _left(args: argparse.Namespace, model: Model, gpu: int) -> int:
    """Of a GPU's memory, for the KV cache. Raises ValueError: nothing."""
    share = _utilization(args)
    weights = weight_bytes(model, _weights_dtype(args, model), args.tensor_parallel)
    left = int(gpu * share) - weights
    if left <= 0:
        raise ValueError(
            f"gpu-memory {args.gpu_memory}: {share:.0%} of it is less than the weights of "
            f"{model.name}, {show_size(weights)}: take more GPUs (--tensor-parallel) or smaller "
            "weights (--weights-dtype)"
        )
    return left


def _utilization(args: argparse.Namespace) -> float:
    return UTILIZATION if args.gpu_memory_utilization is None else args.gpu_memory_utilization


def _weights_dtype(args: argparse.Namespace, model: Model) -> str:
    if args.weights_dtype:
        return str(args.weights_dtype)
    if getattr(model.text, "quantization_config", None):
        raise ValueError(
            f"model {model.name}: its weights are quantized: say with --weights-dtype to what"
        )
    return model.dtype


def _describe_gpu(args: argparse.Namespace, model: Model) -> list[str]:
    if not args.gpu_memory:
        return []
    dtype = _weights_dtype(args, model)
    weights = show_size(weight_bytes(model, dtype, args.tensor_parallel))
    return [
        f"({_utilization(args):.0%} of {args.gpu_memory} less {weights} of weights in "
        f"{dtype}; what steps need is not known: an upper bound)"
    ]
