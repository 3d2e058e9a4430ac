"""PagedCache in every family of models, against transformers' own cache and the reference engine.

Random models: attention of every layer matters to the tokens, so a wrong entry shows.
"""

import pytest
import torch
from hf_models import FAMILIES, load, padded, prompt

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache

EVERY_HEAD = [name for name in ("gpt_neox", "gpt2", "opt", "llama-every-head")]
POLICIES = [
    {"policy": "streaming", "budget": 80},
    {"policy": "snapkv", "budget": 80, "observation_window": 16},
    {"policy": "pyramidal+h2o", "budget": 96, "min_budget": 64},
]
PAGES = {"page_size": 16}
# Two policies for all, and the one that adds up probabilities for one family of each kind.
CASES = [(name, options) for name in FAMILIES for options in POLICIES[:2]]
CASES += [(name, POLICIES[2]) for name in ("llama", "gemma2", "gemma3", "gpt_oss")]


def describe(value) -> str:
    return value if isinstance(value, str) else value["policy"]


def generate(model, inputs, cache=None, num_tokens=24, **options):
    """Greedy unless told otherwise; sequences and logits."""
    settings = {"do_sample": False, "max_new_tokens": num_tokens} | options
    return model.generate(
        **inputs,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )


def generated(model, inputs, cache=None, num_tokens=24, **options) -> list[list[int]]:
    """The new tokens only."""
    output = generate(model, inputs, cache, num_tokens, **options)
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def ragged():
    return padded([prompt(70), prompt(41, seed=1)])


# ---- nothing is evicted: transformers' own cache


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_dynamic_cache(name, ragged):
    model = load(name)
    expected = generate(model, ragged)
    assert len(set(expected.sequences[0, 70:].tolist())) > 8, "the model repeats itself"
    with PagedCache(model.config, **PAGES) as cache:
        found = generate(model, ragged, cache)
        assert cache.stats().evicted == 0
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[-1], expected.logits[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompts_logits_are_bit_for_bit_those_of_dynamic_cache(name):
    model = load(name)
    ids = torch.tensor([prompt(70), prompt(70, seed=1)])
    with torch.no_grad(), PagedCache(model.config) as cache:
        found = model(ids, past_key_values=cache).logits
    with torch.no_grad():
        assert torch.equal(found, model(ids, use_cache=True).logits)


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_bit_for_bit_where_no_head_is_shared(name):
    model = load(name)
    inputs = padded([prompt(70), prompt(70, seed=1)])
    expected = generate(model, inputs)
    with PagedCache(model.config, **PAGES) as cache:
        found = generate(model, inputs, cache)
    for own, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_and_prompt_lookup_equal_dynamic_cache(name, ragged):
    model = load(name)
    alone = {"input_ids": torch.tensor([prompt(30) * 2])}
    for inputs, options in [(ragged, {"num_beams": 3}), (alone, {"prompt_lookup_num_tokens": 4})]:
        expected = generated(model, inputs, **options)
        with PagedCache(model.config, **PAGES) as cache:
            assert generated(model, inputs, cache, **options) == expected, options


# ---- a policy


@pytest.mark.parametrize(("name", "options"), CASES, ids=describe)
def test_equal_to_the_reference_engine(name, options):
    model, tokens, count = load(name), prompt(120), 40
    config = CompressionConfig.from_dict(options)
    engine = ReferenceEngine(model, config, page_size=16, prompt_len=120)
    expected: list[int] = []
    hidden = engine.process(tokens)
    while len(expected) < count:
        expected.append(int(engine.logits(hidden[-1:]).argmax()))
        hidden = engine.process(expected[-1:])
    with PagedCache(model.config, **PAGES, **options) as cache:
        found = generated(model, {"input_ids": torch.tensor([tokens])}, cache, count)
        assert cache.stats().compactions > 4
    assert found == [expected]


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if case[1] != POLICIES[0]], ids=describe
)
def test_a_padded_row_equals_its_solo_run(name, options):
    model = load(name)
    prompts = [prompt(130), prompt(75, seed=1), prompt(20, seed=2)]
    with PagedCache(model.config, **PAGES, **options) as cache:
        together = generated(model, padded(prompts), cache)
    for tokens, found in zip(prompts, together, strict=True):
        with PagedCache(model.config, **PAGES, **options) as cache:
            assert generated(model, {"input_ids": torch.tensor([tokens])}, cache) == [found]


