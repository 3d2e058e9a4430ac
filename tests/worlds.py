"""Worlds of integers: vLLM's real scheduler and page managers, a worker without a model.

The scheduler is the real one under a real VllmConfig; the model is a config.json. The worker does
what vLLM's V1 runner and our Compactor do with pages, but an entry is a label that says what was
computed: equal labels are equal keys and values. Beside the pages it keeps, for every request, the
cache that a private run without prefix caching would have, and compares what a step reads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from paged_kv.core.schedule import Schedule, cdiv
from paged_kv.plan import Plan
from paged_kv.policies.base import Events, Moves, PositionalPolicy
from paged_kv.policies.region import Region
from paged_kv.vllm import limits
from paged_kv.vllm.scheduler import PagedAsyncScheduler, PagedScheduler
from paged_kv.vllm.spec import PagedSpec, register

Budget = tuple[int, int, int]  # minimum, numerator, denominator
Label = tuple[Any, ...]  # what was computed: (group, hash of the prefix) while nothing is evicted


@dataclass(frozen=True)
class Rules:
    """How a world is set up.

    Args:
        num_pages: of the pool, vLLM's null page included.
        budgets: one per layer group.
        page_size: tokens per page.
        full_groups: groups of layers that keep everything (skip_layers).
        compress_prefill: as in CompressionConfig.
        caching: prefix caching.
        max_len: max_model_len.
        batch: max_num_batched_tokens.
        seqs: max_num_seqs.
        asynchronous: a step is scheduled while the one before it is in flight.
    """

    num_pages: int = 40
    budgets: tuple[Budget, ...] = ((8, 0, 1),)
    page_size: int = 4
    full_groups: int = 0
    compress_prefill: bool = False
    caching: bool = True
    max_len: int = 64
    batch: int = 16
    seqs: int = 6
    asynchronous: bool = False

    @property
    def schedules(self) -> list[Schedule | None]:
        """By group; None keeps everything."""
        compressed = [Schedule(self.page_size, *b, self.compress_prefill) for b in self.budgets]
        return [*compressed, *[None] * self.full_groups]


class Scattering(PositionalPolicy):
    """Survivors all over the region: every page that a compaction may write is written."""

    def score(self, region: Region) -> torch.Tensor:
        raise NotImplementedError("labels have no tensors")

    def moves(self, events: Events) -> Moves:
        """As many as fit: whatever else the region holds is lost."""
        moves = []
        for event, (before, after, end) in enumerate(
            zip(events.evicted_before, events.evicted_after, events.num_tokens, strict=True)
        ):
            rng = random.Random(f"{before} {after} {end}")
            count = min(after - before, end - after)
            sources = sorted(rng.sample(range(before, after), count))
            targets = sorted(rng.sample(range(after, end), count))
            moves += [(event, *pair) for pair in zip(sources, targets, strict=True)]
        return Moves(*np.array(moves, dtype=np.int64).reshape(-1, 3).T)


@functools.cache
def _model_config() -> ModelConfig:
    directory = Path(tempfile.mkdtemp(prefix="paged_kv_world_"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 8,
        "max_position_embeddings": 1 << 20,
        "vocab_size": 64,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(model=str(directory), dtype="float32", skip_tokenizer_init=True)


def make_scheduler(rules: Rules) -> PagedScheduler | PagedAsyncScheduler:
    """Our scheduler as an engine would make it, with one layer per group."""
    register()
    init_none_hash(sha256)
    model = copy.copy(_model_config())
    model.max_model_len = rules.max_len
    cache = CacheConfig(block_size=rules.page_size, enable_prefix_caching=rules.caching)
    plan = Plan(
        rules.page_size,
        rules.compress_prefill,
        dict(enumerate(rules.budgets)),
        num_groups=len(rules.budgets),
        num_other_groups=rules.full_groups,
        layers_per_page=1,
    )
    vllm_config = VllmConfig(
        model_config=model,
        cache_config=cache,
        scheduler_config=SchedulerConfig(
            max_num_seqs=rules.seqs,
            max_num_batched_tokens=rules.batch,
            max_model_len=rules.max_len,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            watermark=0.0,
        ),
        additional_config={limits.PLAN_KEY: plan.to_json()},
    )
    # The CPU platform has turned it off; the scheduler itself needs no GPU.
    vllm_config.scheduler_config.async_scheduling = rules.asynchronous
    cache.block_size = rules.page_size
    cache.num_gpu_blocks = rules.num_pages
    full = FullAttentionSpec(
        block_size=rules.page_size, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    groups = [
        KVCacheGroupSpec([f"layer.{i}"], PagedSpec.from_full(full, s) if s else full)
        for i, s in enumerate(rules.schedules)
    ]
    scheduler_class = PagedAsyncScheduler if rules.asynchronous else PagedScheduler
    return scheduler_class(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(rules.num_pages, [], groups),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=rules.page_size,
        hash_block_size=rules.page_size,
        log_stats=True,
    )


def _label(group: int, tokens: Sequence[int]) -> Label:
    """Of the last token, computed while nothing was evicted: depends on its prefix alone."""
    return group, hash(tuple(tokens))


@dataclass
class _Row:
    """A request in the worker."""

    tokens: list[int]
    tables: list[list[int]]  # page ids by group; only ever appended to
    num_old: int  # pages of each table that are older than this step
    run: int  # how often the request has begun: on arrival and after preemptions
    private: list[dict[int, Label]]  # by group: slot -> entry of a run of its own


@dataclass
class Worker:
    """Executes steps on pages of labels.

    Args:
        schedules: by group.
        pool: the scheduler's pool, to see what is shared when something is written.
        policy: picks the survivors.
    """

    schedules: list[Schedule | None]
    pool: Any
    page_size: int
    policy: PositionalPolicy
    pages: list[list[Label | None]] = field(init=False)
    rows: dict[str, _Row] = field(default_factory=dict)
    prompt_lens: dict[str, int] = field(default_factory=dict)  # as in V1's input batch
    reads: dict[str, list[list[int]]] = field(default_factory=dict)  # last: page ids by group
    num_events: int = 0
    num_copies: int = 0
    num_snapshots: int = 0
    num_runs: int = 0

    def __post_init__(self) -> None:
        self.pages = [[None] * self.page_size for _ in self.pool.blocks]

    def execute(self, output: Any, hashed_before: set[int]) -> ModelRunnerOutput:
        """One step, in the order of the runner: copies, writes, reads, snapshots, compactions.

        Args:
            output: what the scheduler wants.
            hashed_before: pages in the prefix cache before that was scheduled: not to be written.
        """
        for request_id in output.finished_req_ids:
            self.rows.pop(request_id, None)
        for source, target in output.kv_cache_block_copies or ():
            self.pages[target] = list(self.pages[source])
            self.num_copies += 1
        starts = self._update_rows(output)
        chunks = {r: (starts[r], starts[r] + n) for r, n in output.num_scheduled_tokens.items()}
        for group in range(len(self.schedules)):
            for request_id, (start, end) in chunks.items():
                self._write(group, request_id, start, end, hashed_before)
            for request_id, (start, end) in chunks.items():
                self._read(group, request_id, start, end)
        for source, target in output.paged_kv_snapshots:
            self.pages[target] = list(self.pages[source])
            self.num_snapshots += 1
        for group in range(len(self.schedules)):
            for request_id, (start, end) in chunks.items():
                self._compact(group, request_id, start, end)
        return self._sample(chunks)

    def _update_rows(self, output: Any) -> dict[str, int]:
        starts = {}
        for row in self.rows.values():
            row.num_old = len(row.tables[0])
        for new in output.scheduled_new_reqs:
            starts[new.req_id] = new.num_computed_tokens
            self.prompt_lens[new.req_id] = len(new.prompt_token_ids)
            self._begin(new.req_id, new.prompt_token_ids, new.block_ids, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for request_id, new_ids, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            starts[request_id] = start
            if request_id in cached.resumed_req_ids:
                self._begin(request_id, cached.all_token_ids[request_id], new_ids, start)
            else:
                for table, ids in zip(self.rows[request_id].tables, new_ids or (), strict=False):
                    table.extend(ids)
        return starts

    def _begin(self, request_id: str, tokens: list[int], ids: Any, num_hits: int) -> None:
        self.num_runs += 1
        private = [
            {slot: _label(group, tokens[: slot + 1]) for slot in range(num_hits)}
            for group in range(len(self.schedules))
        ]
        tables = [list(table) for table in ids]
        num_old = num_hits // self.page_size
        self.rows[request_id] = _Row(list(tokens), tables, num_old, self.num_runs, private)

    def _evicted(self, group: int, request_id: str, num_tokens: int) -> int:
        schedule = self.schedules[group]
        return 0 if schedule is None else schedule.evicted(num_tokens, self.prompt_lens[request_id])

    def _write(self, group: int, request_id: str, start: int, end: int, hashed: set[int]) -> None:
        row = self.rows[request_id]
        raw = self._evicted(group, request_id, start) == 0
        for slot in range(start, end):
            page, offset = self._place(group, row, slot)
            block = self.pool.blocks[page]
            assert not block.is_null
            if slot // self.page_size < row.num_old:
                assert page not in hashed, f"page {page} is hashed and written"
            label: Label = (group, request_id, row.run, slot)  # depends on what was evicted
            if raw:
                label = _label(group, row.tokens[: slot + 1])
            self.pages[page][offset] = row.private[group][slot] = label

    def _read(self, group: int, request_id: str, start: int, end: int) -> None:
        row = self.rows[request_id]
        reads = self.reads.setdefault(request_id, [[] for _ in self.schedules])
        reads[group] = []
        for slot in range(self._evicted(group, request_id, start), end):
            page, offset = self._place(group, row, slot)
            reads[group].append(page)
            found, expected = self.pages[page][offset], row.private[group][slot]
            assert found == expected, f"{request_id} group {group} slot {slot} in page {page}"

    def _compact(self, group: int, request_id: str, start: int, end: int) -> None:
        before, after = (self._evicted(group, request_id, n) for n in (start, end))
        if after <= before:
            return
        self.num_events += 1
        row = self.rows[request_id]
        moves = self.policy.moves(Events(np.array([before]), np.array([after]), np.array([end])))
        pairs = list(zip(moves.source.tolist(), moves.target.tolist(), strict=True))
        places = [[self._place(group, row, slot) for slot in pair] for pair in pairs]
        entries = [self.pages[page][offset] for (page, offset), _ in places]
        for entry, (_, (page, offset)) in zip(entries, places, strict=True):
            block = self.pool.blocks[page]
            assert self.may_write(block), f"{request_id} compacts into shared page {page}"
            self.pages[page][offset] = entry
        kept = row.private[group]
        kept.update({target: kept[source] for source, target in pairs})

    def may_write(self, block: Any) -> bool:
        """Whether a compaction may write it: nobody else can see it."""
        return not block.is_null and block.block_hash is None and block.ref_cnt <= 1

    def _place(self, group: int, row: _Row, slot: int) -> tuple[int, int]:
        return row.tables[group][slot // self.page_size], slot % self.page_size

    def _sample(self, chunks: dict[str, tuple[int, int]]) -> ModelRunnerOutput:
        sampled = []
        for request_id, (_, end) in chunks.items():
            tokens = self.rows[request_id].tokens
            new = []
            if end == len(tokens):
                new = [next_token(tokens)]
                tokens += new
            sampled.append(new)
        ids = list(chunks)
        return ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled)


def next_token(tokens: Sequence[int]) -> int:
    """The model: two words."""
    return 1 + hash(tuple(tokens)) % 2


class World:
    """A scheduler, a worker, and the requests that were sent to them."""

    def __init__(self, rules: Rules, policy: PositionalPolicy | None = None) -> None:
        self.rules = rules
        self.scheduler = make_scheduler(rules)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        policy = policy or Scattering(0, 0)
        self.worker = Worker(rules.schedules, self.pool, rules.page_size, policy)
        self.requests: dict[str, Request] = {}
        self.hits: dict[str, int] = {}
        self.num_steps = 0
        self.chunks: dict[str, list[tuple[int, int]]] = {}
        self._hasher = get_request_block_hasher(rules.page_size, sha256)
        self._hashed: dict[Any, list[Label]] = {}
        self._num_noted: dict[str, int] = {}
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()

    def add(self, prompt: list[int], max_tokens: int, name: str | None = None) -> str:
        """Sends a request."""
        name = name or f"r{len(self.requests)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        params.update_from_generation_config({}, None)
        request = Request(name, list(prompt), params, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)
        self.requests[name] = request
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedules a step; under async scheduling before the output of the last is processed."""
        self.num_steps += 1
        hashed_before = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        waiting = {r.request_id for r in self.scheduler.waiting}
        processed = {
            name: request.num_computed_tokens - request.num_in_flight_tokens
            for name, request in self.scheduler.requests.items()
        }
        output = self.scheduler.schedule()
        if output.num_scheduled_tokens:
            self._check_held(output, waiting, processed)
            self._in_flight.append((output, self.worker.execute(output, hashed_before)))
        self._check_pool()
        depth = 2 if self.rules.asynchronous else 1
        if len(self._in_flight) >= depth or not output.num_scheduled_tokens:
            self.process()

    def process(self) -> None:
        """Processes the output of the oldest step in flight."""
        if self._in_flight:
            self.scheduler.update_from_output(*self._in_flight.popleft())
        if not self._in_flight:
            self._check_hashed()

    def drain(self) -> None:
        """Processes all outputs."""
        while self._in_flight:
            self.process()

    def run(self, max_steps: int) -> None:
        """Until nothing is left to do; fails if that takes more than max_steps."""
        for _ in range(max_steps):
            if not self.scheduler.requests:
                break
            self.step()
        self.drain()
        assert not self.scheduler.requests, f"not done after {max_steps} steps"

    @property
    def num_free(self) -> int:
        return self.pool.get_num_free_blocks()

    def held(self, name: str) -> list[list[int]]:
        """Page ids that a request holds, by group."""
        blocks = (m.req_to_blocks.get(name, []) for m in self._managers)
        return [[b.block_id for b in group if not b.is_null] for group in blocks]

    def check_empty(self) -> None:
        """All pages are back, and nothing is remembered of requests that are gone."""
        assert self.num_free == self.rules.num_pages - 1
        for manager in self._managers:
            assert not manager.req_to_blocks
            assert not manager.num_cached_block
        for manager in self.scheduler.paged_managers:
            assert not manager._sequences
            assert not manager._to_be_written
            assert not manager.snapshots._in_flight

    @property
    def _managers(self) -> Any:
        return self.manager.coordinator.single_type_managers

    def _check_held(self, output: Any, waiting: set[str], processed: dict[str, int]) -> None:
        """Every scheduled request holds exactly the pages that the schedule says."""
        for name, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[name]
            end = request.num_computed_tokens
            if name in waiting:
                self.hits[name] = end - num_tokens
                processed[name] = 0  # nothing of it is evicted by a hit
            self.chunks.setdefault(name, []).append((end - num_tokens, end))
            for schedule, pages in zip(self.rules.schedules, self.held(name), strict=True):
                evicted = 0
                if schedule is not None:
                    evicted = schedule.evicted(processed[name], request.num_prompt_tokens)
                expected = cdiv(end, self.rules.page_size) - evicted // self.rules.page_size
                assert len(pages) == expected, f"{name} holds {pages}, not {expected} pages"

    def _check_pool(self) -> None:
        """Free and held pages are all pages; reference counts are the numbers of holders."""
        counts = [0] * self.rules.num_pages
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    counts[block.block_id] += not block.is_null
        for manager in self.scheduler.paged_managers:  # copies that are under way
            for snapshot in manager.snapshots._in_flight:
                counts[snapshot.copy.block_id] += 1
        found = [block.ref_cnt if not block.is_null else 0 for block in self.pool.blocks]
        assert found == counts
        num_held = sum(count > 0 for count in counts)
        assert self.num_free + num_held == self.rules.num_pages - 1
        for manager in self.scheduler.paged_managers:
            held = {b.block_id for blocks in manager.req_to_blocks.values() for b in blocks}
            assert manager._to_be_written <= held

    def _check_hashed(self) -> None:
        """Every page in the prefix cache holds, raw, what its hash says."""
        for request in self.requests.values():
            self._note_hashes(request)
        for block in self.pool.blocks:
            if block.block_hash is not None:
                found = self.worker.pages[block.block_id]
                assert found == self._hashed[block.block_hash], f"page {block.block_id}"

    def _note_hashes(self, request: Request) -> None:
        """What pages with the hashes of this request must hold."""
        size, done = self.rules.page_size, self._num_noted.get(request.request_id, 0)
        for index in range(done, len(request.block_hashes)):
            for group in range(len(self.rules.schedules)):
                key = make_block_hash_with_group_id(request.block_hashes[index], group)
                if key not in self._hashed:
                    ends = range(index * size + 1, index * size + size + 1)
                    self._hashed[key] = [_label(group, request.all_token_ids[:e]) for e in ends]
        self._num_noted[request.request_id] = len(request.block_hashes)


