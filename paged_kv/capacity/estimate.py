"""The figures of each case, as rows, and the budget with which so many sequences fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from paged_kv import registry
from paged_kv.capacity.cases import Case, Engine
from paged_kv.capacity.model import Model
from paged_kv.capacity.pool import Groups, Held, Pool
from paged_kv.capacity.tiers import tiers
from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.core.schedule import cdiv

Row = dict[str, Any]


class Refused(NamedTuple):
    """A case that the plugin would refuse, or that has no budget that is small enough."""

    case: Case
    error: ValueError


def estimate(
    model: Model, engine: Engine, cases: Iterable[Case], num_sequences: int | None = None
) -> tuple[list[Row], list[Refused]]:
    """A row for each case, and the cases that have none.

    Args:
        model: its sizes.
        engine: how vLLM runs.
        cases: what is kept.
        num_sequences: that must decode at once, for cases that ask for their budget.

    Raises:
        ValueError: the model does not fit, or all cases are refused but those with `full`, which
            nobody has asked for.
    """
    full = Pool(model, engine, Case(registry.FULL, NATIVE, CompressionConfig()))
    base = _decoding(full)
    rows: list[Row] = []
    refused: list[Refused] = []
    for case in cases:
        try:
            sized = case
            if case.finds_budget:
                assert num_sequences is not None
                sized = fitting(model, engine, case, num_sequences)
            rows.append(_row(Pool(model, engine, sized), base))
        except ValueError as error:
            refused.append(Refused(case, error))
    asked = [each for each in refused if not rows or each.case.policy != registry.FULL]
    if asked and all(row["policy"] == registry.FULL for row in rows):
        raise asked[0].error
    return rows, refused


def fitting(model: Model, engine: Engine, case: Case, num_sequences: int) -> Case:
    """The case with the largest budget, in whole pages, with which so many decode at once.

    Raises:
        ValueError: not even the least budget is small enough.
    """
    size = engine.page_size

    def with_budget(pages: int) -> Case:
        config = replace(case.config, budget=pages * size)
        return case._replace(config=config, finds_budget=False)

    def decoding(pages: int) -> float:
        """Sequences; any number with a budget that is too small to be allowed."""
        try:
            return _decoding(Pool(model, engine, with_budget(pages)))
        except ValueError:
            return math.inf

    most = cdiv(engine.max_len, size)
    _decoding(Pool(model, engine, with_budget(most)))  # what has nothing to do with budgets raises
    low, high = 0, most + 1  # enough decode with low pages, not with high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if decoding(middle) >= num_sequences else (low, middle)
    if low == 0 or decoding(low) == math.inf:
        raise ValueError(
            f"sequences {num_sequences}: no budget of {case.policy} is small enough: with "
            f"{high * size}, the least, {decoding(high):.1f} decode at once"
        )
    return with_budget(low)


def _decoding(pool: Pool) -> float:
    """Sequences that decode at once; vLLM's null page is nobody's."""
    return (pool.num_pages - 1) / pool.while_decoding().pages


def _row(pool: Pool, base: float) -> Row:
    shares, layers, engine, case = pool.shares, pool.layers, pool.engine, pool.case
    prompting, decoding = pool.while_prompting(), pool.while_decoding()
    sequences = _decoding(pool)
    concurrency = pool.num_pages / pool.reserved_pages
    return {
        "policy": case.policy,
        "budget": case.budget,
        "page_format": case.page_format,
        "bytes_per_token": sum(layers.pages) // engine.page_size,
        "prompt_entries": round(prompting.entries, 2),
        "prompt_bytes": _bytes(pool, prompting),
        "decode_entries": round(decoding.entries, 2),
        "decode_bytes": _bytes(pool, decoding),
        "prompts": round((pool.num_pages - 1) / prompting.pages, 2),
        "sequences": round(sequences, 2),
        "gain": round(sequences / base, 2),
        "vllm_kv_cache_tokens": int(concurrency * engine.max_len),
        "vllm_max_concurrency": round(concurrency, 2),
        "pages": pool.num_pages,
        "page_bytes": shares.pool_page_bytes,
        "pages_per_sequence": decoding.pages,
        "groups": [
            {"layers": group.num_layers, "groups": group.num_groups, "kind": _kind(group)}
            for group in pool.groups
        ],
        "side_bytes_per_page": shares.beside_page_bytes,
        "query_ring_bytes": (shares.query_rows(engine.memory) + 1) * shares.query_row_bytes,
        "residual_bytes": (shares.residual_rows(engine.memory) + 1) * shares.residual_row_bytes,
        "longest_prompt": pool.longest_prompt,
        "prompt_piece": pool.prompt_chunk,
        "waits_for_pressure": case.config.waits_for_pressure,
        "starts": pool.reserved_pages < pool.num_pages,
        "tiers": tiers(pool),
    }


def _kind(group: Groups) -> str:
    if group.schedule is not None:
        return "compressed"
    return f"sliding window of {group.window}" if group.window else "full"


def _bytes(pool: Pool, held: Held) -> int:
    """With side data and rows of rings."""
    shares = pool.shares
    page = shares.pool_page_bytes + shares.beside_page_bytes
    return held.pages * page + shares.query_row_bytes + shares.residual_row_bytes
