"""The last word before a server is ready: what it keeps, what fits, and where to look."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from vllm import envs
from vllm.logger import init_logger

from paged_kv.config import CompressionConfig
from paged_kv.vllm.plan import get_plan

logger = init_logger(f"vllm.{__name__}")

PAGE_PLUGIN = "paged_kv_page"
READY = "Application startup complete."  # says uvicorn when it is


class Announcement(logging.Filter):
    """A text that is logged once: before the web server says that it is ready, or when asked.

    Args:
        text: empty for none.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything pass."""
        if record.msg == READY:
            self.write()
        return True

    def write(self) -> None:
        """Logs the text, if nobody has."""
        text, self._text = self._text, ""
        if text:
            logger.info("%s", text)


NOTHING = Announcement("")


def announce(vllm_config: Any, facts: Mapping[str, Any]) -> Announcement:
    """The block, to be logged where it is seen.

    vLLM has no hook at the end of a server's start; its web server logs that end.

    Args:
        vllm_config: of the server, with a plan.
        facts: of one engine's scheduler.
    """
    announcement = Announcement(describe(vllm_config, facts))
    logging.getLogger("uvicorn.error").addFilter(announcement)
    return announcement


def describe(vllm_config: Any, facts: Mapping[str, Any]) -> str:
    """The block's lines."""
    lines = {
        "policy": _policy(vllm_config),
        "keeps": get_plan(vllm_config).describe(),
        "capacity": _capacity(vllm_config, facts),
        "bounded by": _bound(vllm_config, facts),
        "prompts": _prompts(facts),
        "metrics": "/metrics, vllm:paged_kv_...; in a terminal: paged-kv top http://HOST:PORT",
        "page": _page(),
        "guide": "docs/operating.md; without --kv-policy the server is vLLM's own",
    }
    width = max(map(len, lines))
    return "\n".join(["paged_kv", *(f"  {name:{width}}  {text}" for name, text in lines.items())])


def _policy(vllm_config: Any) -> str:
    config = CompressionConfig.from_dict(vllm_config.additional_config["paged_kv"])
    if config.waits_for_pressure:
        when = "once pages run out"
    elif config.compress_prefill:
        when = "from the first chunk of a prompt on"
    else:
        when = "from a prompt's end on"
    return f"{config.policy}, budget {config.budget}, {when}"


def _capacity(vllm_config: Any, facts: Mapping[str, Any]) -> str:
    parallel, pages = vllm_config.parallel_config, facts["pool_pages"]
    length = f"{vllm_config.model_config.max_model_len:,}"
    each = " in each engine" if parallel.data_parallel_size > 1 else ""
    return (
        f"{pages / facts['sequence_pages']:.1f} sequences of {length} tokens decode at once{each}, "
        f"without a policy {pages / facts['plain_sequence_pages']:.1f}"
    )


def _bound(vllm_config: Any, facts: Mapping[str, Any]) -> str:
    most, pages = vllm_config.scheduler_config.max_num_seqs, facts["pool_pages"]
    if most * facts["sequence_pages"] <= pages:
        return f"--max-num-seqs {most}: the pool's {pages:,} pages have room for more"
    return f"memory: the pool has {pages:,} pages, {facts['sequence_pages']} for such a sequence"


def _prompts(facts: Mapping[str, Any]) -> str:
    longest = facts["longest_prompt"]
    if longest is None:
        return "of any length"
    return f"of at most {longest:,} tokens: whole until their end, unless compress_prefill is true"


def _page() -> str:
    if PAGE_PLUGIN in (envs.VLLM_PLUGINS or ()):
        return "/kv"
    return f"off; VLLM_PLUGINS=paged_kv,{PAGE_PLUGIN} vllm serve ... shows it at /kv"
