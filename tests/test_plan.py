"""Budgets by layer of the whole model: what pipeline-parallel ranks, which hold a part, make of it.

vLLM 0.32 cannot run a pipeline on CPUs, so its own functions are given the specs of two ranks.
"""

import tempfile
from types import SimpleNamespace
from typing import Any

import engines
import pytest
import tiny_models
import torch

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.plan import make_plan
from paged_kv.vllm.frontend.grouping import group_layers
from paged_kv.vllm.plan import GroupedPlan

NUM_LAYERS = 30
PYRAMID = {"policy": "pyramidal", "budget": 256}


def plan(
    num_layers: int = NUM_LAYERS, full: list[int] | None = None, **options: Any
) -> GroupedPlan:
    full = list(range(num_layers)) if full is None else full
    config = CompressionConfig.from_dict({**PYRAMID, **options})
    return group_layers(make_plan(config, 32, num_layers, full), config, num_layers - len(full))


def test_steps_are_runs_of_layers():
    made = plan()
    budgets = [made.budgets[layer][0] for layer in range(NUM_LAYERS)]
    assert budgets == sorted(budgets, reverse=True)
    assert [budgets.count(value) for value in sorted(set(budgets), reverse=True)] == [10, 10, 10]
    assert sum(budgets) <= 256 * NUM_LAYERS
    assert (made.num_groups, made.num_other_groups, made.layers_per_page) == (3, 0, 10)


def test_json_keeps_everything():
    import json

    for made in (plan(), plan(budget=0.5, compress_prefill=True), plan(policy="streaming")):
        assert GroupedPlan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_skipped_layers_have_no_schedule():
    skipped = list(range(15))
    made = plan(policy="streaming", skip_layers=skipped)
    assert [made.schedule(layer) is None for layer in range(30)] == [True] * 15 + [False] * 15
    assert (made.num_groups, made.num_other_groups) == (1, 1)


def test_a_hybrid_has_one_step():
    made = plan(num_layers=6, full=[1, 3, 5])
    assert made.budgets == dict.fromkeys((1, 3, 5), (256, 0, 1))
    assert (made.num_groups, made.num_other_groups) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"skip_layers": [0]},
            "30 KV cache groups.*Splits that work: 0 skipped with pyramid_steps 1,",
        ),
        ({"skip_layers": [30]}, r"skip_layers names \[30\]"),
        ({"skip_layers": list(range(30))}, "leaves no layer to compress"),
        ({"budget": 96, "pyramid_beta": 8}, "raise budget or lower pyramid_beta"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"policy": "streaming"} | options if "skip_layers" in options else options)


# ---- two ranks of a pipeline


