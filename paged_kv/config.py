"""CompressionConfig: what the user asked for, validated. option_table.py has the options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from paged_kv import registry
from paged_kv.core.environment import CONFIG_VARIABLE, read_environment
from paged_kv.core.options import shown
from paged_kv.core.schedule import cdiv
from paged_kv.model_identity import shape_of
from paged_kv.option_table import (
    OLD_NAMES,
    OPTIONS,
    VARIABLES,
    OptionTable,
    current_names,
    read_policy,
    warn_of_old_names,
)

if TYPE_CHECKING:
    from paged_kv.policies.base import Policy
    from paged_kv.tiers.spill_memory import SpillSpace

DEFAULT_PAGE_SIZE = 32
PRESSURE = "pressure"  # of the option start


@dataclass(frozen=True)
class CompressionConfig(OptionTable):
    """One flat set of options; the same names on the command line, in a dict and in JSON.

    Args:
        options: what the policy itself declares. The others: `paged-kv options` lists them.
    """

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

        Whether directories can be written is not looked at: see tiers.files.check_spill_dir.

        Raises:
            ValueError: an unknown key, or a value out of range; names the option, the value and
                what is allowed. Or both names of an option that has an old one.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"paged_kv must be a dict of options, not {shown(values)}")
        warn_of_old_names(values)
        values = current_names(values)
        policy = read_policy("policy", values.get("policy", registry.FULL))
        declared = registry.declared(registry.split(policy)[1], values) if policy != "full" else {}
        unknown = sorted(map(str, set(values) - set(OPTIONS) - set(declared)))
        if unknown:
            known = ", ".join(sorted(OPTIONS | declared))
            raise ValueError(f"unknown paged_kv option {', '.join(unknown)}; known are: {known}")
        settings = {
            key: each.read(key, values[key]) for key, each in OPTIONS.items() if key in values
        }
        options = {
            key: each.read(key, values[key]) if key in values else each.default
            for key, each in declared.items()
        }
        config = cls(**settings, options=options)
        config.check_spill()
        config.check_start()
        if config.enabled:
            config.create_policy()  # it may refuse what it is given
        return config

    def check_spill(self) -> None:
        """Refuses what does not go with spill. Raises ValueError."""
        if self.spill and not self.enabled:
            raise ValueError("spill needs a policy that drops entries, not policy 'full'")
        if self.spill_dir and not self.spill:
            raise ValueError(f"spill_dir {self.spill_dir!r} is for spill: add spill=true")

    def check_start(self) -> None:
        """Refuses what does not go with start=pressure. Raises ValueError."""
        if self.start == PRESSURE and not self.enabled:
            raise ValueError("start pressure needs a policy that drops entries, not policy 'full'")
        if self.start == PRESSURE and self.compress_prefill:
            raise ValueError(
                "start pressure does not go with compress_prefill, which drops entries of a prompt "
                "however much memory there is: give one of them"
            )

    @property
    def waits_for_pressure(self) -> bool:
        """Whether nothing is dropped while there are pages."""
        return self.start == PRESSURE

    @classmethod
    def from_env(cls, **options: Any) -> CompressionConfig:
        """Options that are given; what is not comes from the environment, then from the defaults.

        A policy's own options in PAGED_KV_POLICY_CONFIG belong to the policy in PAGED_KV_POLICY:
        they are left out where another one is given. A variable that is empty is not set.

        Args:
            options: flat; None is not given.

        Raises:
            ValueError: see from_dict; names the variable, too, that has the value.
        """
        chosen = {key: value for key, value in options.items() if value is not None}
        env = read_environment(OPTIONS)
        if "policy" in env and chosen.get("policy", env["policy"]) != env["policy"]:
            env = {key: value for key, value in env.items() if key in (*OPTIONS, *OLD_NAMES)}
        warn_of_old_names(env | chosen)
        try:
            return cls.from_dict(current_names(env) | current_names(chosen))
        except ValueError as error:
            if not set(env) - set(chosen) - set(VARIABLES):
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

    def settled(self, model: str, sums_attention: bool, decoder: Any) -> CompressionConfig:
        """The same, with what a policy leaves open decided for an engine.

        Args:
            model: see EngineFacts.
            sums_attention: see EngineFacts.
            decoder: the config of transformers that has the model's sizes.

        Raises:
            ValueError: a file is of another model.
        """
        if not self.enabled:
            return self
        from paged_kv.policies.base import EngineFacts

        engine = EngineFacts(model, sums_attention, shape_of(decoder))
        return replace(self, options=registry.settled(self.selector, self.options, engine))

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

    @cached_property
    def _num_protected(self) -> int:
        """Entries that the policy never drops, asked for once: a policy may read a file."""
        return self.create_policy().num_protected

    def min_entries(self, page_size: int) -> int:
        """The least budget that leaves a page to evict."""
        return self._num_protected + page_size

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
        recent = self._num_protected - self.num_sink_tokens
        which = "recent_window" if recent == self.recent_window else "newest entries that stay"
        return (
            f"num_sink_tokens {self.num_sink_tokens} + {which} {recent} + one page of {page_size}"
        )
