"""Text by a vLLM engine in this process, streamed: `paged-kv generate --engine vllm` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paged_kv.sampling import Sampling
from paged_kv.vllm.driver.engine import Engine
from paged_kv.vllm.driver.workload import EngineSettings


class TextGenerator:
    """An engine for one sequence at a time. Its prefix cache keeps what earlier prompts had.

    Args:
        directory: of the model.
        policy: options as in additional_config["paged_kv"]; empty for plain vLLM.
        sampling: how tokens are chosen.
        page_size: tokens per page.
        max_len: longest prompt and output together.
        pool_bytes: memory of the KV cache.

    Raises:
        ValueError: what vLLM or paged_kv refuses.
    """

    def __init__(
        self,
        directory: Path,
        policy: Mapping[str, Any],
        sampling: Sampling,
        page_size: int,
        max_len: int,
        pool_bytes: int,
    ) -> None:
        self.sampling = sampling
        settings = EngineSettings(str(directory), pool_bytes, max_len, policy, page_size, 1)
        self.engine = Engine(settings)
        self.num_requests = 0

    def write(self, tokens: list[int]) -> list[int]:
        """Prints what follows the tokens while it is made; the new tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, engine = self.sampling, self.engine.llm.llm_engine
        params = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.effective_temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p or 1.0,
            seed=sampling.seed + self.num_requests,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.recorder.reset()
        engine.add_request(str(self.num_requests), {"prompt_token_ids": tokens}, params)
        self.num_requests += 1
        new: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                print(output.outputs[0].text, end="", flush=True)
                new += output.outputs[0].token_ids
        print(flush=True)
        return new

    def statistics(self) -> dict[str, Any]:
        """Of the last prompt, by name."""
        info, recorder = self.engine.info(), self.engine.recorder
        pages = max((step.pages for step in recorder.steps), default=0)
        return {
            "pages": recorder.steps[-2].pages if len(recorder.steps) > 1 else pages,
            "peak_pages": pages,
            "page_bytes": info.page_bytes,
            "peak_bytes": pages * info.page_bytes,
            "pool_pages": info.num_pages,
            "prefix_hits": recorder.prefix_hits,
            "preempted": sum(step.preempted for step in recorder.steps),
        }

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()
