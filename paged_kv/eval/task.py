"""What is evaluated, for either engine: plain data, and the checks before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from paged_kv.bench.settings import model_config
from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.core.schedule import Schedule
from paged_kv.plan import make_plan


@dataclass(frozen=True)
class Task:
    """One window of a text, to be predicted; see paged_kv.eval.perplexity for the protocols.

    Args:
        model: a model directory.
        protocol: prompt or stream.
        num_prompt: tokens N before the scored ones.
        num_scored: targets M.
        page_size: entries are dropped in multiples of it.
        tokens: num_tokens of them.
        offset: tokens of the text before them.
    """

    model: Path
    protocol: str
    num_prompt: int
    num_scored: int
    page_size: int
    tokens: Sequence[int] = ()
    offset: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the text that are needed. Of a prompt, token N has no target but itself."""
        return self.num_prompt + self.num_scored + (self.protocol == "prompt")

    @property
    def num_seen(self) -> int:
        """Tokens processed when the entries that are held are counted."""
        return self.num_prompt if self.protocol == "prompt" else self.num_tokens

    def at(self, offset: int, text: Sequence[int]) -> Task:
        """The same with its tokens, those of a text after the first `offset`."""
        return replace(self, tokens=text[offset : offset + self.num_tokens], offset=offset)


class Case(NamedTuple):
    """One policy under one budget."""

    policy: str
    budget: int | Fraction | None
    config: CompressionConfig


class Outcome(NamedTuple):
    """What an engine found in one window."""

    nll: float
    kl: float | None  # from the full cache; None if the engine does not know
    kept: float
    cache_bytes: int
    seconds: float


def check_case(case: Case, task: Task, engine: str = "reference") -> list[Schedule | None]:
    """The schedule of each layer, None for one that keeps everything.

    Args:
        case: what is kept.
        task: of a model and a page size.
        engine: reference or vllm, which refuses budgets that make too many groups of layers.

    Raises:
        ValueError: the budget or the page format does not fit the model, the page size or the
            engine.
    """
    from paged_kv.hf.arguments import check_page_format
    from paged_kv.tiers.files import check_spill_dir

    config = model_config(task.model)
    config = config.get("text_config", config)
    num_layers = config["num_hidden_layers"]
    check_spill_dir(case.config.spill_dir)
    check_page_format(case.config, SimpleNamespace(**config), task.page_size)
    if not case.config.enabled:
        return [None] * num_layers
    full = full_layers(config.get("layer_types"), num_layers)
    plan = make_plan(case.config, task.page_size, num_layers, full)
    if engine == "vllm":
        from paged_kv.vllm.frontend.grouping import group_layers

        group_layers(plan, case.config, num_layers - len(full))
    return [plan.schedule(layer) for layer in range(num_layers)]


def entry_bytes(case: Case, task: Task) -> list[int]:
    """Bytes of an entry in each layer, all KV heads, as float32 engines store it."""
    import torch

    from paged_kv.quant import make_layout

    config = model_config(task.model)
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or config["hidden_size"] // heads
    native = 2 * size * torch.float32.itemsize
    formats = layer_formats(case.config.page_format, config["num_hidden_layers"])
    return [
        kv_heads
        * (
            native
            if name == NATIVE
            else make_layout(name, torch.float32, size, size, task.page_size).entry_bytes
        )
        for name in formats
    ]


def full_layers(types: Sequence[str] | None, num_layers: int) -> list[int]:
    """Layers with full attention; the engines check again what a model says in other ways."""
    if types is None:
        return list(range(num_layers))
    return [layer for layer, kind in enumerate(types) if kind == "full_attention"]


def read_windows(
    task: Task, file: Path, offset: int = 0, windows: int = 1, stride: int = 0
) -> list[Task]:
    """The task at `offset` tokens of a file, and again every `stride` tokens after it.

    Raises:
        ValueError: the text is too short.
    """
    from paged_kv.hf.driver.loading import encode

    tokens = encode(task.model, file.read_text(encoding="utf-8", errors="replace"))
    offsets = [offset + index * stride for index in range(windows)]
    need = offsets[-1] + task.num_tokens
    if len(tokens) < need:
        several = f"windows {windows}, stride {stride}, " if windows > 1 else ""
        raise ValueError(
            f"text {file} has {len(tokens)} tokens; offset {offset}, {several}prompt-tokens "
            f"{task.num_prompt} and score-tokens {task.num_scored} need {need}"
        )
    return [task.at(first, tokens) for first in offsets]
