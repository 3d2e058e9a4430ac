"""--kv-swap-*: what is refused before weights are loaded, and what vLLM is told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from configs import engine_config

from paged_kv.config import CompressionConfig
from paged_kv.vllm.frontend import options
from paged_kv.vllm.swap import options as swap

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.config_only("llama", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swap_space": -1}, "swap_space must be a number from 0"),
        ({"swap_space": "2"}, "swap_space must be a number"),
        ({"swap_space": 1 << 18}, "kv-swap-space 262144.0 GiB: this machine has"),
        ({"swap_dir": "/tmp", "swap_dir_space": 1}, "kv-swap-dir /tmp needs a kv-swap-space"),
        ({"swap_space": 0, "swap_dir_space": 1}, "kv-swap-dir-space 1.0 needs a kv-swap-space"),
        ({"swap_format": "int8"}, "kv-swap-format int8 needs a kv-swap-space"),
        ({"swap_space": 0.1, "swap_format": "zip"}, "swap_format must be one of native, int8"),
        ({"swap_space": 0.1, "swap_dir": "/tmp"}, "kv-swap-dir '/tmp' and kv-swap-dir-space 0.0"),
        ({"swap_space": 0.1, "swap_dir_space": 1}, "need each other"),
        (
            {"swap_space": 0.1, "swap_dir": "/does/not/exist", "swap_dir_space": 1},
            "kv-swap-dir /does/not/exist: cannot write there",
        ),
        (
            {"swap_space": 0.1, "swap_dir": __file__, "swap_dir_space": 1},
            "it must be a directory",
        ),
        (
            {"swap_space": 0.1, "swap_dir": "/proc", "swap_dir_space": 1},
            "kv-swap-dir /proc: cannot write there",
        ),
        (
            {"swap_space": 0.1, "swap_dir": "/tmp", "swap_dir_space": 1 << 19},
            "kv-swap-dir-space 524288.0 GiB: /tmp has",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_before_the_model_is_looked_at(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="swap") as error:
        swap.check(CompressionConfig.from_dict(settings))
    assert message in str(error.value)


def test_without_a_policy(model: str) -> None:
    """Pages and cache dtype stay vLLM's; asked again, the arguments say the same."""
    from vllm import EngineArgs

    plain = EngineArgs(model, skip_tokenizer_init=True).create_engine_config().cache_config
    args = EngineArgs(
        model,
        skip_tokenizer_init=True,
        additional_config={"paged_kv": {"swap_space": 0.5}},
    )
    for config in (args.create_engine_config(), args.create_engine_config()):
        assert config.scheduler_config.scheduler_cls == "paged_kv.vllm.swap.scheduler.SwapScheduler"
        assert config.parallel_config.worker_cls == "paged_kv.vllm.worker.worker.PagedCPUWorker"
        assert config.kv_transfer_config.kv_connector == "SwapConnector"
        assert config.cache_config.block_size == plain.block_size
        assert config.cache_config.cache_dtype == plain.cache_dtype
        assert not config.scheduler_config.disable_hybrid_kv_cache_manager


def test_with_a_policy_the_scheduler_is_the_policys(model: str) -> None:
    config = engine_config(model, {"policy": "streaming", "budget": 128, "swap_space": 0.5})
    assert config.scheduler_config.scheduler_cls.startswith(
        "paged_kv.vllm.scheduler.scheduler.Paged"
    )
    assert swap.is_ours(config.kv_transfer_config)


def test_no_swap_no_connector(model: str) -> None:
    assert engine_config(model, {"policy": "streaming", "budget": 128}).kv_transfer_config is None
    assert engine_config(model, {"swap_space": 0.0}).scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "kv-swap-space does not support KV connectors",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism with kv-swap-space"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "the scheduler class"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(model: str, more: dict[str, Any], message: str) -> None:
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in more:
        more = {"kv_transfer_config": KVTransferConfig(**more["kv_transfer_config"])}
    with pytest.raises(ValueError, match="kv-swap-space") as error:
        engine_config(model, {"swap_space": 0.5}, **more)
    assert message in str(error.value)


def test_flags(model: str, tmp_path: Path) -> None:
    parser = options.add_cli_args(argparse.ArgumentParser())
    line = ["--kv-swap-space", "1.5", "--kv-swap-format", "int8"]
    line += ["--kv-swap-dir", str(tmp_path), "--kv-swap-dir-space", "0.25"]
    parsed = _parse(parser, line, model)
    config = CompressionConfig.from_dict(parsed.additional_config["paged_kv"])
    assert parsed.kv_swap_space is None  # what further API servers get says it once
    assert (config.policy, config.swap_space, config.swap_format) == ("full", 1.5, "int8")
    assert (config.swap_dir, config.swap_dir_space) == (str(tmp_path), 0.25)


def _parse(parser: argparse.ArgumentParser, line: list[str], model: str = "") -> argparse.Namespace:
    parser.add_argument("--model", default=model)
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--additional-config", default=None)
    return parser.parse_args(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--kv-swap-space", "much"], "kv-swap-space must be a number of GiB, not 'much'"),
        (["--kv-swap-dir", "/tmp"], "needs a kv-swap-space above 0"),
        (["--kv-swap-space", "1", "--kv-budget", "64"], "need a kv-policy"),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = options.add_cli_args(argparse.ArgumentParser())
    with pytest.raises(SystemExit) as end:
        _parse(parser, line)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


SPILL = {"policy": "h2o", "budget": 128, "spill": True, "spill_dir": "/nowhere"}
NO_SPILL_DIR = "spill_dir must be a directory to write to, not '/nowhere': No such file"


def test_a_spill_dir_that_is_missing(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by the front end, in Python and on the command line."""
    with pytest.raises(ValueError, match=NO_SPILL_DIR):
        engine_config(model, SPILL)
    parser = options.add_cli_args(argparse.ArgumentParser())
    more = json.dumps({name: SPILL[name] for name in ("spill", "spill_dir")})
    with pytest.raises(SystemExit) as end:
        _parse(parser, ["--kv-policy", "h2o", "--kv-policy-config", more])
    assert end.value.code == 2
    assert NO_SPILL_DIR in capsys.readouterr().err
