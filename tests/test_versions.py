"""Versions of vLLM and transformers that nobody tested: refused, unless the user wants them."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import engines  # noqa: F401  vLLM's environment
import pytest

from paged_kv import versions
from paged_kv.hf import compat
from paged_kv.vllm.frontend import compat as of_vllm

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
LOGGER = logging.getLogger("paged_kv.test_versions")
TESTED = ("5.19", "5.20")


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.delenv(versions.VARIABLE, raising=False)


@pytest.mark.parametrize("version", ["5.19.0", "5.20.2", "5.20.0rc1", "5.19.1.dev0+g12", "5.19"])
def test_tested_versions_pass_in_silence(version, caplog):
    versions.check("transformers", version, TESTED, LOGGER)
    assert not caplog.records


@pytest.mark.parametrize("version", ["5.18.1", "5.21.0", "5.190.0", "5", "6.19.0", "5.21.0.dev0"])
def test_others_are_refused_with_the_way_on(version):
    expected = r"tested with transformers 5\.19, 5\.20; this is"
    with pytest.raises(ValueError, match=expected) as error:
        versions.check("transformers", version, TESTED, LOGGER, "; or else")
    assert f"this is {version}. " in str(error.value)
    assert str(error.value).endswith("set PAGED_KV_ALLOW_UNTESTED=1; or else")


def test_at_the_users_own_risk_there_is_one_warning(monkeypatch, caplog):
    monkeypatch.setenv(versions.VARIABLE, "1")
    for _ in range(3):
        versions.check("transformers", "5.21.0", TESTED, LOGGER)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "5.19, 5.20; this is 5.21.0 (PAGED_KV_ALLOW_UNTESTED=1)" in record.getMessage()


def test_any_other_value_is_no_permission(monkeypatch):
    monkeypatch.setenv(versions.VARIABLE, "0")
    with pytest.raises(ValueError, match="ALLOW_UNTESTED=1"):
        versions.check("transformers", "5.21.0", TESTED, LOGGER)


IMPORT = """
from importlib import metadata
of = metadata.version
metadata.version = lambda name: "5.99.0" if name == "transformers" else of(name)
from paged_kv.hf import PagedCache
print(PagedCache.__name__)
"""


def run(monkeypatch, allowed: str) -> subprocess.CompletedProcess[str]:
    monkeypatch.setenv(versions.VARIABLE, allowed)
    return subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)


def test_an_import_of_paged_kv_hf_checks_first(monkeypatch):
    done = run(monkeypatch, "")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: paged_kv was tested with transformers 5.19")
    assert "this is 5.99.0" in last
    done = run(monkeypatch, "1")
    assert (done.returncode, done.stdout) == (0, "PagedCache\n")
    assert done.stderr.count("this is 5.99.0") == 1


def series(extra: str, library: str) -> list[str]:
    """[first, first that is refused]: what an extra in pyproject.toml allows of a library."""
    (line,) = re.findall(rf'^{extra} = .*"{library}(\W[^"]+)"', PYPROJECT.read_text(), re.MULTILINE)
    return re.findall(r"\d+\.\d+", line)


@pytest.mark.parametrize(
    ("extra", "library", "tested"),
    [("hf", "transformers", compat.TESTED), ("vllm", "vllm", of_vllm.TESTED)],
)
def test_pyproject_allows_what_was_tested(extra, library, tested):
    major, minor = tested[-1].split(".")
    assert series(extra, library) == [tested[0], f"{major}.{int(minor) + 1}"]


def test_the_installed_transformers_is_one_we_tested():
    compat.check_version()
