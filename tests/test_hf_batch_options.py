"""generate_batch: options of generate(), of policies, and what is refused."""

import pytest
import torch
from hf_models import load, prompt

from paged_kv.config import CompressionConfig
from paged_kv.hf import PagePool, PoolFull, generate_batch
from paged_kv.hf.batch import generate

PROMPTS = [prompt(length, seed=length) for length in (5, 120, 33, 1)]
PAGE = {"page_size": 16}
QUIET = {"progress_bar": False}
GREEDY = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return load("llama")


# ---- options


def test_sampling(model):
    settings = GREEDY | {"do_sample": True, "temperature": 0.8}
    greedy = generate_batch(model, PROMPTS, **GREEDY, **QUIET)
    assert generate_batch(model, PROMPTS, top_k=1, **settings, **QUIET) == greedy
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(generate_batch(model, PROMPTS, top_p=0.9, **settings, **QUIET))
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != greedy


def test_options_of_generate(model):
    greedy = generate_batch(model, PROMPTS[:2], **GREEDY, **QUIET)
    sampled = GREEDY | {"do_sample": True, "num_return_sequences": 2}
    twice = generate_batch(model, PROMPTS[:2], **sampled, **QUIET)
    assert len(twice) == 4
    assert twice[0] != twice[1]
    config = model.generation_config.__class__(**GREEDY | {"max_new_tokens": 3})
    short = generate_batch(model, PROMPTS[:2], generation_config=config, **QUIET)
    assert short == [tokens[:3] for tokens in greedy]
    by_length = generate_batch(model, PROMPTS[:2], max_length=130, eos_token_id=None, **QUIET)
    assert [len(tokens) for tokens in by_length] == [125, 10]
    assert by_length[1] == greedy[1][:10]
    assert len(generate_batch(model, PROMPTS[:1], eos_token_id=None, **QUIET)[0]) == 20


def test_policy_from_the_environment(model, monkeypatch):
    options = {"policy": "streaming", "budget": 64}
    expected = generate_batch(model, PROMPTS, **options, **PAGE, **GREEDY, **QUIET)
    assert expected != generate_batch(model, PROMPTS, **PAGE, **GREEDY, **QUIET)
    config = CompressionConfig.from_dict(options)
    assert generate_batch(model, PROMPTS, config, **PAGE, **GREEDY, **QUIET) == expected
    monkeypatch.setenv("PAGED_KV_POLICY", "streaming")
    monkeypatch.setenv("PAGED_KV_BUDGET", "64")
    assert generate_batch(model, PROMPTS, **PAGE, **GREEDY, **QUIET) == expected


def test_progress_bar(model, capfd):
    assert generate_batch(model, [], progress_bar=True) == []
    generate_batch(model, PROMPTS[:2], max_new_tokens=2, **QUIET)
    assert capfd.readouterr().err == ""
    generate_batch(model, PROMPTS[:2], max_new_tokens=2)
    assert "2/2" in capfd.readouterr().err


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[3], []]}, "prompt 1 must be a list of token ids from 0 to 255; it is empty"),
        ({"prompts": [[3, 256]]}, "prompt 0 must be .* it has 256"),
        ({"prompts": [[-1]]}, "it has -1"),
        ({"prompts": ["text"]}, "prompt 0 must be a list of token ids .*, not 'text'"),
        ({"prompts": [3, 4]}, "prompt 0 must be a list of token ids .*, not '3'"),
        ({"num_pages": 4}, r"num_pages 4 is too small: prompt 0 \(40 tokens, 20 new ones\)"),
        ({"num_pages": 0}, "num_pages must be an integer >= 1, not 0"),
        ({"page_size": 1.5}, "page_size must be an integer >= 1, not 1.5"),
        ({"max_requests": True}, "max_requests must be an integer >= 1, not True"),
        ({"max_batch_tokens": "9"}, "max_batch_tokens must be an integer >= 1, not '9'"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
        ({"max_length": 40}, "prompt 0 has 40 tokens, which max_length 40 does not exceed"),
        ({"num_beams": 2}, r"use generate\(\) for beam_search"),
        ({"prompt_lookup_num_tokens": 3}, r"use generate\(\) for assisted_generation"),
        ({"stop_strings": ["a"]}, r"does not know stop_strings \(which is \['a'\]\)"),
        ({"min_new_tokens": 3}, "does not know min_new_tokens"),
        ({"repetition_penalty": 1.2}, "cannot have RepetitionPenaltyLogitsProcessor"),
        ({"no_repeat_ngram_size": 2}, "cannot have NoRepeatNGramLogitsProcessor"),
        ({"policy": "best"}, "best"),
        ({"policy": "streaming", "budget": 10}, "budget 10 is too small"),
        ({"policy": "streaming", "windows": 3}, "unknown paged_kv option windows"),
        ({"policy": CompressionConfig(), "budget": 99}, "budget must be in it"),
    ],
    ids=str,
)
def test_mistakes(model, options, message, monkeypatch):
    pools = []
    monkeypatch.setattr(
        generate, "PagePool", lambda *own: pools.append(PagePool(*own)) or pools[-1]
    )

    def run(*_):
        raise AssertionError("it ran")

    hook = model.register_forward_pre_hook(run)
    try:
        with pytest.raises(ValueError, match=message):
            generate_batch(model, **{"prompts": [prompt(40)], **options}, **QUIET)
    finally:
        hook.remove()
    assert not any(pool.num_held for pool in pools)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["t5", "mamba", "jamba", "mistral-sliding"])
def test_models_that_it_cannot_run(name):
    with pytest.raises(ValueError, match=r"generate_batch|no layer of this model"):
        generate_batch(load(name), [[3]], **QUIET)


def test_pool_full_says_what_is_needed(model):
    with pytest.raises(PoolFull, match="needs 24 pages of 32 entries") as error:
        generate_batch(model, [prompt(150)], num_pages=23, max_new_tokens=21, **QUIET)
    assert "raise num_pages" in str(error.value)
    generate_batch(model, [prompt(150)], num_pages=24, max_new_tokens=21, **QUIET)
