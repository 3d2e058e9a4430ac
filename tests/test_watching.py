"""What a server counts is what its pool and its workers do; and how it gets to /metrics."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import engines
import pytest
import random_worlds
import tiny_models
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from vllm import SamplingParams
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from watched_worlds import WatchedWorld

from paged_kv.vllm.watch import metrics, places, totals
from paged_kv.vllm.watch.metrics import METRICS, PREFIX
from paged_kv.vllm.watch.stat_logger import PagedStatLogger
from paged_kv.vllm.watch.totals import Increments, Series

SERIES = [Series("freed_pages", {"group": "0"}), Series("pool_pages", {})]


@pytest.fixture
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv(places.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def no_metrics():
    unregister_vllm_metrics()
    yield
    unregister_vllm_metrics()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["random_world", "random_swap_world"])
@pytest.mark.parametrize("pressure", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_counters_agree_with_the_pool(directory, monkeypatch, kind, pressure, asynchronous, seed):
    monkeypatch.setattr(metrics, "INTERVAL", 0)
    monkeypatch.setattr(random_worlds, "World", partial(WatchedWorld, directory=directory))
    world = getattr(random_worlds, kind)(seed, pressure=pressure, asynchronous=asynchronous)
    assert world.num_checks > 0


def test_a_file_says_what_its_numbers_are(tmp_path):
    written = totals.create(tmp_path / "engine-0", SERIES, {"page_size": 16})
    found = totals.read(tmp_path / "engine-0")
    assert (found.series, found.facts) == (SERIES, {"page_size": 16})
    assert found.values.tolist() == [0, 0]
    written.values[:] = 1 << 62, 5
    assert found.values.tolist() == [1 << 62, 5]  # the same memory
    # An engine that starts anew: who reads the old file goes on.
    totals.create(tmp_path / "engine-0", SERIES[:1], {})
    assert found.values.tolist() == [1 << 62, 5]
    assert totals.read(tmp_path / "engine-0").values.tolist() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["engine-0"]
    for number in (7, 5):  # what was taken of the old one does not count any more
        totals.create(tmp_path / "engine-0", SERIES, {}).values[0] = number
        anew = Increments(totals.read(tmp_path / "engine-0"))
        assert [anew.take().tolist() for _ in range(2)] == [[number, 0], [0, 0]]


TAKING = """
import sys
from pathlib import Path
from paged_kv.vllm.watch.totals import Increments, read

path = Path(sys.argv[1])
file = read(path)
increments, total = Increments(file), 0
print("ready", flush=True)
while file.values[1] == 0:
    total += int(increments.take()[0])