def start_up_pages(scheduler: Any) -> int:
    """What vLLM's start-up check wants to see in the pool."""
    vllm_config, kv_cache_config = scheduler.vllm_config, scheduler.kv_cache_config
    longest = limits.max_prompt_len(vllm_config, kv_cache_config.num_blocks)
    total = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, PagedSpec):  # as PagedWorker does
            spec = dataclasses.replace(spec, max_prompt_len=longest)
        total += spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
    return total


def random_budget(rng: random.Random) -> Budget:
    """A number, or a fraction and the least it comes to."""
    minimum = rng.choice([5, 6, 8, 9, 12, 16, 24, 40])
    return rng.choice([(minimum, 0, 1), (minimum, 0, 1), (minimum, 1, 4), (minimum, 1, 2)])


def random_rules(rng: random.Random, **fixed: Any) -> Rules:
    """Rules under which vLLM would start; some pools are as small as it allows."""
    while True:
        batch = rng.choice([4, 7, 8, 16, 32])
        values: dict[str, Any] = {
            "num_pages": rng.choice([rng.randint(6, 60), rng.randint(20, 90)]),
            "budgets": tuple(random_budget(rng) for _ in range(rng.choice([1, 1, 2, 3]))),
            "full_groups": rng.choice([0, 0, 0, 1]),
            "max_len": rng.choice([24, 32, 48, 64, 96, 128]),
            "batch": batch,
            "seqs": min(batch, rng.randint(2, 6)),
        }
        rules = Rules(**{**values, **fixed})
        # Less: vLLM counts its null page as if it were of use.
        if start_up_pages(make_scheduler(rules)) < rules.num_pages:
            return rules


