"""What policies see in real vLLM is what eager attention gives with output_attentions."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import torch

from paged_kv.policies.h2o import H2O

pytestmark = [pytest.mark.vllm, pytest.mark.model]

PROMPT = [(37 * index) % 900 + 200 for index in range(150)]
WINDOW = 8
SETTINGS = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "block_size": 32}


@pytest.fixture(scope="module")
def eager(smollm2_dir) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def attention_of(eager: Any, tokens: list[int]) -> torch.Tensor:
    """[layers, kv_heads, group, queries, entries]."""
    output = eager(torch.tensor([tokens]), output_attentions=True)
    heads = torch.cat(output.attentions)
    return heads.unflatten(1, (eager.config.num_key_value_heads, -1))


def start(llm: Any, prompts: dict[str, list[int]]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    for name, prompt in prompts.items():
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)


def stored_scores(llm: Any, row: int, num_tokens: int) -> torch.Tensor:
    """[layers, kv_heads, tokens] of a sequence that was never compacted."""
    worker = engines.worker(llm)
    table = worker.model_runner.input_batch.block_table[0].get_device_tensor(8)
    ((store,),) = worker.compactor.observer._stores.values()
    pages = table[row, : -(-num_tokens // store.pages.page_size)].long()
    scores = store.side.tensors["scores"][:, pages]  # [layers, pages, heads, page_size]
    return scores.transpose(1, 2).flatten(2)[..., :num_tokens]


@pytest.mark.parametrize(
    ("policy", "page_format", "decay"),
    [("h2o", "native", 1.0), ("h2o", "native", 0.9), ("h2o", "int8", 0.9), ("lru", "native", 1.0)],
)
def test_scores_of_every_step(policy, page_format, decay, smollm2_dir, eager, monkeypatch):
    """A prompt in three chunks and five decoded tokens, beside another sequence."""
    monkeypatch.setattr(H2O, "score_decay", decay)
    config = {"policy": policy, "budget": 2048, "page_format": page_format}
    with engines.engine(str(smollm2_dir), config, **SETTINGS) as llm:
        start(llm, {"other": PROMPT[:20], "one": PROMPT})
        batch = engines.worker(llm).model_runner.input_batch
        while "one" not in str(batch.req_ids) or batch.num_computed_tokens_cpu[1] < 155:
            llm.llm_engine.step()
        computed = int(batch.num_computed_tokens_cpu[1])
        tokens = batch.token_ids_cpu[1, : computed + 1].tolist()
        found = stored_scores(llm, 1, computed + 1)
        llm.llm_engine.abort_request(["other", "one"])
    found = found[..., : len(tokens)]
    attention = attention_of(eager, tokens)
    query = torch.arange(len(tokens))[:, None]
    if policy == "h2o":
        left = decay ** query.flip(0).float()  # of what each query gave
        most = left.flip(0).cumsum(0).flip(0)[:, 0] * attention.shape[2]
        expected = (attention * left).sum((2, 3))
        atol = 1e-5 if page_format == "native" else 0.01
        torch.testing.assert_close(found / most, expected / most, atol=atol, rtol=0)
        return
    largest = attention.amax(2)
    clear = ((largest - 0.01).abs() > 1e-5).all(-2)  # of the threshold, for every query
    assert clear.float().mean() > 0.95
    expected = ((largest > 0.01) * query).amax(-2).float()
    assert torch.equal(found[clear], expected[clear])


def test_the_window_before_a_compaction(smollm2_dir, eager, monkeypatch):
    """The last prompt tokens are the window, also when the last chunk is one of them (129)."""
    from paged_kv.policies.snapkv import SnapKV

    seen = {}
    compact = SnapKV.compact

    def recording(self, region):
        for event, num_tokens in enumerate(region.num_tokens.tolist()):
            order = region.queries.positions[event].argsort()
            seen.setdefault(num_tokens, []).append(
                region.attention[:, event, :, :, order, :num_tokens]
            )
        return compact(self, region)

    monkeypatch.setattr(SnapKV, "compact", recording)
    config = {"policy": "snapkv", "budget": 96, "observation_window": WINDOW}
    with engines.engine(str(smollm2_dir), config, **SETTINGS) as llm:
        engines.generate(llm, [PROMPT[:129], PROMPT], 1)
    for num_tokens in (129, 150):
        found = torch.cat(seen[num_tokens])
        expected = attention_of(eager, PROMPT[:num_tokens])[:, :, :, -WINDOW:]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
