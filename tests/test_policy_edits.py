"""Nothing that a policy needs is forgotten, and a policy that lacks it is told so."""

import re

import policy_edits
import pytest

from paged_kv import registry
from paged_kv.core.options import integer

NEEDED = [
    policy_edits.without_cases,
    policy_edits.without_definition,
    policy_edits.without_run,
    policy_edits.without_row_in_readme,
    policy_edits.without_row_in_document,
]
CHECKS = [policy_edits.unregistered, *NEEDED, policy_edits.without_default]
GUIDE = policy_edits.ROOT / "docs" / "adding-a-policy.md"


def name_of(check) -> str:
    return check.__name__


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
def test_nothing_is_forgotten(check):
    lines = check()
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("check", NEEDED, ids=name_of)
def test_a_new_policy_is_asked_for_the_rest(check, monkeypatch):
    """Only its file and its line in the registry are there."""
    monkeypatch.setitem(registry._BUILT_IN, "newcomer", "paged_kv.policies.knorm:KNorm")
    (line,) = check()
    assert line.startswith("newcomer: ")
    assert ".py" in line or ".md" in line


@pytest.mark.parametrize("check", NEEDED, ids=name_of)
def test_what_is_left_of_a_removed_policy_is_told(check, monkeypatch):
    monkeypatch.delitem(registry._BUILT_IN, "knorm")
    (line,) = check()
    assert line.startswith("knorm, in ")


def test_a_class_without_a_line_in_the_registry(monkeypatch):
    monkeypatch.delitem(registry._BUILT_IN, "knorm")
    (line,) = policy_edits.unregistered()
    assert line == "paged_kv.policies.knorm:KNorm: add a line to paged_kv/registry.py"


def test_a_line_without_a_class(monkeypatch):
    monkeypatch.setitem(registry._BUILT_IN, "newcomer", "paged_kv.policies.knorm:Newcomer")
    (line,) = policy_edits.unregistered()
    assert line == "newcomer: there is no paged_kv.policies.knorm:Newcomer"


def test_a_default_that_has_changed(monkeypatch):
    monkeypatch.setattr(registry.load("random"), "options", {"seed": integer(5)})
    (line,) = policy_edits.without_default()
    assert line == "random: its row in docs/policies.md must say: seed 5"


@pytest.mark.parametrize(
    ("text", "subjects"),
    [
        (
            "## Policies\n\n| name | keeps |\n| --- | --- |\n| `h2o`, `lru` | `x` |\n",
            ["h2o", "lru"],
        ),
        (
            "## Policies\n\n* `h2o`, `lru` and `tova`: most\n  attention `x`\n",
            ["h2o", "lru", "tova"],
        ),
        ("# All\n- **`h2o`** (`y`)\n- `pyramidal+NAME`: more `x`\n", ["h2o", "pyramidal"]),
        ("# All\n\nIn prose: `h2o`.\n\n* With `tova`\n", []),
        ("# All\n| `h2o` | |\n\n# Formats\n| `int8` | |\n\n## Measured\n| `lru` | |\n", ["h2o"]),
    ],
)
def test_rows_and_items_are_read(text, subjects, tmp_path):
    (tmp_path / "text.md").write_text(text)
    assert list(policy_edits.entries(tmp_path / "text.md")) == subjects


def test_the_guide_names_files_that_exist():
    paths = re.findall(r"`((?:paged_kv|tests|docs)/[\w/.-]+)`", GUIDE.read_text())
    assert len(paths) > 5
    for path in paths:
        assert (policy_edits.ROOT / path.replace("NAME", "knorm")).exists(), path
