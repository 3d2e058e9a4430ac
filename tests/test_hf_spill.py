"""PagedCache with spill: what is dropped waits on a lower tier, follows its row, and comes back."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import tiny_models
import torch
from policy_cases import CALIBRATED
from reference_loop import Rule, load_model
from spill_loop import SpillSequence

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, generate_batch
from paged_kv.hf.driver.decoding import Decoder
from paged_kv.hf.driver.loading import encode

PROMPT, NEW, BUDGET = 150, 100, 80
SPILL: dict[str, Any] = {
    "spill": True,
    "spill_interval": 0,
    "fetch_limit": 40,
    "spill_window": 12,
    "recent_window": 16,
}
CASES = {
    "streaming": {},
    "snapkv": {"observation_window": 8},
    "h2o": {"spill_threshold": 1.5},
    "tova": {"spill_budget": 70},
    "calibrated_attention": {"fading": "on", "half_life": 40, **CALIBRATED},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    loaded = load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))
    loaded.generation_config.eos_token_id = None
    return loaded


def prompts(count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack(
        [torch.randperm(250, generator=generator)[:PROMPT] + 3 for _ in range(count)]
    )


def options(policy: str, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "budget": BUDGET, **SPILL, **CASES[policy], **more}


def generate(
    model: Any, cache: PagedCache, tokens: torch.Tensor, new: int = NEW, **more: Any
) -> Any:
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        **more,
    )


@pytest.mark.parametrize("policy", CASES)
def test_tokens_are_those_of_the_loop(policy, model, tmp_path):
    """The last entries of the tier lie in a file."""
    config = options(policy)
    loop = SpillSequence(model, Rule([BUDGET] * 6), PROMPT, config)
    tokens = prompts()
    expected = []
    new = tokens[0].tolist()
    for _ in range(NEW):
        hidden = loop.process(new)
        loop.drop()
        new = [int(loop.logits(hidden[-1]).argmax())]
        expected += new
    where = {"spill_dir": str(tmp_path), "spill_host_budget": 32}
    with PagedCache(model.config, **config, **where) as cache:
        found = generate(model, cache, tokens)
        stats = cache.stats()
    assert found[0, PROMPT:].tolist() == expected
    assert stats.fetched == pytest.approx(loop.num_fetched / 2)
    assert stats.fetched > 100
    assert stats.spilled == sum(len(heads[0]) for heads in loop.tier) > 0
    assert stats.bytes_by_tier["host"] > 0
    assert stats.bytes_by_tier["mmap"] > 0


def one_by_one(model: Any, cache: PagedCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [rows, n, vocabulary] of given tokens [rows, n]."""
    with torch.inference_mode():
        steps = tokens.split(1, 1)
        return torch.cat([model(step, past_key_values=cache).logits for step in steps], 1)


@pytest.mark.parametrize("policy", ["streaming", "h2o", "calibrated_attention"])
def test_stores_follow_their_rows(policy, model):
    """Rows are repeated, go on differently, change places and leave: each as if it were alone."""
    tokens = prompts(8)
    config = options(policy)
    with PagedCache(model.config, **config) as cache, torch.inference_mode():
        model(tokens[:2], past_key_values=cache)
        one_by_one(model, cache, tokens[2:4, :40])
        cache.batch_repeat_interleave(2)
        assert len(cache.sequences.spilled.stores) == 2, "shared until somebody writes"
        one_by_one(model, cache, tokens[4:8, :40])
        assert len(cache.sequences.spilled.stores) == 4
        cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        found = one_by_one(model, cache, tokens[:2, :60])
        assert cache.stats().spilled > 0
    histories = [
        (tokens[1], tokens[3, :40], tokens[7, :40], tokens[0, :60]),
        (tokens[0], tokens[2, :40], tokens[5, :40], tokens[1, :60]),
    ]
    for row, (prompt, *parts) in zip(found, histories, strict=True):
        with PagedCache(model.config, **config) as cache, torch.inference_mode():
            model(prompt[None], past_key_values=cache)
            expected = one_by_one(model, cache, torch.cat(parts)[None])[0, -60:]
        torch.testing.assert_close(row, expected, atol=3e-4, rtol=0)


def test_the_reference_engine_agrees(model):
    """A pyramid, a prompt in chunks."""
    more = {"policy": "pyramidal+snapkv", "budget": 150, "compress_prefill": True}
    config = CompressionConfig.from_dict(SPILL | more)
    tokens = prompts(2).flatten()
    engine = ReferenceEngine(model, config, prompt_len=PROMPT)
    with PagedCache(model.config, config) as cache, torch.inference_mode():
        for start, end in [(0, 120), (120, 200), *((at, at + 1) for at in range(200, 280))]:
            found = model(tokens[None, start:end], past_key_values=cache).logits[0, -1]
            expected = engine.logits(engine.process(tokens[start:end].tolist()))[-1]
            torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
        stats = cache.stats()
    assert stats.fetched > 100
    assert stats.spilled == sum(
        layer.spilled.num_entries for layer in engine.layers if layer.spilled
    )


