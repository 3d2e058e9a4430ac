"""What `paged-kv capacity` computes is what vLLM and our plugin report of themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import engines
import pytest
import tiny_models
import torch
from capacity_models import LLAMA_8B, write
from engines import logged

from paged_kv.capacity.cases import GPU_DTYPES, Case, Engine
from paged_kv.capacity.command import CPU_DEFAULTS, GPU_DEFAULTS, UTILIZATION
from paged_kv.capacity.layers import entry_bytes
from paged_kv.capacity.model import read_model
from paged_kv.capacity.pool import Pool
from paged_kv.capacity.tiers import tiers
from paged_kv.capacity.weights import FAMILIES, parameters
from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import cdiv

MEMORY, PAGE = 16 << 20, 32
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "side data, ratio, int8, swap": (
        "llama",
        {"policy": "h2o", "budget": 0.25, "page_format": "int8", "swap_space": 0.01},
    ),
    "query ring, residual, int4, swap": (
        "llama",
        {
            "policy": "snapkv",
            "budget": 128,
            "page_format": "int4",
            "residual_pages": 1,
            "swap_space": 0.01,
        },
    ),
    "groups of two sizes, converted swap": (
        "llama-30-layers",
        {
            "policy": "pyramidal+snapkv",
            "budget": 192,
            "pyramid_steps": 4,
            "compress_prefill": True,
            "swap_space": 0.01,
            "swap_format": "int4",
        },
    ),
    "plain hybrid": ("gemma3", {}),
    "hybrid": ("gemma3", {"policy": "knorm", "budget": 128, "skip_layers": [1]}),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Of the models of CASES."""
    place = tmp_path_factory.mktemp("models")
    return {name: tiny_models.saved(name, place) for name in {model for model, _ in CASES.values()}}


@pytest.mark.vllm
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_an_engine_reports(name, directories):
    model, options = CASES[name]
    settings = {"kv_cache_memory_bytes": MEMORY, "block_size": PAGE, "skip_tokenizer_init": True}
    swap_module, capacity_module = "vllm.swap.copier", "vllm.scheduler.capacity"
    with (
        logged(capacity_module) as lines,
        logged(swap_module) as swap,
        engines.engine(directories[model], options, **settings) as llm,
    ):
        vllm_config = llm.llm_engine.vllm_config
        cache = vllm_config.cache_config
        reported = cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency
        num_pages = engines.block_pool(llm).num_gpu_blocks
        pool_bytes = engines.scheduler(llm).kv_cache_config.kv_cache_tensors[0].size
    config = CompressionConfig.from_dict(options)
    pool = Pool(
        read_model(directories[model], "float32"),
        Engine(
            memory=MEMORY,
            prompt_len=1024,
            max_len=2048,
            page_size=PAGE,
            max_num_seqs=16,
            max_num_batched_tokens=512,
            concurrent_batches=vllm_config.max_concurrent_batches,
        ),
        Case(config.policy, config.page_format, config),
    )
    concurrency = pool.num_pages / pool.reserved_pages
    assert pool.num_pages == num_pages
    assert pool.num_pages * pool.shares.pool_page_bytes == pool_bytes
    assert (int(concurrency * 2048), concurrency) == reported
    assert len(lines) == config.enabled
    for line in lines:
        held = pool.while_decoding()
        assert (
            f"{(num_pages - 1) / held.pages:.2f} sequences of 2,048 tokens once their prompts are "
            f"done ({held.pages} pages each)"
        ) in line
        if pool.prompt_chunk is not None:
            assert f"in pieces of {pool.prompt_chunk:,} tokens" in line
    assert len(swap) == bool(config.swap_space)
    for line in swap:
        found = tiers(pool)["swap"]
        assert f"{found['host_slots']} pages of {found['slot_bytes']} bytes in memory" in line


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("max_len", "window"), [(2048, 64), (2048, 65), (600, 64), (5000, 1024)])
def test_pages_of_a_sliding_window_are_those_of_vllm(batches, max_len, window, directories):
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    sizes = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    spec = SlidingWindowSpec(block_size=PAGE, sliding_window=window, **sizes)
    model = replace(read_model(directories["gemma3"]), window=window)
    engine = Engine(MEMORY, 1, max_len, PAGE, 16, 512, concurrent_batches=batches)
    pool = Pool(model, engine, Case("full", "native", CompressionConfig()))
    sliding = spec.max_admission_blocks_per_request(batches * 512, max_len)
    assert pool.reserved_pages == sliding + cdiv(max_len, PAGE)


