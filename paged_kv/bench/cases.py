"""What throughput, latency and memory compare, and with which load; read and checked.

A case is a policy with a budget, or a peer: vLLM as it is. A load is what is asked of each of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

from paged_kv import registry
from paged_kv.bench.held import layer_schedules
from paged_kv.bench.settings import BFLOAT16, decoder_config, kv_bytes_per_token
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.core.readers import read_budget
from paged_kv.core.schedule import cdiv
from paged_kv.variants import read_variants, refuse_repeated

PLAIN, PLAIN_FP8 = "plain", "plain-fp8"
PEERS = {PLAIN: "auto", PLAIN_FP8: "fp8"}  # name -> vLLM's kv_cache_dtype
OWN_FLAGS = {
    "policy": "--policy",
    "budget": "--budget",
    "page_format": "--page-format",
    "start": "--start",
}
SLACK = DEFAULT_PAGE_SIZE  # tokens by which a prompt of random words may turn out longer


def peer_format(peer: str) -> str:
    """Of a peer's pages, in vLLM's word for it; native also for peers that have none."""
    return "fp8" if PEERS.get(peer) == "fp8" else NATIVE


def number_bytes(peer: str) -> int:
    """Of a number in a peer's pages; 0: as many as in the model's dtype."""
    return 0 if peer_format(peer) == NATIVE else 1


@dataclass(frozen=True, eq=False)  # the same case is the same object
class Case:
    """One line of the result.

    Args:
        policy: as the user wrote it, or one of PEERS.
        budget: None for what keeps everything.
        config: the policy's options; a peer has none that differ from the defaults.
        options: those given, as in additional_config["paged_kv"]; empty for peers.
    """

    policy: str
    budget: int | Fraction | None
    config: CompressionConfig
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """Names it among others."""
        parts = (self.policy, self.shown_budget, self.config.page_format)
        return " ".join(str(part) for part in parts if part not in (None, NATIVE))

    @property
    def shown_budget(self) -> int | float | None:
        """The budget as JSON can carry it."""
        return float(self.budget) if isinstance(self.budget, Fraction) else self.budget

    @property
    def kv_cache_dtype(self) -> str:
        """vLLM's option of that name."""
        return PEERS.get(self.policy, "auto")

    @property
    def page_format(self) -> str:
        """Of the policy's pages; of a peer's, vLLM's word for it."""
        return peer_format(self.policy) if self.policy in PEERS else self.config.page_format

    def flags(self) -> list[str]:
        """Of `vllm serve`."""
        if self.policy in PEERS:
            return ["--kv-cache-dtype", self.kv_cache_dtype]
        more = {k: v for k, v in self.options.items() if k not in ("policy", "budget", "start")}
        flags = ["--kv-policy", self.config.policy]
        if self.budget is not None:
            flags += ["--kv-budget", str(self.options["budget"])]
        if "start" in self.options:
            flags += ["--kv-start", self.options["start"]]
        return [*flags, "--kv-policy-config", json.dumps(more)]


@dataclass(frozen=True)
class Load:
    """Requests of one size, and the pool that they share.

    Args:
        input_len: tokens of a prompt.
        output_len: tokens generated for each.
        requests: how many.
        pool_tokens: tokens whose keys and values fit into the pool, uncompressed.
        dtype: in which the model runs.
    """

    input_len: int
    output_len: int
    requests: int
    pool_tokens: int
    dtype: str = BFLOAT16

    def pool_bytes(self, model: Path) -> int:
        """Memory of the pool, for a model directory."""
        return self.pool_tokens * kv_bytes_per_token(model, self.dtype)

    @property
    def share(self) -> float:
        """The pool over what all requests need uncompressed."""
        return self.pool_tokens / (self.requests * self.request_tokens)

    @property
    def request_tokens(self) -> int:
        """Of one request, in whole pages."""
        return whole_pages(self.input_len + self.output_len)

    @property
    def max_model_len(self) -> int:
        """The longest sequence that an engine for this load admits."""
        return self.request_tokens + SLACK


def whole_pages(num_tokens: int) -> int:
    """Tokens that fit into the pages of so many."""
    return cdiv(num_tokens, DEFAULT_PAGE_SIZE) * DEFAULT_PAGE_SIZE


def read_cases(
    policies: str, budgets: str, page_formats: str, start: str | None, more: str | None
) -> list[Case]:
    """Every page format with every policy and budget; what keeps everything, and peers, once.

    Args:
        policies: see read_variants.
        budgets: the same of budgets.
        page_formats: the same of page formats.
        start: of the policies; None for the default.
        more: a JSON object of further options for all policies.

    Raises:
        ValueError: names the option.
    """
    cases = []
    for variant in read_variants(policies, more, OWN_FLAGS, PEERS):
        if variant.policy in PEERS:
            cases.append(Case(variant.text, None, CompressionConfig(), {}))
            continue
        formats = page_formats.split(",")
        sizes = [None] if variant.policy == registry.FULL else budgets.split(",")
        for page_format, size in product(formats, sizes):
            options = variant.stored_in(page_format, formats)
            cases.append(_case(variant.text, options, size, start))
    refuse_repeated(f"budget {budgets}, page-format {page_formats}", [case.label for case in cases])
    return cases


def _case(text: str, options: dict[str, Any], size: str | None, start: str | None) -> Case:
    if size is None:
        return Case(text, None, CompressionConfig.from_dict(options), options)
    options = {**options, "budget": size} | ({"start": start} if start else {})
    return Case(text, read_budget("budget", size), CompressionConfig.from_dict(options), options)


def read_loads(
    model: Path,
    inputs: Sequence[int],
    output_len: int,
    requests: Sequence[int],
    pools: Sequence[int | float],
    dtype: str = BFLOAT16,
) -> list[Load]:
    """Every prompt length with every number of requests and every pool.

    Args:
        model: a model directory.
        inputs: tokens of a prompt.
        output_len: tokens generated.
        requests: how many at once.
        pools: tokens, or as a float the share of what all requests need.
        dtype: in which the model runs.

    Raises:
        ValueError: longer than the model's context, or a pool without room for one request.
    """
    limit = decoder_config(model).get("max_position_embeddings")
    loads = []
    for input_len, count, pool in product(inputs, requests, pools):
        load = Load(input_len, output_len, count, 0, dtype)
        if limit is not None and load.max_model_len > limit:
            raise ValueError(
                f"input-len {input_len} with output-len {output_len} needs a context of "
                f"{load.max_model_len} tokens (whole pages, and one to spare); the model has "
                f"{limit}"
            )
        share = round(pool * count * load.request_tokens)
        tokens = whole_pages(share) if isinstance(pool, float) else pool
        load = replace(load, pool_tokens=tokens)
        _check_pool(load, pool)
        loads.append(load)
    return loads


def _check_pool(load: Load, pool: int | float) -> None:
    needed = load.max_model_len + DEFAULT_PAGE_SIZE  # one page is vLLM's null page
    if load.pool_tokens >= needed:
        return
    what = f"{pool} ({load.pool_tokens} tokens)" if isinstance(pool, float) else pool
    raise ValueError(
        f"pool {what} has no room for one request: input-len {load.input_len} with output-len "
        f"{load.output_len} needs {needed} tokens; a share of what all {load.requests} requests "
        "need is written with a point"
    )


def check(cases: Sequence[Case], model: Path) -> None:
    """Refuses budgets and page formats that the model cannot have. Raises ValueError."""
    kv_bytes_per_token(model)
    for case in cases:
        layer_schedules(case.config, model, DEFAULT_PAGE_SIZE)
