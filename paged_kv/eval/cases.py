"""What is compared: policies, budgets and page formats, and the checks before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from paged_kv import registry
from paged_kv.bench.cases import peer_format
from paged_kv.bench.held import LayerSchedule, entries, entry_bytes, layer_schedules
from paged_kv.config import CompressionConfig
from paged_kv.core.readers import read_budget
from paged_kv.eval.peers import peers
from paged_kv.eval.tasks.longbench import truncated_middle
from paged_kv.variants import read_variants, refuse_repeated, takes_residual

TRUNCATE = "truncate"  # no policy: the context's first and last half of the budget, all kept
FIXED = {  # options that the command line or the protocol decides on -> what to use
    "policy": "--policy",
    "budget": "--budget",
    "compress_prefill": "the protocol",
    "start": "the protocol",
    "page_format": "--page-format",
    "residual_pages": "--residual-pages",
}


class Held(NamedTuple):
    """What a cache holds."""

    by_layer: list[int]  # entries
    cache_bytes: int  # keys and values, as pages store them

    @property
    def kept(self) -> float:
        """Entries per layer, mean."""
        return sum(self.by_layer) / len(self.by_layer)


@dataclass(frozen=True)
class Case:
    """One policy under one budget.

    Args:
        policy: as the user wrote it, which tells it from another with other options.
        budget: entries or share that is kept; None: everything.
        config: the same, as engines take it.
        model: a model directory.
        page_size: entries are dropped in multiples of it.
    """

    policy: str
    budget: int | Fraction | None
    config: CompressionConfig
    model: Path
    page_size: int

    @property
    def is_peer(self) -> bool:
        """Whether somebody else's cache is asked; the config then says how much it may hold."""
        return self.policy in peers.NAMES

    def __str__(self) -> str:
        return f"{self.policy} {self.budget or ''}".strip()

    def schedules(self, engine: str = "reference") -> list[LayerSchedule]:
        """The schedule of each layer.

        Args:
            engine: reference, hf or vllm, which refuses budgets that make too many groups of
                layers.

        Raises:
            ValueError: the budget or the page format does not fit the model, the page size or the
                engine.
        """
        return layer_schedules(self.config, self.model, self.page_size, engine)

    def held(self, num_tokens: int) -> Held:
        """What is held after so many tokens: the schedules say it."""
        kept = entries(self.schedules(), num_tokens, 0)
        return Held(kept, sum(map(int.__mul__, kept, self._entry_bytes)))

    @cached_property
    def _entry_bytes(self) -> list[int]:
        """In each layer, all KV heads; engines that evaluate store float32."""
        import torch

        return entry_bytes(self.config, self.model, self.page_size, torch.float32)


def context_of(case: Case, context: Sequence[int]) -> list[int]:
    """The tokens that a case sees of a context: all, unless it cuts out the middle."""
    if case.policy != TRUNCATE:
        return list(context)
    assert isinstance(case.budget, int)
    return truncated_middle(list(context), case.budget)


def read_cases(args: argparse.Namespace, model: Path, baselines: Sequence[str] = ()) -> list[Case]:
    """Every page format with every policy and budget, `full` once; then the peers.

    Args:
        args: of a command with the common options.
        model: its directory.
        baselines: names that are neither policies nor peers and are allowed here.

    Raises:
        ValueError: what the user got wrong.
    """
    others = [*peers.NAMES, *baselines]
    variants = read_variants(args.policy, args.policy_config, FIXED, others)
    cases = []
    budgets = [read_budget("budget", text) for text in args.budget.split(",")]
    named = [variant.text for variant in variants if variant.text in peers.NAMES]
    policies = [variant for variant in variants if variant.text not in named]
    formats = args.page_format.split(",")
    for page_format, (text, policy, more) in product(formats, policies):
        paging: dict[str, Any] = {"page_format": page_format}
        if takes_residual(page_format, formats):
            paging["residual_pages"] = args.residual_pages
        uncompressed = CompressionConfig.from_dict(paging)
        if policy == registry.FULL:
            cases.append(Case(policy, None, uncompressed, model, args.page_size))
            continue
        for budget in budgets:
            options = {"policy": policy, "budget": budget, "compress_prefill": True, **paging}
            config = uncompressed
            if policy not in baselines:
                config = CompressionConfig.from_dict({**more, **options})
            elif isinstance(budget, Fraction):
                raise ValueError(f"budget {float(budget)}: {policy} needs a number of tokens")
            cases.append(Case(text, budget, config, model, args.page_size))
    for case in cases:
        case.schedules(args.engine)
    cases += [case for name in named for case in _peer_cases(args, model, name, budgets)]
    labels = [f"{case} {case.config.page_format}" for case in cases]
    refuse_repeated(f"budget {args.budget}, page-format {args.page_format}", labels)
    return cases


def _peer_cases(
    args: argparse.Namespace, model: Path, name: str, budgets: Sequence[int | Fraction]
) -> list[Case]:
    """A peer at every budget; it holds what `streaming` would."""
    peers.check(name, args.kvpress_python)
    if peers.keeps_all(name):
        config = CompressionConfig.from_dict({"page_format": peer_format(name)})
        return [Case(name, None, config, model, args.page_size)]
    cases = []
    for budget in budgets:
        options = {"policy": "streaming", "budget": budget, "compress_prefill": True}
        config = CompressionConfig.from_dict(options)
        cases.append(Case(name, budget, config, model, args.page_size))
        cases[-1].schedules()
    return cases
