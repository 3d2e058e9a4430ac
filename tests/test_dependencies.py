"""Dependencies go one way.

cli -> bench|eval|generate|report|top -> vllm|hf -> store -> tiers -> policies|quant -> kernels ->
core

Imports for type checkers and those inside functions count, too.
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
    "tiers": 3,
    "store": 4,
    "vllm": 6,
    "hf": 6,
    "bench": 7,
    "generate": 7,
    "eval": 7,
    "capacity": 7,
    "report": 7,
    "top": 7,
    "cli": 8,
}
# Modules beside the folders: policies' names, options and budgets, which the engines read.
LEVELS |= {"registry": 5, "option_table": 5, "config": 5, "plan": 5, "sampling": 5, "variants": 5}
LEVELS |= {
    "results": 1,
    "partial": 0,
    "models": 0,
    "model_identity": 0,
    "model_rules": 0,
    "directory_cache": 0,
    "versions": 0,
    "__init__": 0,
}  # not part of the chain
SAME_LEVEL = {
    ("option_table", "registry"),
    ("config", "registry"),
    ("config", "option_table"),
    ("plan", "config"),
    ("variants", "registry"),
    ("models", "directory_cache"),
    ("eval", "bench"),
    ("generate", "bench"),
    ("report", "bench"),
    ("top", "capacity"),
}


# Folders of the second level: a folder may import those after it; "" is what lies beside them. A
# module stands here if it belongs above folders that are above the rest.
INSIDE = {
    "vllm": ["driver", "frontend", "worker", "scheduler", "swap", "watch", ""],
    "hf": ["driver", "batch", ""],
    "eval": ["", "peers", "reference", "tasks", "prompt"],
    "kernels": ["ops", "cpu", "triton", ""],
}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether the import runs when the module is imported) of every import."""
    tree = ast.parse(file.read_text())
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
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


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def place(parts: list[str]) -> int:
    """Of a dotted name below paged_kv, its folder's place in the order of INSIDE."""
    order = INSIDE[parts[0]]
    return order.index(parts[1] if len(parts) > 1 and parts[1] in order else "")


@pytest.mark.parametrize("file", [f for f in FILES if part(f) in INSIDE], ids=name_of)
def test_imports_go_down_inside_folders(file):
    importing = place(module_of(file).split(".")[1:])
    for name, _ in imports(file):
        parts = name.split(".")[1:]
        if name.startswith("paged_kv.") and parts[0] == part(file):
            assert place(parts) >= importing, f"{name_of(file)} imports {name}"


def test_every_folder_of_the_second_level_has_a_place():
    folders = {tuple(f.relative_to(PACKAGE).parts[:2]) for f in PACKAGE.glob("*/*/*.py")}
    assert {above for above, _ in folders} == set(INSIDE)
    for above, inner in folders:
        assert inner in INSIDE[above], f"{above}/{inner}: say in INSIDE what it may import"


@pytest.mark.parametrize("file", [f for f in FILES if part(f) == "vllm"], ids=name_of)
def test_the_plugin_does_not_need_the_driver(file):
    """What runs engines for our own commands is no part of what runs in them."""
    if "driver" not in file.parts:
        assert not any(name.startswith("paged_kv.vllm.driver") for name, _ in imports(file))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle; none if there is no such."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_module_imports_itself_through_others():
    modules = {module_of(file): file for file in FILES}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        named = {other for other, _ in imports(file)}
        # `from folder import module` names the module, `from module import thing` not the thing.
        found = {other if other in modules else other.rpartition(".")[0] for other in named}
        graph[name] = found & set(modules) - {name}
    assert len(graph["paged_kv.vllm.worker.worker"]) > 10, "nothing was looked at"
    assert circle(graph) == []
    assert circle(graph | {"paged_kv.core.schedule": {"paged_kv.plan"}}), "a circle is not seen"


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
