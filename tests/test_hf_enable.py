"""enable(): generate() without an argument, in all that calls it."""

import threading
from fractions import Fraction

import pytest
import tiny_models
import torch
from hf_models import load, padded, prompt

from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, PagePool, enable

SNAPKV = {"policy": "snapkv", "budget": 80, "page_size": 16, "observation_window": 16}
# A random model says padding as readily as anything else, and generate() would mask it next time.
SETTINGS = {"do_sample": False, "max_new_tokens": 24, "suppress_tokens": [0, 1, 2]}


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture(scope="module")
def inputs():
    return padded([prompt(100), prompt(41, seed=1)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"num_beams": 3}),
        ("llama", {"do_sample": True}),
        ("gemma3", {"num_beams": 3}),
        ("jamba", {}),
        ("t5", {"num_beams": 2}),
        ("bart", {}),
    ],
    ids=str,
)
def test_equal_to_a_cache_that_is_given(name, inputs, options):
    model = load(name)
    decoder_only = not model.config.is_encoder_decoder
    settings = SETTINGS | {"max_new_tokens": 24 if decoder_only else 98} | options
    make = PagedCache if decoder_only else PagedEncoderDecoderCache
    with make(model.config if decoder_only else model, **SNAPKV) as cache:
        torch.manual_seed(0)
        expected = model.generate(**inputs, past_key_values=cache, **settings)
        stats = cache.stats()
    before = model.generate(**inputs, **SETTINGS)
    with enable(model, **SNAPKV) as enabled:
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **settings), expected)
        assert enabled.stats() == stats
        assert stats.evicted > 0
    assert torch.equal(model.generate(**inputs, **SETTINGS), before)
    assert "_prepare_cache_for_generation" not in vars(model)


def test_stats_are_those_of_the_last_call(model, inputs):
    with enable(model, **SNAPKV) as enabled:
        with pytest.raises(ValueError, match=r"no generate\(\)"):
            enabled.stats()
        model.generate(**inputs, **SETTINGS)
        assert enabled.stats().sequences == 2
        output = model.generate(
            torch.tensor([prompt(50)]), return_dict_in_generate=True, **SETTINGS
        )
        assert enabled.stats() == output.past_key_values.stats()
        with torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=output.past_key_values)
        assert enabled.stats().tokens == 50 + 24
        del output
        assert enabled.stats().tokens == 50 + 24
    assert enabled.stats().sequences == 1


def test_what_is_asked_for_is_respected(model, inputs):
    from transformers import DynamicCache

    plain = model.generate(**inputs, **SETTINGS)
    with enable(model, **SNAPKV) as enabled:
        own = DynamicCache(config=model.config)
        assert torch.equal(model.generate(**inputs, past_key_values=own, **SETTINGS), plain)
        assert own.get_seq_length() == 123
        assert torch.equal(model.generate(**inputs, use_cache=False, **SETTINGS), plain)
        with pytest.raises(ValueError, match=r"no generate\(\)"):
            enabled.stats()
        output = model.generate(
            **inputs, cache_implementation="static", return_dict_in_generate=True, max_new_tokens=2
        )
        assert type(output.past_key_values).__name__ == "StaticCache"


def test_a_models_default_cache_is_replaced(model, inputs):
    model.generation_config.cache_implementation = "static"
    try:
        with enable(model, **SNAPKV) as enabled:
            model.generate(**inputs, **SETTINGS)
            assert enabled.stats().evicted > 0
    finally:
        model.generation_config.cache_implementation = None


def test_nested(model, inputs):
    with enable(model, **SNAPKV) as outer:
        with enable(model, policy="streaming", budget=96, page_size=16) as inner:
            model.generate(**inputs, **SETTINGS)
            assert inner.stats().evicted > 0
        with pytest.raises(ValueError, match=r"no generate\(\)"):
            outer.stats()
        model.generate(**inputs, **SETTINGS)
        assert outer.stats().evicted > inner.stats().evicted
    assert "_prepare_cache_for_generation" not in vars(model)


def test_errors_within_lose_no_page(model, inputs):
    from transformers import StoppingCriteria

    class Fails(StoppingCriteria):
        calls = 0

        def __call__(self, *_, **__):
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("in the middle")
            return torch.zeros(2, dtype=torch.bool)

    pool = PagePool(num_pages=400, page_size=16)
    options = {key: value for key, value in SNAPKV.items() if key != "page_size"}
    with pytest.raises(RuntimeError, match="in the middle"):
        fail(model, inputs, pool, options, Fails())
    assert pool.num_held == 0
    pool.check_integrity()
    assert model.config._attn_implementation == "sdpa"
    assert "_prepare_cache_for_generation" not in vars(model)