print(total + int(increments.take()[0]))
"""


def test_each_increment_is_taken_by_one_front_end(tmp_path):
    """Two processes take while this one counts: together they have all of it."""
    path = tmp_path / "engine-0"
    written = totals.create(path, SERIES, {})
    line = [sys.executable, "-c", TAKING, str(path)]
    takers = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for taker in takers:
        assert taker.stdout is not None
        assert taker.stdout.readline() == "ready\n"
    own, taken = Increments(totals.read(path)), 0
    end = time.monotonic() + 1
    while time.monotonic() < end:
        written.values[0] += 1
        taken += int(own.take()[0])
    written.values[1] = 1
    counted = [int(taker.communicate(timeout=120)[0]) for taker in takers]
    assert min(taken, *counted) > 0, "all of them have taken some"
    assert taken + sum(counted) + int(own.take()[0]) == written.values[0]


def test_a_directory_goes_with_the_server(tmp_path, monkeypatch):
    """And one that a killed server has left goes with the next server's start."""
    monkeypatch.setattr(places, "MEMORY", str(tmp_path))
    program = (
        "import os, signal, sys\n"
        "from paged_kv.vllm.watch import places\n"
        f"places.MEMORY = {str(tmp_path)!r}\n"
        "places.ensure()\n"
        "first = places.directory()\n"
        "places.ensure()\n"
        "assert places.directory() == first\n"
        "assert oct(first.stat().st_mode)[-3:] == '700'\n"
        "print(first, flush=True)\n"
        "if sys.argv[1:]:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    variables = {**os.environ, places.VARIABLE: "/somebody/elses"}
    for arguments, left in ([], 0), (["kill"], 1), ([], 0):
        line = [sys.executable, "-c", program, *arguments]
        made = subprocess.run(line, env=variables, capture_output=True, text=True)
        assert made.stdout.startswith(f"{tmp_path}/paged-kv-watch-"), made.stderr
        assert len(list(tmp_path.iterdir())) == left


def test_one_of_several_api_servers_makes_no_directory(directory):
    places.ensure(inherited=True)
    assert places.directory() == directory


def test_files_of_an_engine(tmp_path):
    for name in ("engine-1", "engine-1-rank-0", "engine-1-rank-0-exported", "engine-1-map",
                 "engine-10", "engine-1-exported", ".engine-1.new"):  # fmt: skip
        (tmp_path / name).touch()
    assert [path.name for path in places.files(tmp_path, 1)] == ["engine-1", "engine-1-rank-0"]


def config(name: str = "m", api_servers: int = 1):
    return SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=name),
        parallel_config=SimpleNamespace(_api_process_count=api_servers, _api_process_rank=1),
    )


def test_every_metric_gets_to_prometheus(directory, no_metrics):
    """Counters as what they have grown by, gauges as they are, those of two ranks added up."""

    def series(rank: str) -> list[Series]:
        own = {"rank": rank, "group": "0", "policy": "h2o", "tier": "host", "use": "spill"}
        return [
            Series(name, {label: own[label] for label in metric.labels})
            for name, metric in METRICS.items()
        ]

    paths = [places.file_of(directory, 3, rank) for rank in range(2)]
    files = [totals.create(path, series(str(rank)), {}) for rank, path in enumerate(paths)]
    logger = PagedStatLogger(config(), [3])
    logger.record(None, None, engine_idx=3)  # before the engine is ready: nothing to say
    logger.log_engine_initialized()
    for name, metric in METRICS.items():
        assert value(name, rank="0") == 0, "from the start"
        for step in (1, 2):
            for file in files:
                file.values[list(METRICS).index(name)] = 1000 * step
            logger.record(None, None, engine_idx=3)
            logger.record(None, None, engine_idx=0)  # not ours
            ranks = 1 if "rank" in metric.labels else 2
            assert value(name, rank="0") == pytest.approx(1000 * step * ranks * metric.scale)


def value(name: str, **more: str) -> float | None:
    own = {"group": "0", "policy": "h2o", "tier": "host", "use": "spill", **more}
    labels = {label: own[label] for label in METRICS[name].labels}
    suffix = "_total" if METRICS[name].is_counter else ""
    sample = f"{PREFIX}_{name}{suffix}"
    return REGISTRY.get_sample_value(sample, {"model_name": "m", "engine": "3", **labels})


def test_no_policy_no_metrics(monkeypatch, tmp_path, no_metrics):
    for place in (str(tmp_path), "", "/nowhere"):
        monkeypatch.setenv(places.VARIABLE, place)
        logger = PagedStatLogger(config(), [0])
        logger.log_engine_initialized()
        logger.record(None, None)
        logger.log()
    assert PREFIX.encode() not in generate_latest(REGISTRY)


