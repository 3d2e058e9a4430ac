"""Batches as vLLM's runners hand them to metadata builders, in buffers that stay where they are."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import engines  # noqa: F401  vLLM's environment
import numpy as np
import torch
from gpu_steps import LAYERS, NUM_PAGES, PAGE_SIZE, SPEC

MAX_ROWS, MAX_LEN = 8, 320
WIDTH = MAX_LEN // PAGE_SIZE
BACKENDS = {  # whose builders need no GPU
    "flash_attn": "FlashAttentionBackend",
    "triton_attn": "TritonAttentionBackend",
    "flex_attention": "FlexAttentionBackend",
    "rocm_attn": "RocmAttentionBackend",
}


def backend(module: str) -> Any:
    return getattr(
        importlib.import_module(f"vllm.v1.attention.backends.{module}"), BACKENDS[module]
    )


def config(mode: str) -> Any:
    """What builders ask of vLLM's configuration."""
    from vllm.config import CUDAGraphMode

    flex = ("flex_attn_q_block_size", "flex_attn_kv_block_size")
    flex += "flex_attn_block_m", "flex_attn_block_n"
    return SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: 4,
            get_num_kv_heads=lambda parallel: SPEC.num_kv_heads,
            get_head_size=lambda: SPEC.head_size,
            rswa_window=None,
            is_mm_prefix_lm=False,
            max_model_len=MAX_LEN,
            hf_config=SimpleNamespace(model_type="llama"),
        ),
        parallel_config=SimpleNamespace(
            cp_kv_cache_interleave_size=1, decode_context_parallel_size=1
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", num_gpu_blocks=NUM_PAGES),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode[mode],
            cudagraph_capture_sizes=[1, 2, 4, MAX_ROWS],
            max_cudagraph_capture_size=MAX_ROWS,
            static_forward_context={},
        ),
        attention_config=SimpleNamespace(
            flash_attn_max_num_splits_for_cuda_graph=32, **dict.fromkeys(flex)
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_ROWS, max_num_batched_tokens=2 * MAX_LEN),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        speculative_config=None,
    )


class Runner:
    """A model runner's persistent buffers, and its requests; a batch replaces the one before.

    Args:
        kind: V1 or V2.
        seed: of the page ids.
    """

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind = kind
        self._random = np.random.default_rng(seed)
        self._table = torch.zeros((MAX_ROWS, WIDTH), dtype=torch.int32)
        self._lens = torch.zeros(MAX_ROWS, dtype=torch.int32)
        self._starts = torch.zeros(MAX_ROWS + 1, dtype=torch.int32)
        # V1: rows of requests that have left follow; V2: a table of requests in another order.
        prompts = np.full(2 * MAX_ROWS, 1, dtype=np.int32)
        self.input_batch = SimpleNamespace(
            num_prompt_tokens=prompts, req_ids=[], req_id_to_index={}
        )
        self.req_states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=prompts), req_id_to_index={}, index_to_req_id={}
        )

    def dummy(self, rows: int) -> Any:
        """For a capture: rows of one token and null pages, and no bound but the model's."""
        lens = np.ones(rows, dtype=np.int64)
        self._table[:rows] = 0
        return self._metadata(lens, lens, rows, np.arange(rows), MAX_LEN)

    def batch(self, prompts: Any, before: Any, new: Any, padded: int | None = None) -> Any:
        """Metadata of a step.

        Args:
            prompts: prompt length of each request.
            before: its tokens before this step.
            new: its tokens in this step.
            padded: rows of the graph; None: no graph is used.
        """
        rows = len(prompts)
        index = np.arange(rows)[::-1] + 3 if self.kind == "V2" else np.arange(rows)
        place = self.input_batch.num_prompt_tokens
        place[:] = 1
        place[index] = prompts
        names = [f"r{row}" for row in range(rows)]
        self.input_batch.req_ids = names
        self.input_batch.req_id_to_index = dict(zip(names, range(rows), strict=True))
        self.req_states.req_id_to_index = dict(zip(names, index.tolist(), strict=True))
        self.req_states.index_to_req_id = dict(zip(index.tolist(), names, strict=True))
        # Behind the rows' ends lie ids of earlier requests.
        ids = self._random.integers(1, NUM_PAGES, (MAX_ROWS, WIDTH))
        self._table[:] = torch.from_numpy(ids.astype(np.int32))
        self._table[rows : padded or rows] = 0  # the null page
        after = np.asarray(before) + np.asarray(new)
        return self._metadata(after, np.asarray(new), padded or rows, index, int(after.max()))

    def _metadata(self, after: Any, new: Any, rows: int, index: Any, max_len: int) -> Any:
        from vllm.v1.attention.backend import CommonAttentionMetadata

        self._lens.zero_()
        self._lens[: len(after)] = torch.from_numpy(after)
        self._starts[1 : len(new) + 1] = torch.from_numpy(np.cumsum(new))
        self._starts[len(new) + 1 :] = int(new.sum())
        return CommonAttentionMetadata(
            query_start_loc=self._starts[: rows + 1],
            query_start_loc_cpu=self._starts[: rows + 1].clone(),
            seq_lens=self._lens[:rows],
            seq_lens_cpu_upper_bound=self._lens[:rows].clone(),
            num_reqs=rows,
            num_actual_tokens=int(new.sum()),
            max_query_len=int(new.max()),
            max_seq_len=max_len,
            block_table_tensor=self._table[:rows],
            slot_mapping=torch.zeros(int(new.sum()), dtype=torch.int64),
            req_idx=index if self.kind == "V2" else None,
        )


def builder(module: str, runner: Runner, policy: Any, mode: str = "FULL") -> tuple[Any, Any]:
    """(a builder of vLLM's under our policy, the compactor that it asks)."""
    from paged_kv.vllm.worker.attention import wrap_backend
    from paged_kv.vllm.worker.step import Compactor

    compactor = Compactor(runner, policy, {})
    wrapped = wrap_backend(backend(module), compactor)
    made = wrapped.get_builder_cls()(SPEC, LAYERS, config(mode), torch.device("cpu"))
    return made, compactor


def evicted(num_tokens: int, prompt: int) -> int:
    """From the rule in words: whole pages above the budget of 48, from the prompt's end on."""
    pages = (num_tokens - 48) // PAGE_SIZE
    return max(0, pages) * PAGE_SIZE if num_tokens >= prompt else 0


def random_step(random: Any, most: int) -> tuple[list[int], list[int], list[int]]:
    """(prompt lengths, tokens before, new tokens) of decodes, some far above the budget."""
    rows = int(random.integers(1, most + 1))
    prompts = random.integers(1, MAX_LEN // 2, rows)
    before = prompts + random.integers(0, MAX_LEN // 2, rows)
    return prompts.tolist(), before.tolist(), [1] * rows
