"""What changes transformers for the whole process happens once, whoever comes first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps


def once(install: Callable[[], None]) -> Callable[[], None]:
    """The first call runs; other threads wait for it, and all later calls do nothing."""
    lock, done = threading.Lock(), False

    @wraps(install)
    def call() -> None:
        nonlocal done
        with lock:
            if not done:
                install()
                done = True

    return call
