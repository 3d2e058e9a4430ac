"""Our flags, --kv-policy, --kv-budget and so on: from the user into a VllmConfig.

A user's mistake is a ValueError before any process starts; on the command line, one line and exit
code 2.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger

from paged_kv import registry
from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.options import parse_json
from paged_kv.core.page_formats import NATIVE
from paged_kv.option_table import OLD_NAMES, OPTIONS
from paged_kv.tiers.files import check_spill_dir
from paged_kv.vllm.frontend import formats, intake, loggers, support
from paged_kv.vllm.plan import PLAN_KEY
from paged_kv.vllm.swap import options as swap
from paged_kv.vllm.watch import places

logger = init_logger(f"vllm.{__name__}")

CONFIG_KEY = "paged_kv"
SWAP_OPTIONS = tuple(name for name in OPTIONS if name.startswith("swap_"))
FLAGS = (
    "kv_policy",
    "kv_budget",
    "kv_start",
    "kv_policy_config",
    *(f"kv_{name}" for name in SWAP_OPTIONS),
)


class _CommandLine(dict[str, Any]):
    """additional_config that came from a command line.

    The mark is on this value because it alone comes through: `vllm bench` hands the fields of its
    EngineArgs to LLM, which makes others of them.
    """


class _Title(str):
    """A group's title that --help=TITLE finds: vLLM turns the underscores of TITLE into dashes."""

    def lower(self) -> str:
        return str(self).lower().replace("_", "-")


def add_cli_args(parser: Any) -> Any:
    """Adds our group to the parser of `vllm serve` and `vllm bench`."""
    group = parser.add_argument_group(
        title=_Title("paged_kv"),
        description="KV-cache compression: fewer pages per sequence. The last block in the log "
        "before the server is ready says what is kept, and how many sequences fit. Then: /metrics "
        "(vllm:paged_kv_...), `paged-kv top URL`, and with VLLM_PLUGINS=paged_kv,paged_kv_page a "
        "live page at /kv. Before: `paged-kv capacity`.",
    )
    add = group.add_argument
    names = ", ".join(registry.available())
    add("--kv-policy", metavar=OPTIONS["policy"].metavar, help=f"{_help('policy')} NAMEs: {names}.")
    for name in ("budget", "start"):
        add(_flag(name), metavar=OPTIONS[name].metavar, help=_help(name))
    add(
        "--kv-policy-config",
        metavar="JSON",
        help=f"More options: {', '.join(_without_flag())}, and what the policy declares; `paged-kv "
        "options` explains them.",
    )
    for name in SWAP_OPTIONS:
        add(_flag(name), metavar=OPTIONS[name].metavar, help=_help(name))
    _fold_when_parsed(parser)
    return parser


def _flag(name: str) -> str:
    return f"--kv-{name.replace('_', '-')}"


def _without_flag() -> list[str]:
    """The options that only --kv-policy-config has."""
    return [name for name in OPTIONS if f"kv_{name}" not in FLAGS]


def _help(name: str) -> str:
    """An option's line of help as a sentence, with its default."""
    option = OPTIONS[name]
    return f"{option.help[0].upper()}{option.help[1:]}. Default: {option.shown_default}."


def _fold_when_parsed(parser: Any) -> None:
    """Has parsed arguments carry our options in additional_config, validated.

    As early as that: vLLM sends what it parsed to further API servers, which make EngineArgs of it
    before they load any plugin. And `vllm bench throughput` loads the tokenizer before it makes
    EngineArgs, and would fail there with a traceback.
    """
    parse_known_args = parser.parse_known_args

    @functools.wraps(parse_known_args)
    def folding(*args: Any, **kwargs: Any) -> Any:
        namespace, extras = parse_known_args(*args, **kwargs)
        additional = _CommandLine(namespace.additional_config or {})
        with _errors_of(additional):
            _take_flags(namespace, additional)
            config = _read(additional.get(CONFIG_KEY, {}))
            _check_machine(config)
            if _is_active(config):
                model = getattr(namespace, "model_tag", None) or namespace.model
                support.check_model_directory(model, namespace.load_format)
        if CONFIG_KEY in additional:
            namespace.additional_config = additional
        if config.enabled:
            places.ensure()
        return namespace, extras

    parser.parse_known_args = folding


def _take_flags(args: argparse.Namespace, additional: dict[str, Any]) -> None:
    """Moves our flags into additional. Raises ValueError: they contradict it or each other."""
    policy, more = getattr(args, "kv_policy", None), getattr(args, "kv_policy_config", None)
    held = {name: getattr(args, f"kv_{name}", None) for name in ("budget", "start")}
    held = {name: text for name, text in held.items() if text is not None}
    flags = {name: getattr(args, f"kv_{name}", None) for name in SWAP_OPTIONS}
    swap_flags = {name: text for name, text in flags.items() if text is not None}
    if policy is None and (held or more is not None):
        raise ValueError("kv-budget, kv-start and kv-policy-config need a kv-policy")
    if policy is None and not swap_flags:
        return
    if CONFIG_KEY in additional:
        flag = "kv-policy" if policy is not None else "kv-swap-space"
        raise ValueError(f"give either {flag} or additional-config's paged_kv, not both")
    settings = parse_json(more) if more else {}
    settings |= {"policy": policy} if policy is not None else {}
    settings |= held
    settings |= {
        name: _gib(name, text) if OPTIONS[name].metavar == "GIB" else text
        for name, text in swap_flags.items()
    }
    additional[CONFIG_KEY] = _read(settings).to_dict()
    for name in FLAGS:
        setattr(args, name, None)


