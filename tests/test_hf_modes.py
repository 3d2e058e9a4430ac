"""Everything that generate() can do with a cache, done with a PagedCache."""

import pytest
import torch
from hf_models import load, padded, prompt

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, PagePool

SNAPKV = {"policy": "snapkv", "budget": 80, "observation_window": 16}
STREAMING = {"policy": "streaming", "budget": 80}
NEW = 24


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture(scope="module")
def ragged():
    return padded([prompt(100), prompt(41, seed=1)])


def cache_of(model, **options) -> PagedCache:
    return PagedCache(model.config, **{"page_size": 16} | options)


def generate(model, inputs, cache=None, **options) -> torch.Tensor:
    """All tokens; greedy unless told otherwise; sampling always from the same seed."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(**inputs, past_key_values=cache, **settings)


def one(tokens: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([tokens])}


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


# ---- several turns


def turns(model, inputs, make_cache, **options) -> torch.Tensor:
    """Three calls of generate on one cache, each with everything so far and something new."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config) if make_cache is None else make_cache()
    for turn in range(3):
        output = generate(model, inputs, cache, max_new_tokens=12, **options)
        rows = len(output)
        more = torch.tensor([prompt(9, seed=10 * turn + row) for row in range(rows)])
        mask = inputs.get("attention_mask")
        inputs = {"input_ids": torch.cat([output, more], 1)}
        if mask is not None:
            width = inputs["input_ids"].shape[1] - mask.shape[1]
            inputs["attention_mask"] = torch.cat([mask, mask.new_ones(rows, width)], 1)
    return output


def test_turns_equal_dynamic_cache(model, ragged):
    for inputs in (one(prompt(60)), ragged):
        expected = turns(model, inputs, None)
        assert torch.equal(turns(model, inputs, lambda: cache_of(model)), expected)


def test_a_padded_row_equals_its_solo_run_over_turns(model):
    prompts = [prompt(100), prompt(41, seed=1)]
    together = turns(model, padded(prompts), lambda: cache_of(model, **SNAPKV))
    alone = turns(model, one(prompts[0]), lambda: cache_of(model, **SNAPKV))
    assert torch.equal(together[:1], alone)


def test_turns_under_a_policy(model):
    """The second turn's prompt sees what the first has kept, and is whole until its own end."""
    first, second = prompt(100), prompt(30, seed=1)
    with cache_of(model, **SNAPKV) as cache:
        output = generate(model, one(first), cache, max_new_tokens=12)
        before = cache.stats().entries
        ids = torch.cat([output, torch.tensor([second])], 1)
        with torch.no_grad():
            rest = ids[:, cache.get_seq_length() :]
            model(rest, past_key_values=cache)
        assert cache.stats().entries == before + 4 * rest.shape[1]
        model(torch.tensor([[5]]), past_key_values=cache)
        assert 4 * 80 <= cache.stats().entries < 4 * 97


# ---- rows, reset, crop


def step(model, cache, tokens: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(tokens), past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, SNAPKV], ids=str)
def test_rows_can_be_repeated_reordered_and_dropped(name, options):
    model = load(name)
    a, b = prompt(100), prompt(100, seed=1)
    with cache_of(model, **options) as cache, cache_of(model, **options) as other:
        step(model, cache, [a, b])
        cache.batch_repeat_interleave(2)  # a a b b
        step(model, cache, [[5], [6], [7], [8]])
        cache.reorder_cache(torch.tensor([3, 0, 0, 1]))  # b8 a5 a5 a6
        step(model, cache, [[1], [2], [3], [4]])
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_select_indices(torch.tensor([True, True]))
        found = step(model, cache, [[9], [9]])
        step(model, other, [a, b])
        step(model, other, [[5], [8]])
        step(model, other, [[3], [1]])
        torch.testing.assert_close(found, step(model, other, [[9], [9]]), atol=1e-4, rtol=1e-4)
        assert cache.stats().entries == other.stats().entries


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_reset(name):
    model = load(name)
    with cache_of(model, **SNAPKV) as cache:
        expected = generate(model, one(prompt(100)), cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().pages == cache.stats().entries == 0
        generate(model, padded([prompt(50), prompt(20)]), cache)  # another batch
        cache.reset()
        assert torch.equal(generate(model, one(prompt(100)), cache), expected)


@pytest.mark.parametrize("options", [{}, STREAMING, SNAPKV, {"policy": "h2o", "budget": 80}],
                         ids=lambda options: options.get("policy", "full"))  # fmt: skip
def test_crop_forgets_the_last_tokens(model, options):
    """Queries and scores, too; a turn begins with several tokens."""
    tokens = prompt(90)
    with cache_of(model, **options) as cache, cache_of(model, **options) as other:
        for one_cache in (cache, other):
            step(model, one_cache, [tokens])
            for token in range(3, 12):
                step(model, one_cache, [[token]])
        step(model, cache, [[20, 21, 22, 23]])
        step(model, cache, [[24]])
        cache.crop(-5)
        assert cache.get_seq_length() == other.get_seq_length() == 99
        assert cache.stats().entries == other.stats().entries
        for token in range(30, 60):
            found, expected = (step(model, held, [[token]]) for held in (cache, other))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_waits_for_crop_does_not_wait_for_ever(model):
    """Nobody crops 256 passes: who was told to record and goes on without, has its budget again."""
    with cache_of(model, **STREAMING) as cache:
        cache.activate_past_recording()
        step(model, cache, [prompt(100)])
        for count in range(300):
            step(model, cache, [[3 + count % 200]])
            held = cache.stats().entries // 4
            assert held == 101 + count if count < 256 else held <= 80 + 16
        cache.crop(-1)


def test_crop_errors(model, ragged):
    with cache_of(model, **SNAPKV) as cache:
        generate(model, ragged, cache)
        with pytest.raises(ValueError, match="since the last padding"):
            cache.crop(-NEW)
    with cache_of(model, policy="knorm", budget=80) as cache:
        generate(model, one(prompt(100)), cache)
        length = cache.get_seq_length()
        with pytest.raises(ValueError, match=r"a compaction that has seen .* copy\.deepcopy"):
            cache.crop(-60)
        assert cache.get_seq_length() == length
        cache.crop(-10)
        with pytest.raises(ValueError, match="no more can be removed"):
            cache.crop(-1000)