def random_prompt(rng: random.Random, world: World, longest: int) -> list[int]:
    """Often begins as an earlier request did, with its output or without; often very long."""
    prompt: list[int] = []
    if world.requests and rng.random() < 0.75:
        other = rng.choice(list(world.requests.values()))
        known = list(rng.choice([other.all_token_ids, other.prompt_token_ids]))
        prompt = known[: rng.choice([len(known), rng.randint(0, len(known))])]
    prompt += [rng.randint(1, 3) for _ in range(rng.choice([0, 1, rng.randint(1, longest)]))]
    if rng.random() < 0.3:
        prompt += [3] * longest
    return prompt[: rng.choice([longest, longest, rng.randint(1, longest)])] or [1]


def random_world(seed: int, **fixed: Any) -> World:
    """Arrivals, aborts and resets at random until all is done; every step is checked.

    Args:
        seed: of everything.
        fixed: values of Rules that are not random.
    """
    rng = random.Random(seed)
    world = World(random_rules(rng, **fixed))
    rules, scheduler = world.rules, world.scheduler
    limit = limits.max_prompt_len(scheduler.vllm_config, rules.num_pages)
    longest = min(rules.max_len - 1, limit or rules.max_len)
    for _ in range(rng.randint(3, 10)):
        prompt = random_prompt(rng, world, longest)
        world.add(prompt, rng.randint(1, rules.max_len - len(prompt) + 3))
        for _ in range(rng.choice([0, 0, 1, 3, 20])):
            world.step()
        if scheduler.requests and rng.random() < 0.1:
            world.abort(rng.choice(list(scheduler.requests)))
        if rng.random() < 0.08:
            scheduler.reset_prefix_cache(reset_running_requests=True)
    # One after the other, a request takes at most max_len steps; preempted ones begin anew.
    world.run(3 * rules.max_len * len(world.requests))
    world.check_empty()
    return world
