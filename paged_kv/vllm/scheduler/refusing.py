"""A scheduler that ends single requests with an error, where an exception would end the engine."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

logger = init_logger(f"vllm.{__name__}")


class RefusingMixin(Scheduler):
    """Requests that were refused are told to their senders with the next step's outputs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._refused: list[Request] = []
        super().__init__(*args, **kwargs)

    def refuse(self, request: Request, why: Exception) -> None:
        """Ends a request that was not added. Its sender reads the reason in the log."""
        logger.error("paged_kv refuses request %s: %s", request.request_id, why)
        request.status = RequestStatus.FINISHED_ERROR
        self._refused.append(request)

    def has_finished_requests(self) -> bool:
        """Also what was refused needs a step: the engine sleeps while there is nothing to do."""
        return bool(self._refused) or super().has_finished_requests()

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        """A step's outputs by client, with an error for each request that was refused."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        refused, self._refused = self._refused, []
        for request in refused:
            name, reason = request.request_id, request.get_finished_reason()
            output = outputs.setdefault(request.client_index, EngineCoreOutputs())
            output.outputs.append(EngineCoreOutput(name, [], finish_reason=reason))
            output.finished_requests = (output.finished_requests or set()) | {name}
        return outputs
