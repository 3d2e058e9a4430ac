"""vLLM's workers with compaction: specs under a schedule, wrapped backends, moves after each step.

``parallel_config.worker_cls`` names one of these (see WORKERS), each a mixin over vLLM's own class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.kv_cache_interface import KVCacheSpec

from paged_kv.config import CompressionConfig
from paged_kv.core.page_formats import NATIVE
from paged_kv.core.schedule import Schedule
from paged_kv.kernels.page_layout import PageLayout
from paged_kv.policies.base import Policy
from paged_kv.vllm.plan import GroupedPlan, get_plan
from paged_kv.vllm.scheduler import limits
from paged_kv.vllm.scheduler.registration import register
from paged_kv.vllm.scheduler.spec import PagedSpec
from paged_kv.vllm.swap.connector import SwapConnector
from paged_kv.vllm.swap.copier import Copier
from paged_kv.vllm.worker import stored_layers
from paged_kv.vllm.worker.attention import observe_layer, wrap_backend
from paged_kv.vllm.worker.caches import WorkerCaches, rings_of
from paged_kv.vllm.worker.memory import Shares
from paged_kv.vllm.worker.packed import PackedAttention, layout_of, packed_backend, packed_spec
from paged_kv.vllm.worker.residual import ResidualRings
from paged_kv.vllm.worker.spilling import make_request_stores
from paged_kv.vllm.worker.step import Compactor
from paged_kv.vllm.worker.watching import WorkerWatch

logger = init_logger(f"vllm.{__name__}")

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "PagedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "PagedGPUWorker",
    "vllm.v1.worker.xpu_worker.XPUWorker": "PagedXPUWorker",
}


class PagedWorkerMixin:
    """What a worker does under a policy, or with pages of ours."""

    vllm_config: Any
    model_runner: Any
    compactor: Compactor | None = None
    residual: ResidualRings | None = None
    layouts: dict[str, PageLayout] = {}  # noqa: RUF012 -- replaced, never changed

    def load_model(self, **kwargs: Any) -> None:
        """Loads, then wraps the attention of every layer that is compressed or has packed pages."""
        super().load_model(**kwargs)  # type: ignore[misc]
        register()
        self._stored()  # refuses
        every = self.vllm_config.compilation_config.static_forward_context
        specs = super().get_kv_cache_spec()  # type: ignore[misc]
        layouts = {name: layout_of(specs[name], form) for name, form in self._formats().items()}
        layers = {name: every[name] for name in self._schedules()}
        plan = self._plan
        if plan.residual_pages:
            quantized = {n: every[n] for n, form in self._formats().items() if form != NATIVE}
            self.residual = ResidualRings(
                self.model_runner, plan.residual_pages, plan.page_size, quantized
            )
        if layers:
            self.compactor = self._compactor(layers, layouts)
            self.compactor.watch = self._watch()
        self.layouts = layouts
        for name, layout in layouts.items():
            compactor = self.compactor if name in layers else None
            residual = self.residual if self.residual and name in self.residual.layers else None
            layer = every[name]
            layer.attn_backend = packed_backend(layer.attn_backend, compactor, residual)
            observer = None if compactor is None else compactor.observer
            PackedAttention(name, layer, layout, observer, residual)
        for name, layer in layers.items():
            assert self.compactor is not None
            if name not in layouts:
                layer.attn_backend = wrap_backend(layer.attn_backend, self.compactor)
            if self.compactor.observer.looks_at_queries:
                observe_layer(layer, name, self.compactor.observer)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, with packed pages and with a schedule for every compressed layer."""
        specs = self._stored()
        for name, schedule in self._schedules().items():
            specs[name] = PagedSpec.from_full(
                specs[name],
                schedule,
                observation_window=self._policy.observation_window,
                private_hits="scores" in self._policy.reads,
                lead=self._policy.lead,
            )
        return self._limit_prompts(specs)

    def determine_available_memory(self) -> int:
        """What is left for pages: what lies beside them and the rings take their share.

        Raises:
            ValueError: nothing is left.
        """
        memory: int = super().determine_available_memory()  # type: ignore[misc]
        shares = self._shares()
        shares.grow_rings(memory)
        return shares.memory.for_pages(memory)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """The caches are (re)allocated."""
        if self.compactor is not None:
            self.compactor.reset_pages()
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        swap = _swap_connector()
        if swap is not None:
            swap.bind_copier(self._copier(kv_cache_config))

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step, then its compactions, in stream order; what is preempted is saved before."""
        swap = _swap_connector()
        if swap is not None:
            swap.handle_preemptions(scheduler_output.kv_connector_metadata)
        with ExitStack() as stack:
            if self.residual is not None:
                stack.enter_context(self.residual.step(scheduler_output))
            if self.compactor is not None:
                stack.enter_context(self.compactor.step(scheduler_output))
            return super().execute_model(scheduler_output)  # type: ignore[misc]

    def shutdown(self) -> None:
        """Gives back what was spilled, and logs what that came to."""
        if self.compactor is not None and self.compactor.spilled is not None:
            self.compactor.spilled.close()
        super().shutdown()  # type: ignore[misc]

    def _compactor(self, layers: dict[str, Any], layouts: dict[str, PageLayout]) -> Compactor:
        num_requests = self.vllm_config.scheduler_config.max_num_seqs
        spilled = make_request_stores(self._config, list(layers.values()), num_requests)
        waits = self._plan.waits_for_pressure
        return Compactor(self.model_runner, self._policy, layers, layouts, spilled, waits)

    def _watch(self) -> WorkerWatch:
        assert self.compactor is not None
        parallel, device = self.vllm_config.parallel_config, self.model_runner.device
        spilled = self.compactor.spilled
        return WorkerWatch(parallel.data_parallel_index, parallel.rank, device, spilled)

    def _copier(self, kv_cache_config: Any) -> Copier:
        compactor, residual = self.compactor, self.residual
        layers = self.vllm_config.compilation_config.static_forward_context
        return Copier(
            self.model_runner,
            kv_cache_config,
            self._config,
            WorkerCaches(layers, self.layouts, compactor),
            rings_of(compactor, residual),
            None if compactor is None else compactor.spilled,
        )

    @cached_property
    def _config(self) -> CompressionConfig:
        return CompressionConfig.from_dict(self.vllm_config.additional_config["paged_kv"])

    @cached_property
    def _policy(self) -> Policy:
        return self._config.create_policy()

    @cached_property
    def _plan(self) -> GroupedPlan:
        return get_plan(self.vllm_config)

    def _schedules(self) -> dict[str, Schedule]:
        """Schedule by layer name, for the compressed layers on this rank."""
        return self._by_layer(self._plan.schedule)

    def _formats(self) -> dict[str, str]:
        """Page format by layer name, for the layers with packed pages on this rank."""
        return self._by_layer(self._plan.format)

    def _by_layer(self, chosen: Callable[[int], Any]) -> dict[str, Any]:
        """What the plan says of each layer on this rank, where it says something."""
        result = {}
        for name, layer in self.vllm_config.compilation_config.static_forward_context.items():
            if hasattr(layer, "attn_backend"):
                setting = chosen(extract_layer_index(name))
                if setting is not None:
                    result[name] = setting
        return result

    def _stored(self) -> dict[str, KVCacheSpec]:
        """The model's specs, with packed pages.

        Raises:
            ValueError: a layer of the plan is of a kind that we cannot read.
        """
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        layers = self.vllm_config.compilation_config.static_forward_context
        formats, schedules = self._formats(), self._schedules()
        stored_layers.check_full({**schedules, **formats}, layers, specs)
        stored_layers.check_alike(schedules, specs)
        stored_layers.check_layouts("kv-policy", schedules, layers, specs)
        if self._plan.budgets:
            stored_layers.check_others(layers, specs)
            if self._policy.observation_window or self._policy.reads:
                stored_layers.check_scales(schedules, layers)
            if not schedules and self.vllm_config.parallel_config.pipeline_parallel_size == 1:
                raise ValueError("kv-policy: this model has no attention layer that we know")
        if self._config.swap_format != NATIVE:
            asked = f"kv-swap-format {self._config.swap_format}"
            stored_layers.check_layouts(asked, specs, layers, specs)
        return specs | {name: packed_spec(specs[name], form) for name, form in formats.items()}

    def _shares(self) -> Shares:
        """What lies beside the pages."""
        return Shares(
            self._stored(),
            self._schedules(),
            self._plan,
            self.vllm_config.scheduler_config.max_num_seqs,
            self.compactor,
            self.residual,
        )

    def _limit_prompts(self, specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
        """Lets vLLM start with a pool below max_model_len, where the pool's size is configured.

        Its check wants room for max_model_len tokens; under a policy only a prompt needs that.
        """
        cache_config = self.vllm_config.cache_config
        if not self._plan.budgets:
            return specs
        num_pages = cache_config.num_gpu_blocks_override
        memory = cache_config.kv_cache_memory_bytes
        if num_pages is None and memory is not None:
            shares = self._shares().memory
            num_pages = shares.for_pages(memory) // shares.pool_page_bytes
        limit = None if num_pages is None else limits.max_prompt_len(self.vllm_config, num_pages)
        if limit is None:
            return specs
        return {
            name: dataclasses.replace(spec, max_prompt_len=limit)
            if isinstance(spec, PagedSpec)
            else spec
            for name, spec in specs.items()
        }


def _swap_connector() -> SwapConnector | None:
    """This process's connector, if it is ours."""
    if not has_kv_transfer_group():
        return None
    connector = get_kv_transfer_group()
    return connector if isinstance(connector, SwapConnector) else None


def __getattr__(name: str) -> type:
    """The worker class of one platform; the others' modules would not import here."""
    for base, worker_name in WORKERS.items():
        if worker_name == name:
            worker = type(
                name, (PagedWorkerMixin, resolve_obj_by_qualname(base)), {"__module__": __name__}
            )
            globals()[name] = worker
            return worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
