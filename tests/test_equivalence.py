"""Real vLLM against the definition (reference_loop), and against itself where nothing may change.

All greedy, on SmolLM2-135M. One engine per policy and budget, all prompts in one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import engines
import pytest
import torch
from reference_loop import (
    Rule,
    complete_and_check,
    load_model,
    one_by_one,
    reference_tokens,
)

pytestmark = [pytest.mark.vllm, pytest.mark.model]

TEXT = """\
The harbour town had been built twice. The first houses stood close to the water, on the flat
ground where the river spreads out before it meets the sea, and every few winters a storm took some
of them away. After the great flood the families who were left moved their doors and windows, board
by board, up to the terrace behind the old lime kilns, and there they built again, this time in
stone. From the quay one can still see the line where the two towns meet: below it the walls are
dark and patched with brick, above it they are pale, and the streets run straight.

Bread is a simple thing, but it does not forgive impatience. Mix the flour with the water first and
leave it alone for half an hour; only then add the salt and the leaven. Fold the dough four times,
once every forty minutes, and keep it in a warm corner of the kitchen. It is ready when it has grown
by about one half, when the surface is smooth, and when a finger pressed into it leaves a mark that
comes back slowly. The oven must be as hot as it will go. Put a tray of water on its floor, so that
the crust stays soft for the first ten minutes, and then take the tray away.

To find out how old a tree is, one need not cut it down. A thin core, no wider than a pencil, is
taken from the trunk with a hollow drill, and the rings are counted under a lens. Wide rings tell of
wet summers, narrow rings of dry ones, and a dark scar on one side may be the mark of a fire that
nobody wrote down. Because the pattern of good and bad years is the same for all trees of a valley,
the beams of a house can be matched, ring by ring, with trees that are still alive, and so the year
in which they were felled is known exactly.

A good map leaves out almost everything. The mapmaker walks the land, measures what can be measured,
and then decides what the reader will need: the bridge but not the fence, the name of the village
but not the names of the farms. A sailor's chart shows the depth of the water and says nothing about
the hills, except for the three or four that can be seen from the sea. The same coast, drawn for a
geologist, has no lighthouses at all. Neither of the two is wrong, and neither could take the place
of the other.

