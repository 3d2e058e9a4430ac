"""A cache decides who computes: other calls of the same model are what they always were."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from hf_models import load, padded, prompt
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, PagedEncoderDecoderCache, enable, generate_batch

STREAMING = {"policy": "streaming", "budget": 80, "page_size": 16}
SNAPKV = {"policy": "snapkv", "budget": 80, "page_size": 16, "observation_window": 16}
SETTINGS = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": [0, 1, 2]}


@pytest.fixture(scope="module")
def model():
    return load("llama")


@pytest.fixture(scope="module")
def inputs():
    return padded([prompt(100), prompt(41, seed=1)])


@pytest.fixture
def own():
    """A model that the test may change."""
    return copy.deepcopy(load("llama"))


@contextlib.contextmanager
def meanwhile(work):
    """Another thread does work again and again; what it raises is raised here."""
    stopped, errors, started = threading.Event(), [], threading.Event()

    def run():
        try:
            while not stopped.is_set():
                work()
                started.set()
        except Exception as error:
            errors.append(error)
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        started.wait()
        yield
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]


# ---- plain calls


def enabled(model):
    with enable(model, **STREAMING):
        model.generate(torch.tensor([prompt(90)]), **SETTINGS)


def batched(model):
    generate_batch(model, [prompt(90), prompt(9)], max_new_tokens=4, progress_bar=False)


def computed_by_reference(model):
    ReferenceEngine(model, CompressionConfig()).process(prompt(90))


@pytest.mark.parametrize("work", [enabled, batched, computed_by_reference])
def test_in_another_thread(model, inputs, work):
    plain = {"cache_implementation": "dynamic", **SETTINGS}
    expected = model.generate(**inputs, **plain)
    with meanwhile(lambda: work(model)):
        for _ in range(15):
            assert torch.equal(model.generate(**inputs, **plain), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_when_the_garbage_collector_finds_a_cache(name):
    """In the middle of a forward pass: between the mask and a layer."""
    model = load(name)
    ids = torch.tensor([prompt(100)])
    plain = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    expected = model(**plain).logits
    collected = []
    layer = (model.decoder.block if name == "t5" else model.model.layers)[1]
    hook = layer.register_forward_pre_hook(lambda *_: collected.append(gc.collect()) and None)
    gc.collect()
    gc.disable()
    try:
        cache = PagedEncoderDecoderCache(model) if name == "t5" else PagedCache(model.config)
        cache.me = cache  # in a cycle, as after an exception
        del cache
        assert torch.equal(model(**plain).logits, expected)
        assert collected[0] > 0
    finally:
        gc.enable()
        hook.remove()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_they_get_what_the_model_computes_itself(own, inputs, name):
    own.set_attn_implementation(name)
    first, second = (DynamicCache(config=own.config) for _ in range(2))
    with torch.inference_mode():
        expected = own(**inputs, use_cache=False).logits
        own(**inputs, past_key_values=first)
        with PagedCache(own.config, **STREAMING) as cache:
            own(**inputs, past_key_values=cache)
            assert torch.equal(own(**inputs, use_cache=False).logits, expected)
            own(**inputs, past_key_values=second)
    assert torch.equal(second.layers[3].keys, first.layers[3].keys)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_probabilities(name, inputs):
    model = load(name, attention="eager")
    expected = model(**inputs, output_attentions=True).attentions
    with PagedCache(model.config) as cache:
        found = model(**inputs, output_attentions=True).attentions
        with pytest.raises(ValueError, match="never has the attention of all tokens"):
            model(**inputs, output_attentions=True, past_key_values=cache)
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_copies_of_a_model(model, inputs, tmp_path):
    expected = model.generate(**inputs, **SETTINGS)
    with enable(model, **STREAMING) as one, PagedCache(model.config):
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        twin.generate(**inputs, **SETTINGS)
        with pytest.raises(ValueError, match=r"no generate\(\)"):
            one.stats()
    for other in (twin, type(model).from_pretrained(tmp_path)):
        assert other.config._attn_implementation == "sdpa"
        other.generation_config.eos_token_id = None
        assert torch.equal(other.generate(**inputs, **SETTINGS), expected)


# ---- calls with a cache of ours


@pytest.mark.parametrize("options", [{}, SNAPKV], ids=["full", "snapkv"])
def test_whatever_the_implementation_is(own, inputs, options):
    with PagedCache(own.config, **options) as cache:
        expected = own.generate(**inputs, past_key_values=cache, **SETTINGS)
    for name in ("eager", "flex_attention"):
        own.set_attn_implementation(name)
        with PagedCache(own.config, **options) as cache:
            found = own.generate(**inputs, past_key_values=cache, **SETTINGS)
        assert torch.equal(found, expected)


def test_the_implementation_may_change_while_a_cache_lives(own):
    tokens = torch.tensor([prompt(120)])
    with PagedCache(own.config, **STREAMING) as cache, torch.no_grad():
        own(tokens, past_key_values=cache)
        expected = own(torch.tensor([[5]]), past_key_values=cache).logits
    for names in (("sdpa", "eager"), ("eager", "sdpa"), ("flex_attention", "eager")):
        with PagedCache(own.config, **STREAMING) as cache, torch.no_grad():
            own.set_attn_implementation(names[0])
            own(tokens, past_key_values=cache)
            own.set_attn_implementation(names[1])
            assert torch.equal(own(torch.tensor([[5]]), past_key_values=cache).logits, expected)


def test_an_implementation_of_the_users_own(own, inputs):
    """transformers would make no mask for it: padding would be lost."""
    AttentionInterface.register("users_own", sdpa_attention_forward)
    try:
        own.set_attn_implementation("users_own")
        expected = own(**inputs, use_cache=False).logits
        with PagedCache(own.config) as cache:
            assert torch.equal(own(**inputs, use_cache=False).logits, expected)
            with pytest.raises(ValueError, match="'users_own' has no mask function"):
                own(**inputs, past_key_values=cache)
    finally:
        del AttentionInterface._global_mapping["users_own"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_two_threads_with_caches_of_one_model(name):
    model = load(name)
    make = PagedEncoderDecoderCache if name == "t5" else PagedCache
    prompts = [padded([prompt(100), prompt(41, seed=1)]), padded([prompt(130, seed=2)])]

    def generated(tokens):
        with make(model if name == "t5" else model.config, **SNAPKV) as cache:
            return model.generate(**tokens, past_key_values=cache, **SETTINGS)

    alone = [generated(tokens) for tokens in prompts]

    def check():
        assert torch.equal(generated(prompts[0]), alone[0])

    with meanwhile(check):
        for _ in range(5):
            assert torch.equal(generated(prompts[1]), alone[1])


def test_contexts_that_overlap_in_threads(own, inputs):
    """One that ends first began first: each has left nothing when it ends."""
    plain = own.generate(**inputs, **SETTINGS)
    first, second = enable(own, **STREAMING), enable(own, **SNAPKV)
    one, other = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    own.generate(**inputs, **SETTINGS)
    assert other.stats().evicted > 0
    with pytest.raises(ValueError, match=r"no generate\(\)"):
        one.stats()
    second.__exit__(None, None, None)
    output = own.generate(**inputs, return_dict_in_generate=True, **SETTINGS)
    assert type(output.past_key_values) is DynamicCache
    assert torch.equal(output.sequences, plain)


# ---- torch.compile


@pytest.fixture
def compiled():
    """A function that compiles a model's forward pass."""
    torch._dynamo.reset()
    yield lambda model, **options: torch.compile(model, backend="eager", **options)
    torch._dynamo.reset()


