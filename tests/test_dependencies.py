"""Dependencies go one way.

cli -> bench, eval -> vllm | hf -> policies, quant, tiers -> kernels -> core
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "paged_kv"
FILES = sorted(PACKAGE.rglob("*.py"))

# Higher may import lower. Those of one number do not see each other, except within a folder.
LEVELS = {
    "core": 0,
    "kernels": 1,
    "policies": 2,
    "quant": 2,
    "tiers": 2,
    "vllm": 4,
    "hf": 4,
    "bench": 5,
    "generate": 5,
    "eval": 5,
    "cli": 6,
}
# Modules beside the folders: policies' names, options and budgets, which the engines read.
LEVELS |= {"registry": 3, "option_table": 3, "config": 3, "plan": 3, "sampling": 3}
LEVELS |= {"models": 0, "directory_cache": 0, "versions": 0, "__init__": 0}  # not part of the chain
SAME_LEVEL = {
    ("option_table", "registry"),
    ("config", "registry"),
    ("config", "option_table"),
    ("plan", "config"),
    ("models", "directory_cache"),
    ("eval", "bench"),
    ("generate", "bench"),
}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether the import runs when the module is imported) of every import."""
    tree = ast.parse(file.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            yield from ((f"{node.module}.{alias.name}", node not in inside) for alias in node.names)


def part(file: Path) -> str:
    """The folder or module below paged_kv."""
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down(file):
    own = part(file)
    assert own in LEVELS, f"{own}: say in LEVELS where it belongs"
    for name, _ in imports(file):
        parts = name.split(".")
        if parts[0] != "paged_kv" or len(parts) < 2 or parts[1] in (own, "__version__"):
            continue
        other = parts[1]
        assert LEVELS[other] < LEVELS[own] or (own, other) in SAME_LEVEL, f"{own} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_only_one_folder_imports_each_engine(file):
    for name, _ in imports(file):
        top = name.split(".")[0]
        assert top != "vllm" or part(file) == "vllm", f"only paged_kv/vllm may import {name}"
        if top == "transformers":
            assert part(file) in ("hf", "models"), f"only paged_kv/hf may import {name}"


@pytest.mark.parametrize("file", [f for f in FILES if part(f) == "core"], ids=name_of)
def test_core_is_plain_python(file):
    for name, _ in imports(file):
        assert name.split(".")[0] not in ("torch", "numpy", "vllm", "transformers"), name


@pytest.mark.parametrize("file", [PACKAGE / "models.py", PACKAGE / "cli.py"], ids=name_of)
def test_the_command_line_imports_engines_when_asked(file):
    for name, at_import in imports(file):
        assert not at_import or name.split(".")[0] not in ("torch", "vllm", "transformers"), name
