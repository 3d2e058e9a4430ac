"""What vllm_runs.py runs: engines with and without a policy, and what each must show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
UNREACHED = 1 << 16  # a budget that nothing exceeds
BUDGET = 256

POLICIES: dict[str, Json] = {
    "plain": {},
    "plain_again": {},
    "unreached": {"policy": "streaming", "budget": UNREACHED},
    "streaming": {"policy": "streaming", "budget": BUDGET},
    "pyramidal+streaming": {"policy": "pyramidal+streaming", "budget": BUDGET},
    "snapkv": {"policy": "snapkv", "budget": BUDGET},
    "pyramidal": {"policy": "pyramidal", "budget": BUDGET},
    "swap": {"policy": "full", "swap_space": 8.0},
}


class Case(NamedTuple):
    """A process with an engine.

    Args:
        kind: what is done; see vllm_child.
        policy: one of POLICIES.
        runner: "v1" or "v2", vLLM's model runner.
        graphs: whether CUDA graphs are on, as vLLM chooses them.
        pool: share of what all requests need uncompressed.
        same: its tokens must be those of `plain` with the same settings. Both have the same CUDA
            graphs: a budget that nothing exceeds changes no batch.
        wanted: of its fields, as common.wanted takes them.
    """

    kind: str
    policy: str
    runner: str = "v2"
    graphs: bool = False
    pool: float = 1.1
    same: bool = False
    wanted: Json | None = None

    @property
    def name(self) -> str:
        mode = "graphs" if self.graphs else "eager"
        size = "ample" if self.pool >= 1 else "tight"
        return f"{self.kind} {self.policy} {self.runner} {mode} {size}"

    @property
    def against(self) -> str:
        """The name of the case that it is compared with."""
        return self._replace(policy="plain").name


KINDS = ("tokens", "chunked", "prefix", "reference", "profile")  # may run beside each other
TIGHT = 0.25


def right() -> Iterator[Case]:
    """What must be right; several at once."""
    for runner in ("v2", "v1"):
        for policy in ("plain", "plain_again", "unreached"):
            yield Case("tokens", policy, runner, same=policy != "plain")
    for policy in ("streaming", "pyramidal+streaming", "snapkv", "pyramidal"):
        yield Case("reference", policy, "v2")
        yield Case("reference", policy, "v1")
    for kind in ("chunked", "prefix"):
        for policy in ("plain", "unreached", "streaming"):
            yield Case(kind, policy, same=policy == "unreached")
    for policy in ("plain", "unreached", "streaming", "pyramidal+streaming", "snapkv"):
        yield Case("profile", policy)
    for policy in ("plain", "plain_again", "unreached"):
        yield Case("tokens", policy, graphs=True, same=policy != "plain")


def fast() -> Iterator[Case]:
    """What is timed; one after another."""
    ample, tight = {"ratio": (">=", 0.99)}, {"ratio": (">=", 2.0)}
    graphs: Json = {"graphs": True}
    for policy in ("plain", "unreached"):
        yield Case("speed", policy, **graphs, wanted=ample)
    for policy in ("plain", "streaming", "pyramidal+streaming"):
        yield Case("speed", policy, **graphs, pool=TIGHT, wanted=tight)
    swapped = {"ratio": (">=", 1.5)}
    for policy in ("plain", "swap"):
        yield Case("preempted", policy, **graphs, pool=0.4, wanted=swapped)
    for policy in ("snapkv", "pyramidal"):
        yield Case("speed", policy, **graphs, pool=TIGHT)
    for policy in ("plain", "unreached"):
        yield Case("speed", policy)
    for policy in ("plain", "streaming", "pyramidal+streaming", "snapkv", "pyramidal"):
        yield Case("speed", policy, pool=TIGHT)


def all_cases() -> list[Case]:
    found = [*right(), *fast()]
    plain = [case._replace(same=False, wanted=None) if case.policy == "plain" else case
             for case in found]  # fmt: skip
    assert len({case.name for case in plain}) == len(plain)
    return plain
