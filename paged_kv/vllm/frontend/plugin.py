"""vLLM's entry point: adds the options. Nothing else is replaced until a policy is asked for.

vLLM calls register() in every process before any config exists. vLLM has no hook for options, so
two functions of EngineArgs are wrapped, unless vLLM carries our source patch (see patches/),
which has the hook. The page spec is registered here too: the engine's process gets specs from the
workers' and looks them up before it has loaded anything else of ours.
"""

from __future__ import annotations

import functools
from typing import Any

_MARK = "_paged_kv_wrapped"


def register() -> None:
    """Adds the options to vLLM. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    from paged_kv.vllm.frontend import compat, options
    from paged_kv.vllm.scheduler import registration

    compat.check_version()
    registration.register()
    if hasattr(EngineArgs, "plugins"):  # patched vLLM
        if options not in EngineArgs.plugins:
            EngineArgs.plugins.append(options)
        return
    if getattr(EngineArgs, _MARK, False):
        return
    setattr(EngineArgs, _MARK, True)
    add_cli_args: Any = EngineArgs.add_cli_args
    create_engine_config: Any = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def wrapped_add_cli_args(parser: Any) -> Any:
        return options.add_cli_args(add_cli_args(parser))

    @functools.wraps(create_engine_config)
    def wrapped_create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        config = options.before_engine_config(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        options.after_engine_config(self, vllm_config, config)
        return vllm_config

    EngineArgs.add_cli_args = staticmethod(wrapped_add_cli_args)
    EngineArgs.create_engine_config = wrapped_create_engine_config
