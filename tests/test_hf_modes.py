"""Everything that generate() can do with a cache, done with a PagedCache."""

import pytest
import torch
from hf_generate import NEW, SNAPKV, STREAMING, cache_of, generate, one
from hf_models import load, padded, prompt

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagePool


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture(scope="module")
def ragged():
    return padded([prompt(100), prompt(41, seed=1)])


# ---- equal to transformers' cache while nothing is evicted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "top_p": 0.8, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"prefill_chunk_size": 32},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_p": 0.1, "do_sample": True},
    ],
    ids=str,
)
def test_modes(model, ragged, options):
    expected = generate(model, ragged, **options)
    with cache_of(model) as cache:
        assert torch.equal(generate(model, ragged, cache, **options), expected)
    pool = PagePool(page_size=16)
    with cache_of(model, pool=pool, page_size=None, **SNAPKV) as cache:
        found = generate(model, ragged, cache, **options)
        assert found.shape == expected.shape
        assert cache.stats().evicted > 0
        pool.check_integrity()
    assert pool.num_held == 0


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": None}], ids=str
)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 8}], ids=str)
def test_assisted_decoding(model, options, sampling):
    if "assistant_model" in options:
        options = {"assistant_model": load("llama-draft")}
    inputs = one(prompt(40) * 2)
    expected = generate(model, inputs, **options, **sampling)
    with cache_of(model) as cache:
        assert torch.equal(generate(model, inputs, cache, **options, **sampling), expected)
    with cache_of(model, **SNAPKV) as cache:
        assert generate(model, inputs, cache, **options, **sampling).shape == expected.shape
        stats = cache.stats()
        assert stats.evicted > 0
        assert 4 * 80 <= stats.entries < 4 * 96


def test_an_assistant_that_sees_the_same_tokens_guesses_them(model):
    inputs = one(prompt(100))
    with cache_of(model) as cache:
        found = generate(model, inputs, cache, assistant_model=model)
    assert torch.equal(found, generate(model, inputs))


def test_what_generate_returns(model, ragged):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = generate(model, ragged, **options)
    with cache_of(model) as cache:
        found = generate(model, ragged, cache, **options)
        assert found.past_key_values is cache
    assert len(found.scores) == NEW
    for own, other in zip(found.scores + found.logits, expected.scores + expected.logits,
                          strict=True):  # fmt: skip
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_attention_maps_are_refused(model, ragged):
    with cache_of(model) as cache:
        with pytest.raises(ValueError, match="output_attentions"):
            generate(model, ragged, cache, output_attentions=True, return_dict_in_generate=True)
        assert cache.stats().pages == 0


def test_a_streamer_sees_every_token(model):
    from transformers.generation.streamers import BaseStreamer

    class Recorder(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    recorder = Recorder()
    with cache_of(model, **SNAPKV) as cache:
        output = generate(model, one(prompt(100)), cache, streamer=recorder)
    assert recorder.tokens == [*output[0].tolist(), "end"]


# ---- a policy, against definitions


def beams_by_forks(model, tokens: list[int], options: dict, num_beams: int) -> list[int]:
    """Beam search over copies of reference engines; no token ends a beam."""
    config = CompressionConfig.from_dict(options)
    engine = ReferenceEngine(model, config, page_size=16, prompt_len=len(tokens))
    hidden = engine.process(tokens)
    beams = [(0.0, [], engine, hidden)]
    for _ in range(NEW):
        chances = [e.logits(h[-1:])[0].log_softmax(-1) + total for total, _, e, h in beams]
        best = torch.stack(chances).flatten().topk(num_beams)
        size = len(chances[0])
        grown = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            _, before, parent, _ = beams[place // size]
            fork = parent.fork(config)
            grown.append((score, [*before, place % size], fork, fork.process([place % size])))
        beams = grown
    return max(beams, key=lambda beam: beam[0])[1]


@pytest.mark.parametrize("options", [STREAMING, SNAPKV, {"policy": "h2o", "budget": 80}],
                         ids=lambda options: options["policy"])  # fmt: skip
def test_beams_under_a_policy_equal_copies(model, options):
    tokens = prompt(100)
    expected = beams_by_forks(model, tokens, options, num_beams=3)
    with cache_of(model, **options) as cache:
        assert generate(model, one(tokens), cache, num_beams=3)[0, 100:].tolist() == expected
        assert cache.stats().compactions > 4


@pytest.mark.parametrize("options", [{}, SNAPKV | {"compress_prefill": True}], ids=str)
@pytest.mark.parametrize("size", [7, 32, 64])
def test_chunks_of_a_prompt(model, options, size):
    tokens = prompt(150)
    with cache_of(model, **options) as cache:
        found = generate(model, one(tokens), cache, prefill_chunk_size=size)[0, 150:].tolist()
    config = CompressionConfig.from_dict(options)
    engine = ReferenceEngine(model, config, page_size=16)
    for start in range(0, 150, size):
        hidden = engine.process(tokens[start : start + size])
    expected = []
    while len(expected) < NEW:
        expected.append(int(engine.logits(hidden[-1:]).argmax()))
        hidden = engine.process(expected[-1:])
    assert found == expected
