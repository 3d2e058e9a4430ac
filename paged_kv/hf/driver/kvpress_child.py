"""One press of kvpress, in an interpreter that has it: a script of its own, no part of paged_kv.

kvpress wants an older transformers than we do. Started by paged_kv.eval.peers.kvpress_process:

    python -I kvpress_child.py MODEL_DIR PRESS THREADS
    stdout   {"kvpress": version or null, ...} at once, before anything is loaded
    stdin    a line of JSON for each prompt: [its fields by name, kept]
    stdout   a line of JSON for each answer, in order

kept is how many entries of the context each layer keeps, null for all. What libraries print goes to
stderr. The model runs in float32.
"""

import json
import os
import runpy
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("kvpress", "transformers", "torch")
EAGER = ("ObservedAttentionPress",)  # it reads the weights that only eager attention returns


def main() -> None:
    """Answers until the parent closes the pipe."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps({name: version_of(name) for name in PACKAGES}), file=replies)
    line = sys.stdin.readline()  # the parent looks at the versions before it asks
    if not line:
        return
    model_dir, press, threads = sys.argv[1:]
    model, press_class = load(model_dir, press, int(threads))
    answer = runpy.run_path(str(Path(__file__).with_name("peer_protocol.py")))["answer"]
    from transformers import DynamicCache

    while line:
        prompt, kept = json.loads(line)

        def compression(length: int, kept: Any = kept) -> Any:
            if kept is None or kept >= length:
                return nullcontext()
            return press_class(compression_ratio=ratio(length, kept))(model)

        found = answer(model, DynamicCache(), compression, **prompt)
        print(json.dumps(found), file=replies)
        line = sys.stdin.readline()


def ratio(length: int, kept: int) -> float:
    """The share to remove. Presses keep int(length * (1 - ratio)), or round that."""
    return 1 - (kept + 1e-6) / length


def version_of(package: str) -> Any:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load(model_dir: str, press: str, threads: int) -> tuple[Any, Any]:
    """The model and the class of the press."""
    import kvpress
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.set_num_threads(threads)
    ALL_ATTENTION_FUNCTIONS["tail"] = tail_attention
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32,
        local_files_only=True,
        attn_implementation="eager" if press in EAGER else "tail",
    )
    return model.eval(), getattr(kvpress, press)


def tail_attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kwargs: Any
) -> tuple[Any, None]:
    """SDPA with a causal mask that ends at the last key, as flash attention's.

    Some presses leave layers of unequal lengths, and transformers' mask is that of the first one.
    """
    import torch

    queries, keys = query.shape[2], key.shape[2]
    seen = None
    if 1 < queries < keys:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        seen = seen.tril(keys - queries)
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=seen,
        is_causal=queries > 1 and queries == keys,
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main()
