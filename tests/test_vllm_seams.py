"""What we rely on inside vLLM, name by name: what fails here has moved and needs new code.

Versions, options and scheduling; test_vllm_page_seams.py and test_vllm_worker_seams.py have the
rest. Where vLLM carries one of our source patches, the hook it adds is used and these still hold.
"""

from __future__ import annotations

import inspect
import re

import engines  # noqa: F401  vLLM's environment
import pytest
from signatures import begins_with, has_fields, takes

from paged_kv.vllm.frontend import compat

# ---- versions


def test_the_installed_version_is_one_we_tested():
    compat.check_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "1.0.0"])
def test_other_versions_are_refused(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    expected = rf"paged_kv was tested with vLLM 0\.32, 0\.33; this is {re.escape(version)}\."
    with pytest.raises(ValueError, match=expected) as error:
        compat.check_version()
    assert "PAGED_KV_ALLOW_UNTESTED=1" in str(error.value)
    assert "VLLM_PLUGINS=" in str(error.value)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.33.1rc1", "0.33.0"])
def test_these_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    compat.check_version()


# ---- options


def test_engine_args():
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    assert isinstance(inspect.getattr_static(EngineArgs, "add_cli_args"), staticmethod)
    begins_with(EngineArgs.add_cli_args, "parser")
    begins_with(EngineArgs.create_engine_config, "self", "usage_context", "headless")
    assert "EngineArgs.add_cli_args(" in inspect.getsource(AsyncEngineArgs.add_cli_args)
    assert AsyncEngineArgs.create_engine_config is EngineArgs.create_engine_config
    has_fields(EngineArgs, "additional_config", "block_size", "model", "load_format")
    has_fields(EngineArgs, "enable_dbo", "ubatch_size", "prefill_context_parallel_size")


def test_llm_makes_its_engine_args_from_fields():
    """options._CommandLine travels in additional_config because of it."""
    from vllm import LLM

    source = inspect.getsource(LLM.from_engine_args)
    assert "**vars(engine_args)" in source or "additional_config" in source


def test_requests_are_checked_in_the_front_end():
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    begins_with(InputProcessor.process_inputs, "self", "request_id", "prompt", "params")
    assert {"prompt_token_ids", "prompt_embeds", "resumable"} <= set(
        EngineCoreRequest.__struct_fields__
    )
    assert "self.vllm_config = vllm_config" in inspect.getsource(InputProcessor.__init__)


def test_every_front_end_knows_the_pages_of_its_engines():
    """intake._pages_of_an_engine: their sum, and how many they are."""
    from vllm.v1.engine.core_client import MPClient

    ready = inspect.getsource(MPClient._apply_ready_response)
    assert "num_gpu_blocks += response.num_gpu_blocks" in ready
    source = " ".join(inspect.getsource(MPClient.__init__).split())
    assert "offline_mode = parallel_config.data_parallel_rank_local is not None" in source
    assert "dp_local_size if parallel_config.local_engines_only else dp_size" in source
    assert "[dp_rank] if offline_mode else list(range(dp_rank, dp_rank + num_ranks))" in source


def test_an_error_can_be_sent_in_place_of_an_answer():
    """RefusingMixin."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request, RequestStatus

    assert "self.has_finished_requests()" in inspect.getsource(Scheduler.has_requests)
    assert "self.scheduler.has_requests()" in inspect.getsource(EngineCore.step)
    assert RequestStatus.get_finished_reason(RequestStatus.FINISHED_ERROR) == FinishReason.ERROR
    takes(Request.__init__, "client_index", "request_id")
    assert EngineCoreOutput.__struct_fields__[:2] == ("request_id", "new_token_ids")
    assert {"outputs", "finished_requests"} <= set(EngineCoreOutputs.__struct_fields__)


# ---- scheduler


def test_scheduler_methods():
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    assert issubclass(AsyncScheduler, Scheduler)
    begins_with(Scheduler.add_request, "self", "request")
    begins_with(Scheduler._free_blocks, "self", "request")
    begins_with(Scheduler._get_local_prefix_cache_hit, "self", "request")
    begins_with(
        Scheduler._mamba_block_aligned_split,
        "self",
        "request",
        "num_new_tokens",
        "num_new_local_computed_tokens",
        "num_external_computed_tokens",
    )
    for name in ("_free_blocks", "_get_local_prefix_cache_hit", "_mamba_block_aligned_split"):
        assert name not in vars(AsyncScheduler), f"AsyncScheduler now has a {name} of its own"


def test_both_branches_of_schedule_let_us_clip_a_chunk():
    """Running and waiting requests, in both before pages are allocated."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    hook = "self._clip_chunk(" if hasattr(Scheduler, "_clip_chunk") else None
    if hook is None:
        hook = "self._mamba_block_aligned_split("
        assert source.count("if self.need_mamba_block_aligned_split:") == 2
    clips = [at for at in range(len(source)) if source.startswith(hook, at)]
    allocations = [
        at for at in range(len(source)) if source.startswith("kv_cache_manager.allocate_slots", at)
    ]
    assert len(clips) == 2
    assert len(allocations) >= 2
    assert clips[0] < allocations[0] < clips[1] < allocations[1]


def test_mamba_is_all_that_the_flag_means():
    """After __init__ nothing else reads it: we set it at the end of ours."""
    from vllm.v1.core.sched.scheduler import Scheduler

    readers = {
        name
        for name, function in vars(Scheduler).items()
        if inspect.isfunction(function)
        and "need_mamba_block_aligned_split" in inspect.getsource(function)
    }
    assert readers - {"_clip_chunk"} <= {"__init__", "schedule"}
