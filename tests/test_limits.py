"""Prompts that a pool cannot hold, in worlds of integers: what is refused, and how."""

from __future__ import annotations

from typing import Any

import engines  # noqa: F401, sets vLLM's environment before it is imported
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import Request, RequestStatus
from worlds import small_world as world

from paged_kv.vllm.scheduler import limits


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"num_pages": 11}, 40),
        ({"num_pages": 17}, None),  # max_len is 64
        ({"num_pages": 16}, 60),
        ({"num_pages": 30, "budgets": ((8, 0, 1),) * 3}, 36),
        ({"num_pages": 30, "full_groups": 1}, 52),
        ({"num_pages": 11, "compress_prefill": True}, None),
    ],
)
def test_max_prompt_len(rules, expected):
    w = world(**rules)
    assert w.max_prompt_len() == expected
    vllm_config = w.scheduler.vllm_config
    limits.check_prompt(vllm_config, expected or 63, w.rules.num_pages)
    if expected is not None:
        with pytest.raises(ValueError, match=f"{expected + 1} tokens, .* at most {expected}"):
            limits.check_prompt(vllm_config, expected + 1, w.rules.num_pages)


def refusals(outputs: dict[int, Any]) -> dict[int, list[tuple[str, Any]]]:
    """(request, reason) of those that ended in a step, by client."""
    return {
        client: [(one.request_id, one.finish_reason) for one in of.outputs if one.finished]
        for client, of in outputs.items()
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_request_that_cannot_run_ends_with_an_error_and_others_go_on(asynchronous):
    """Nothing may raise: vLLM's engine ends with what its scheduler's add_request raises."""
    w = world(num_pages=11, asynchronous=asynchronous)
    name = w.add([1] * 40, 10)
    params = SamplingParams(max_tokens=1)
    w.scheduler.add_request(Request("long", [1] * 41, params, None, client_index=1))
    w.scheduler.add_request(Request("session", [1, 2], params, None, resumable=True))
    assert list(w.scheduler.requests) == [name]
    w.scheduler.finish_requests("long", RequestStatus.FINISHED_ABORTED)  # its sender may go away
    w.step()
    w.drain()
    told = refusals(w.outputs)
    assert told[1] == [("long", FinishReason.ERROR)]
    assert w.outputs[1].finished_requests == {"long"}
    assert ("session", FinishReason.ERROR) in told[0]
    w.run(20)
    assert w.requests[name].num_output_tokens == 10
    assert "long" not in str(w.outputs), "told once"
    w.check_empty()


def test_a_refusal_wakes_a_scheduler_that_has_nothing_else_to_do():
    w = world(num_pages=11)
    assert not w.scheduler.has_requests()
    w.add([1] * 41, 1, name="long")
    assert w.scheduler.has_requests()
    assert not w.scheduler.has_unfinished_requests()
    w.outputs = w.scheduler.update_from_output(w.scheduler.schedule(), EMPTY_MODEL_RUNNER_OUTPUT)
    assert refusals(w.outputs) == {0: [("long", FinishReason.ERROR)]}
    assert not w.scheduler.has_requests()
    w.check_empty()
