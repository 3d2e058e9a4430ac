"""How a peer's cache is measured: one prompt, compressed once. Needs torch only.

The same code runs in this process and in kvpress_child.py's, which loads it by its path: it must
import nothing of paged_kv and nothing that differs between versions of transformers.

    context   one forward pass, inside which or after which the cache becomes smaller
    question  one more, over what is left, at its true positions
    answer    greedy, token by token, up to a token that ends it
    targets   instead of an answer: question and targets in one pass, teacher forcing
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
Compression = Callable[[int], AbstractContextManager[Any]]


@torch.inference_mode()
def answer(
    model: Any,
    cache: Any,
    compression: Compression = lambda length: nullcontext(),
    argument: str = "past_key_values",
    *,
    context: Sequence[int],
    question: Sequence[int],
    max_new_tokens: int,
    stop: Container[int],
    targets: Sequence[int],
) -> dict[str, Any]:
    """The fields of paged_kv.eval.prompt.Answer; the last arguments are those of a Prompt.

    Without a question the first new token is predicted from the context's own pass, as engines do.
    A target never is: then the context's last token is read after the compression, as a question.

    Args:
        model: a causal LM of transformers.
        cache: of this model, empty.
        compression: from the length of the context to what is entered around its pass.
        argument: what models call their cache.
        context: at least one token.
        question: may be empty.
        max_new_tokens: most tokens of the answer.
        stop: what ends an answer, and is not part of it.
        targets: to be predicted instead, in one pass, whose logits are held at once.
    """
    if targets and not question:
        context, question = context[:-1], context[-1:]
    run = _Run(model, cache, argument)
    start = time.perf_counter()
    with compression(len(context)):
        logits = run.forward(context)
    held = [_held(layer, cache.get_seq_length(place)) for place, layer in enumerate(cache.layers)]
    result = {"kept": sum(held) / len(held), "cache_bytes": cache_bytes(cache)}
    if targets:
        logits = run.forward([*question, *targets[:-1]], len(targets)).float()
        wanted = torch.tensor(targets, device=logits.device)
        tokens, nll = [], F.cross_entropy(logits, wanted).item()
    else:
        logits = run.forward(question) if question else logits
        tokens, nll = run.generate(logits, max_new_tokens, stop), None
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "nll": nll, **result, "seconds": seconds}


class _Run:
    """A model with a cache that may hold fewer entries than tokens were seen."""

    def __init__(self, model: Any, cache: Any, argument: str) -> None:
        self.model, self.cache, self.argument = model, cache, argument
        self.num_tokens = 0

    def forward(self, tokens: Sequence[int], predictions: int = 1) -> Tensor:
        """Logits [predictions, vocabulary] of the last tokens of a chunk."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        end = self.num_tokens + ids.shape[1]
        positions = torch.arange(self.num_tokens, end, device=ids.device)[None]
        self.num_tokens = end
        caching = {self.argument: self.cache, "use_cache": True}
        output = self.model(
            input_ids=ids, position_ids=positions, logits_to_keep=predictions, **caching
        )
        logits: Tensor = output.logits[0]
        return logits

    def generate(self, logits: Tensor, max_new_tokens: int, stop: Container[int]) -> list[int]:
        """The likeliest tokens, from the logits of the first one on."""
        tokens: list[int] = []
        while len(tokens) < max_new_tokens:
            token = int(logits[-1].argmax())
            if token in stop:
                break
            tokens.append(token)
            if len(tokens) < max_new_tokens:
                logits = self.forward([token])
        return tokens


def _held(layer: Any, num_tokens: int) -> int:
    """Of so many tokens: transformers counts those that a sliding window has left, too."""
    return min(num_tokens, getattr(layer, "sliding_window", None) or num_tokens)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values: packed numbers with scales and shifts, and what is unpacked."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(stored_bytes(tensor) for tensor in tensors if tensor is not None)


def stored_bytes(tensor: Tensor) -> int:
    """Of a tensor, or of those that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
