"""Statistics of queries: what is gathered is what plain loops find, in whatever engine."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import engines
import numpy as np
import pytest
import query_files
import tiny_models
import torch
from query_loops import Rope, assert_same, gathered, of_model
from reference_loop import load_model

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache
from paged_kv.kernels.operands import Expected
from paged_kv.kernels.reference import expected_logarithm
from paged_kv.kernels.rotary import Rotary
from paged_kv.store.query_gathering import FIRST, SERVED_TOKENS, QueryGathering

LAYERS, HEADS, KV_HEADS, SIZE = (3, 8), 4, 2, 16
POLICY: dict[str, Any] = {"policy": "calibrated_attention"}
CPU = torch.device("cpu")


def states(num_tokens: int, seed: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys of each layer, [tokens, heads, d]; no mean is 0, no variances are equal."""
    generator = torch.Generator().manual_seed(seed)

    def noise(heads: int) -> torch.Tensor:
        spread = torch.rand(heads, SIZE, generator=generator) + 0.2
        mean = torch.randn(heads, SIZE, generator=generator)
        return torch.randn(num_tokens, heads, SIZE, generator=generator) * spread + mean

    return {layer: (noise(HEADS), noise(KV_HEADS)) for layer in LAYERS}


def gather(
    gathering: QueryGathering,
    given: dict[int, tuple[torch.Tensor, torch.Tensor]],
    positions: torch.Tensor,
    rotary: Rotary,
    steps: list[int],
    scale: float = 0.3,
) -> Expected:
    """Gives it all tokens, in steps of so many."""
    starts = np.cumsum([0, *steps])
    for start, end in pairwise(starts.tolist()):
        for layer, (queries, keys) in given.items():
            now = queries[start:end], keys[start:end], positions[start:end]
            gathering.add(layer, *now, rotary, scale)
        gathering.end_step(end - start)
    return gathering.of(np.array(LAYERS), np.arange(KV_HEADS), CPU)


def frequencies(half: int) -> torch.Tensor:
    return 100.0 ** (-torch.arange(half) / half)