The night train used to stop at every station, whether anybody waited there or not. The guard would
step down with his lamp, look along the empty platform, and wave to the driver, and the carriages
would begin to move again with a long soft knock that ran from the front of the train to its end.
Children who lived near the line learned to sleep through it. Only when the stops were given up, one
spring, did they wake: at ten past two, when nothing happened.
"""


@pytest.fixture(scope="module")
def model(smollm2_dir) -> Any:
    return load_model(smollm2_dir)


@pytest.fixture(scope="module")
def text(smollm2_dir) -> list[int]:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2_dir).encode(TEXT)
    return tokens * 2


def cut(text: list[int], lengths: list[int]) -> list[list[int]]:
    """Prompts of these lengths, each from another place of the text."""
    return [text[37 * index : 37 * index + length] for index, length in enumerate(lengths)]


# ---- the reference itself


def test_the_reference_without_a_budget_is_transformers(model, text):
    prompt = text[:90]
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    rule = Rule([None] * 30)
    chunks = [(0, 32), (32, 90), *one_by_one(90, 24)[1:]]
    assert reference_tokens(model, prompt, chunks, rule, 24) == output[0, 90:].tolist()


# ---- vLLM against the reference


@dataclass(frozen=True)
class Case:
    """An engine, and the rule that it must follow."""

    config: dict[str, Any]
    rule: Rule
    prompts: list[int]  # lengths
    max_tokens: int = 256
    engine: dict[str, Any] = field(default_factory=dict)


PYRAMID_256 = [320] * 10 + [256] * 10 + [192] * 10
# Fractions of a pyramid with beta 2 and mean 1/2, over 24 layers: 89, 73 and 57 of 146.
PYRAMID_HALF = [Fraction(n, 146) for n in (89, 73, 57) for _ in range(8)]
LENGTHS = [20, 77, 128, 131, 300, 513]  # 128: exactly the budget
CHUNKS = {"max_num_batched_tokens": 100}  # prompts in chunks that end anywhere in a page

CASES = {
    "streaming": Case(
        {"policy": "streaming", "budget": 128}, Rule([128] * 30), LENGTHS, engine=CHUNKS
    ),
    "streaming, compress_prefill, no sinks": Case(
        {"policy": "streaming", "budget": 128, "num_sink_tokens": 0, "compress_prefill": True},
        Rule([128] * 30, num_sinks=0, compress_prefill=True),
        [77, 128, 131, 333],
        engine=CHUNKS,
    ),
    "streaming, a quarter, sinks larger than a page": Case(
        {"policy": "streaming", "budget": 0.25, "min_budget": 120}
        | {"num_sink_tokens": 40, "recent_window": 48},
        Rule([Fraction(1, 4)] * 30, num_sinks=40, min_budget=120),
        [33, 120, 290, 600],
    ),
    "streaming, half, compress_prefill, pages of 64": Case(
        {"policy": "streaming", "budget": 0.5, "min_budget": 130, "compress_prefill": True},
        Rule([Fraction(1, 2)] * 30, page_size=64, min_budget=130, compress_prefill=True),
        [50, 130, 410],
        max_tokens=160,
        engine=CHUNKS | {"block_size": 64},
    ),
    "streaming, pages of 128, asynchronous": Case(
        {"policy": "streaming", "budget": 250, "recent_window": 100},
        Rule([250] * 30, page_size=128),
        [60, 250, 405],
        max_tokens=160,
        engine={"block_size": 128, "async_scheduling": True},
    ),
    "streaming, a budget of no whole pages": Case(
        {"policy": "streaming", "budget": 100, "num_sink_tokens": 40, "recent_window": 28},
        Rule([100] * 30, num_sinks=40),
        [99, 100, 101],
        max_tokens=128,
    ),
    "pyramidal": Case(
        {"policy": "pyramidal+streaming", "budget": 256},
        Rule(PYRAMID_256),
        [60, 192, 300, 420],
        engine=CHUNKS,
    ),
    "pyramidal, half, compress_prefill, skipped layers": Case(
        {"policy": "pyramidal+streaming", "budget": 0.5, "min_budget": 96, "compress_prefill": True}
        | {"skip_layers": [0, 1, 2, 3, 4, 29]},
        Rule([*[None] * 5, *PYRAMID_HALF, None], min_budget=96, compress_prefill=True),
        [70, 256, 410],
        engine=CHUNKS,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_the_reference_s(name, smollm2_dir, model, text):
    case = CASES[name]
    prompts = cut(text, case.prompts)
    with engines.engine(str(smollm2_dir), case.config, **case.engine) as llm:
        complete_and_check(llm, model, prompts, case.rule, case.max_tokens)
        assert engines.worker(llm).compactor.num_events > 0


@pytest.mark.parametrize("compress_prefill", [False, True])
def test_preempted_requests(compress_prefill, smollm2_dir, model, text):
    """Four requests that grow to five pages each in a pool of 13: recomputed, in other chunks."""
    config = {"policy": "streaming", "budget": 128, "compress_prefill": compress_prefill}
    rule = Rule([128] * 30, compress_prefill=compress_prefill)
    prompts = cut(text, [64, 75, 40, 90])
    pool = {"num_gpu_blocks_override": 14, **CHUNKS}
    with engines.engine(str(smollm2_dir), config, **pool) as llm:
        chunks = complete_and_check(llm, model, prompts, rule, max_tokens=160)
    restarts = [b for own in chunks for (_, end), (b, _) in pairwise(own) if b != end]
    assert restarts, "the pool was large enough"


# ---- vLLM against itself: what nothing exceeds changes nothing

LARGE = {"budget": 2048}
STORES = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"kv_cache_dtype": "fp8"},
    "int4": {"kv_cache_dtype": "int4_per_token_head"},
}


@pytest.fixture
def without_kernels(monkeypatch):
    """Pages and attention are vLLM's, as on a machine that has no compiler."""
    from paged_kv.kernels import cpu

    monkeypatch.setattr(cpu, "available", lambda: False)


def skip_without_fp8(store: str) -> None:
    if store == "fp8" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's fp8 cache needs AVX-512")