@pytest.mark.parametrize("residual", [0, 1])
def test_quantized_entries_come_back_as_they_were(residual, model):
    """In the first layer, whose keys and values depend on tokens alone, on both tiers."""
    tokens = prompts(2).flatten()[None]
    pages = {"page_format": "int8", "residual_pages": residual}
    config = options("streaming", recent_window=32, **pages)
    with (
        PagedCache(model.config, **config) as cache,
        PagedCache(model.config, **config | {"budget": 1000}) as complete,
        torch.inference_mode(),
    ):
        for one in (cache, complete):
            model(tokens[:, :PROMPT], past_key_values=one)
            one_by_one(model, one, tokens[:, PROMPT : PROMPT + 100])
        assert cache.stats().fetched > 100
        expected = held(complete, 0)
        found = held(cache, 0)
        (store,) = cache.sequences.spilled.stores
        count = store.count(torch.tensor([0]))
        for head in range(2):
            places = torch.tensor(0), torch.tensor(head), torch.arange(count)
            below = store.read("positions", places).long()
            assert sorted(found["positions"][head].tolist() + below.tolist()) == list(range(250))
            for name in ("keys", "values"):
                assert torch.equal(store.read(name, places), expected[name][head, below])
                own = expected[name][head, found["positions"][head]]
                assert torch.equal(found[name][head], own)


def held(cache: PagedCache, layer: int) -> dict[str, torch.Tensor]:
    """What the only row of a cache holds in a layer, [kv_heads, entries, ...], decoded."""
    sequences = cache.sequences
    arena = sequences.tables.arena(layer)
    pages = torch.from_numpy(sequences.tables.ids[layer, 0, : sequences.tables.count[layer, 0]])
    size = int(sequences.size[layer, 0])
    first = torch.tensor([0])
    result = {
        name: getattr(arena.pages, name).gather(first, pages[None])[0, 0, :, :size]
        for name in ("keys", "values")
    }
    positions = arena.side["positions"][:, pages].flatten(1)[:, :size].long()
    return result | {"positions": positions}


def test_a_batch_of_requests(model):
    """Requests come and go, one makes way for others; each gets what it gets alone."""
    tokens = prompts(5)
    config = options("snapkv")
    requests = [row[: PROMPT - 20 * index].tolist() for index, row in enumerate(tokens)]
    found = generate_batch(
        model, requests, **config, num_pages=70, max_new_tokens=60, progress_bar=False
    )
    for request, output in zip(requests, found, strict=True):
        with PagedCache(model.config, **config) as cache:
            expected = generate(model, cache, torch.tensor([request]), 60)
            assert cache.stats().fetched > 50
        assert output == expected[0, len(request) :].tolist()


def test_crop(model):
    """Back to where a turn began; what has been spilled since, no crop takes back."""
    tokens = prompts(2)
    with PagedCache(model.config, **options("streaming")) as cache, torch.inference_mode():
        model(tokens[:1], past_key_values=cache)
        one_by_one(model, cache, tokens[1:, :40])
        before = cache.stats()
        with pytest.raises(ValueError, match=r"crop\(-100\): a compaction that has seen some"):
            cache.crop(-100)
        assert cache.stats() == before
        other = copy.deepcopy(cache)
        model(tokens[:1, :7], past_key_values=cache)
        cache.crop(-7)
        found = one_by_one(model, cache, tokens[1:, 40:80])
        assert found.equal(one_by_one(model, other, tokens[1:, 40:80]))
        assert cache.get_seq_length() == PROMPT + 80
        assert cache.stats().spilled > before.spilled
        cache.reset()
        assert cache.stats().bytes_by_tier == {"device": 0, "host": 0, "mmap": 0}


@pytest.mark.parametrize(
    ("name", "value"), [("swap_space", 1.0), ("swap_dir", "/tmp"), ("swap_format", "int8")]
)
def test_swapping_is_of_vllm(name, value, model):
    with pytest.raises(ValueError, match=f"{name} .* is an option of vLLM"):
        PagedCache(model.config, "streaming", 128, **{name: value})


@pytest.mark.model
@pytest.mark.slow
def test_a_needle_that_is_lost_without(smollm2_dir):
    """A key at 10 % of 1,500 tokens; the chunks before the question have no use for it.

    paged_kv/eval/tasks/needle.py asks for more keys, in longer prompts, at other depths.
    """
    model = load_model(smollm2_dir)
    found = {}
    for key, spill in itertools.product(("48213",), (False, True)):
        filler = encode(
            smollm2_dir, "The grass is green. The sky is blue. The sun is yellow. " * 120
        )
        needle = encode(
            smollm2_dir, f" The pass key is {key}. Remember it. {key} is the pass key. "
        )
        question = encode(smollm2_dir, " What is the pass key? The pass key is")
        prompt = filler[:150] + needle + filler[150:1500] + question
        with PagedCache(
            model.config, "streaming", 256, compress_prefill=True, spill=spill
        ) as cache:
            decoder = Decoder(model, cache)
            decoder.read([prompt])
            answer = encode(smollm2_dir, f" {key}.")
            for _ in answer:
                decoder.step()
        found[key, spill] = decoder.tokens[0, len(prompt) :].tolist() == answer
    assert found == {(key, spill): spill for key, spill in found}
