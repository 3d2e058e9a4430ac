"""The example of docs/adding-a-policy.md, as a package of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import engines
import pytest
import tiny_models
import torch
from reference_loop import load_model

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.hf import PagedCache

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "adding-a-policy.md"
NAME = "mean_query"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """As pip would install it: the module, and the record of its entry point."""
    import tomllib

    folder = tmp_path_factory.mktemp("site")
    (code,), (project,) = blocks("python"), blocks("toml")
    points = tomllib.loads(project)["project"]["entry-points"]["paged_kv.policies"]
    (module,) = {value.partition(":")[0] for value in points.values()}
    (folder / f"{module}.py").write_text(code)
    info = folder / "mean_query_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-query-policy\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[paged_kv.policies]", *lines, ""]))
    return folder


@pytest.fixture
def installed(package, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(package))
    return package


def test_it_is_listed_with_its_docstring(installed):
    assert registry.available()[NAME] == "Entries whose keys match the mean of the last queries"


def test_its_options_are_known_and_checked(installed):
    config = CompressionConfig.from_dict({"policy": f"pyramidal+{NAME}", "observation_window": 5})
    assert config.create_policy().observation_window == 5
    with pytest.raises(ValueError, match="observation_window must be an integer >= 1, not 0"):
        CompressionConfig.from_dict({"policy": NAME, "observation_window": 0})


def test_it_passes_the_matrix(installed):
    """pytest with one more case; the case is added before the tests are collected."""
    line = (
        "from policy_cases import CASES, Cases\n"
        f"CASES['{NAME}'] = Cases([{{}}, {{'observation_window': 4}}])\n"
    )
    (installed / "one_more_case.py").write_text(line)
    path = os.pathsep.join([str(installed), str(TESTS / "support")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "one_more_case",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, str(TESTS / "test_policies.py"), "-k", NAME],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 10


@pytest.mark.vllm
@pytest.mark.parametrize("policy", [NAME, f"pyramidal+{NAME}"])
def test_it_gives_the_same_tokens_in_both_engines(policy, installed, tmp_path):
    model = tiny_models.saved("llama", tmp_path)
    settings = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 32 << 20}
    kv = {"policy": policy, "budget": 128, "pyramid_beta": 1.5}
    prompt = [token % 250 + 3 for token in range(200)]
    with engines.engine(model, kv, **settings) as llm:
        total = engines.block_pool(llm).get_num_free_blocks()
        first, second = (engines.generate(llm, [prompt, prompt[5:90]], 60) for _ in range(2))
        assert first == second
        assert engines.worker(llm).compactor.num_events > 0
        assert engines.block_pool(llm).get_num_free_blocks() == total
    loaded, settings = load_model(model), {"max_new_tokens": 60, "min_new_tokens": 60}
    for own, expected in zip([prompt, prompt[5:90]], first, strict=True):
        with PagedCache(loaded.config, **kv) as cache:
            ids = torch.tensor([own])
            found = loaded.generate(ids, past_key_values=cache, do_sample=False, **settings)
            assert found[0, len(own) :].tolist() == expected
