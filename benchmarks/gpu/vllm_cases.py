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
        same: its tokens must be those of `plain` with the same settings, as far as those of
            `plain_again` are. All have the same CUDA graphs: a budget that nothing exceeds changes
            no batch.
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

    @property
    def again(self) -> str:
        """Where plain vLLM does the same a second time: by how much that differs is nobody's."""
        return self._replace(kind="tokens", policy="plain_again").name

    @property
    def eager(self) -> str:
        """The same without CUDA graphs."""
        return self._replace(graphs=False).name


# These may run beside each other.
KINDS = ("tokens", "chunked", "prefix", "reference", "nearly", "profile")
TIGHT = 0.25
SAME = ("plain", "plain_again", "unreached")


def right_first() -> Iterator[Case]:
    """Does it run, and is it right: as few engines as can say so, several at once."""
    for graphs in (False, True):
        for policy in SAME:
            yield Case("tokens", policy, graphs=graphs, same=policy != "plain")
        yield Case("tokens", "streaming", graphs=graphs)
    for policy in ("unreached", "streaming"):  # who goes must not hang on how numbers are rounded
        yield Case("nearly", policy)
    for policy in ("streaming", "snapkv"):
        yield Case("reference", policy)


def fast_first() -> Iterator[Case]:
    """The figures that are wanted; one engine after another."""
    graphs: Json = {"graphs": True}
    for policy in ("plain", "streaming"):
        yield Case("speed", policy, **graphs, pool=TIGHT, wanted={"ratio": (">=", 2.0)})
    for policy in ("plain", "unreached"):
        yield Case("speed", policy, **graphs, wanted={"ratio": (">=", 0.99)})
    for policy in ("plain", "swap"):
        yield Case("preempted", policy, **graphs, pool=0.4, wanted={"ratio": (">=", 1.5)})
    yield Case("speed", "pyramidal+streaming", **graphs, pool=TIGHT, wanted={"ratio": (">=", 2.0)})


def right_then() -> Iterator[Case]:
    """The other ways through the same code."""
    for policy in ("plain", "unreached", "streaming", "pyramidal+streaming", "snapkv"):
        yield Case("profile", policy)
    for policy in SAME:
        yield Case("tokens", policy, "v1", same=policy != "plain")
    for kind in ("chunked", "prefix"):
        for policy in ("plain", "unreached", "streaming"):
            # Steps may be cut elsewhere, and other shapes round otherwise: told, no failure.
            nearly = {"same_tokens": (">=", 0.9)} if policy == "unreached" else None
            yield Case(kind, policy, wanted=nearly)
    for policy in ("pyramidal+streaming", "pyramidal"):
        yield Case("reference", policy)
    for policy in ("streaming", "snapkv", "pyramidal+streaming", "pyramidal"):
        yield Case("reference", policy, "v1")


def fast_then() -> Iterator[Case]:
    """Figures to compare these with."""
    for policy in ("snapkv", "pyramidal"):
        yield Case("speed", policy, graphs=True, pool=TIGHT)
    for policy in ("plain", "unreached"):
        yield Case("speed", policy)
    for policy in ("plain", "streaming", "pyramidal+streaming", "snapkv", "pyramidal"):
        yield Case("speed", policy, pool=TIGHT)


def phases() -> list[list[Case]]:
    """All cases, what tells most first: the time may be up after any."""
    found = [list(cases()) for cases in (right_first, fast_first, right_then, fast_then)]
    for phase in found:
        phase[:] = [
            case._replace(same=False, wanted=None) if case.policy == "plain" else case
            for case in phase
        ]
    names = [case.name for phase in found for case in phase]
    assert len(set(names)) == len(names)
    return found