def scored(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """Tokens and the logprobs of the best five of each."""
    outputs = engines.complete(llm, prompts, 48, logprobs=5)
    return [
        [(token, logprob.logprob) for best in output.logprobs for token, logprob in best.items()]
        for output in outputs
    ]


@pytest.mark.parametrize(
    ("store", "configs"),
    [
        ("float32", [{"policy": "full"}, {"policy": "streaming"} | LARGE]),
        ("bfloat16", [{"policy": "pyramidal+streaming"} | LARGE]),
        ("fp8", [{"policy": "pyramidal+streaming"} | LARGE]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_budget_that_nothing_exceeds_changes_no_bit(
    store, configs, smollm2_dir, text, without_kernels
):
    skip_without_fp8(store)
    prompts = cut(text, [30, 128, 257])
    results = []
    for config in [None, *configs]:
        settings = {"block_size": 32, **CHUNKS, **STORES[store]}
        with engines.engine(str(smollm2_dir), config, **settings) as llm:
            results.append(scored(llm, prompts))
    for config, result in zip(configs, results[1:], strict=True):
        assert result == results[0], config


def test_full_leaves_the_engine_alone(smollm2_dir):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    seen = []
    for additional in ({}, {"paged_kv": {"policy": "full", "budget": 128}}):
        args = EngineArgs(model=str(smollm2_dir), additional_config=additional)
        config = args.create_engine_config()
        parallel, scheduler = config.parallel_config, config.scheduler_config
        seen.append((parallel.worker_cls, scheduler.scheduler_cls, config.cache_config.block_size))
        assert config.additional_config == additional
    assert seen == [("vllm.v1.worker.cpu_worker.CPUWorker", None, 128)] * 2


# ---- entries of 8 and 16 bits: moved bit for bit


class Ledger:
    """Follows the bits of every entry by its position, through all compactions of a worker.

    The model's arithmetic is out of it: what a compaction leaves must be, bit for bit, the entries
    of the sinks and of the newest positions, as they were first written.
    """

    def __init__(self, worker: Any, num_sinks: int) -> None:
        self.runner = worker.model_runner
        self.compactor = worker.compactor
        self.num_sinks = num_sinks
        self.num_checked = 0
        self.entries: dict[tuple[str, str], dict[int, bytes]] = {}  # (request, layer): position
        self.elements: dict[str, torch.Tensor] = {}  # bytes of each entry in a page
        self.compact = self.compactor._compact
        self.compactor._compact = self.checked

    def checked(self, pending: Any) -> None:
        for row, before, num_tokens in self.rows(pending, "evicted_before"):
            for name in pending.layer_names:
                known = self.entries.setdefault((self.runner.input_batch.req_ids[row], name), {})
                # What came since the last compaction lies where its position says.
                new = range(max(known, default=-1) + 1, num_tokens)
                assert new.start >= before
                slots = list(new)
                bits = self.read(name, pending, row, slots)
                known.update(zip(slots, bits, strict=True))
        self.compact(pending)
        for row, after, num_tokens in self.rows(pending, "evicted_after"):
            for name in pending.layer_names:
                self.check(name, pending, row, after, num_tokens)

    def check(self, name: str, pending: Any, row: int, evicted: int, num_tokens: int) -> None:
        known = self.entries[self.runner.input_batch.req_ids[row], name]
        newest = range(evicted + self.num_sinks, num_tokens)
        expected = {position: known[position] for position in [*range(self.num_sinks), *newest]}
        slots = list(range(evicted, num_tokens))
        found = self.read(name, pending, row, slots)
        assert sorted(found) == sorted(expected.values())
        self.entries[self.runner.input_batch.req_ids[row], name] = expected
        self.num_checked += 1

    def rows(self, pending: Any, which: str) -> list[tuple[int, int, int]]:
        events = pending.events
        columns = (pending.rows, getattr(events, which), events.num_tokens)
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def read(self, name: str, pending: Any, row: int, slots: list[int]) -> list[bytes]:
        """The bits of the entries in these logical slots, all heads together."""
        layer, index = self.compactor.layers[name], torch.tensor(slots, dtype=torch.int64)
        if name not in self.elements:
            self.elements[name] = self.bytes_of(name, layer)
        page = pending.block_table[row, index // pending.block_size].long()
        elements = self.elements[name][index % pending.block_size]
        pages = layer.kv_cache.flatten(2).view(torch.uint8)
        entries = pages[page[:, None], :, elements]  # [slots, bytes, heads]
        return [entry.tobytes() for entry in entries.numpy()]

    def bytes_of(self, name: str, layer: Any) -> torch.Tensor:
        """int64 [page_size, bytes]: where in a page of a head the bytes of each entry lie."""
        from paged_kv.vllm.worker.layout import probe_elements

        if name in self.compactor.layouts:
            return self.compactor.layouts[name].elements
        size = layer.kv_cache.element_size()
        found = probe_elements(layer, layer.kv_cache)[..., None] * size
        return (found + torch.arange(size)).flatten(1)


def check_moves(store: str, smollm2_dir: Any, text: list[int]) -> None:
    config = {"policy": "pyramidal+streaming", "budget": 128, "recent_window": 16}
    settings = {"block_size": 32, **CHUNKS, **STORES[store]}
    with engines.engine(str(smollm2_dir), config, **settings) as llm:
        ledger = Ledger(engines.worker(llm), num_sinks=4)
        engines.generate(llm, cut(text, [60, 150, 301]), 100)
    # 30 layers: each request compacts at the end of its prompt or later, and every 32 tokens.
    assert ledger.num_checked >= 30 * 3 * 2


@pytest.mark.parametrize("store", ["bfloat16", "fp8"])
def test_entries_of_vllms_pages_are_moved_bit_for_bit(store, smollm2_dir, text, without_kernels):
    skip_without_fp8(store)
    check_moves(store, smollm2_dir, text)


def test_entries_of_packed_pages_are_moved_bit_for_bit(smollm2_dir, text):
    check_moves("int4", smollm2_dir, text)
