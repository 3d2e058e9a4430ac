"""How the next token is chosen: the options of `paged-kv generate`, the same for both engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Raises ValueError for a value out of range.

    Args:
        max_new_tokens: >= 1.
        temperature: 0 for the most likely token; None for 1 if top_k or top_p is given, else 0.
        top_k: sample from the k most likely tokens; None for all.
        top_p: sample from the most likely tokens that together have this probability; None for all.
        num_beams: of a beam search; 1 for none.
        seed: of what is sampled.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be an integer >= 1, not {value}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number >= 0, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be a number above 0, at most 1, not {self.top_p}")
        narrowed = [name for name in ("top_k", "top_p") if getattr(self, name) is not None]
        if self.temperature == 0 and narrowed:
            raise ValueError(
                f"{_flag(narrowed[0])} has no effect with temperature 0: give a temperature above 0"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, not {self.seed}")

    @property
    def effective_temperature(self) -> float:
        """0 for the most likely token."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.top_k is None and self.top_p is None else 1.0


def _flag(name: str) -> str:
    return name.replace("_", "-")
