"""`paged-kv capacity`: mistakes are one line that names the option; models it cannot tell, too."""

from __future__ import annotations

import json

import pytest
import tiny_models
from capacity_models import GEMMA_4B, LLAMA_8B, write

from paged_kv import cli
from paged_kv.capacity.model import read_model

MEMORY = ("--memory", "40GiB")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("models") / "Llama", LLAMA_8B)


def refusal(capsys, *args: str) -> str:
    assert cli.main(["capacity", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("paged-kv: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--memory", "40 apples"), "memory must be a size such as 40GiB, 80GB or 1073741824"),
        (("--memory", "0"), "not '0'"),
        (("--gpu-memory", "x"), "gpu-memory must be a size"),
        (("--gpu-memory", "16GB"), "92% of it is less than the weights of Llama, 15.0 GiB"),
        (("--gpu-memory", "80GB", "--gpu-memory-utilization", "1.1"), "in (0, 1], not 1.1"),
        (("--gpu-memory", "80GB", "--device", "cpu"), "device cpu does not go with --gpu-memory"),
        ((*MEMORY, "--gpu-memory-utilization", "7"), "utilization must be a number in (0, 1], not"),
        ((*MEMORY, "--gpu-memory-utilization", "0.9"), "utilization 0.9 is for --gpu-memory"),
        ((*MEMORY, "--weights-dtype", "int4"), "weights-dtype int4 is for --gpu-memory"),
        ((*MEMORY, "--context", "0"), "context must be an integer >= 1, not 0"),
        (
            (*MEMORY, "--context", "131000"),
            "context 131000 + output 1024 must be at most 131072, the longest sequence of model "
            "Llama, not 132024",
        ),
        ((*MEMORY, "--output", "131072"), "context 1 + output 131072 must be at most 131072"),
        ((*MEMORY, "--page-size", "-1"), "page-size must be an integer >= 1, not -1"),
        ((*MEMORY, "--max-num-seqs", "0"), "max-num-seqs must be an integer >= 1, not 0"),
        ((*MEMORY, "--tensor-parallel", "3"), "32 query heads and 8 KV heads, which so many"),
        ((*MEMORY, "--policy", "nope"), "unknown kv-policy 'nope'"),
        ((*MEMORY, "--policy", "streaming", "--budget", "x"), "budget must be an integer >= 1"),
        ((*MEMORY, "--policy", "streaming", "--budget", "64"), "budget 64 is too small"),
        ((*MEMORY, "--policy-config", "{"), "policy-config is not JSON"),
        ((*MEMORY, "--policy-config", '{"budget": 1}'), "must not have budget: use --budget"),
        (
            (*MEMORY, "--policy", "streaming", "--policy-config", '{"x": 1}'),
            "unknown paged_kv option x",
        ),
        ((*MEMORY, "--page-format", "int3"), "page_format must be one of native"),
        (
            (*MEMORY, "--device", "gpu", "--page-format", "formats.json"),
            "page-format on a GPU must be one of native, int8, int4, fp8 (vLLM's own)",
        ),
        (
            (*MEMORY, "--device", "gpu", "--policy", "snapkv", "--page-format", "int8"),
            "page-format on a GPU with policy snapkv, which reads the cache, must be one of native,"
            " fp8, not int8",
        ),
        (
            (*MEMORY, "--policy=streaming,snapkv", "--page-format=native,int8", "--budget=64"),
            "budget 64 is too small",
        ),
        (
            (*MEMORY, "--device", "gpu", "--policy-config", '{"residual_pages": 1}'),
            "residual_pages 1 works on CPU only",
        ),
        ((*MEMORY, "--policy-config", '{"residual_pages": 1}'), "needs a page_format other than"),
        ((*MEMORY, "--policy-config", '{"swap_format": "int8"}'), "needs a kv-swap-space above 0"),
        ((*MEMORY, "--policy-config", '{"swap_space": 0.001}'), "holds no request"),
        (
            (*MEMORY, "--policy", "streaming", "--tensor-parallel", "16"),
            "kv-policy does not support more ranks (16) than KV heads (8)",
        ),
        ((*MEMORY, "--page-format", "int8", "--page-size", "8"), "need a multiple of 16 from 16"),
        ((*MEMORY, "--sequences", "5"), "sequences 5 needs a --policy that has a budget"),
        ((*MEMORY, "--policy", "full", "--budget", "77"), "budget 77 needs a --policy that has a"),
        (
            (*MEMORY, "--policy", "streaming", "--sequences", "9999"),
            "no budget of streaming is small enough: with 96, the least, 2559.8 decode at once",
        ),
        (
            ("--memory", "16MiB", "--policy", "snapkv"),
            "the queries that this kv-policy observes take",
        ),
        (
            (*MEMORY, "--policy", "streaming", "--policy-config", '{"skip_layers": [0]}'),
            "these options need 32 KV cache groups, more than max_groups 8",
        ),
    ],
)
def test_options(llama, args, message, capsys):
    assert message in refusal(capsys, "--model", llama, *args)


