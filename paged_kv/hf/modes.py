"""What a cache keeps outlives the mode of the forward pass that made it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def keeps(function: Callable[P, T]) -> Callable[P, T]:
    """For what makes, or writes to, tensors that are kept: they are ordinary ones, with no graph.

    A tensor that is made under torch.inference_mode() cannot be written to outside of it. Another
    forward pass, or another cache of the same pool, may be in another mode.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
