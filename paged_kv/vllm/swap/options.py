"""--kv-swap-*: checks before any process starts, and what vLLM is told of them."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from paged_kv.config import CompressionConfig

CONNECTOR = "SwapConnector"
GIB = 1 << 30


def check(config: CompressionConfig) -> None:
    """Refuses what cannot work on this machine.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    check_together(config)
    if config.swap_space:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if config.swap_space * GIB >= memory:
            raise ValueError(
                f"kv-swap-space {config.swap_space} GiB: this machine has "
                f"{memory / GIB:.1f} GiB of memory"
            )
    if config.swap_dir:
        _check_directory(config.swap_dir, config.swap_dir_space)


def check_together(config: CompressionConfig) -> None:
    """Refuses what cannot work anywhere. Raises ValueError: see check."""
    if not config.swap_space:
        for value, name in (
            (config.swap_dir, "swap-dir"),
            (config.swap_dir_space, "swap-dir-space"),
        ):
            if value:
                raise ValueError(f"kv-{name} {value} needs a kv-swap-space above 0")
        if config.swap_format != "native":
            raise ValueError(f"kv-swap-format {config.swap_format} needs a kv-swap-space above 0")
    if bool(config.swap_dir) != bool(config.swap_dir_space):
        raise ValueError(
            f"kv-swap-dir {config.swap_dir!r} and kv-swap-dir-space {config.swap_dir_space} need "
            "each other: a directory, and a number of GiB above 0"
        )


def set_connector(engine_args: Any) -> None:
    """Has vLLM use our connector.

    Raises:
        ValueError: it was told to use another one.
    """
    from vllm.config import KVTransferConfig

    transfer = engine_args.kv_transfer_config
    if transfer is not None and not is_ours(transfer):
        raise ValueError(
            f"kv-swap-space does not support KV connectors: kv-transfer-config has "
            f"{getattr(transfer, 'kv_connector', transfer)!r}"
        )
    engine_args.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path="paged_kv.vllm.swap.connector",
        # For a consumer vLLM would not preempt while a step is in flight: its loads are not ordered
        # against that step. Ours are.
        kv_role="kv_producer",
    )


def is_ours(transfer_config: Any) -> bool:
    """Whether a KVTransferConfig (or None) asks for our connector."""
    return getattr(transfer_config, "kv_connector", None) == CONNECTOR


def _check_directory(directory: str, space: float) -> None:
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
        stat = os.statvfs(directory)
    except OSError as error:
        raise ValueError(
            f"kv-swap-dir {directory}: cannot write there ({error.strerror}); it must be a "
            "directory that exists and can be written"
        ) from None
    free = stat.f_bavail * stat.f_frsize
    if space * GIB > free:
        raise ValueError(
            f"kv-swap-dir-space {space} GiB: {directory} has {free / GIB:.2f} GiB left"
        )