@pytest.fixture
def vllm_config(tmp_path) -> Any:
    from vllm import EngineArgs
    from vllm.v1.kv_cache_layout import KVCacheLayout

    config = EngineArgs(
        model=tiny_models.config_only("llama-30-layers", tmp_path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        pipeline_parallel_size=2,
        additional_config={"paged_kv": PYRAMID},
    ).create_engine_config()
    config.cache_config.kv_cache_layout = KVCacheLayout.LBHNC.name
    return config


class StockWorker:
    """vLLM's worker of a rank that holds some of the layers: its attention layers are real."""

    def __init__(self, vllm_config: Any, layers: range) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention import Attention

        compilation = SimpleNamespace(**vars(vllm_config.compilation_config))
        compilation.static_forward_context = {}
        self.vllm_config = SimpleNamespace(
            **{**vars(vllm_config), "compilation_config": compilation}
        )
        with set_current_vllm_config(self.vllm_config):
            for layer in layers:  # each adds itself to the context
                Attention(4, 32, 1.0, num_kv_heads=2, prefix=f"model.layers.{layer}.self_attn.attn")

    def get_kv_cache_spec(self) -> dict[str, Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return {name: layer.get_kv_cache_spec(self.vllm_config) for name, layer in context.items()}


@pytest.fixture
def ranks(vllm_config) -> list[Any]:
    from paged_kv.vllm.worker.worker import PagedWorkerMixin

    class Worker(PagedWorkerMixin, StockWorker):
        pass

    return [Worker(vllm_config, range(15)), Worker(vllm_config, range(15, 30))]


def test_a_rank_schedules_its_layers_by_their_place_in_the_model(vllm_config, ranks):
    made = GroupedPlan.from_json(vllm_config.additional_config["paged_kv_plan"])
    schedules = ranks[1]._schedules()
    assert list(schedules) == [f"model.layers.{layer}.self_attn.attn" for layer in range(15, 30)]
    budgets = [schedule.minimum for schedule in schedules.values()]
    assert budgets == [made.budgets[layer][0] for layer in range(15, 30)]
    assert len(set(budgets)) == 2
    assert [s.minimum for s in ranks[0]._schedules().values()] == [
        made.budgets[layer][0] for layer in range(15)
    ]


def test_a_worker_makes_one_config_and_one_policy(vllm_config, ranks, monkeypatch, tmp_path):
    """However many layers it has. (A config makes a policy of its own, which may refuse.)"""
    from paged_kv.vllm.worker import worker

    monkeypatch.setattr(worker, "make_request_stores", lambda *args: None)
    monkeypatch.setattr(worker, "Compactor", lambda runner, policy, *args: policy)
    created, files = [], []
    create, temporary = registry.create, tempfile.TemporaryFile
    monkeypatch.setattr(registry, "create", lambda *args: created.append(1) or create(*args))
    monkeypatch.setattr(
        tempfile, "TemporaryFile", lambda **kwargs: files.append(1) or temporary(**kwargs)
    )
    options = vllm_config.additional_config["paged_kv"]
    spilling = {**options, "spill": True, "spill_dir": str(tmp_path)}
    vllm_config.additional_config["paged_kv"] = spilling
    for rank in ranks:
        rank.model_runner = None
        assert len(rank.get_kv_cache_spec()) == 15
        assert rank._compactor({}, {}).observation_window > 0
    assert (len(created), len(files)) == (2 * len(ranks), 0)


def test_groups_are_the_same_on_every_rank(vllm_config, ranks):
    """A group's number means the same budget everywhere, also where it has no layer."""
    from paged_kv.vllm.scheduler import registration

    registration.register()
    by_rank = [rank.get_kv_cache_spec() for rank in ranks]
    together = by_rank[0] | by_rank[1]
    planning = engines.kv_cache_planning()
    groups = planning.get_kv_cache_groups(vllm_config, together)
    projected = [planning._project_kv_cache_groups_to_worker(groups, specs) for specs in by_rank]
    assert len(groups) == 3
    for rank in projected:
        assert [group.kv_cache_spec for group in rank] == [g.kv_cache_spec for g in groups]
    assert [[len(group.layer_names) for group in rank] for rank in projected] == [
        [10, 5, 0],
        [0, 5, 10],
    ]
    for rank, specs in zip(projected, by_rank, strict=True):
        for group in rank:
            assert all(specs[name] == group.kv_cache_spec for name in group.layer_names)


def test_vllm_makes_one_pool_for_both_ranks(vllm_config, ranks):
    from paged_kv.vllm.scheduler import registration

    registration.register()
    configs = engines.kv_cache_configs(
        vllm_config, [rank.get_kv_cache_spec() for rank in ranks], [1 << 28, 1 << 28]
    )
    assert configs[0].num_blocks == configs[1].num_blocks > 0
    assert [len(config.kv_cache_groups) for config in configs] == [3, 3]


def test_a_layer_with_position_biases_is_refused_whatever_the_config_says(ranks):
    name, layer = next(iter(ranks[0].vllm_config.compilation_config.static_forward_context.items()))
    layer.impl = SimpleNamespace(alibi_slopes=torch.ones(4))
    with pytest.raises(ValueError, match=f"not support ALiBi position biases .layer {name}."):
        ranks[0].get_kv_cache_spec()