def decoded(model, cache):
    """Logits of a prompt and of five more tokens."""
    ids = padded([prompt(100), prompt(70, seed=1)])
    mask = ids["attention_mask"]
    with torch.no_grad():
        found = [model(**ids, past_key_values=cache).logits[:, -1]]
        for step in range(5):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token = torch.tensor([[5 + step], [9]])
            found.append(model(token, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_compiled_model(name, compiled):
    model = load(name)
    with PagedCache(model.config, **STREAMING) as cache:
        expected = decoded(model, cache)
        assert cache.stats().evicted > 0
    fast = compiled(model)
    for _ in range(2):
        plain = decoded(fast, DynamicCache(config=model.config))
        near = {"atol": 1e-4, "rtol": 1e-4}  # a compiled model's tensors lie otherwise: other sums
        torch.testing.assert_close(plain, decoded(model, DynamicCache(config=model.config)), **near)
        with PagedCache(model.config, **STREAMING) as cache:
            torch.testing.assert_close(decoded(fast, cache), expected, **near)
            assert cache.stats().evicted > 0


def test_generate_of_a_compiled_model(own, inputs, compiled):
    settings = SETTINGS | {"num_beams": 2}
    plain = own.generate(**inputs, **settings)
    with PagedCache(own.config, **SNAPKV) as cache:
        expected = own.generate(**inputs, past_key_values=cache, **settings)
    own.forward = compiled(own.forward)
    assert torch.equal(own.generate(**inputs, **settings), plain)
    with PagedCache(own.config, **SNAPKV) as cache:
        found = own.generate(**inputs, past_key_values=cache, **settings)
        assert cache.stats().evicted > 0
    assert torch.equal(found, expected)


def test_plain_calls_compile_without_a_break(model, compiled):
    """Ours is in front of what they call, and costs them nothing."""
    PagedCache(model.config).close()
    fast = compiled(model, fullgraph=True)
    tokens = torch.tensor([prompt(20)])
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(fast(tokens, use_cache=False).logits, expected)
        static = StaticCache(config=model.config, max_cache_len=64)
        torch.testing.assert_close(fast(tokens, past_key_values=static).logits, expected)
