"""Files of query statistics: of which model they are, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import engines
import numpy as np
import pytest
import query_files
from reference_loop import load_model
from safetensors.numpy import save_file

from paged_kv.config import CompressionConfig
from paged_kv.eval.reference.engine import ReferenceEngine
from paged_kv.hf import PagedCache
from paged_kv.model_identity import identity
from paged_kv.models import directory_of
from paged_kv.policies import query_files as files

SHAPE = (6, 2, 2, 32)
POLICY = {"policy": "calibrated_attention", "budget": 96}


# ---- which model it is


def test_the_same_model_elsewhere(tiny, tmp_path):
    """Saved by another transformers, under another name."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    changes = {"transformers_version": "9.0", "_name_or_path": "x", "dtype": "bfloat16"}
    (other / "config.json").write_text(json.dumps(config | changes, indent=7))
    assert identity(other) == identity(Path(tiny))
    assert len(identity(other)) == 16


def test_other_models(tiny, tmp_path):
    """Other weights, another config; no weights, no config."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for place in (len(content) // 2, len(content) // 2 + 40, len(content) // 64 * 7 + 1):
        content[place] ^= 1
    weights.write_bytes(content)
    known = {identity(Path(tiny)), identity(other)}
    assert len(known) == 2
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert identity(other) not in known | {None}
    weights.unlink()
    assert identity(other) is None
    shutil.copy(Path(tiny) / "model.safetensors", other)
    (other / "config.json").write_text("[]")
    assert identity(other) is None
    (other / "config.json").unlink()
    assert identity(other) is None


def test_nobody_is_asked_for_a_model_that_is_not_there(tiny):
    assert directory_of("nobody/has-this-model") is None
    assert directory_of(tiny) == Path(tiny)
    assert files.find("nobody/has-this-model") is None
    assert files.find("") is None


# ---- files that are wrong


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 100])
def test_damaged_files(tmp_path, content):
    (tmp_path / "queries.safetensors").write_bytes(content)
    refused(tmp_path, "is no readable .safetensors file")


def test_half_a_file(tmp_path):
    path = query_files.write(tmp_path / "queries.safetensors", SHAPE)
    path.write_bytes(path.read_bytes()[:-20])
    refused(tmp_path, "is no readable .safetensors file")


def refused(folder: Path, message: str) -> None:
    """As soon as the options are read."""
    statistics = str(folder / "queries.safetensors")
    with pytest.raises(ValueError, match=f"statistics: {statistics} .*{message}"):
        CompressionConfig.from_dict({**POLICY, "statistics": statistics})


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"statistics: .*No such file"):
        CompressionConfig.from_dict({**POLICY, "statistics": str(tmp_path / "none.safetensors")})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linear": np.full(SHAPE, np.nan)}, "holds numbers that are not finite"),
        ({"normaliser": np.full(SHAPE[:-1], np.inf)}, "holds numbers that are not finite"),
        ({"quadratic": np.zeros((6, 2, 2, 16))}, "do not fit each other"),
        ({"normaliser": np.zeros((6, 2, 1))}, "do not fit each other"),
        ({"linear": np.zeros(32)}, "do not fit each other"),
        ({"more": np.zeros(3)}, "was not written by paged-kv calibrate queries"),
    ],
)
def test_files_with_something_else(tmp_path, changed, message):
    query_files.write(tmp_path / "queries.safetensors", SHAPE, **changed)
    refused(tmp_path, message)


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "queries.safetensors"
    save_file(query_files.statistics(SHAPE), path, {"format": "another"})
    refused(tmp_path, "was not written by paged-kv calibrate queries")
    save_file(query_files.statistics(SHAPE), path)
    refused(tmp_path, "was not written by paged-kv calibrate queries")


OTHERS = [(5, 2, 2, 32), (7, 2, 2, 32), (6, 1, 4, 32), (6, 4, 2, 32), (6, 2, 1, 32), (6, 2, 2, 16)]


@pytest.mark.parametrize("shape", OTHERS, ids=str)
def test_files_of_other_models(tiny, tmp_path, shape):
    """Refused before a token is seen, by whoever has the model's config."""
    path = query_files.write(tmp_path / "queries.safetensors", shape)
    model, options = load_model(tiny), {**POLICY, "statistics": str(path)}
    message = (
        f"{path} is of another model: of {shape[0]} layers, {shape[1]} KV heads with {shape[2]} "
        f"query heads each, head_dim {shape[3]}; this one has 6 layers, 2 KV heads with 2"
    )
    with pytest.raises(ValueError, match=message):
        PagedCache(model.config, **options)
    with pytest.raises(ValueError, match=message):
        ReferenceEngine(model, CompressionConfig.from_dict(options))


@pytest.mark.vllm
def test_vllm_refuses_the_file_of_another_model(tiny, tmp_path):
    path = query_files.write(tmp_path / "queries.safetensors", OTHERS[-1])
    options = {**POLICY, "statistics": str(path)}
    with (
        pytest.raises(ValueError, match=r"is of another model: .* head_dim 16; this one"),
        engines.engine(tiny, options, skip_tokenizer_init=True),
    ):
        pass
