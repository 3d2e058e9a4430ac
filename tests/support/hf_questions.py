"""One document, many questions: for tests of copies, saved caches and crop."""

from __future__ import annotations

from typing import Any

import torch
from hf_models import prompt

CONTEXT = prompt(203)
QUESTIONS = [prompt(9 + 20 * seed, seed + 1) for seed in range(3)]


def read(model: Any, cache: Any, *rows: list[int]) -> None:
    """The context: in two chunks, so that a policy drops some of it if it may."""
    ids = torch.tensor(rows or [CONTEXT])
    with torch.no_grad():
        model(ids[:, :150], past_key_values=cache)
        model(ids[:, 150:], past_key_values=cache)


def ask(model: Any, cache: Any, question: list[int], count: int = 45) -> list[int]:
    """A greedy answer."""
    ids = torch.tensor([CONTEXT + question])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    found = model.generate(ids, past_key_values=cache, max_new_tokens=count, **options)
    return found[0, ids.shape[1] :].tolist()