def _read(settings: Any) -> CompressionConfig:
    """The options. The log says what has another name now: Python's warnings are not shown here."""
    for old, name in OLD_NAMES.items():
        if isinstance(settings, dict) and old in settings:
            logger.warning_once("the paged_kv option %s is now called %s", old, name)
    return CompressionConfig.from_dict(settings)


def _check_machine(config: CompressionConfig) -> None:
    """Refuses directories and sizes that this machine does not have. Raises ValueError."""
    swap.check(config)
    check_spill_dir(config.spill_dir)


def _gib(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        option = name.replace("_", "-")
        raise ValueError(f"kv-{option} must be a number of GiB, not {text!r}") from None


def before_engine_config(engine_args: Any) -> CompressionConfig:
    """Validates our options and takes what is ours out of vLLM's, before vLLM looks at the model.

    Raises:
        ValueError: see CompressionConfig and formats.take_cache_dtype.
    """
    additional = engine_args.additional_config
    with _errors_of(additional):
        settings = additional.get(CONFIG_KEY, {}) if isinstance(additional, dict) else {}
        asked = _read(settings)
        config = formats.take_cache_dtype(engine_args, asked)
        if config != asked:
            # vLLM may ask for a config again, and no longer finds the dtype in the arguments.
            engine_args.additional_config = _with_settings(additional, config)
        _check_machine(config)
        if config.swap_space:
            swap.set_connector(engine_args)
        if _is_active(config):
            support.check_arguments(engine_args, config)
        if config.enabled and engine_args.block_size is None:
            engine_args.block_size = DEFAULT_PAGE_SIZE
        return config


def after_engine_config(engine_args: Any, vllm_config: Any, config: CompressionConfig) -> None:
    """Checks what vLLM made of it and has our worker and scheduler used."""
    if not _is_active(config):
        return
    with _errors_of(engine_args.additional_config):
        plan = support.check(vllm_config, config)
        # Every rank reads the same: whether all compressed layers have pages of ours, whose
        # attention sums up what entries get, and where the model's statistics are.
        sums_attention = all(plan.format(layer) for layer in plan.budgets)
        model = vllm_config.model_config
        config = config.settled(model.model, sums_attention, model.hf_text_config)
    additional = _with_settings(dict(vllm_config.additional_config), config)
    additional[PLAN_KEY] = plan.to_json()
    json.dumps(additional)  # vLLM hashes it
    vllm_config.additional_config = additional
    _install_worker(vllm_config)
    intake.install()
    if config.enabled or config.swap_space:
        _install_scheduler(vllm_config, config)
    if config.enabled:
        loggers.install()
        places.ensure(inherited=vllm_config.parallel_config._api_process_count > 1)


def _is_active(config: CompressionConfig) -> bool:
    """Whether anything of ours has to run in the engine."""
    return config.enabled or config.page_format != NATIVE or config.swap_space > 0


def _with_settings(additional: Any, config: CompressionConfig) -> dict[str, Any]:
    """additional_config with our settings; of the same kind. Raises ValueError: it is no dict."""
    if not isinstance(additional, dict):
        raise ValueError(
            f"page_format {config.page_format} needs an additional_config that is a dict, not a "
            f"{type(additional).__name__}"
        )
    return type(additional)(additional, **{CONFIG_KEY: config.to_dict()})


def _install_worker(vllm_config: Any) -> None:
    from paged_kv.vllm.worker.worker import WORKERS

    parallel = vllm_config.parallel_config
    parallel.worker_cls = f"paged_kv.vllm.worker.worker.{WORKERS[parallel.worker_cls]}"


def _install_scheduler(vllm_config: Any, config: CompressionConfig) -> None:
    scheduler = vllm_config.scheduler_config
    kind = "AsyncScheduler" if scheduler.async_scheduling else "Scheduler"
    if not config.enabled:
        scheduler.scheduler_cls = f"paged_kv.vllm.swap.scheduler.Swap{kind}"
        return
    scheduler.scheduler_cls = f"paged_kv.vllm.scheduler.scheduler.Paged{kind}"


@contextmanager
def _errors_of(additional_config: Any) -> Iterator[None]:
    """ValueErrors as they are in Python; on the command line as argparse would show them."""
    try:
        yield
    except ValueError as error:
        if not isinstance(additional_config, _CommandLine):
            raise
        print(f"vllm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