def _rope(kind: str, factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": 32768, **more}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}},
        {"rope_scaling": _rope("yarn", 4.0)},
        {"rope_scaling": _rope("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0)},
        {"rope_scaling": _rope("longrope", 4.0, short_factor=[1.0] * 64, long_factor=[2.0] * 64)},
        {"max_seq_len": 999},
        {"model_max_length": 200_000},
        {
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "head_dim": 128,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"] * 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ],
    ids=lambda changed: " ".join(map(str, changed.values()))[:40],
)
def test_the_longest_sequence_is_that_of_vllm(changed, tmp_path):
    from vllm.config import ModelConfig

    directory = write(tmp_path / "model", LLAMA_8B, **changed)
    longest = read_model(directory).max_len
    assert longest is not None
    settings = {"model": directory, "dtype": "float32", "skip_tokenizer_init": True}
    assert ModelConfig(**settings, max_model_len=longest).max_model_len == longest
    with pytest.raises(ValueError, match="greater than the derived max_model_len"):
        ModelConfig(**settings, max_model_len=longest + 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_defaults_are_those_of_vllms_server(ranks):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    defaults = EngineArgs.get_batch_defaults(ranks)
    found = [values[UsageContext.OPENAI_API_SERVER] for values in defaults]
    assert found == [ranks * value for value in CPU_DEFAULTS]


@pytest.mark.parametrize("least", GPU_DEFAULTS)
def test_gpus_have_the_defaults_of_vllms_server(least, monkeypatch):
    """vLLM's own choice, told that the platform is a GPU of that memory, and of one byte less."""
    from vllm.config.cache import CacheConfig
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    assert CacheConfig().gpu_memory_utilization == UTILIZATION
    platform = arg_utils.current_platform
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    monkeypatch.setattr(platform, "get_device_name", lambda: "NVIDIA H200")

    def defaults(memory: int) -> tuple[int, ...]:
        monkeypatch.setattr(platform, "get_device_total_memory", lambda: memory)
        found = arg_utils.EngineArgs.get_batch_defaults(1)
        return tuple(values[UsageContext.OPENAI_API_SERVER] for values in found)

    assert defaults(least) == GPU_DEFAULTS[least]
    assert not least or defaults(least - 1) != GPU_DEFAULTS[least]


@pytest.mark.parametrize("page_format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_of_a_gpu_are_those_of_vllm(page_format, head_dim, directories):
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    spec = FullAttentionSpec(
        block_size=16,
        num_kv_heads=2,
        head_size=head_dim,
        dtype=torch.uint8,
        kv_quant_mode=get_kv_quant_mode(GPU_DTYPES[page_format]),
    )
    spec = TritonAttentionBackend.customize_spec(spec)
    model = replace(read_model(directories["llama"]), head_dim=head_dim)
    assert spec.page_size_bytes == 16 * 2 * entry_bytes(page_format, model, 16, "gpu")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family, has_bias, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**tiny_models.MODELS["llama"][2], "pad_token_id": 0}
    sizes |= dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings"), has_bias)
    config = AutoConfig.for_model(family, **sizes, architectures=["ForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    counted = sum(parameters(read_model(str(tmp_path)), vocab_multiple=1))
    assert counted == sum(weight.numel() for weight in model.parameters())
