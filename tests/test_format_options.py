"""--kv-cache-dtype and page_format on CPU: what they come to, what is refused before weights."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
from configs import engine_config

from paged_kv.vllm.frontend import formats

pytestmark = pytest.mark.usefixtures("in_process")

LAYERS = 6
STREAMING = {"policy": "streaming", "budget": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_models.config_only("llama", tmp_path_factory.mktemp("models"))


def plan_of(config: Any) -> dict[str, Any]:
    return config.additional_config["paged_kv_plan"]


@pytest.fixture(params=["with kernels", "without"])
def kernels(request, monkeypatch) -> bool:
    there = request.param == "with kernels"
    monkeypatch.setattr(formats.cpu, "available", lambda: there)
    return there


@pytest.mark.parametrize(
    ("dtype", "name"), [("int8_per_token_head", "int8"), ("int4_per_token_head", "int4")]
)
def test_vllms_names_without_a_policy(model, kernels, dtype, name):
    """vLLM's own scheduler, page size and cache dtype; its arguments can be used again."""
    from vllm import EngineArgs

    plain = EngineArgs(model, skip_tokenizer_init=True).create_engine_config().cache_config
    args = EngineArgs(model, skip_tokenizer_init=True, kv_cache_dtype=dtype)
    for config in (args.create_engine_config(), args.create_engine_config()):
        assert config.parallel_config.worker_cls == "paged_kv.vllm.worker.worker.PagedCPUWorker"
        assert config.scheduler_config.scheduler_cls is None
        assert config.cache_config.cache_dtype == plain.cache_dtype == "auto"
        assert config.cache_config.block_size == plain.block_size
        assert plan_of(config)["formats"] == [name] * LAYERS
        assert plan_of(config)["budgets"] == {}
        json.dumps(config.additional_config)


@pytest.mark.parametrize("given", [{"kv_cache_dtype": "int4_per_token_head"}, {}], ids=str)
def test_under_a_policy(model, given):
    settings = STREAMING | ({} if given else {"page_format": "int4"})
    config = engine_config(model, settings, **given)
    assert (
        config.scheduler_config.scheduler_cls == "paged_kv.vllm.scheduler.scheduler.PagedScheduler"
    )
    assert config.cache_config.block_size == 32
    assert plan_of(config)["formats"] == ["int4"] * LAYERS


def test_native_pages_are_ours_where_the_kernels_are(model, kernels):
    """The compressed layers' alone; and none of a head size or page size that cannot be packed."""
    config = engine_config(model, STREAMING | {"skip_layers": [0, 5]})
    ours = "native" if kernels else None
    assert plan_of(config)["formats"] == [None, *[ours] * 4, None]
    for other in ({"block_size": 256}, {"kv_cache_dtype": "fp8_e5m2"}):
        config = engine_config(model, {"policy": "streaming", "budget": 512}, **other)
        assert plan_of(config)["formats"] == [None] * LAYERS


@pytest.mark.parametrize("policy", [{}, STREAMING], ids=str)
def test_fp8_is_ours_under_a_policy_and_vllms_without(model, kernels, policy):
    config = engine_config(model, policy, kv_cache_dtype="fp8")
    if policy and kernels:
        assert plan_of(config)["formats"] == ["fp8"] * LAYERS
        assert config.cache_config.cache_dtype == "auto"
    else:
        assert config.cache_config.cache_dtype == "fp8"
        assert ("paged_kv_plan" in config.additional_config) == bool(policy)


def test_a_format_for_each_layer(model, tmp_path):
    file = tmp_path / "formats.json"
    layers = ["int8", "int4", "native", "int4", "fp8", "int8"]
    file.write_text(json.dumps({"layers": layers}))
    for policy in ({}, STREAMING):
        config = engine_config(model, policy | {"page_format": str(file), "residual_pages": 1})
        assert plan_of(config)["formats"] == layers
        assert plan_of(config)["residual_pages"] == 1
    pyramid = {"policy": "pyramidal", "budget": 256, "pyramid_steps": 2}
    for policy in (pyramid, STREAMING | {"skip_layers": [0]}):
        with pytest.raises(ValueError, match="different formats cannot have different budgets"):
            engine_config(model, policy | {"page_format": str(file)})
    file.write_text(json.dumps({"layers": layers[:5]}))
    with pytest.raises(ValueError, match="the file has 5 layers, the model 6"):
        engine_config(model, {"page_format": str(file)})


SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.mark.parametrize(
    ("paged_kv", "arguments", "message"),
    [
        (
            {"page_format": "int4"},
            {"kv_cache_dtype": "int8_per_token_head"},
            "page_format int4 and kv-cache-dtype int8_per_token_head contradict each other",
        ),
        (
            {"page_format": "int8"},
            {"kv_cache_dtype": "fp8_e5m2"},
            "page_format int8 and kv-cache-dtype fp8_e5m2 contradict each other",
        ),
        ({"page_format": "int3"}, {}, "page_format must be one of native, int8, .* not 'int3'"),
        ({"page_format": "no.json"}, {}, "page_format no.json: the file cannot be read"),
        (
            {"page_format": "int8"},
            {"kv_cache_dtype_skip_layers": ["0"]},
            "kv-cache-dtype-skip-layers does not work with page_format int8",
        ),
        ({"page_format": "int8"}, {"block_size": 256}, "page_size 256: packed pages need a mult"),
        ({"residual_pages": 1}, {}, "residual_pages 1 needs a page_format other than native"),
        (STREAMING | {"residual_pages": 1}, {}, "residual_pages 1 needs a page_format"),
        (
            {"page_format": "int4", "residual_pages": 10**6},
            {"max_model_len": 512, "block_size": 32},
            "residual_pages must be at most 16, the pages of 32 that a sequence of 512 tokens has",
        ),
        (
            STREAMING | {"residual_pages": 2, "page_format": "int8"},
            {},
            "residual_pages 2 of 32 needs a recent_window of at least 64, not 32",
        ),
        (
            {"page_format": "int8"},
            {"speculative_config": SPECULATIVE},
            "^page_format int8 does not support speculative decoding$",
        ),
        (
            {"page_format": "int4"},
            {"kv_offloading_size": 1},
            "^page_format int4 does not support KV connectors$",
        ),
    ],
)
def test_mistakes(model, paged_kv, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine_config(model, paged_kv, **arguments)


@pytest.mark.parametrize("name", ["gemma3", "mistral-sliding", "deepseek-v2", "falcon-alibi"])
def test_models_that_are_refused(tmp_path, name):
    directory = tiny_models.config_only(name, tmp_path)
    with pytest.raises(ValueError, match=r"^page_format int8 does not support "):
        engine_config(directory, {"page_format": "int8"})


def test_an_additional_config_of_others_cannot_carry_a_format(model):
    from vllm import EngineArgs

    class Hashed:
        def compute_hash(self) -> str:
            return "constant"

    args = EngineArgs(
        model,
        skip_tokenizer_init=True,
        additional_config=Hashed(),
        kv_cache_dtype="int8_per_token_head",
    )
    with pytest.raises(ValueError, match="needs an additional_config that is a dict, not a Hashed"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("paged_kv", "message"),
    [
        ({"page_format": "int8"}, "page_format int8 works on CPU only; .* --kv-cache-dtype fp8, i"),
        ({"policy": "streaming", "residual_pages": 1}, "residual_pages 1 works on CPU only"),
    ],
)
def test_on_a_gpu_the_dtypes_are_vllms(monkeypatch, paged_kv, message):
    """Our formats are refused, vLLM's names go through untouched."""
    from paged_kv.config import CompressionConfig

    monkeypatch.setattr(formats, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    arguments = SimpleNamespace(kv_cache_dtype="int8_per_token_head")
    with pytest.raises(ValueError, match=message):
        formats.take_cache_dtype(arguments, CompressionConfig.from_dict(paged_kv))
    config = CompressionConfig.from_dict({"policy": "streaming"})
    assert formats.take_cache_dtype(arguments, config) is config
    assert arguments.kv_cache_dtype == "int8_per_token_head"


def test_on_the_command_line(model, capsys):
    """Parsed like vllm serve does, and one line for a mistake."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()

    def made(*flags: str) -> Any:
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        args = parser.parse_args(["--model", model, "--skip-tokenizer-init", *flags])
        return EngineArgs.from_cli_args(args).create_engine_config()

    config = made("--kv-cache-dtype", "int8_per_token_head")
    assert plan_of(config)["formats"] == ["int8"] * LAYERS
    options = ("--kv-policy", "full", "--kv-policy-config", '{"page_format": "int4"}')
    config = made(*options)
    assert plan_of(config)["formats"] == ["int4"] * LAYERS
    with pytest.raises(SystemExit) as exit_:
        made(*options, "--kv-cache-dtype", "fp8")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.endswith(
        "vllm: error: page_format int4 and kv-cache-dtype fp8 contradict each other: give one of "
        "them\n"
    )
