"""What can be checked of the documents: their width, and that what they link to is there."""

import re

import documents
import pytest

from paged_kv import registry

PATHS = documents.documents()


def anchors(text: str) -> set[str]:
    """Those of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_are_found():
    names = {str(path.relative_to(documents.ROOT)) for path in PATHS}
    assert {"README.md", "docs/architecture.md", "benchmarks/README.md"} <= names
    assert not [name for name in names if name.startswith(".")]


def test_no_line_is_too_wide():
    assert list(documents.long_lines()) == []


def test_a_wide_line_is_named(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / ".venv").mkdir()
    url = "<https://example.org/" + 100 * "a" + ">"
    wide = 101 * "a"
    (tmp_path / "docs" / "page.md").write_text(f"{100 * 'a'}\n{url}\n{wide}\n{url} {wide}\n")
    (tmp_path / ".venv" / "other.md").write_text(wide)
    assert list(documents.long_lines(tmp_path)) == [
        "docs/page.md:3: 101 columns, at most 100 are allowed",
        f"docs/page.md:4: {len(url) + 102} columns, at most 100 are allowed",
    ]


def test_the_readme_is_read_in_two_minutes():
    assert len((documents.ROOT / "README.md").read_text().splitlines()) <= 100


@pytest.mark.parametrize("name", ["README.md", "docs/policies.md"])
def test_every_policy_has_a_row(name):
    lines = (documents.ROOT / name).read_text().splitlines()
    rows = "".join(line for line in lines if line.startswith("| `"))
    assert [policy for policy in registry.available() if f"`{policy}`" not in rows] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(documents.ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target
