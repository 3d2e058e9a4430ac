"""PagedEncoderDecoderCache in T5 and BART, against transformers' own cache and a dense model."""

import copy

import pytest
import torch
from hf_models import ENCODER_DECODERS, load, padded, prompt, seen_under_streaming

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, PoolFull

STREAMING = {"policy": "streaming", "budget": 64, "page_size": 16}
SNAPKV = {"policy": "snapkv", "budget": 64, "page_size": 16, "observation_window": 8}


@pytest.fixture(params=ENCODER_DECODERS)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def ragged():
    return padded([prompt(50), prompt(21, seed=1)])


def generate(model, inputs, cache=None, num_tokens=30, **options) -> torch.Tensor:
    """All tokens of the decoder; greedy unless told otherwise, sampling always the same."""
    torch.manual_seed(0)
    settings = {"do_sample": False, "max_new_tokens": num_tokens} | options
    return model.generate(**inputs, past_key_values=cache, **settings)


def one(tokens: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([tokens])}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"decoder_input_ids": torch.tensor([[1, 7, 9, 5]] * 2)},
    ],
    ids=["greedy", "beams", "sampling", "decoder prompt"],
)
def test_nothing_evicted_equals_transformers_cache(model, ragged, options):
    expected = generate(model, ragged, **options)
    with PagedEncoderDecoderCache(model, page_size=16) as cache:
        assert torch.equal(generate(model, ragged, cache, **options), expected)
        assert cache.stats().evicted == 0


@pytest.mark.parametrize("kind", ["prompt_lookup_num_tokens", "assistant_model"])
def test_assisted_decoding_crops(model, kind):
    inputs = one(prompt(50))
    expected = generate(model, inputs)
    options = {kind: 3 if kind == "prompt_lookup_num_tokens" else model}
    with PagedEncoderDecoderCache(model, page_size=16) as cache:
        assert torch.equal(generate(model, inputs, cache, **options), expected)
    with PagedEncoderDecoderCache(model, **STREAMING) as cache:
        found = generate(model, inputs, cache, 90, **options)
        assert found.shape == (1, 91)
        assert cache.stats().evicted > 0


def test_streaming_equals_a_dense_model_with_a_mask(model):
    """T5's position bias, too: it is that of the true distances."""
    inputs = one(prompt(50))
    with PagedEncoderDecoderCache(model, **STREAMING) as cache:
        output = generate(
            model, inputs, cache, 140, return_dict_in_generate=True, output_logits=True
        )
        assert cache.stats().compactions > 6
    tokens = output.sequences[:, :-1]
    seen = seen_under_streaming(tokens.shape[1], 0, 64)
    assert not seen[-1].all()
    with torch.no_grad():
        dense = model(
            **inputs, decoder_input_ids=tokens, decoder_attention_mask=seen[None, None]
        ).logits[0]
    torch.testing.assert_close(torch.cat(output.logits), dense, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("options", [SNAPKV, {"policy": "h2o", "budget": 64, "page_size": 16}],
                         ids=["snapkv", "h2o"])  # fmt: skip
def test_a_padded_row_equals_its_solo_run(model, options):
    ragged = padded([prompt(50), prompt(21, seed=1)], "right")  # BART counts from the left
    with PagedEncoderDecoderCache(model, **options) as cache:
        together = generate(model, ragged, cache, 110)
        assert cache.stats().evicted > 0
    for row, tokens in enumerate([prompt(50), prompt(21, seed=1)]):
        with PagedEncoderDecoderCache(model, **options) as cache:
            assert torch.equal(generate(model, one(tokens), cache, 110)[0], together[row])


def test_beams_under_a_policy_give_every_page_back(model, ragged):
    pool = PagePool(page_size=16)
    with PagedEncoderDecoderCache(model, pool=pool, **SNAPKV | {"page_size": 16}) as cache:
        generate(model, ragged, cache, 100, num_beams=3)
        assert 6 * 3 * 64 <= cache.stats().entries < 6 * 3 * 80
        pool.check_integrity()
    assert pool.num_held == 0


def test_reset_forgets_the_input_too(model, ragged):
    expected = generate(model, one(prompt(33)))
    with PagedEncoderDecoderCache(model, page_size=16) as cache:
        generate(model, ragged, cache)
        cache.reset()
        assert cache.stats().pages == cache.get_seq_length() == 0
        assert torch.equal(generate(model, one(prompt(33)), cache), expected)


def test_the_model_stays_as_it_is(model, ragged):
    expected = generate(model, ragged)
    configs = {id(module.config): module.config for module in model.modules()
               if hasattr(module, "config")}  # fmt: skip
    before = {key: copy.deepcopy(vars(config)) for key, config in configs.items()}
    cache = PagedEncoderDecoderCache(model)
    assert torch.equal(generate(model, ragged), expected), "without the cache"
    assert {key: vars(config) for key, config in configs.items()} == before
    cache.close()
    cache.close()
    assert {key: vars(config) for key, config in configs.items()} == before
    with pytest.raises(ValueError, match="has been closed"):
        cache.stats()
    with pytest.raises(ValueError, match="has been closed"):
        generate(model, ragged, cache)


def test_errors(model):
    with pytest.raises(ValueError, match="is no encoder-decoder model"):
        PagedEncoderDecoderCache(load("llama"))
    with pytest.raises(ValueError, match="is no encoder-decoder model"):
        PagedEncoderDecoderCache(model.config)
    with pytest.raises(ValueError, match="PagedEncoderDecoderCache"):
        PagedCache(model.config)
    with pytest.raises(ValueError, match="budget 32 is too small"):
        PagedEncoderDecoderCache(model, policy="streaming", budget=32)
    pool = PagePool(num_pages=3, page_size=16)
    with PagedEncoderDecoderCache(model, pool=pool) as cache, pytest.raises(PoolFull):
        generate(model, one(prompt(20)), cache)
    assert pool.num_held == 0
