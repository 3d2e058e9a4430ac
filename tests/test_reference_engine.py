"""The reference engine against definitions that share no code with it."""

import random

import pytest
import reference_loop
import tiny_models
import torch
from reference_loop import Rule, one_by_one, reference_tokens

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.eval.reference import compaction
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.policies.h2o import H2O
from paged_kv.store.holding import MAX_NUMBERS
from paged_kv.store.query_gathering import SERVED_TOKENS, QueryGathering

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return reference_loop.load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


def config(policy: str = "streaming", budget: int = 96, **options) -> CompressionConfig:
    if policy == "full":
        return CompressionConfig()
    return CompressionConfig.from_dict({"policy": policy, "budget": budget, **options})


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


def greedy(engine: ReferenceEngine, tokens: list[int], count: int) -> list[int]:
    output: list[int] = []
    hidden = engine.process(tokens)
    while len(output) < count:
        output.append(int(engine.logits(hidden[-1:]).argmax()))
        hidden = engine.process(output[-1:])
    return output


# ---- equal to the loop of the other tests


@pytest.mark.parametrize(
    ("own", "rule"),
    [
        (config("full"), Rule([None] * NUM_LAYERS)),
        (config(), Rule([96] * NUM_LAYERS)),
        (config(num_sink_tokens=0), Rule([96] * NUM_LAYERS, num_sinks=0)),
        (config(skip_layers=[0, 1, 2]), Rule([None] * 3 + [96] * 3)),
    ],
    ids=["full", "streaming", "no sinks", "skipped layers"],
)
def test_tokens(model, own, rule):
    tokens = prompt(150)
    expected = reference_tokens(model, tokens, one_by_one(150, 100), rule, 100)
    assert len(set(expected)) > 10, "the model repeats itself: a difference would not show"
    assert greedy(ReferenceEngine(model, own, prompt_len=150), tokens, 100) == expected