@pytest.mark.parametrize("scale", [1.0, 1.2], ids=["", "YaRN"])
@pytest.mark.parametrize("rotary_dim", [SIZE, 6])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
def test_plain_loops(neox, rotary_dim, scale):
    """Two sequences; the first tokens of neither count."""
    turns = frequencies(rotary_dim // 2)
    positions = torch.cat([torch.arange(60), torch.arange(40)])
    given = states(100)
    found = gather(QueryGathering(100), given, positions, Rotary(turns, scale, neox), [100])
    rope = Rope(turns.double().numpy(), scale, neox)
    for index, (queries, keys) in enumerate(given.values()):
        arrays = queries.double().numpy(), keys.double().numpy()
        expected = gathered(*arrays, positions.tolist(), rope, 0.3, 100)
        assert_same(Expected(*(part[index] for part in found)), expected)


def test_contexts():
    """What keys share is averaged over contexts, the last of which is shorter."""
    turns, given = frequencies(SIZE // 2), states(3000)
    positions = torch.arange(3000) % 100
    found = gather(QueryGathering(3000), given, positions, Rotary(turns), [1000, 2000])
    rope = Rope(turns.double().numpy())
    for index, (queries, keys) in enumerate(given.values()):
        arrays = queries.double().numpy(), keys.double().numpy()
        expected = gathered(*arrays, positions.tolist(), rope, 0.3, 3000)
        assert_same(Expected(*(part[index] for part in found)), expected)


@pytest.mark.parametrize("num_tokens", [700, 1024, 2000])
def test_steps_do_not_matter(num_tokens):
    """The same keys stand for the others, evenly, whatever came together."""
    positions, given = torch.arange(700), states(700)
    rotary = Rotary(frequencies(SIZE // 2))
    one = gather(QueryGathering(num_tokens), given, positions, rotary, [700])
    for steps in ([350, 350], [1] * 700, [333, 1, 1, 1, 64, 300]):
        other = gather(QueryGathering(num_tokens), given, positions, rotary, steps)
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_it_stops():
    """With the step that brings enough tokens; then it says so, once."""
    said, positions, given = [], torch.arange(90), states(90)
    gathering = QueryGathering(50, done=lambda: said.append(gathering.count))
    for steps, complete in ((20, False), (29, False), (11, True), (30, True)):
        gather(gathering, given, positions, Rotary(frequencies(SIZE // 2)), [steps])
        assert gathering.is_complete == complete
    assert said == [60]
    assert gathering.count == 60


def test_frozen():
    """What was gathered stays, however little; the keys have told what they are for, and go."""
    gathering = QueryGathering(1000)
    found = gather(gathering, states(40), torch.arange(40), Rotary(frequencies(SIZE // 2)), [40])
    assert not gathering.is_complete
    gathering.freeze()
    assert gathering.is_complete
    assert gathering.num_tokens == 40
    assert not any(part.numel() for name, part in gathering.state().items() if "keys" in name)
    again = QueryGathering(7)
    again.restore(gathering.state(), CPU)
    for one in (gathering, gathering.copy(), again):
        for parts in zip(one.of(np.array(LAYERS), np.arange(KV_HEADS), CPU), found, strict=True):
            assert torch.equal(*parts)


@pytest.mark.parametrize("how", ["copy", "state"])
def test_copies_go_on_alone(how):
    given, positions, rotary = states(300), torch.arange(300), Rotary(frequencies(3), 1.1, False)
    one = QueryGathering(512)
    first = {layer: (q[:100], k[:100]) for layer, (q, k) in given.items()}
    rest = {layer: (q[100:], k[100:]) for layer, (q, k) in given.items()}
    before = gather(one, first, positions[:100], rotary, [100])
    if how == "copy":
        other = one.copy()
    else:
        other = QueryGathering(SERVED_TOKENS)
        other.restore(copy.deepcopy(one.state()), CPU)
    after = gather(other, rest, positions[100:], rotary, [200])
    whole = gather(QueryGathering(512), given, positions, rotary, [300])
    again = one.of(np.array(LAYERS), np.arange(KV_HEADS), CPU)
    for parts in zip(before, again, after, whole, strict=True):
        assert torch.equal(parts[0], parts[1])
        torch.testing.assert_close(parts[2], parts[3], rtol=1e-5, atol=1e-5)


def test_nothing_but_first_tokens():
    """Of prompts that are too short nothing is known: all keys expect the same, and no NaN."""
    found = gather(
        QueryGathering(100), states(FIRST), torch.arange(FIRST), Rotary(frequencies(8)), [FIRST]
    )
    assert not found.linear.any()
    assert not found.quadratic.any()
    assert not expected_logarithm(torch.randn(2, 1, KV_HEADS, 5, SIZE), found).isnan().any()


# ---- in engines


@pytest.fixture(scope="module", params=["llama", "llama-yarn"])
def model(request, tmp_path_factory) -> Any:
    return load_model(tiny_models.saved(request.param, tmp_path_factory.mktemp("models")))


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randperm(250, generator=generator)[:length] + 3).tolist()


def of_all(gathering: Any, model: Any) -> Expected:
    config = model.config
    layers = np.arange(config.num_hidden_layers)
    return gathering.of(layers, np.arange(config.num_key_value_heads), CPU)


@torch.inference_mode()
def test_a_cache_gathers_from_its_prompt(model):
    """In two chunks; after the first compaction nothing changes any more."""
    tokens, expected = torch.tensor([text(200)]), of_model(model, [text(150)], SERVED_TOKENS)
    with PagedCache(model.config, budget=100, **POLICY) as cache:
        model(tokens[:, :70], past_key_values=cache)
        model(tokens[:, 70:150], past_key_values=cache)
        gathering = cache.sequences.query_statistics
        assert_same(of_all(gathering, model), expected)
        assert cache.stats().evicted == 0
        for step in range(150, 200):
            model(tokens[:, step : step + 1], past_key_values=cache)
        assert cache.stats().evicted > 0
        assert gathering.is_complete
        assert gathering.count == 150
        assert_same(of_all(gathering, model), expected)


@torch.inference_mode()
def test_the_reference_engine_gathers_the_same(model):
    tokens = text(150)
    engine = ReferenceEngine(model, CompressionConfig.from_dict(POLICY | {"budget": 200}))
    for start, end in ((0, 1), (1, 90), (90, 150)):
        engine.process(tokens[start:end])
    assert_same(of_all(engine.gathering, model), of_model(model, [tokens], SERVED_TOKENS))


SETTINGS = {
    "skip_tokenizer_init": True,
    "max_num_batched_tokens": 100,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
}


OBSERVER = "vllm.worker.observer"


def observer(llm: Any) -> Any:
    return engines.worker(llm).compactor.observer


@pytest.mark.vllm
def test_vllm_gathers_from_what_it_serves(tmp_path):
    """Prompts in chunks, decoded tokens, several at once; compacted or not."""
    path = tiny_models.saved("llama", tmp_path)
    model = load_model(path)
    config = {**POLICY, "budget": 96}
    with engines.engine(path, config, **SETTINGS) as llm:
        gathering = observer(llm).gathering
        engines.generate(llm, [text(210)], 1)
        assert gathering.count == 210
        assert_same(of_all(gathering, model), of_model(model, [text(210)], SERVED_TOKENS))
        # Side by side they take turns, so other keys stand for all: the sums are the same.
        texts = [text(210), text(99, 1), text(180, 2)]
        engines.generate(llm, texts[1:], 1)
        assert gathering.count == sum(map(len, texts))
        expected, found = of_model(model, texts, SERVED_TOKENS), of_all(gathering, model)
        for name in ("linear", "quadratic"):
            np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.normaliser, expected["normaliser"], atol=1.0)
        before = engines.worker(llm).compactor.num_events
        tokens = engines.generate(llm, [text(150, 3)], 60)
        assert engines.worker(llm).compactor.num_events > before
        assert len(set(tokens[0])) > 20
        assert gathering.count >= sum(map(len, texts)) + 150 + 59


@pytest.mark.vllm
def test_vllm_stops_and_says_so(tmp_path):
    """In one line of the log; then no step shows its queries any more, if fading needs none."""
    path = tiny_models.saved("llama", tmp_path)
    config = {**POLICY, "budget": 96, "fading": "off"}
    settings = {**SETTINGS, "max_num_batched_tokens": 512}
    with engines.engine(path, config, **settings) as llm, engines.logged(OBSERVER) as lines:
        gathering = observer(llm).gathering
        prompts = [text(240, seed) for seed in range(SERVED_TOKENS // 240 + 1)]
        assert observer(llm).looks_at_queries
        engines.generate(llm, prompts[:-1], 1)
        assert not gathering.is_complete
        engines.generate(llm, prompts[-1:], 30)
        assert gathering.is_complete
        assert not observer(llm).looks_at_queries
        before = of_all(gathering, load_model(path))
        engines.generate(llm, [text(200, 99)], 30)
        after = of_all(gathering, load_model(path))
    for parts in zip(before, after, strict=True):
        assert torch.equal(*parts)
    lines = [line for line in lines if "statistics" in line]
    assert len(lines) == 1
    assert str(SERVED_TOKENS) in lines[0]
    assert "paged-kv calibrate queries" in lines[0]


@pytest.mark.vllm
def test_vllm_with_a_file_gathers_nothing(tiny):
    config = {**POLICY, "budget": 96, "statistics": query_files.shared(6, 2, 2, 32)}
    with engines.engine(tiny, config, **SETTINGS) as llm:
        assert observer(llm).gathering is None
        assert "scores" in observer(llm).policy.reads  # auto: pages are ours, which sum them up
        assert not observer(llm).looks_at_queries
