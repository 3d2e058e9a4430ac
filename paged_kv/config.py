"""CompressionConfig: what the user asked for, validated. The only place that knows the defaults."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from paged_kv import registry
from paged_kv.core.options import read_json, shown
from paged_kv.core.readers import READERS, parse_budget
from paged_kv.core.schedule import cdiv

if TYPE_CHECKING:
    from paged_kv.policies.base import Policy
    from paged_kv.tiers.spill_memory import SpillSpace

DEFAULT_PAGE_SIZE = 32
DEFAULT_BUDGET = 1024
VARIABLES = {"policy": "PAGED_KV_POLICY", "budget": "PAGED_KV_BUDGET"}
CONFIG_VARIABLE = "PAGED_KV_POLICY_CONFIG"  # a JSON object of the other options


@dataclass(frozen=True)
class CompressionConfig:
    """One flat set of options; the same names on the command line, in a dict and in JSON.

    Args:
        policy: ``full``, or ``[pyramidal+]NAME``: a budget shape and what picks the survivors.
        budget: entries kept per sequence and layer (int; the mean over layers under a pyramid), or
            the fraction of the processed tokens that is kept (Fraction).
        num_sink_tokens: first entries of a sequence, never dropped.
        recent_window: newest entries, never dropped.
        pyramid_beta: budget of the first layer over that of a layer past the last one.
        min_budget: least entries kept when budget is a fraction.
        compress_prefill: evict between the chunks of a prompt too, not only from its end on.
        skip_layers: indices of layers that keep everything.
        tiers: distinct budgets that a pyramid is quantized into.
        max_groups: KV cache groups allowed; each costs scheduling time.
        page_format: how pages store numbers: native, int8, int4, fp8, or a file of `paged-kv
            calibrate` with a format for each layer.
        residual_pages: newest pages of a sequence that stay in the model's dtype.
        swap_space: GiB of host memory for the pages of preempted requests; 0 for none (vLLM).
        swap_dir: directory for what the host memory cannot hold; empty for none.
        swap_dir_space: GiB of files there.
        swap_format: how swapped pages store numbers, where that is smaller than how they lived.
        spill: whether evicted entries go down a tier, from where they can be fetched back.
        spill_budget: entries there, per sequence and layer.
        fetch_limit: entries that one compaction may fetch back, per sequence, layer and KV head.
        spill_window: last queries that say what is worth fetching.
        spill_threshold: how many times the attention of the weakest survivor a spilled entry must
            get to take its place.
        spill_interval: tokens after which a sequence that decodes looks at its tier again; 0: at
            every compaction.
        spill_dir: directory for spilled entries beyond spill_host_budget; empty for none.
        spill_host_budget: of the spilled entries, those in host memory, if there is a spill_dir.
        options: what the policy itself declares.
    """

    policy: str = "full"
    budget: int | Fraction = DEFAULT_BUDGET
    num_sink_tokens: int = 4
    recent_window: int = 32
    pyramid_beta: float = 2.0
    min_budget: int = 128
    compress_prefill: bool = False
    skip_layers: tuple[int, ...] = ()
    tiers: int = 3
    max_groups: int = 8
    page_format: str = "native"
    residual_pages: int = 0
    swap_space: float = 0.0
    swap_dir: str = ""
    swap_dir_space: float = 0.0
    swap_format: str = "native"
    spill: bool = False
    spill_budget: int = 8192
    fetch_limit: int = 64
    spill_window: int = 32
    spill_threshold: float = 1.0
    spill_interval: int = 128
    spill_dir: str = ""
    spill_host_budget: int = 4096
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def enabled(self) -> bool:
        """Whether anything is compressed at all."""
        return self.policy != "full"

    @property
    def is_pyramid(self) -> bool:
        """Whether layers get different budgets."""
        return registry.split(self.policy)[0] == registry.PYRAMIDAL

    @property
    def selector(self) -> str:
        """The policy that picks the survivors."""
        return registry.split(self.policy)[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompressionConfig:
        """Reads and validates the flat dict of ``additional_config["paged_kv"]``.

        Raises:
            ValueError: an unknown key, or a value out of range; names the option, the value and
                what is allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"paged_kv must be a dict of options, not {shown(values)}")
        policy = values.get("policy", "full")
        registry.check(policy)
        declared = registry.declared(registry.split(policy)[1], values) if policy != "full" else {}
        own = {f.name for f in fields(cls)} - {"options"}
        unknown = sorted(map(str, set(values) - own - set(declared)))
        if unknown:
            known = ", ".join(sorted(own | set(declared)))
            raise ValueError(f"unknown paged_kv option {', '.join(unknown)}; known are: {known}")
        settings = {key: READERS[key](key, values[key]) for key in own if key in values}
        options = {
            key: option.read(key, values[key]) if key in values else option.default
            for key, option in declared.items()
        }
        config = cls(**settings, options=options)
        config.check_spill()
        if config.enabled:
            config.create_policy()  # it may refuse what it is given
        return config

    def check_spill(self) -> None:
        """Refuses what does not go with spill. Raises ValueError."""
        if self.spill and not self.enabled:
            raise ValueError("spill needs a policy that drops entries, not policy 'full'")
        if self.spill_dir and not self.spill:
            raise ValueError(f"spill_dir {self.spill_dir!r} is for spill: add spill=true")
        if self.spill_dir:
            try:
                tempfile.TemporaryFile(dir=self.spill_dir).close()
            except OSError as error:
                raise ValueError(
                    f"spill_dir must be a directory to write to, not {self.spill_dir!r}: "
                    f"{error.strerror}"
                ) from None

    @classmethod
    def from_env(cls, **given: Any) -> CompressionConfig:
        """Options that are given; what is not comes from the environment, then from the defaults.

        A policy's own options in PAGED_KV_POLICY_CONFIG belong to the policy in PAGED_KV_POLICY:
        they are left out where another one is given. A variable that is empty is not set.

        Args:
            given: flat options; None is not given.

        Raises:
            ValueError: see from_dict; names the variable, too, that has the value.
        """
        chosen = {key: value for key, value in given.items() if value is not None}
        found = _environment()
        if "policy" in found and chosen.get("policy", found["policy"]) != found["policy"]:
            common = {f.name for f in fields(cls)}
            found = {key: value for key, value in found.items() if key in common}
        try:
            return cls.from_dict(found | chosen)
        except ValueError as error:
            if not set(found) - set(chosen) - set(VARIABLES):
                raise
            raise ValueError(f"{error} (with the options in {CONFIG_VARIABLE})") from None

    def to_dict(self) -> dict[str, Any]:
        """The flat dict again, in values that JSON can carry."""
        result: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        result.update(result.pop("options"))
        result["skip_layers"] = list(self.skip_layers)
        if isinstance(self.budget, Fraction):
            result["budget"] = str(float(self.budget))
        return result

    def create_policy(self) -> Policy:
        """What picks the survivors; with spill, around it what fetches others back.

        Raises:
            ValueError: the policy refuses an option's value, or merges what should spill.
        """
        policy = registry.create(
            self.selector, self.num_sink_tokens, self.recent_window, self.options
        )
        if not self.spill:
            return policy
        if policy.merges:
            raise ValueError(
                f"spill needs a policy that drops entries; {self.policy!r} merges them into others"
            )
        from paged_kv.policies.spill import Spill

        return Spill(
            policy, self.fetch_limit, self.spill_window, self.spill_threshold, self.spill_interval
        )

    def spill_space(self, is_pinned: bool = False) -> SpillSpace:
        """Where a sequence's spilled entries lie; is_pinned: in page-locked memory, for a GPU."""
        from paged_kv.tiers.spill_memory import SpillSpace

        return SpillSpace(self.spill_budget, self.spill_host_budget, self.spill_dir, is_pinned)

    def min_entries(self, page_size: int) -> int:
        """The least budget that leaves a page to evict."""
        return self.create_policy().num_protected + page_size

    def check_page_size(self, page_size: int) -> None:
        """Refuses budgets that leave no page to evict. Raises ValueError."""
        residual = self.residual_pages * page_size
        if residual > self.recent_window:
            # Compactions move entries between pages; the residual must not be among them.
            raise ValueError(
                f"residual_pages {self.residual_pages} of {page_size} needs a recent_window of at "
                f"least {residual}, not {self.recent_window}"
            )
        needed = self.min_entries(page_size)
        name = "budget" if isinstance(self.budget, int) else "min_budget"
        value = self.budget if isinstance(self.budget, int) else self.min_budget
        if value < needed:
            raise ValueError(
                f"{name} {value} is too small: it must be at least {needed} "
                f"({self.describe_minimum(page_size)})"
            )

    def check_residual(self, page_size: int, max_tokens: int) -> None:
        """Refuses more native pages than a sequence of max_tokens has. Raises ValueError."""
        most = cdiv(max_tokens, page_size)
        if self.residual_pages > most:
            raise ValueError(
                f"residual_pages must be at most {most}, the pages of {page_size} that a sequence "
                f"of {max_tokens} tokens has, not {self.residual_pages}"
            )

    def describe_minimum(self, page_size: int) -> str:
        """Where min_entries comes from."""
        recent = self.min_entries(page_size) - page_size - self.num_sink_tokens
        which = "recent_window" if recent == self.recent_window else "newest entries that stay"
        return (
            f"num_sink_tokens {self.num_sink_tokens} + {which} {recent} + one page of {page_size}"
        )


def parse_json(text: str, name: str = "kv-policy-config") -> dict[str, Any]:
    """The object in the option of that name. Raises ValueError."""
    try:
        values = read_json(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error} in {shown(text)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object, not {shown(text)}")
    return values


def _environment() -> dict[str, Any]:
    """The flat options in the environment's variables. Raises ValueError."""
    text = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items()}
    config = os.environ.get(CONFIG_VARIABLE, "")
    options = parse_json(config, CONFIG_VARIABLE) if config.strip() else {}
    for name, variable in VARIABLES.items():
        if name in options:
            raise ValueError(f"{CONFIG_VARIABLE} must not have {name}: use {variable}")
    if policy := text["policy"].strip():
        try:
            registry.check(policy)
        except ValueError as error:
            raise ValueError(f"{VARIABLES['policy']}: {error}") from None
        options["policy"] = policy
    if budget := text["budget"].strip():
        options["budget"] = parse_budget(VARIABLES["budget"], budget)
    return options
