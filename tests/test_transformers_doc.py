"""docs/transformers.md: every configuration of its mapping table runs and does what it says."""

import copy
import re
from fractions import Fraction
from pathlib import Path

import pytest
import tiny_models
import torch

from paged_kv import registry
from paged_kv.hf import PagedCache, PagePool

DOCUMENT = Path(__file__).parent.parent / "docs" / "transformers.md"
MAPPED = [
    "kv_cache_size",
    "include_skipped",
    "truncation_strategy",
    "hybrid_split_ratio",
    "token_importance_window",
    "heavy_ratio",
    "recent_ratio",
    "initial_local_window",
    "steepness_coefficient",
    "seq_pooling_type",
    "skip_prefill_compression",
    "sink_tokens",
    "max_seq_len",
]


def rows() -> dict[str, str]:
    """Their options -> our call."""
    text = DOCUMENT.read_text().split("\n## Coming from another")[1]
    found = re.findall(r"^\* (.+?):\n  `(PagedCache\([^`]+\))`", text, re.MULTILINE)
    assert len(found) == text.count("\n* ")
    return dict(found)


def test_one_document_many_questions(model, tmp_path, monkeypatch):
    """The example runs as it stands, and leaves the context in a file."""
    text = DOCUMENT.read_text().split("\n## One document, many questions")[1]
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 200)[None].repeat(1, 6)
    names = {"model": model, "document": ids, "questions": [ids[:, 5:9], ids[:, 90:99]]}
    exec(code, {"copy": copy, "torch": torch, "PagedCache": PagedCache, **names})
    with PagedCache.load(tmp_path / "report.safetensors", model.config) as cache:
        assert cache.stats().tokens == ids.shape[1]
        assert cache.stats().evicted > 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    directory = tiny_models.saved("llama", tmp_path_factory.mktemp("models"))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def cache_of(call: str, model) -> PagedCache:
    return eval(call, {"PagedCache": PagedCache, "PagePool": PagePool, "config": model.config})


def test_all_names_are_mapped():
    assert [name for name in MAPPED if not any(name in theirs for theirs in rows())] == []


@pytest.mark.parametrize("theirs", rows())
def test_a_mapped_configuration_runs_and_keeps_its_budget(theirs, model):
    torch.manual_seed(0)
    prompt = torch.randint(30, 200, (1, 2000))
    with cache_of(rows()[theirs], model) as cache:
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            prefill_chunk_size=400,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=2,
        )
        assert output.shape == (1, 2004)
        stats, config = cache.stats(), cache.compression
        tokens, layers = 2003, model.config.num_hidden_layers
        assert stats.tokens == tokens
        if not config.enabled:
            assert stats.entries == tokens * layers
            return
        budget = config.budget
        budget = max(config.min_budget, budget * tokens) if budget < 1 else budget
        pages = layers * cache.pool.page_size
        assert budget * layers <= stats.entries < budget * layers + pages
        slots = stats.pages * cache.pool.page_size
        assert slots < (budget + 2 * cache.pool.page_size) * layers
        peak_slots = slots * stats.peak_bytes / stats.bytes
        assert (peak_slots < 1500 * layers) == config.compress_prefill
        assert (peak_slots >= 2000 * layers) == (not config.compress_prefill)


def test_the_environment_s_variables_are_those_of_the_code():
    from paged_kv.core.environment import CONFIG_VARIABLE
    from paged_kv.option_table import VARIABLES

    found = set(re.findall(r"`(PAGED_KV_[A-Z_]+)`", DOCUMENT.read_text()))
    assert found == {*VARIABLES.values(), CONFIG_VARIABLE}


def test_the_limit_on_the_length_is_hard(model):
    call = next(ours for theirs, ours in rows().items() if "max_seq_len" in theirs)
    with cache_of(call.replace("2048", "128"), model) as cache:
        ids = torch.randint(30, 200, (1, 129))
        model(ids[:, :128], past_key_values=cache)
        with pytest.raises(ValueError, match="num_pages 24 is too small"):
            model(ids[:, 128:], past_key_values=cache)
        cache.pool.check_integrity()
        assert cache.get_seq_length() == 128


def test_the_pyramid_starts_where_the_window_did(model):
    """initial_local_window is the first layer's budget, if every layer is a tier of its own."""
    from paged_kv.core.budgets import pyramid

    layers, window, beta = 64, 512, Fraction(2)
    budget = window * (1 + (layers - 1) / (2 * layers) * (1 / beta - 1))
    assert float(pyramid(layers, layers, beta)[0]) * budget == pytest.approx(window)
    assert budget == pytest.approx(512 * 3 // 4, rel=0.01)


def test_every_policy_of_the_table_exists():
    for call in rows().values():
        registry.check(re.search(r'policy="([^"]+)"', call)[1])
