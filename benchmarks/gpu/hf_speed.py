"""PagedCache against DynamicCache in transformers, on a random model in the shape of Llama 3.1 8B.

A line for each context and cache, as benchmarks/hf_decode.py measures it: the caches of a context
step in turn, one row, bfloat16; dynamic_ms and paged_ms per token, their ratio, and by how much
torch's memory grew while the context was read. The weights are random and never leave the device.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
SMALL: dict[str, Any] = {  # --device cpu
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
}
WANTED = {"ratio": ("<=", 0.6)}  # with a budget of 1,024 after 32k
WANTED_AT = (32768, 1024)


def random_model(args: argparse.Namespace, folder: Path) -> Any:
    """On the device; its config.json lies in the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPE if args.device == "cuda" else {**SHAPE, **SMALL}
    config = AutoConfig.for_model("llama", **shape, num_hidden_layers=args.layers)
    config.save_pretrained(folder)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def caches(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Options of each PagedCache, by name."""
    budget = {"budget": args.budget, "compress_prefill": True}
    return {"full": {}} | {name: {"policy": name, **budget} for name in args.policies}


# Not imported: that folder has a module `kernels`, the name of a package that transformers seeks.
compare = runpy.run_path(str(common.ROOT / "benchmarks" / "hf_decode.py"))["compare"]


def lines(part: common.Part, args: argparse.Namespace, model: Any, tokens: int) -> None:
    """Of one context."""
    found = {}

    def run() -> dict[str, Any]:
        compared = compare(args, model, tokens, 1, caches(args), args.chunk)
        found.update(compared)
        return {"tokens": tokens, "caches": list(compared)}

    if part.case(f"read {tokens}", run) is None:
        return
    for name, measured in found.items():
        budget = None if name == "full" else args.budget
        fields = {"policy": name, "budget": budget, "tokens": tokens, "layers": args.layers}
        fields |= measured
        if (tokens, budget) == WANTED_AT:
            fields |= common.wanted(fields, WANTED)
        part.line(f"{name} {tokens}", True, **fields)


def main() -> int:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[32768, 8192], metavar="N",
        help="tokens (default 32768 8192)")  # fmt: skip
    add("--layers", type=int, default=32, metavar="N", help="of the model (default 32)")
    add("--budget", type=int, default=1024, metavar="N", help="default 1024")
    add("--policies", nargs="+", default=["streaming", "snapkv"], metavar="POLICY",
        help="beside full (default streaming snapkv)")  # fmt: skip
    add("--chunk", type=int, default=2048, metavar="N",
        help="tokens of the context that are read at once (default 2048)")  # fmt: skip
    add("--rounds", type=int, default=3, metavar="N", help="of 32 tokens (default 3)")
    args = parser.parse_args()
    part = common.Part("hf_speed", args)
    torch.manual_seed(part.seed)
    with tempfile.TemporaryDirectory() as folder:
        args.model = Path(folder)
        try:
            model = random_model(args, args.model)
        except Exception as error:
            part.line("model", False, error=f"{type(error).__name__}: {error}"[:600])
            return part.exit_code
        for tokens in args.contexts:
            lines(part, args, model, tokens)
    return part.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
