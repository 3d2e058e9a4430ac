"""What an operator is told when a server starts, which logger it gets, and what the guide says."""

from __future__ import annotations

import logging
import re
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import tiny_models
from vllm import envs
from vllm.v1.engine.async_llm import AsyncLLM

from paged_kv.vllm.frontend import loggers
from paged_kv.vllm.plan import PLAN_KEY
from paged_kv.vllm.watch import places, start_up, totals
from paged_kv.vllm.watch.metrics import METRICS
from paged_kv.vllm.watch.stat_logger import PagedStatLogger


@pytest.mark.vllm
def test_the_last_word_before_a_server_is_ready(tmp_path, monkeypatch):
    """Its figures are the engine's, and those of one without a policy."""
    model = tiny_models.saved("llama", tmp_path, tokenizer=True)
    size = {"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 16}
    with engines.engine(model, **size) as llm:
        plain = engines.block_pool(llm).num_gpu_blocks - 1
        page = engines.engine_core(llm).vllm_config.cache_config.block_size
        plain_sequences = plain / (2048 / page)
    policy = {"policy": "pyramidal", "budget": 256, "start": "pressure"}
    with engines.engine(model, policy, disable_log_stats=False, **size) as llm:
        vllm_config = engines.engine_core(llm).vllm_config
        facts = totals.read(places.file_of(places.directory(), 0)).facts
        capacity = engines.scheduler(llm).capacity
        sequences = (capacity.num_pages - 1) / capacity.pages_per_sequence()
        text = start_up.describe(vllm_config, facts)
        assert "pyramidal, budget 256, once pages run out" in text
        assert "layers 0-1: 320 entries; layers 2-3: 256 entries" in text
        found = re.search(r"([\d.]+) sequences of 2,048 tokens .*, without a policy ([\d.]+)", text)
        assert found
        assert float(found[1]) == pytest.approx(sequences, abs=0.06)
        assert float(found[2]) == pytest.approx(plain_sequences, abs=0.06)
        assert f"memory: the pool has {capacity.num_pages - 1:,} pages" in text
        assert facts["longest_prompt"] is capacity.longest_prompt is None
        assert re.search(r"prompts +of any length", text)
        many = {**facts, "pool_pages": 16 * facts["sequence_pages"], "longest_prompt": 1024}
        text = start_up.describe(vllm_config, many)
        assert re.search(r"bounded by +--max-num-seqs 16:", text)
        assert re.search(r"prompts +of at most 1,024 tokens", text)
        for plugins, page in (("paged_kv", "off; VLLM_PLUGINS=paged_kv,paged_kv_page"),
                              ("paged_kv,paged_kv_page", "/kv")):  # fmt: skip
            monkeypatch.setattr(envs, "VLLM_PLUGINS", plugins.split(","), raising=False)
            assert re.search(rf"page +{page}", start_up.describe(vllm_config, facts))


def test_it_is_said_once_and_last(monkeypatch):
    said = []
    monkeypatch.setattr(start_up.logger, "info", lambda form, text: said.append(text))
    web_server = logging.getLogger("uvicorn.error")
    announcement = start_up.Announcement("all of it")
    web_server.addFilter(announcement)
    monkeypatch.setattr(web_server, "disabled", False)
    web_server.setLevel(logging.INFO)
    try:
        web_server.info("Waiting for application startup.")
        assert not said
        for _ in range(2):
            web_server.info(start_up.READY)
            announcement.write()
        assert said == ["all of it"]
    finally:
        web_server.removeFilter(announcement)


@pytest.mark.parametrize(
    ("log_stats", "config", "ours"),
    [
        (True, {PLAN_KEY: {}}, True),
        (False, {PLAN_KEY: {}}, False),
        (True, {}, False),
        (True, None, False),
    ],
)
def test_vllm_is_asked_for_our_logger_where_it_keeps_statistics(log_stats, config, ours):
    made = []

    def init(self, vllm_config, executor_class, log_stats, more=1, stat_loggers=None) -> None:
        made.append((vllm_config, executor_class, log_stats, more, stat_loggers or []))

    vllm_config = SimpleNamespace(additional_config=config)
    wrapped = loggers.with_logger(init)
    wrapped(None, vllm_config, object, log_stats)
    wrapped(None, executor_class=object, vllm_config=vllm_config, log_stats=log_stats, more=2,
            stat_loggers=[int])  # fmt: skip
    own = [PagedStatLogger] * ours
    assert made == [
        (vllm_config, object, log_stats, 1, own),
        (vllm_config, object, log_stats, 2, [int, *own]),
    ]
    assert {"log_stats", "vllm_config", "stat_loggers"} <= set(signature(AsyncLLM).parameters)


def test_every_metric_is_explained():
    text = (Path(__file__).parent.parent / "docs" / "watching.md").read_text()
    for name, metric in METRICS.items():
        row = next(
            line for line in text.splitlines() if f"`{name}{metric.is_counter * '_total'}`" in line
        )
        assert [label for label in re.findall(r"\w+", row.split("|")[2])] == list(metric.labels)
