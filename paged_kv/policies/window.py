"""The newest entries only: what every other policy must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_kv.policies.streaming import Streaming


class Window(Streaming):
    """The newest entries only (a baseline: without sinks most models break).

    Sliding-window attention: Beltagy et al., "Longformer" (2004.05150), on a model that was not
    trained for it. num_sink_tokens has no effect.
    """

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(0, recent_window, options)
