"""Spilling and fetching: what a compaction exchanges, and where dropped entries lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spill_definition import Spilling
from spill_world import BUDGET, STEP, World, compact

from paged_kv.config import CompressionConfig
from paged_kv.tiers.files import check_spill_dir
from paged_kv.tiers.spill_memory import SpillSpace

CASES: list[tuple[str, dict[str, Any]]] = [
    ("streaming", {}),
    ("snapkv", {"observation_window": 6}),
    ("tova", {}),
    ("h2o", {}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize("threshold", [1.0, 1.5])
def test_exchange_is_the_definition(name, options, threshold, tmp_path):
    """Two sequences, one of them longer, in one region; tiers that fill up, partly in files."""
    given = {"fetch_limit": 16, "spill_window": 9, "spill_threshold": threshold}
    config = {
        "num_sink_tokens": 2,
        "recent_window": 8,
        "budget": 100,
        "spill": True,
        "spill_interval": 0,
    }
    policy = CompressionConfig.from_dict(
        {"policy": name} | options | config | given
    ).create_policy()
    worlds = [
        World(name, options, Spilling(**given, spill_budget=60), SpillSpace(60, 20, str(tmp_path)))
        for _ in range(2)
    ]
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    worlds[1].add(30)
    for _ in range(5):
        for world in worlds:
            world.add(BUDGET + STEP if world.num_tokens < BUDGET else STEP)
        compact(worlds, policy, generator)
    assert min(world.num_fetched for world in worlds) > 20
    assert min(world.store.num_lost for world in worlds) > 0
    assert all(world.store.num_bytes["mmap"] for world in worlds)
    assert not list(tmp_path.iterdir()), "a file still has a name"


def test_who_decodes_looks_now_and_then():
    """What was fetched stays until the next look."""
    given = {"fetch_limit": 16, "spill_window": 9, "spill_threshold": 1.0}
    config = {"num_sink_tokens": 2, "recent_window": 8, "budget": 100, "spill": True}
    policy = CompressionConfig.from_dict(
        {"policy": "streaming", "spill_interval": 3 * STEP} | config | given
    ).create_policy()
    world = World("streaming", {}, Spilling(**given, spill_budget=60), SpillSpace(60, 60))
    world.interval = 3 * STEP
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    rests = []
    for more in (BUDGET + STEP, *[STEP] * 7):
        world.add(more)
        before = world.num_rests
        compact([world], policy, generator)
        rests.append(world.num_rests > before)
    assert rests == [False, True, True, False, True, True, False, True]
    assert world.num_fetched > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "full"}, r"spill needs a policy that drops entries, not policy 'full'"),
        ({"policy": "value_merge"}, r"spill needs .*'value_merge' merges them"),
        ({"policy": "pyramidal+pooling"}, r"spill needs .*'pyramidal\+pooling' merges them"),
        ({"policy": "cluster", "mode": "centroid"}, r"spill needs .*'cluster' merges them"),
        ({"policy": "h2o", "spill_dir": "/nowhere"}, r"spill_dir .* '/nowhere': No such file"),
        ({"policy": "h2o", "spill_dir": "/proc"}, r"spill_dir .* '/proc'"),
        ({"policy": "h2o", "fetch_limit": 0}, r"fetch_limit must be an integer >= 1, not 0"),
        ({"policy": "h2o", "spill": False, "spill_dir": "/tmp"}, r"spill_dir '/tmp' is for spill"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_spill_dir(CompressionConfig.from_dict({"spill": True, **options}).spill_dir)


def test_every_policy_that_drops_can_spill():
    for options in ({"policy": "cluster"}, {"policy": "random"}, {"policy": "pyramidal+learned"}):
        policy = CompressionConfig.from_dict({"spill": True, **options}).create_policy()
        assert {"keys", "values"} <= policy.reads
