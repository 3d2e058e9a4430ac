"""vLLM's workers with compaction: specs under a schedule, wrapped backends, moves after each step.

``parallel_config.worker_cls`` names one of these (see WORKERS), each a mixin over vLLM's own class.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import cdiv
from paged_kv.policies.base import Policy
from paged_kv.vllm import limits, side_data
from paged_kv.vllm.attention import observe_layer, wrap_backend
from paged_kv.vllm.compaction import Compactor
from paged_kv.vllm.layer_group import row_bytes
from paged_kv.vllm.spec import PagedSpec, register

logger = init_logger(f"vllm.{__name__}")

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "PagedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "PagedGPUWorker",
    "vllm.v1.worker.xpu_worker.XPUWorker": "PagedXPUWorker",
}


class PagedWorkerMixin:
    """What a worker does under a policy."""

    vllm_config: Any
    model_runner: Any
    compactor: Compactor

    def load_model(self, **kwargs: Any) -> None:
        """Loads, then wraps the attention backend of every compressed layer."""
        super().load_model(**kwargs)  # type: ignore[misc]
        register()
        every = self.vllm_config.compilation_config.static_forward_context
        layers = {name: every[name] for name in self._schedules()}
        self.compactor = Compactor(self.model_runner, self._policy(), layers)
        for name, layer in layers.items():
            layer.attn_backend = wrap_backend(layer.attn_backend, self.compactor)
            if self.compactor.observes:
                observe_layer(layer, name, self.compactor)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, with a schedule for every compressed layer."""
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        layers = self.vllm_config.compilation_config.static_forward_context
        policy = self._policy()
        for name, schedule in self._schedules().items():
            if getattr(layers[name].impl, "alibi_slopes", None) is not None:
                # Slots are not positions any more. Not every such model's config says so.
                raise ValueError(f"kv-policy does not support ALiBi position biases (layer {name})")
            if type(specs.get(name)) is not FullAttentionSpec:
                raise ValueError(
                    f"kv-policy: layer {name} has no plain full attention: {specs.get(name)}"
                )
            specs[name] = PagedSpec.from_full(
                specs[name],
                schedule,
                observation_window=policy.observation_window,
                private_hits="scores" in policy.reads,
            )
        return self._limit_prompts(specs)

    def determine_available_memory(self) -> int:
        """What is left for pages: side data beside them and the query ring take their share.

        Raises:
            ValueError: nothing is left.
        """
        memory = super().determine_available_memory()  # type: ignore[misc]
        self.compactor.requests.grow(self._ring_rows(memory))
        return self._for_pages(memory)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """The caches are (re)allocated."""
        self.compactor.reset_pages()
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step, then its compactions, in stream order."""
        with self.compactor.step(scheduler_output):
            return super().execute_model(scheduler_output)  # type: ignore[misc]

    def _policy(self) -> Policy:
        values = self.vllm_config.additional_config["paged_kv"]
        return CompressionConfig.from_dict(values).create_policy()

    def _schedules(self) -> dict[str, Any]:
        """Schedule by layer name, for the compressed layers on this rank."""
        plan = limits.get_plan(self.vllm_config)
        result = {}
        for name, layer in self.vllm_config.compilation_config.static_forward_context.items():
            if not hasattr(layer, "attn_backend"):
                continue
            schedule = plan.schedule(extract_layer_index(name))
            if schedule is not None:
                result[name] = schedule
        return result

    def _for_pages(self, memory: int) -> int:
        """Of so many bytes for the KV cache, those for keys and values."""
        policy, layers = self.compactor.policy, list(self.compactor.layers.values())
        if self.compactor.positional:
            return memory
        ring = (self._ring_rows(memory) + 1) * row_bytes(layers, policy)
        spec, beside = self._page()
        left = (memory - ring) * spec.page_size_bytes // (spec.page_size_bytes + beside)
        if left <= 0:
            raise ValueError(
                f"the queries that this kv-policy observes take {ring} bytes (observation_window "
                f"{policy.observation_window}), more than the {memory} of the KV cache: lower "
                "observation_window, or give the KV cache more memory"
            )
        return int(left)

    def _ring_rows(self, memory: int) -> int:
        """Requests with an observation window that fit: each holds about a budget in each layer."""
        policy, layers = self.compactor.policy, list(self.compactor.layers.values())
        if not policy.observation_window:
            return 0
        spec, beside = self._page()
        least = row_bytes(layers, policy)
        for schedule in self._schedules().values():
            held = schedule.minimum + schedule.page_size - policy.observation_window
            least += max(1, cdiv(held, schedule.page_size)) * (spec.page_size_bytes + beside)
        return min(self.vllm_config.scheduler_config.max_num_seqs, max(1, memory // least))

    def _page(self) -> tuple[FullAttentionSpec, int]:
        """The spec of a compressed layer, and the bytes of a page's side data."""
        policy = self.compactor.policy
        specs = self.model_runner.get_kv_cache_spec()
        spec: FullAttentionSpec = specs[next(iter(self.compactor.layers))]
        return spec, side_data.bytes_per_slot(policy) * spec.num_kv_heads * spec.block_size

    def _limit_prompts(self, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
        """Lets vLLM start with a pool below max_model_len, where the pool's size is configured.

        Its check wants room for max_model_len tokens; under a policy only a prompt needs that.
        """
        cache_config = self.vllm_config.cache_config
        num_pages = cache_config.num_gpu_blocks_override
        memory = cache_config.kv_cache_memory_bytes
        if num_pages is None and memory is not None:
            layers_per_page = limits.get_plan(self.vllm_config).layers_per_page
            page_bytes = max(spec.page_size_bytes for spec in specs.values())
            num_pages = self._for_pages(memory) // (page_bytes * layers_per_page)
        limit = None if num_pages is None else limits.max_prompt_len(self.vllm_config, num_pages)
        if limit is None:
            return specs
        return {
            name: dataclasses.replace(spec, max_prompt_len=limit)
            if isinstance(spec, PagedSpec)
            else spec
            for name, spec in specs.items()
        }


def __getattr__(name: str) -> type:
    """The worker class of one platform; the others' modules would not import here."""
    for base, own in WORKERS.items():
        if own == name:
            worker = type(
                name, (PagedWorkerMixin, resolve_obj_by_qualname(base)), {"__module__": __name__}
            )
            globals()[name] = worker
            return worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