def fail(model, inputs, pool, options, criterion):
    with enable(model, pool=pool, **options):
        model.generate(**inputs, stopping_criteria=[criterion], **SETTINGS)


def test_assisted_decoding(model):
    inputs = {"input_ids": torch.tensor([prompt(40) * 2])}
    plain = model.generate(**inputs, **SETTINGS)
    draft = load("llama-draft")
    with enable(model, page_size=16), enable(draft, page_size=16) as assistant:
        assert torch.equal(model.generate(**inputs, assistant_model=draft, **SETTINGS), plain)
        assert assistant.stats().tokens > 80
        found = model.generate(**inputs, prompt_lookup_num_tokens=3, **SETTINGS)
        assert torch.equal(found, plain)


def test_an_assistant_under_a_policy(model, monkeypatch):
    """It guesses 45 tokens before it hears which of them stay: nothing is dropped until then."""
    inputs = {"input_ids": torch.tensor([prompt(150)])} | SETTINGS | {"max_new_tokens": 60}
    plain = model.generate(**inputs)
    draft = load("llama-draft")
    monkeypatch.setattr(draft.generation_config, "num_assistant_tokens", 45)
    monkeypatch.setattr(draft.generation_config, "num_assistant_tokens_schedule", "constant")
    monkeypatch.setattr(draft.generation_config, "assistant_confidence_threshold", 0.0)
    for compress_prefill in (False, True):
        options = {"budget": 64, "page_size": 16, "compress_prefill": compress_prefill}
        with enable(model), enable(draft, policy="streaming", **options) as assistant:
            assert torch.equal(model.generate(**inputs, assistant_model=draft), plain)
            assert assistant.stats().evicted > 0


def test_in_a_thread_with_a_streamer(model, tmp_path):
    from transformers import AutoTokenizer, TextIteratorStreamer

    tiny_models.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = torch.tensor([prompt(100)])
    with enable(model, **SNAPKV) as enabled:
        settings = {"input_ids": ids, "streamer": streamer, **SETTINGS}
        thread = threading.Thread(target=model.generate, kwargs=settings)
        thread.start()
        text = "".join(streamer)
        thread.join()
        expected = model.generate(ids, **SETTINGS)[0, 100:]
        assert text.split() == tokenizer.decode(expected).split()
        assert enabled.stats().evicted > 0


def test_in_a_pipeline(model, tmp_path):
    from transformers import AutoTokenizer, pipeline

    tiny_models.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left", pad_token="t0")
    texts = [tokenizer.decode(prompt(size)) for size in (100, 40)]
    pipe = pipeline("text-generation", model, tokenizer=tokenizer, batch_size=2)
    with enable(model, **SNAPKV) as enabled:
        found = pipe(texts, return_full_text=False, **SETTINGS)
        assert enabled.stats().sequences == 2
        assert enabled.stats().evicted > 0
        expected = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **SETTINGS)
    for own, other in zip(found, expected, strict=True):
        assert own[0]["generated_text"].split() == tokenizer.decode(other[-24:]).split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "nothing"}, "nothing"),
        ({"policy": "streaming", "budget": 40}, "budget 40 is too small"),
        ({"polcy": "streaming"}, "unknown paged_kv option polcy"),
        ({"policy": "streaming", "budget": Fraction(3, 2)}, "budget"),
        ({"page_size": 0}, "page_size"),
    ],
)
def test_wrong_options_show_at_once(model, options, message):
    with pytest.raises(ValueError, match=message), enable(model, **options):
        pytest.fail("the context began")
    assert model.config._attn_implementation == "sdpa"
    assert "_prepare_cache_for_generation" not in vars(model)


def test_models_that_cannot():
    for name in ("gemma3n", "mistral-sliding", "mamba"):
        with pytest.raises(ValueError, match=r"share|full attention"), enable(load(name)):
            pytest.fail("the context began")
    with pytest.raises(ValueError, match="does not make its cache"), enable(torch.nn.Linear(1, 1)):
        pytest.fail("the context began")


def test_transformers_own_continuous_batching_is_refused():
    """It would compress nothing, and take 90 % of a CPU's free memory for its own cache."""
    model, ids = load("llama"), torch.tensor([prompt(20)])
    with enable(model, policy="streaming", budget=96):
        with pytest.raises(ValueError, match=r"cache_implementation 'paged' .* is ours"):
            model.generate(ids, max_new_tokens=3, cache_implementation="paged")
        with pytest.raises(ValueError, match=r"paged_kv\.hf\.generate_batch"):
            model.generate_batch([prompt(20)])
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
