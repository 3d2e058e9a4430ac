"""What the tiers below the pages take and hold: host memory and files, of all ranks together."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from paged_kv.capacity.layers import page_bytes
from paged_kv.capacity.pool import Pool
from paged_kv.core.page_formats import NATIVE
from paged_kv.core.schedule import cdiv

GIB = 1 << 30


def tiers(pool: Pool) -> dict[str, Any]:
    """Of swap and of spill, where the options ask for them; JSON.

    Raises:
        ValueError: the swap space holds no request.
    """
    result: dict[str, Any] = {}
    if pool.case.config.swap_space:
        result["swap"] = _swap(pool)
    if pool.case.config.spill:
        result["spill"] = _spill(pool)
    return result


def _swap(pool: Pool) -> dict[str, Any]:
    """Requests that wait there at their most, and the slots that they take."""
    from paged_kv.vllm.swap.contents import aligned

    config, ranks = pool.case.config, pool.engine.num_ranks
    largest = slot_bytes(pool)
    spaces = config.swap_space, config.swap_dir_space
    host, files = (int(space * GIB) // ranks // aligned(largest) for space in spaces)
    rings = pool.layers.residual_row + pool.layers.query_row * len(pool.plan.budgets)
    per_request = pool.while_decoding().pages + -(-rings // largest)
    if host < 1 + -(-rings // largest):
        raise ValueError(f"swap_space {config.swap_space} GiB holds no request")
    return {
        "slot_bytes": aligned(largest),
        "host_slots": host,
        "file_slots": files,
        "slots_per_sequence": per_request,
        "sequences": round((host + files) / per_request, 2),
    }


def slot_bytes(pool: Pool) -> int:
    """Of a page of one layer group with all that lies beside it, on one rank."""
    from paged_kv.vllm.swap.contents import aligned

    layers, most = pool.layers, 0
    for group in pool.groups:
        # Layers of different formats are one group, that of the whole model.
        of_group = layers.formats[: cdiv(group.num_layers, group.num_groups)]
        runs = [(name, len(list(run))) for name, run in groupby(of_group)]
        parts = [_page(pool, name) * count for name, count in runs]
        swapped = [_page(pool, pool.case.config.swap_format) * count for _, count in runs]
        if pool.case.config.swap_format != NATIVE:
            parts = min(parts, swapped, key=sum)
        if group.schedule is not None:
            for _ in layers.side_names:  # of four bytes each
                beside = layers.side // len(layers.side_names)
                parts += [beside * count for _, count in runs]
        most = max(most, sum(map(aligned, parts)))
    return most


def _page(pool: Pool, page_format: str) -> int:
    return page_bytes(page_format, pool.model, pool.engine)


def _spill(pool: Pool) -> dict[str, Any]:
    """Keys and values of what a sequence has dropped at its end, as far as there is room."""
    max_len, space = pool.engine.max_len, pool.case.config.spill_space()
    per_entry = pool.layers.native_page // pool.engine.page_size * pool.engine.num_ranks
    host = files = 0
    for schedule in pool.plan.schedules():
        spilled = min(schedule.evicted(max_len, 0), space.budget)
        host += min(spilled, space.host_entries) * per_entry
        files += max(0, spilled - space.host_entries) * per_entry
    return {"host_bytes_per_sequence": host, "file_bytes_per_sequence": files}
