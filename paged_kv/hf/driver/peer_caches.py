"""transformers' caches, as peers of ours in evaluations."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from paged_kv.hf import compat
from paged_kv.hf.driver.decoding import dynamic_cache
from paged_kv.hf.driver.loading import load_model
from paged_kv.hf.driver.peer_protocol import answer


def quantized_cache(model: Any, bits: int) -> Any:
    """transformers' QuantizedCache with its defaults: a context is packed as a whole, what follows
    is native up to 128 entries."""
    from transformers import QuantizedCache

    return QuantizedCache(backend="quanto", config=model.config, nbits=bits)


QUANTO = "optimum-quanto"
CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": dynamic_cache,
    "quantized-int4": lambda model: quantized_cache(model, 4),
    "quantized-int2": lambda model: quantized_cache(model, 2),
}


def check(name: str) -> dict[str, str]:
    """The version of optimum-quanto, if it is used. Raises ValueError: it is missing."""
    if name == "dynamic":
        return {}
    try:
        return {QUANTO: metadata.version(QUANTO)}
    except metadata.PackageNotFoundError:
        hint = "pip install 'paged-kv[peers]'"
        raise ValueError(f"peer {name} needs {QUANTO}, which is not installed: {hint}") from None


def answers(
    name: str, model_dir: Path, prompts: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The fields of one answer for each prompt; see peer_protocol.

    Args:
        name: one of CACHES.
        model_dir: of the model, which runs in float32.
        prompts: fields of paged_kv.eval.prompt.Prompt.

    Raises:
        ValueError: a package or a compiler is missing, or transformers does not quantize the cache
            of such a model.
    """
    check(name)
    model = load_model(model_dir)
    argument = compat.cache_argument()
    _use_once(name, model)
    for prompt in prompts:
        yield answer(model, CACHES[name](model), argument=argument, **prompt)


def _use_once(name: str, model: Any) -> None:
    """Quanto compiles its operators when it first unpacks something: not in a prompt's seconds."""
    cache, numbers = CACHES[name](model), torch.zeros(1, 1, 64, 64)
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{before}"  # ninja is there
    try:
        cache.update(numbers, numbers, 0)
        cache.update(numbers, numbers, 0)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"peer {name}: {QUANTO} could not compile its operators, which takes ninja and a C++ "
            f"compiler ({reason})"
        ) from None
    finally:
        os.environ["PATH"] = before