@pytest.mark.parametrize(
    ("policy", "dropped"),
    [
        ({"policy": "pyramidal+h2o", "budget": 128, "pyramid_beta": 1.5}, "evicted"),
        ({"policy": "value_merge", "of": "knorm", "budget": 96}, "merged"),
    ],
    ids=["evicts", "merges"],
)
@pytest.mark.vllm
def test_an_engine_counts_what_it_does(tmp_path, no_metrics, policy, dropped):
    model = tiny_models.saved("llama", tmp_path, tokenizer=True)
    with (
        engines.engine(model, policy, disable_log_stats=False) as llm,
        engines.logged("vllm.watch.stat_logger") as lines,
    ):
        logger = PagedStatLogger(config(), [0])
        logger.log_engine_initialized()
        engines.generate(llm, [[3 + i] * 200 for i in range(3)], 80)
        logger.record(None, None)
        managers = engines.scheduler(llm).paged_managers
        compactor = engines.worker(llm).compactor
        pool = engines.scheduler(llm).kv_cache_manager.block_pool
        found = samples()
        assert found["compactions_total"] == {(("rank", "0"),): compactor.num_events}
        assert 0 < found["compaction_seconds_total"][("rank", "0"),] < 60
        for manager in managers:
            group = str(manager.kv_cache_group_id)
            # All three ran to 279 tokens, of which the last is not computed; before the last step
            # it was one less.
            size = manager.block_size
            freed = 3 * (manager.schedule.evicted(278, 200) // size)
            assert found["freed_pages_total"][("group", group),] == freed > 0
            layers = engines.scheduler(llm).kv_cache_config.kv_cache_groups[int(group)].layer_names
            key = ("group", group), ("policy", policy["policy"])
            assert found[f"{dropped}_entries_total"][key] == freed * size * len(layers)
        assert found["pool_pages"] == {(): pool.num_gpu_blocks - 1} == found["free_pages"]
        logger.log()
        total = sum(found[f"{dropped}_entries_total"].values())
        assert len(lines) == 1
        assert f"{total:,.0f} entries {dropped}" in lines[0]
        logger.log()
        assert len(lines) == 1, "nothing is new"
        logger = PagedStatLogger(config(api_servers=2), [0])
        logger.log()
        assert len(lines) == 1, "one of several servers does not know all"
        assert scrape_seconds() < 1e-3


@pytest.mark.vllm
def test_what_is_spilled_agrees_with_its_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "INTERVAL", 0)
    model = tiny_models.saved("llama", tmp_path, tokenizer=True)
    policy = {"policy": "snapkv", "budget": 96, "observation_window": 8, "spill": True}
    policy |= {"spill_interval": 32, "spill_threshold": 0.0}
    with engines.engine(model, policy) as llm:
        file = totals.read(places.file_of(places.directory(), 0, 0))
        names = [series.name for series in file.series]
        params = SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True, detokenize=False)
        prompt = [random.Random(0).randrange(3, tiny_models.VOCAB_SIZE) for _ in range(300)]
        llm.llm_engine.add_request("0", {"prompt_token_ids": prompt}, params)
        seen = []
        while llm.llm_engine.has_unfinished_requests():
            compactor, before = engines.worker(llm).compactor, file.values[0]
            llm.llm_engine.step()
            found = dict(zip(names[:3], file.values[:3].tolist(), strict=True))
            host, files = file.values[3:].tolist()
            stats = compactor.spill_stats()
            assert found["compactions"] == compactor.num_events
            if file.values[0] > before:  # what was on its way then has arrived now
                assert found["fetched_entries"] == stats.fetched
                assert host <= stats.host_bytes
                assert files == stats.mmap_bytes == 0
                seen.append(host)
        assert stats.fetched > 0
        assert seen[-1] > 0


def samples() -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """By name without PREFIX, then by labels beside model_name and engine."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name.startswith(PREFIX):
                own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                name = sample.name.removeprefix(f"{PREFIX}_")
                found.setdefault(name, {})[tuple(sorted(own.items()))] = sample.value
    return found


def scrape_seconds() -> float:
    """What our metrics take of a scrape; the least of some, for others use this machine, too."""
    ours = CollectorRegistry()
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            ours.register(collector)

    def once() -> float:
        begin = time.perf_counter()
        generate_latest(ours)
        return time.perf_counter() - begin

    return min(once() for _ in range(20))
