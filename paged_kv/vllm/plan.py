"""The plan as vLLM's processes have it: budgets by layer, and the KV cache groups of these layers.

The front end makes it; it travels as plain JSON values in ``additional_config["paged_kv_plan"]``,
so that every rank and the scheduler read the same numbers. Pipeline ranks agree, too: layers are
numbered over the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paged_kv.core.schedule import Schedule, cdiv
from paged_kv.plan import Plan

PLAN_KEY = "paged_kv_plan"


@dataclass(frozen=True)
class GroupedPlan(Plan):
    """Budgets by layer, and what vLLM's pool of pages makes of them.

    Args:
        num_groups: KV cache groups that the compressed layers fall into.
        num_other_groups: the rest (skipped and sliding-window layers).
        layers_per_page: layers that a page of vLLM's pool has room for.
        formats: page format of each layer; None for pages as the engine has them. Empty: all None.
        residual_pages: as in CompressionConfig.
    """

    num_groups: int
    num_other_groups: int
    layers_per_page: int
    formats: tuple[str | None, ...] = ()
    residual_pages: int = 0

    def format(self, layer: int) -> str | None:
        """The page format of a layer, None for pages as the engine has them."""
        return self.formats[layer] if layer < len(self.formats) else None

    def schedules(self) -> list[Schedule]:
        """Of the compressed layers."""
        return [schedule for layer in self.budgets if (schedule := self.schedule(layer))]

    def longest_prompt(self, max_len: int, num_pages: int) -> int | None:
        """Longest prompt that num_pages pages (vLLM's null page included) can hold; None: any.

        A prompt is held whole until its end, in every group of compressed layers at once; the
        other groups are taken at their most.

        Args:
            max_len: tokens of the longest sequence.
            num_pages: of vLLM's pool.
        """
        if self.compress_prefill:
            return None
        other_pages = self.num_other_groups * cdiv(max_len, self.page_size)
        limit = max(0, num_pages - 1 - other_pages) // self.num_groups * self.page_size
        return limit if limit < max_len else None

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can carry, and from_json reads."""
        budgets = {str(k): list(v) for k, v in self.budgets.items()}
        return {**vars(self), "budgets": budgets, "formats": list(self.formats)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GroupedPlan:
        """The plan that to_json wrote."""
        loaded = {int(layer): tuple(budget) for layer, budget in values["budgets"].items()}
        return cls(**{**values, "budgets": loaded, "formats": tuple(values["formats"])})


def get_plan(vllm_config: Any) -> GroupedPlan:
    """The plan that the front end left in the config."""
    return GroupedPlan.from_json(vllm_config.additional_config[PLAN_KEY])
