"""What adding a policy takes, and what of it is missing; see docs/adding-a-policy.md.

Each check returns a line for everything that is wrong, in both directions: a policy of the registry
that a place does not know, and a name in that place that is no policy.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
from collections.abc import Collection, Iterator
from pathlib import Path

from policy_cases import CASES, policies
from policy_definitions import DEFINITIONS

import paged_kv.policies
from paged_kv import registry
from paged_kv.policies.base import Policy
from paged_kv.policies.wrapper import Wrapper

ROOT = Path(__file__).parent.parent.parent
EQUIVALENCE = ROOT / "tests" / "test_policy_equivalence.py"
RUNS = runpy.run_path(str(EQUIVALENCE))["test_tokens_are_those_of_the_definition"].pytestmark
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "policies.md"


def unregistered() -> list[str]:
    """Classes of paged_kv/policies that the registry does not name, and lines without a class."""
    classes = set()
    for module in pkgutil.iter_modules(paged_kv.policies.__path__):
        path = f"{paged_kv.policies.__name__}.{module.name}"
        for name, value in vars(importlib.import_module(path)).items():
            policy = (
                inspect.isclass(value) and issubclass(value, Policy) and value.__module__ == path
            )
            if not policy or inspect.isabstract(value) or name.startswith("_"):
                continue
            if not issubclass(value, Wrapper) or registry.WRAPPED in value.options:
                classes.add(f"{path}:{name}")
    lines = {place: name for name, place in registry._BUILT_IN.items()}
    return [
        *(f"{c}: add a line to paged_kv/registry.py" for c in sorted(classes) if c not in lines),
        *(f"{lines[c]}: there is no {c}" for c in sorted(lines) if c not in classes),
    ]


def _is_named(value: type) -> bool:
    """Whether users can ask for it; a wrapper without an option `of`, Spill, goes around any."""
    if not issubclass(value, Policy) or inspect.isabstract(value):
        return False
    return not issubclass(value, Wrapper) or registry.WRAPPED in value.options


def without_cases() -> list[str]:
    """Policies without options to be tested with."""
    place = "CASES in tests/support/policy_cases.py"
    return _compared(CASES, policies(), f"add a line to {place}", place)


def without_definition() -> list[str]:
    """Policies that nothing says in plain loops."""
    place = "tests/support/policy_scores.py or policy_merging.py"
    return _compared(DEFINITIONS, policies(), f"add a function to {place}", place)


def without_run() -> list[str]:
    """Policies that no test runs in vLLM."""
    (mark,) = (mark for mark in RUNS if mark.name == "parametrize")
    runs = {case.values[0] for case in mark.args[1]}
    place = EQUIVALENCE.name
    return _compared(runs, policies(), f"`engine` of its case must not be empty: {place}", place)


def without_row_in_readme() -> list[str]:
    """Names that README.md does not have as the subject of a table's row or of a list's item."""
    rows = entries(README)
    return _compared(rows, registry.available(), "add it to a row of README.md", "README.md")


def without_row_in_document() -> list[str]:
    """The same of docs/policies.md; `full` and `pyramidal` may be there or not."""
    rows = [name for name in entries(DOCUMENT) if name not in (registry.FULL, registry.PYRAMIDAL)]
    return _compared(rows, policies(), "add a row to docs/policies.md", "docs/policies.md")


def without_default() -> list[str]:
    """Options that docs/policies.md does not name with their defaults in the policy's row."""
    rows = entries(DOCUMENT)
    lines = []
    for name in policies():
        for key, option in registry.load(name).options.items():
            default = str(option.default).lower().removesuffix(".0")
            wanted = rf"\b{key}\b"
            if default:
                wanted += rf"\W{{1,8}}{re.escape(default)}(?!\w|\.\d)"
            if not any(re.search(wanted, text) for text in rows.get(name, [])):
                lines.append(f"{name}: its row in docs/policies.md must say: {key} {default}")
    return lines


def _compared(
    names: Collection[str], known: Collection[str], request: str, place: str
) -> list[str]:
    missing = [f"{name}: {request}" for name in known if name not in names]
    stale = [name for name in names if name not in known]
    return missing + [f"{name}, in {place}: the registry has no such policy" for name in stale]


def entries(path: Path) -> dict[str, list[str]]:
    """By subject: the texts of table rows and list items that begin with `subject`.

    Only sections in which some subject is a policy's name: other tables have options or formats. In
    sections that begin with "Measured" not every policy must be.
    """
    result: dict[str, list[str]] = {}
    for section in re.split(r"^#+ ", path.read_text(), flags=re.MULTILINE):
        if section.startswith("Measured"):
            continue
        found = [(subjects, text) for text in _texts(section) if (subjects := _subjects(text))]
        if any(name in registry.available() for subjects, _ in found for name in subjects):
            for subjects, text in found:
                for name in subjects:
                    result.setdefault(name, []).append(text)
    return result


def _texts(section: str) -> Iterator[str]:
    """Table rows, and list items with the indented lines that go on with them."""
    for match in re.finditer(r"^(?:\|.*|[*-] .*(?:\n +\S.*)*)", section, re.MULTILINE):
        yield match[0]


def _subjects(text: str) -> list[str]:
    """Names in a row's first cell, or at the beginning of an item; pyramidal+NAME: pyramidal."""
    if text.startswith("|"):
        first = text.split("|")[1]
    else:
        begins = re.match(r"[*-] +((?:\**`[^`]+`\**(?:,| and)? *)*)", text)
        first = begins[1] if begins else ""
    return [name.partition("+")[0] for name in re.findall(r"`([\w+]+)`", first)]