# ---- what policies are given


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("chunks", [[(0, 120)], [(0, 50), (50, 51), (51, 120)]])
def test_scores_are_the_sum_of_the_attention(model, chunks, decay, monkeypatch):
    """Or of what has not faded of it."""
    monkeypatch.setattr(H2O, "score_decay", decay)
    tokens = prompt(120)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            maps = model(torch.tensor([tokens]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    engine = ReferenceEngine(model, config("h2o", budget=160))
    for start, end in chunks:
        engine.process(tokens[start:end])
    for layer, attention in zip(engine.layers, maps, strict=True):
        kv_heads = len(layer.cache["scores"])
        left = decay ** torch.arange(119.0, -1, -1)
        expected = (attention[0] * left[:, None]).unflatten(0, (kv_heads, -1)).sum((1, 2))
        torch.testing.assert_close(layer.cache["scores"], expected, atol=3e-5, rtol=5e-5)


def test_the_observation_window_is_the_last_queries(model):
    engine = ReferenceEngine(model, config("snapkv", observation_window=8), observe=20)
    for start, end in [(0, 3), (3, 30), (30, 31)]:
        engine.process(prompt(31)[start:end])
    region = engine.region(engine.layers, 0, frozenset({"keys"}), 8)
    assert region.queries.positions.tolist() == [list(range(23, 31))]
    whole = ReferenceEngine(model, config("snapkv", observation_window=31))
    whole.process(prompt(31))
    states = whole.region(whole.layers, 0, frozenset(), 31).queries.states
    torch.testing.assert_close(region.queries.states, states[..., 23:31, :], atol=1e-4, rtol=1e-4)
    assert region.attention.shape == (NUM_LAYERS, 1, 2, 2, 8, 31)
    torch.testing.assert_close(region.attention.sum(-1), torch.ones(NUM_LAYERS, 1, 2, 2, 8))


def test_queries_that_are_missing(model):
    engine = ReferenceEngine(model, config("snapkv", observation_window=8))
    engine.process(prompt(3))
    region = engine.region(engine.layers, 0, frozenset({"keys"}), 8)
    assert region.queries.positions.tolist() == [[-1] * 5 + [0, 1, 2]]
    assert not region.attention[..., :5, :].any()


# ---- how it is run


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_no_chunking_changes_anything_while_nothing_is_dropped(model, decay, monkeypatch):
    monkeypatch.setattr(H2O, "score_decay", decay)
    tokens = prompt(300)
    own = config("h2o", compress_prefill=True)
    one, many = ReferenceEngine(model, own), ReferenceEngine(model, own)
    for token in tokens:
        last = one.process([token])
    start = 0
    for end in range(1, 301):
        if many.drops_at(end) or end == 300:
            rows = many.process(tokens[start:end])
            start = end
    torch.testing.assert_close(rows[-1:], last, atol=1e-4, rtol=1e-4)
    for a, b in zip(one.layers, many.layers, strict=True):
        assert torch.equal(a.cache["positions"], b.cache["positions"])
        torch.testing.assert_close(a.cache["scores"], b.cache["scores"], atol=1e-4, rtol=1e-4)
    assert one.num_kept == many.num_kept
    assert 96 <= one.num_kept[0] < 96 + 32


def test_fork_equals_a_run_of_its_own(model):
    tokens = prompt(200)
    gathering = QueryGathering(SERVED_TOKENS)
    prefill = ReferenceEngine(model, config("full"), observe=32, gathering=gathering)
    prefill.process(tokens)
    for policy in ("streaming", "snapkv", "value_merge", "calibrated_attention"):
        options = {"compress_prefill": True} | ({"of": "snapkv"} if policy == "value_merge" else {})
        own = config(policy, **options)
        fork = prefill.fork(own)
        assert (fork.gathering is None) == (policy != "calibrated_attention"), (
            "nobody else reads it"
        )
        fork.compact()
        alone = ReferenceEngine(model, own)
        alone.process(tokens)
        for a, b in zip(fork.layers, alone.layers, strict=True):
            for name in ("keys", "values", "positions", "weights"):
                assert torch.equal(a.cache[name], b.cache[name])
        fork.process(tokens[:10])
    assert prefill.gathering.count == 200
    assert not prefill.gathering.is_complete
    assert prefill.num_kept == [200] * NUM_LAYERS
    assert prefill.num_tokens == 200


@pytest.mark.parametrize("policy", [p for p in registry.available() if p != "full"])
def test_layers_compact_by_themselves_as_they_do_together(policy, model, monkeypatch):
    caches = []
    for at_once in (MAX_NUMBERS, 1):
        monkeypatch.setattr(compaction, "MAX_NUMBERS", at_once)
        engine = ReferenceEngine(model, config(policy, 128, compress_prefill=True))
        engine.process(prompt(200))
        engine.process(prompt(60, seed=1))
        caches.append([layer.cache for layer in engine.layers])
    for together, alone in zip(*caches, strict=True):
        assert together.size < 260
        assert torch.equal(together["positions"], alone["positions"])
        for name in ("keys", "values", "weights"):
            torch.testing.assert_close(together[name], alone[name], atol=1e-5, rtol=1e-5)


def test_fork_refuses_what_was_not_recorded(model):
    prefill = ReferenceEngine(model, config("full"), observe=8)
    prefill.process(prompt(100))
    with pytest.raises(ValueError, match="h2o accumulates scores"):
        prefill.fork(config("h2o"))
    with pytest.raises(ValueError, match="looks at 32 queries, but only 8"):
        prefill.fork(config("snapkv"))
    scored = ReferenceEngine(model, config("h2o"))
    scored.process(prompt(100), compact=False)
    scored.fork(config("h2o", budget=128))
    with pytest.raises(ValueError, match="h2o accumulates scores"):
        scored.fork(config("h2o", heavy_ratio=0.9))


def test_bytes(model):
    engine = ReferenceEngine(model, config(compress_prefill=True))
    engine.process(prompt(100))
    engine.process(prompt(100))
    assert engine.num_kept == [104] * NUM_LAYERS  # 200 - 3 pages
    assert engine.cache_bytes == NUM_LAYERS * 104 * 2 * 2 * 32 * 4


def test_errors(model, tmp_path):
    with pytest.raises(ValueError, match="budget 64 is too small"):
        ReferenceEngine(model, config(budget=64))
    from transformers import AutoConfig, AutoModelForCausalLM

    shared = AutoConfig.for_model(
        *tiny_models.MODELS["gemma3n"][:1], **tiny_models.MODELS["gemma3n"][2]
    )
    with pytest.raises(ValueError, match="share their KV cache"):
        ReferenceEngine(AutoModelForCausalLM.from_config(shared), config("full"))
    bloom = reference_loop.load_model(tiny_models.saved("bloom", tmp_path))
    with pytest.raises(ValueError, match="AttentionInterface"):
        ReferenceEngine(bloom, config("full")).process([1, 2, 3])


# ---- every policy


def test_every_policy_runs(model):
    from policy_cases import CASES

    tokens = prompt(300)
    for name, cases in CASES.items():
        for options in cases:
            own = config(name, budget=224, compress_prefill=True, **options)
            engine = ReferenceEngine(model, own)
            for start in range(0, 300, 60):
                hidden = engine.process(tokens[start : start + 60])
            assert engine.num_kept == [236] * NUM_LAYERS, name
            assert hidden.isfinite().all(), name