# ---- layers of other kinds, and models that are refused


def test_sliding_layers_keep_transformers_cache():
    from transformers.cache_utils import DynamicSlidingWindowLayer

    model = load("gemma3")
    with PagedCache(model.config, policy="streaming", budget=80, **PAGES) as cache:
        generated(model, {"input_ids": torch.tensor([prompt(120)])}, cache)
        kinds = [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers]
        assert kinds == [True, False, True, False]
        assert cache.layers[0].keys.shape[2] == 47
        assert 2 * 80 <= cache.stats().entries < 2 * 96


@pytest.mark.parametrize("name", ["jamba", "qwen3_next"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_hybrid_with_linear_layers(name, options):
    model = load(name)
    inputs = {"input_ids": torch.tensor([prompt(90)])}
    expected = generated(model, inputs, **options)
    with PagedCache(model.config, **PAGES) as cache:
        assert generated(model, inputs, cache, **options) == expected
    with PagedCache(model.config, policy="streaming", budget=64, **PAGES) as cache:
        generated(model, inputs, cache, **options)
        rows = options.get("num_beams", 1)
        assert 2 * rows * 64 <= cache.stats().entries < 2 * rows * 80


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3n", "share their KV cache"),
        ("mistral-sliding", "no layer of this model has full attention"),
        ("mamba", "no layer of this model has full attention"),
    ],
)
def test_refused_before_anything_runs(name, message):
    model = load(name)
    with pytest.raises(ValueError, match=message):
        PagedCache(model.config, policy="streaming", budget=80)


def test_a_model_that_computes_its_attention_itself():
    model = load("bloom")
    with PagedCache(model.config) as cache:
        with pytest.raises(ValueError, match="AttentionInterface"):
            generated(model, {"input_ids": torch.tensor([prompt(20)])}, cache)
        assert cache.stats().pages == 0
    generated(model, {"input_ids": torch.tensor([prompt(20)])})


# ---- number formats


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    model = load(name, dtype=dtype)
    inputs = padded([prompt(100), prompt(60, seed=1)])
    for options in [{}, *POLICIES]:
        with PagedCache(model.config, **PAGES, **options) as cache:
            output = generate(model, inputs, cache)
            arena = cache.sequences.tables.arena(0)
            assert arena.keys.dtype == arena.values.dtype == dtype
            assert {t.dtype for t in arena.side.values()} <= {torch.float32, torch.int32}
        assert output.logits[-1].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast(name):
    model = load(name)
    inputs = padded([prompt(100), prompt(60, seed=1)])
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, inputs)
        with PagedCache(model.config, **PAGES) as cache:
            found = generate(model, inputs, cache)
        torch.testing.assert_close(found.logits[0], expected.logits[0], atol=0.2, rtol=0.05)
        for options in POLICIES:
            with PagedCache(model.config, **PAGES, **options) as cache:
                generated(model, inputs, cache)
                assert cache.stats().evicted > 0


def test_scores_stay_float32():
    tokens = torch.tensor([prompt(200)])
    scores = []
    for dtype, autocast in [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]:
        model = load("llama", dtype=dtype)
        with PagedCache(model.config, policy="h2o", budget=256) as cache, torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(tokens, past_key_values=cache)
            tables = cache.sequences.tables
            found = tables.arena(0).side["scores"][:, tables.ids[0, 0]].flatten(1)[:, :200]
        # Each query gives each of its heads' entries 1 in all: rounded to bfloat16 it would not.
        assert found.sum(1).tolist() == pytest.approx([2 * 200] * 2, abs=0.01)
        scores.append(found)
    torch.testing.assert_close(scores[1], scores[0], atol=0.3, rtol=0.1)
