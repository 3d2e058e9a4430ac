"""What results say that a sequence holds, in models whose layers differ."""

from __future__ import annotations

import json
from pathlib import Path

import engines  # noqa: F401  sets the environment of vLLM
import pytest
import reference_loop
import tiny_models

from paged_kv import cli, results
from paged_kv.bench import server
from paged_kv.bench.held import layer_schedules
from paged_kv.bench.settings import kv_bytes_per_token
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.eval.answering import limit_of
from paged_kv.eval.cases import Case
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf.driver.peer_protocol import answer
from paged_kv.vllm.driver.engine import POOL_VARIABLE

WINDOW, TOKENS = 64, list(range(3, 243))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A directory: layers 1, 3 and 5 have full attention, the others a window."""
    return Path(tiny_models.saved("gemma3", tmp_path_factory.mktemp("hybrid")))


def rewritten(model: Path, folder: Path, change) -> Path:
    """A directory with another config.json."""
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    return folder


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({"policy": "full"}, 240),
        ({"policy": "streaming", "budget": 96}, 112),
        ({"policy": "streaming", "budget": 96, "page_format": "int8"}, 112),
    ],
)
def test_layers_with_a_window_hold_no_more_than_it(hybrid, options, full):
    config = CompressionConfig.from_dict({**options, "compress_prefill": True})
    case = Case(config.policy, None, config, hybrid, DEFAULT_PAGE_SIZE)
    engine = ReferenceEngine(reference_loop.load_model(str(hybrid)), config)
    engine.process(TOKENS)
    held = case.held(len(TOKENS))
    assert held.by_layer == engine.num_kept == [WINDOW, full] * 3
    assert held.cache_bytes == engine.cache_bytes
    assert case.held(50).by_layer == [50] * 6


def test_a_peer_counts_the_same(hybrid):
    from transformers import DynamicCache

    model = reference_loop.load_model(str(hybrid))
    cache = DynamicCache(config=model.config)
    asked = {"context": TOKENS, "question": [], "max_new_tokens": 1, "stop": [], "targets": []}
    assert answer(model, cache, **asked)["kept"] == (3 * WINDOW + 3 * len(TOKENS)) / 6


def test_the_decoder_of_a_multimodal_model(hybrid, tmp_path):
    nested = rewritten(hybrid, tmp_path, lambda config: {"model_type": "x", "text_config": config})
    config = CompressionConfig.from_dict({"policy": "streaming", "budget": 96})
    cases = [Case("streaming", 96, config, model, DEFAULT_PAGE_SIZE) for model in (hybrid, nested)]
    assert cases[0].held(200) == cases[1].held(200)
    assert kv_bytes_per_token(nested) == kv_bytes_per_token(hybrid)
    limit = json.loads((hybrid / "config.json").read_text())["max_position_embeddings"]
    assert limit_of(nested, None) == limit
    with pytest.raises(ValueError, match=f"max-length must be at most the model's {limit}"):
        limit_of(nested, limit + 1)


def test_a_window_of_unknown_layers_is_refused(hybrid, tmp_path):
    def without(config):
        return {key: value for key, value in config.items() if key != "layer_types"}

    model = rewritten(hybrid, tmp_path, without)
    with pytest.raises(ValueError, match=r"has a sliding_window, but no layer_types"):
        layer_schedules(CompressionConfig(), model, DEFAULT_PAGE_SIZE)


@pytest.mark.vllm
def test_an_engine_counts_the_same(hybrid, tmp_path, monkeypatch):
    monkeypatch.setenv(POOL_VARIABLE, "1")  # a pool of 1 GiB, whatever is asked for
    assert POOL_VARIABLE not in server.environment()
    out = tmp_path / "rows.jsonl"
    line = f"bench memory --model {hybrid} --policy plain,streaming --budget 96 --pool 12.0"
    line += f" --input-len 200 --output-len 24 --requests 2 --out {out}"
    assert cli.main(line.split()) == 0
    plain, streaming = results.read([out])
    assert plain["kept_by_layer"] == [WINDOW, 224] * 3
    assert streaming["kept_by_layer"] == [WINDOW, streaming["kept_by_layer"][1]] * 3
    assert 96 <= streaming["kept_by_layer"][1] < 112
