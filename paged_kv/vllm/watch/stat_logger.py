"""A logger of vLLM's kind: our metrics on /metrics, and a line in the log beside vLLM's own.

vLLM makes one for each front end and calls it after every step whose results reach that front end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from paged_kv.vllm.watch import places, start_up, totals
from paged_kv.vllm.watch.metrics import METRICS, PREFIX, Metric
from paged_kv.vllm.watch.totals import Series

logger = init_logger(f"vllm.{__name__}")

_Key = tuple[str, tuple[str, ...]]  # a metric's name, values of its labels


class PagedStatLogger(AggregateStatLoggerBase):
    """Takes over what engines of this server count; without a policy it does nothing.

    Args:
        vllm_config: of the server.
        engine_indexes: engines that this front end talks to.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._model = str(vllm_config.model_config.served_model_name)
        self._indexes = engine_indexes
        self._vllm_config = vllm_config
        parallel = vllm_config.parallel_config
        self._several = parallel._api_process_count > 1
        self._is_first_server = parallel._api_process_rank == 0
        self._start_up = start_up.NOTHING
        self._engines: dict[int, _Engine] = {}
        self._metrics: dict[str, Any] = {}
        self._since_line: Counter[str] = Counter()

    def log_engine_initialized(self) -> None:
        """The engines run, and vLLM has thrown out metrics of older ones: ours can be made."""
        directory = places.directory()
        if directory is None:
            return
        for index in self._indexes:
            files = places.files(directory, index)
            if files:
                self._engines[index] = _Engine(files)
                self._export(index, self._engines[index])
        if self._engines and self._is_first_server:
            facts = next(iter(self._engines.values())).facts
            self._start_up = start_up.announce(self._vllm_config, facts)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """After a step."""
        engine = self._engines.get(engine_idx)
        if engine is not None:
            self._export(engine_idx, engine)

    def log(self) -> None:
        """The line: what is new since the last one. Of several API servers none has all of it."""
        self._start_up.write()
        for index, engine in self._engines.items():
            self._export(index, engine)
        new, self._since_line = self._since_line, Counter()
        if self._several or not new["freed_pages"]:
            return
        gauges = [engine.gauges for engine in self._engines.values()]
        free, pool, held = (
            sum(value for g in gauges for (name, _), value in g.items() if name == wanted)
            for wanted in ("free_pages", "pool_pages", "requests_at_budget")
        )
        logger.info(
            "paged_kv: %s pages given back, %s entries %s (per KV head); now %s of %s pages free, "
            "%d requests at their budgets",
            f"{new['freed_pages']:,}",
            f"{new['evicted_entries'] + new['merged_entries']:,}",
            "merged" if new["merged_entries"] else "evicted",
            f"{free:,}",
            f"{pool:,}",
            held,
        )

    def _export(self, index: int, engine: _Engine) -> None:
        for (name, labels), new in engine.take():
            metric = METRICS[name]
            child = self._metric(name, metric).labels(self._model, str(index), *labels)
            if metric.is_counter:
                child.inc(new * metric.scale)
                self._since_line[name] += new
            else:
                child.set(new * metric.scale)

    def _metric(self, name: str, metric: Metric) -> Any:
        if name not in self._metrics:
            kind: Any = prometheus_client.Counter
            more = {}
            if not metric.is_counter:
                kind, more = prometheus_client.Gauge, {"multiprocess_mode": "mostrecent"}
            self._metrics[name] = kind(
                name=f"{PREFIX}_{name}",
                documentation=metric.documentation,
                labelnames=["model_name", "engine", *metric.labels],
                **more,
            )
        return self._metrics[name]


class _Engine:
    """The files of an engine and its workers.

    Attributes:
        facts: what the scheduler says of itself.
        gauges: how things were when somebody looked last; those of several workers added up.
    """

    def __init__(self, files: list[Path]) -> None:
        opened = [totals.read(path) for path in files]
        self._files = [(file, totals.Increments(file)) for file in opened]
        self.facts = next((file.facts for file in opened if file.facts), {})
        self.gauges: Counter[_Key] = Counter()
        self._is_first = True

    def take(self) -> Iterator[tuple[_Key, int]]:
        """Counters that have grown, by how much, and gauges; all of them when asked first."""
        gauges: Counter[_Key] = Counter()
        for file, increments in self._files:
            new = increments.take().tolist()
            for series, increment, value in zip(
                file.series, new, file.values.tolist(), strict=True
            ):
                key = _key(series)
                if not METRICS[series.name].is_counter:
                    gauges[key] += value
                elif increment or self._is_first:
                    yield key, increment
        for key, value in gauges.items():
            if self._is_first or value != self.gauges[key]:
                yield key, value
        self._is_first, self.gauges = False, gauges


def _key(series: Series) -> _Key:
    return series.name, tuple(series.labels[name] for name in METRICS[series.name].labels)