@pytest.mark.parametrize(
    "args",
    [
        (*MEMORY, "--gpu-memory", "80GB"),
        (),
        (*MEMORY, "--policy", "window", "--budget", "128", "--sequences", "5"),
        (*MEMORY, "--dtype", "int8"),
    ],
)
def test_options_that_argparse_refuses(llama, args, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["capacity", "--model", llama, *args])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_lora_rank": 512}, "does not support multi-head latent attention (MLA)"),
        ({"mamba_d_state": 16}, "does not support a model with Mamba or linear-attention layers"),
        ({"layer_types": ["linear_attention"] * 32}, "Mamba or linear-attention layers"),
        ({"layer_types": ["chunked_attention"] * 32}, "support chunked local attention"),
        ({"attention_chunk_size": 8192}, "support chunked local attention"),
        ({"num_kv_shared_layers": 2}, "support layers that share their KV cache"),
        ({"alibi": True}, "support ALiBi position biases"),
        ({"is_encoder_decoder": True}, "support an encoder-decoder model"),
        ({"architectures": ["LlamaModel"]}, "support a pooling model"),
        ({"model_type": "gemma3"}, "support bidirectional multimodal prefixes"),
        ({"rswa_window": 8}, "support reference sliding-window attention"),
        ({"multi_query": True}, "its config.json has multi_query, so its KV heads may not be"),
        ({"sliding_window": 4096}, "a sliding_window, but no layer_types that says which"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, not 32"),
        ({"num_attention_heads": None}, "its config.json has no num_attention_heads; load and"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers must be an integer >= 1, not '32'"),
        ({"torch_dtype": "float8_e4m3fn"}, "has dtype float8_e4m3fn: use --dtype to choose"),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "factor of its rope scaling must be a number above 0, not '4'",
        ),
        ({"max_position_embeddings": "long"}, "max_position_embeddings must be an integer >= 1"),
        ({"model_type": None}, "its config.json has no model_type"),
        ({"model_type": "mixtral"}, ""),
    ],
)
def test_models(changed, message, tmp_path, capsys):
    directory = write(tmp_path / "model", LLAMA_8B, **changed)
    if not message:
        assert read_model(directory).num_layers == 32
        return
    told = refusal(capsys, "--model", directory, *MEMORY)
    assert told.startswith("paged-kv: error: model model: ")
    assert message in told


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_models_are_refused_as_by_the_plugin(name, tmp_path):
    """As they are saved by transformers; test_models_vllm has the plugin's own refusals."""
    pytest.importorskip("transformers")
    directory = tmp_path / name
    tiny_models._config(name).save_pretrained(directory)
    refused = {
        "gemma3n": "layers that share their KV cache",
        "deepseek-v2": "multi-head latent attention (MLA)",
        "mamba": "a model with Mamba or linear-attention layers",
        "jamba": "a model with Mamba or linear-attention layers",
        "bert": "a pooling model",
        "whisper": "an encoder-decoder model",
        "bloom": "ALiBi position biases",
        "falcon-alibi": "ALiBi position biases",
        "llama4": "chunked local attention",
    }
    if name not in refused:
        assert read_model(str(directory)).kv_heads == (1 if "one-kv" in name else 2)
        return
    with pytest.raises(ValueError, match="does not support") as caught:
        read_model(str(directory))
    assert refused[name] in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "is no config of a model"), (None, "cannot be read: No such")],
)
def test_files(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message in refusal(capsys, "--model", str(tmp_path), *MEMORY)


def test_the_longest_sequence_of_a_model_that_has_no_limit(tmp_path, capsys):
    model = write(tmp_path / "model", LLAMA_8B, max_position_embeddings=None)
    args = ("--model", model, *MEMORY, "--context", "2147483647")
    assert "+ output 1024 must be at most 2147483647" in refusal(capsys, *args)


def test_a_file_of_any_name(tmp_path, capsys):
    file = tmp_path / "of-mine.json"
    file.write_text(json.dumps(LLAMA_8B))
    assert cli.main(["capacity", "--model", str(file), *MEMORY]) == 0
    assert capsys.readouterr().out.startswith("of-mine: 32 layers")


def test_weights_that_cannot_be_counted(tmp_path, capsys):
    model = write(tmp_path / "gemma", GEMMA_4B)
    told = refusal(capsys, "--model", model, "--gpu-memory", "80GB")
    assert "the weights of a gemma3_text are not counted (only of llama, mistral" in told
    assert "use --memory" in told
    model = write(tmp_path / "awq", LLAMA_8B, quantization_config={"bits": 4})
    told = refusal(capsys, "--model", model, "--gpu-memory", "80GB")
    assert "its weights are quantized: say with --weights-dtype to what" in told


@pytest.mark.parametrize("policy", ["full", "streaming"])
def test_a_hybrid_has_native_pages_only(policy, tmp_path, capsys):
    model = write(tmp_path / "gemma", GEMMA_4B)
    args = ("--model", model, *MEMORY, "--page-format", "int8", "--policy", policy)
    told = refusal(capsys, *args)
    assert "page_format int8 does not support a model with sliding-window layers" in told


def test_a_model_with_sliding_windows_only(tmp_path, capsys):
    changed = {"model_type": "mistral", "sliding_window": 4096}
    model = write(tmp_path / "mistral", LLAMA_8B, **changed)
    told = refusal(capsys, "--model", model, *MEMORY, "--policy", "streaming", "--json")
    assert "kv-policy does not support a model without full-attention layers" in told
