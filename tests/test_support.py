"""What is refused under a policy, before weights are read, and what vLLM says without one."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import tiny_models
from configs import engine_config

pytestmark = pytest.mark.usefixtures("in_process")

POLICY = {"policy": "streaming", "budget": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_models.config_only("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("deepseek-v2", "multi-head latent attention (MLA)"),
        ("mamba", "a model without attention"),
        ("jamba", "a model with Mamba or linear-attention layers"),
        ("bert", "a pooling model"),
        ("whisper", "an encoder-decoder model"),
        ("mistral-sliding", "a model without full-attention layers (all have a sliding window)"),
        ("gemma3-all-sliding", "a model without full-attention layers"),
        ("gemma3n", "layers that share their KV cache"),
        ("bloom", "ALiBi position biases"),
        ("falcon-alibi", "ALiBi position biases"),
        ("llama4", "chunked local attention"),
    ],
)
def test_models_are_refused(tmp_path, name, refusal):
    directory = tiny_models.config_only(name, tmp_path)
    with pytest.raises(ValueError, match=r"^kv-policy does not support ") as error:
        engine_config(directory, POLICY)
    assert refusal in str(error.value)
    assert "\n" not in str(error.value)
    assert "paged_kv" not in engine_config(directory).parallel_config.worker_cls


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("policy", ["streaming", "pyramidal"])
def test_models_are_taken(tmp_path, name, policy):
    directory = tiny_models.config_only(name, tmp_path)
    config = engine_config(directory, {"policy": policy, "budget": 256})
    assert config.parallel_config.worker_cls == "paged_kv.vllm.worker.worker.PagedCPUWorker"
    assert (
        config.scheduler_config.scheduler_cls == "paged_kv.vllm.scheduler.scheduler.PagedScheduler"
    )
    assert config.cache_config.block_size == 32


def test_gemma3_layers_with_a_window_are_not_in_the_plan(tmp_path):
    directory = tiny_models.config_only("gemma3", tmp_path)
    plan = engine_config(directory, {"policy": "pyramidal", "budget": 256}).additional_config
    assert plan["paged_kv_plan"]["budgets"] == {str(k): [256, 0, 1] for k in (1, 3, 5)}


SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
SCHEDULER = "vllm.v1.core.sched.scheduler.Scheduler"


def test_cache_dtypes_whose_entries_nobody_can_move():
    """As long as vLLM has new ones, each is refused until its layout is known."""
    from vllm.config.cache import CacheDType

    from paged_kv.config import CompressionConfig
    from paged_kv.vllm.frontend.refusals import MOVABLE_DTYPES, check_cache_dtype

    config = CompressionConfig.from_dict({"policy": "streaming"})
    others = {*get_args(CacheDType)} - {*MOVABLE_DTYPES}
    assert {"nvfp4", "nvfp4_4over6", "turboquant_4bit_nc"} <= others
    for dtype in others:
        with pytest.raises(
            ValueError, match=rf"kv-policy .* cache dtype {dtype}: .* moves .* auto"
        ):
            check_cache_dtype(dtype, config)
    assert {*MOVABLE_DTYPES} <= {*get_args(CacheDType)}
    for dtype in MOVABLE_DTYPES:
        check_cache_dtype(dtype, config)
    check_cache_dtype("nvfp4", CompressionConfig(swap_space=1.0))  # whole pages
    swap = CompressionConfig(swap_space=1.0, swap_format="int4")
    for dtype in ("nvfp4", "int8_per_token_head"):
        with pytest.raises(ValueError, match=f"kv-swap-space .* {dtype} with swap_format int4, "):
            check_cache_dtype(dtype, swap)


def test_a_cache_dtype_that_a_policy_cannot_read():
    from paged_kv.config import CompressionConfig
    from paged_kv.vllm.frontend.refusals import check_cache_dtype

    def check(policy: str) -> None:
        config = CompressionConfig.from_dict({"policy": policy})
        check_cache_dtype("int8_per_token_head", config)

    check("streaming")
    check("random")
    for policy in ("knorm", "h2o", "pyramidal+snapkv", "residual"):
        with pytest.raises(ValueError, match=r"cache dtype int8_per_token_head .* auto, float16"):
            check(policy)


@pytest.mark.parametrize(
    ("refusal", "kwargs"),
    [
        ("speculative decoding", {"speculative_config": SPECULATIVE}),
        ("KV connectors", {"kv_transfer_config": CONNECTOR}),
        ("KV connectors", {"kv_offloading_size": 1}),
        ("--disable-hybrid-kv-cache-manager", {"disable_hybrid_kv_cache_manager": True}),
        ("--kv-sharing-fast-prefill", {"kv_sharing_fast_prefill": True}),
        (f"the scheduler class {SCHEDULER}", {"scheduler_cls": SCHEDULER}),
        ("the worker class some.Worker", {"worker_cls": "some.Worker"}),
        ("dual-batch overlap", {"enable_dbo": True}),
        ("a pooling model", {"runner": "pooling"}),
        (
            "--kv-cache-dtype-skip-layers with --kv-cache-dtype fp8_e5m2",
            {"kv_cache_dtype": "fp8_e5m2", "kv_cache_dtype_skip_layers": ["0"]},
        ),
    ],
)
def test_features_are_refused(model, refusal, kwargs):
    with pytest.raises(ValueError, match=r"^kv-policy does not support ") as error:
        engine_config(model, POLICY, **kwargs)
    assert refusal in str(error.value)
    assert "paged_kv" not in engine_config(model, **kwargs).parallel_config.worker_cls


def test_experts_routes_and_whole_images_are_refused(model):
    """The first where vLLM has it: for models with experts, on GPUs."""
    from paged_kv.config import CompressionConfig
    from paged_kv.vllm.frontend import support

    policy = CompressionConfig.from_dict({**POLICY, "budget": 512})
    pieces = replace(policy, compress_prefill=True)
    config = engine_config(model)
    config.scheduler_config.disable_chunked_mm_input = True
    support.check(config, policy)
    with pytest.raises(ValueError, match="--disable-chunked-mm-input with compress_prefill"):
        support.check(config, pieces)
    config = engine_config(model)
    support.check(config, pieces)
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match="not support --enable-return-routed-experts"):
        support.check(config, policy)


def test_more_ranks_than_kv_heads_are_refused(tmp_path):
    directory = tiny_models.config_only("llama-one-kv-head", tmp_path)
    with pytest.raises(ValueError, match=r"not support more ranks \(2\) than KV heads \(1\)"):
        engine_config(directory, POLICY, tensor_parallel_size=2)
    assert engine_config(directory, tensor_parallel_size=2)


def test_decode_context_parallelism_is_refused(tmp_path):
    directory = tiny_models.config_only("llama-one-kv-head", tmp_path)
    ranks = {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}
    with pytest.raises(ValueError, match="not support decode context parallelism"):
        engine_config(directory, POLICY, **ranks)
    assert engine_config(directory, **ranks)


@pytest.mark.parametrize(
    ("refusal", "kwargs"),
    [
        ("prefill context parallelism", {"prefill_context_parallel_size": 2}),
        ("dual-batch overlap", {"ubatch_size": 2}),
    ],
)
def test_refused_by_vllm_on_a_cpu_but_by_us_first(model, refusal, kwargs):
    with pytest.raises(ValueError, match=f"^kv-policy does not support {refusal}$"):
        engine_config(model, POLICY, **kwargs)
    with pytest.raises(ValueError, match=r"(?i)does not support|only supports"):
        engine_config(model, **kwargs)


def test_dual_batch_overlap_is_refused_where_vllm_has_it(model):
    from paged_kv.config import CompressionConfig
    from paged_kv.vllm.frontend import support

    config = engine_config(model)
    config.parallel_config.ubatch_size = 2
    with pytest.raises(ValueError, match="not support dual-batch overlap"):
        support.check(config, CompressionConfig.from_dict(POLICY))


@pytest.mark.parametrize(
    ("paged_kv", "message"),
    [
        ({"policy": "nonsense"}, "unknown kv-policy 'nonsense'; known are: full, pyramidal, .*str"),
        ({"policy": "streaming", "budget": 67}, "budget 67 is too small: .* at least 68 "),
        ({"policy": "streaming", "budget": 1.5}, "budget must be .* not 1.5"),
        ({"policy": "streaming", "budget": 0}, "budget must be .* not 0"),
        ({"policy": "pyramidal", "pyramid_beta": 0.5}, "pyramid_beta must be a number >= 1"),
        ({"policy": "streaming", "colour": 1}, "unknown paged_kv option colour"),
        ({"policy": "streaming", "skip_layers": [99]}, r"skip_layers names \[99\]"),
        ("streaming", "paged_kv must be a dict"),
    ],
)
def test_mistakes_in_python_are_value_errors(model, paged_kv, message):
    with pytest.raises(ValueError, match=message):
        engine_config(model, paged_kv)


def test_llm_raises_before_an_engine_starts(model):
    from vllm import LLM

    with pytest.raises(ValueError, match="unknown kv-policy 'nonsense'"):
        LLM(model, additional_config={"paged_kv": {"policy": "nonsense"}}, skip_tokenizer_init=True)


def test_a_directory_without_weights(tmp_path, model):
    directory = tmp_path / "empty"
    directory.mkdir()
    (directory / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"holds no weights \(\*\.safetensors, "):
        engine_config(str(directory), POLICY)
    assert engine_config(str(directory), POLICY, load_format="dummy")


def test_additional_config_of_others_is_left_alone(model):
    from vllm import EngineArgs

    class Hashed:
        def compute_hash(self) -> str:
            return "constant"

    for other in ({"theirs": 1}, Hashed()):
        args = EngineArgs(model=model, skip_tokenizer_init=True, additional_config=other)
        config = args.create_engine_config()
        assert config.additional_config == other
        assert config.scheduler_config.scheduler_cls is None


def test_the_plan_travels_in_the_hash(model):
    """Ranks and caches of compiled graphs tell two policies apart by it."""
    configs = [engine_config(model, {"policy": "streaming", "budget": n}) for n in (128, 160, 128)]
    hashes = [config.compute_hash() for config in configs]
    assert hashes[0] == hashes[2] != hashes[1]


def test_an_option_s_old_name_is_logged(model, monkeypatch):
    """Python's warnings are not shown in vLLM's processes."""
    from paged_kv.vllm.frontend import options

    told = []
    monkeypatch.setattr(options.logger, "warning_once", lambda *args: told.append(args))
    settings = {"policy": "pyramidal", "budget": 256, "tiers": 2}
    with pytest.warns(DeprecationWarning, match="tiers is now called pyramid_steps"):
        config = engine_config(model, settings)
    assert told == [("the paged_kv option %s is now called %s", "tiers", "pyramid_steps")]
    assert config.additional_config["paged_kv"]["pyramid_steps"] == 2
    assert len(set(map(tuple, config.additional_config["paged_kv_plan"]["budgets"].values()))) == 2
