"""One layer of 30 keeps everything: transformers can do that, and vLLM would make 30 groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from configs import engine_config
from reference_loop import Rule, Sequence_, load_model

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache, generate_batch

NUM_LAYERS, BUDGET, PROMPT, END = 30, 100, 150, 190
OPTIONS = {"policy": "streaming", "budget": BUDGET, "skip_layers": [0]}
RULE = Rule([None] + [BUDGET] * (NUM_LAYERS - 1))
KEPT = [END] + [END - (END - BUDGET) // 32 * 32] * (NUM_LAYERS - 1)

Chunk = tuple[torch.Tensor, torch.Tensor]  # tokens and their logits


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.saved("llama-30-layers", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return load_model(directory)


@pytest.fixture(scope="module")
def chunks(model: Any) -> list[Chunk]:
    """A prompt, then tokens one by one, by the definition."""
    tokens = torch.randperm(END, generator=torch.Generator().manual_seed(0)) + 3
    sequence = Sequence_(model, RULE, PROMPT)
    expected = []
    for chunk in tokens.split([PROMPT] + [1] * (END - PROMPT)):
        expected.append((chunk, sequence.logits(sequence.process(chunk.tolist()))))
        sequence.drop()
    assert [len(positions) for positions in sequence.positions] == KEPT
    return expected


def logits_of_cache(model: Any, cache: PagedCache, chunks: list[Chunk]) -> Iterator[torch.Tensor]:
    for tokens, _ in chunks:
        yield model(tokens[None], past_key_values=cache).logits[0]


def logits_of_engine(engine: ReferenceEngine, chunks: list[Chunk]) -> Iterator[torch.Tensor]:
    for tokens, _ in chunks:
        yield engine.logits(engine.process(tokens.tolist()))


@torch.inference_mode()
def test_transformers(model: Any, chunks: list[Chunk]) -> None:
    with PagedCache(model.config, **OPTIONS) as cache:
        for found, (_, expected) in zip(logits_of_cache(model, cache, chunks), chunks, strict=True):
            torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
        assert cache.sequences.size[:, 0].tolist() == KEPT


@torch.inference_mode()
def test_the_reference_engine(model: Any, chunks: list[Chunk]) -> None:
    engine = ReferenceEngine(model, CompressionConfig.from_dict(OPTIONS), prompt_len=PROMPT)
    for found, (_, expected) in zip(logits_of_engine(engine, chunks), chunks, strict=True):
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    assert engine.num_kept == KEPT


def test_a_batch(model: Any, chunks: list[Chunk]) -> None:
    """The tokens of each prompt alone."""
    prompts = [chunks[0][0].tolist(), chunks[0][0].tolist()[:120]]
    greedy = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    found = generate_batch(model, prompts, progress_bar=False, **OPTIONS, **greedy)
    for prompt, tokens in zip(prompts, found, strict=True):
        with PagedCache(model.config, **OPTIONS) as cache:
            expected = model.generate(torch.tensor([prompt]), past_key_values=cache, **greedy)
        assert tokens == expected[0, len(prompt) :].tolist()


def test_a_pyramid_of_steps_as_uneven_as_vllm_would_refuse(model: Any) -> None:
    options = {"policy": "pyramidal+streaming", "budget": 200, "skip_layers": [0], "max_groups": 1}
    with PagedCache(model.config, **options) as cache:
        assert [len(layers) for _, layers in cache.sequences.groups] == [1, 10, 10, 9]


def test_vllm(directory: Path) -> None:
    with pytest.raises(ValueError, match="KV cache groups") as error:
        engine_config(str(directory), OPTIONS)
    skipped = [0, *range(4, 15)]  # the first twelve
    assert str(error.value) == (
        "these options need 30 KV cache groups, more than max_groups 8: vLLM makes groups as small "
        "as the smallest set of layers with equal budgets, and the sets have [29, 1] layers. "
        "Splits that work: " + ", ".join(f"{n} skipped with pyramid_steps 1" for n in skipped)
    )
