"""PagedCache gives what the reference engine gives, which holds entries in plain lists.

Every policy and its options, pyramids, fractions, chunks, pages of other sizes. The tokens are
given and all different, so that no two entries are alike and tie.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from hf_models import load
from policy_cases import CASES
from reference_loop import load_model

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache

PROMPT, END = 150, 250
NAMED = [(name, options) for name, several in CASES.items() for options in several]

SEVERAL = ["streaming", "snapkv", "h2o", "value_merge", "calibrated_attention"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return load_model(tiny_models.saved("llama", tmp_path_factory.mktemp("models")))


def chunks(prompt_chunk: int) -> list[tuple[int, int]]:
    prompt = [(s, min(s + prompt_chunk, PROMPT)) for s in range(0, PROMPT, prompt_chunk)]
    return prompt + [(step, step + 1) for step in range(PROMPT, END)]


@torch.inference_mode()
def check(
    model: Any,
    options: dict[str, Any],
    page_size: int = 32,
    prompt_chunk: int = PROMPT,
    num_layers: int = 6,
) -> None:
    config = CompressionConfig.from_dict(options)
    tokens = torch.randperm(END, generator=torch.Generator().manual_seed(0)) + 3
    engine = ReferenceEngine(model, config, page_size, PROMPT)
    with PagedCache(model.config, config, page_size=page_size) as cache:
        for start, end in chunks(prompt_chunk):
            found = model(tokens[None, start:end], past_key_values=cache).logits[0]
            hidden = engine.process(tokens[start:end].tolist())
            torch.testing.assert_close(found, engine.logits(hidden), atol=3e-4, rtol=0)
        assert cache.sequences.size[:, 0].tolist() == engine.num_kept
        assert cache.stats().entries < 0.8 * num_layers * END


@pytest.mark.every_policy
@pytest.mark.parametrize(
    ("name", "options"), NAMED, ids=[f"{name} {options}" for name, options in NAMED]
)
def test_policies(name, options, model):
    check(model, {"policy": name, "budget": 100, **options})


@pytest.mark.parametrize("name", [*SEVERAL, "past_future"])
@pytest.mark.parametrize("page_size", [8, 16, 64])
def test_pages_of_other_sizes(name, page_size, model):
    check(model, {"policy": name, "budget": 110}, page_size)


@pytest.mark.parametrize("name", SEVERAL)
def test_pyramids_and_skipped_layers(name, model):
    check(model, {"policy": f"pyramidal+{name}", "budget": 150})
    check(model, {"policy": name, "budget": 100, "skip_layers": [0, 3]})


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("compress_prefill", [True, False])
def test_fractions_and_chunks(name, compress_prefill, model):
    options = {"policy": name, "budget": 0.5, "min_budget": 80}
    check(model, {**options, "compress_prefill": compress_prefill}, prompt_chunk=40)


@pytest.mark.parametrize("prompt_chunk", [PROMPT, 40])
@pytest.mark.parametrize("compress_prefill", [True, False])
def test_statistics_that_are_gathered(compress_prefill, prompt_chunk, model):
    """Until the first compaction, from what comes until then; the model has no file."""
    options = {"policy": "calibrated_attention", "budget": 100, "statistics": "gathered"}
    check(model, {**options, "compress_prefill": compress_prefill}, prompt_chunk=prompt_chunk)
    pyramid = {**options, "policy": "pyramidal", "budget": 150}
    check(model, {**pyramid, "compress_prefill": compress_prefill}, prompt_chunk=prompt_chunk)


@pytest.mark.parametrize(("policy", "spill"), [("snapkv", False), ("snapkv", True), ("h2o", True)])
def test_layers_with_scales_of_their_own(policy, spill):
    """GPT-2's last layer has a quarter of the first one's: its window's attention is flatter."""
    model = load("gpt2-scales")
    options: dict[str, Any] = {"policy": policy, "budget": 100, "spill": spill}
    check(model, options | ({"spill_interval": 0} if spill else {}), num_layers=4)
