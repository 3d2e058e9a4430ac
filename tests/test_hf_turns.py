"""A PagedCache between calls: several turns, rows that come and go, reset, crop."""

import pytest
import torch
from hf_generate import NEW, SNAPKV, STREAMING, cache_of, generate, one
from hf_models import load, padded, prompt


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture(scope="module")
def ragged():
    return padded([prompt(100), prompt(41, seed=1)])


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
