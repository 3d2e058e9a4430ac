"""What generate_batch takes for granted in transformers' continuous batching; counting pages."""

import ast
import copy
import inspect

import pytest
from hf_models import load, prompt
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process
from transformers.generation.continuous_batching import (
    continuous_api,
    input_outputs,
    model_runner,
    offloading_manager,
    requests,
    scheduler,
    utils,
)

from paged_kv import registry
from paged_kv.config import CompressionConfig
from paged_kv.core.schedule import Schedule
from paged_kv.hf import generate_batch
from paged_kv.hf.batch import arguments, layers
from paged_kv.hf.batch.engine import BatchCache
from paged_kv.hf.batch.page_counts import PageCounts
from paged_kv.hf.batch.processor import BatchProcessor, BatchScheduler
from paged_kv.hf.pool import PagePool

# Read where nothing is shared, swapped, forked, captured or kept for a next session.
NOT_REACHED = {
    "device": "swap is off",
    "fill_block_table": "block tables are off: max_blocks_per_request is 0",
    "free_all_requests": "a processor is used once",
    "layer_to_allocator": "our attention function is called instead of theirs",
    "perform_cache_copy": "requests have no children",
    "prepare_fork_request": "requests have no children",
    "reset": "only warm-up, which needs CUDA graphs or compilation",
    "search_prefix_match": "use_prefix_sharing is False",
}
NOT_REACHED_OF_ALLOCATORS = {
    "blocks_per_sector": "swap is off",
    "bytes_per_block": "swap is off",
    "layer_type": "only warm-up, which needs CUDA graphs or compilation",
    "tokens_per_page": "use_prefix_sharing is False",
    "_copy_view": "swap is off",
}


def attributes(module, *owners):
    """Names that a module reads of what it calls `owners`."""
    tree = ast.parse(inspect.getsource(module))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


@pytest.fixture
def cache():
    (part,) = layers.make_parts(load("llama"), CompressionConfig(), PagePool())
    return BatchCache([part], PageCounts([None], 32, None, 512), {}, 512)


@pytest.mark.parametrize(
    "module",
    [
        scheduler,
        input_outputs,
        offloading_manager,
        model_runner,
        continuous_api.ContinuousBatchProcessor,
    ],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_the_cache_answers_all_that_transformers_asks(module, cache):
    asked = attributes(module, "self.cache", "cache", "allocator.cache")
    assert asked, "transformers calls its cache something else now"
    assert {name for name in asked if not hasattr(cache, name)} <= set(NOT_REACHED)
    asked = attributes(module, "self.cache.pool", "cache.pool")
    assert {name for name in asked if not hasattr(cache.pool, name)} <= set(NOT_REACHED)
    asked = attributes(module, "allocator", "cache_allocator", "ca")
    (own,) = cache.cache_allocators.values()
    assert {name for name in asked if not hasattr(own, name)} <= set(NOT_REACHED_OF_ALLOCATORS)


def test_what_is_overridden_is_there():
    for own, name in [
        (BatchScheduler, "_schedule_request"),
        (BatchProcessor, "_generation_step"),
    ]:
        theirs = inspect.signature(getattr(own.__base__, name)).parameters
        ours = inspect.signature(getattr(own, name)).parameters
        assert len(theirs) == len(ours), f"{name} takes {list(theirs)} now"
    source = inspect.getsource(scheduler.Scheduler._process_candidates)
    assert "self._schedule_request(state, request_tokens, token_budget" in source
    assert "request_len = len(state.tokens_to_process)" in source, "what was scheduled counts"
    assert hasattr(scheduler.FIFOScheduler, "schedule_batch")
    source = inspect.getsource(scheduler)
    for name in ("safety_margin", "waiting_requests", "active_requests", "block_new_requests"):
        assert f"self.{name}" in source, f"{name} has another name now"


def test_fields_of_requests():
    state = requests.RequestState("0", [3, 4], max_new_tokens=5, eos_token_id=[2])
    assert (state.position_offset, state.remaining_prefill_tokens) == (0, [3, 4])
    assert {"state", "query_length"} <= set(requests.FutureRequestState.__slots__)
    state.generated_tokens = [7]
    again = state.create_equivalent_initial_request()
    assert (again.request_id, again.initial_tokens, again.max_new_tokens) == ("0", [3, 4, 7], 4)
    again.generated_tokens = [8]
    assert again.to_generation_output().generated_tokens == [7, 8]


def test_no_mask_is_made():
    """transformers prepares none for "eager"; the model takes one of four dimensions as it is."""
    model = load("gemma3")
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    assert not utils.attn_mask_is_needed(config)
    masks = []
    hook = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    generate_batch(model, [prompt(40), prompt(9)], max_new_tokens=3, progress_bar=False)
    hook.remove()
    assert [mask.shape for mask in masks] == [(1, 1, 1, 1)] * 3


def test_the_model_is_called_with_a_cache():
    """In its place we give our engine, under another name."""
    source = inspect.getsource(input_outputs.ContinuousBatchingIOs.get_model_kwargs)
    assert "cache=self.cache," in source
    source = inspect.getsource(model_runner.ModelRunner._forward_process_and_sample)
    assert "model(**batch_data)" in source


def test_logits_processors_say_what_they_can():
    for own in (logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper):
        assert own.supports_continuous_batching is True
    assert set(arguments.SCORES_ONLY) <= set(dir(logits_process))
    known = vars(load("llama").generation_config)
    assert set(arguments.UNSUPPORTED) <= set(known), "options of generate() have new names"


def test_options_of_policies_and_of_generate_do_not_clash():
    declared = set(vars(CompressionConfig()))
    for name in set(registry.available()) - {"full", "pyramidal"}:
        declared |= set(registry.declared(name, {}))
    assert not declared & set(arguments.split(dict.fromkeys(declared))[0])


# ---- pages, counted ahead


schedule_ = st.builds(
    Schedule,
    page_size=st.just(8),
    minimum=st.integers(9, 60),
    numerator=st.integers(0, 3),
    denominator=st.just(4),
    compress_prefill=st.booleans(),
)


@given(
    layers=st.lists(st.none() | schedule_, min_size=1, max_size=4),
    prompt_len=st.integers(1, 90),
    num_new=st.integers(0, 60),
    chunk=st.integers(1, 40),
)
def test_no_step_needs_more_than_the_peak(layers, prompt_len, num_new, chunk):
    """Step by step, as a request is computed and, later, computed again."""
    page_counts = PageCounts(layers, 8, None, chunk)
    total = prompt_len + num_new
    peak = page_counts.peak(total, prompt_len)
    before = 0
    while before < total:
        step = page_counts.longest_step(before, prompt_len)
        after = min(before + step, before + chunk, total)
        entries = [after - (own.evicted(before, prompt_len) if own else 0) for own in layers]
        needed = sum(-(-size // 8) for size in entries)
        assert page_counts.during(before, after, prompt_len) == needed <= peak
        for own in layers:
            if own is not None and (before >= prompt_len or not own.compress_prefill):
                assert len({own.evicted(n, prompt_len) for n in range(before, after)}) == 1
        before = after
    assert page_counts.during(total, total, prompt_len) <= peak


def test_pages_are_taken_and_given_back():
    page_counts = PageCounts([None, Schedule(8, 16)], 8, 10, 64)
    assert page_counts.take("a", 6)
    assert not page_counts.take("b", 5)
    assert page_counts.take("a", 4)
    assert page_counts.take("b", 5)
    assert (page_counts.num_free, page_counts.free_share) == (1, 0.1)
    page_counts.give_back("a")
    page_counts.give_back("a")
    assert page_counts.num_free == 5
    assert page_counts.enough([(40, 8), (8, 8), (24, 24)], 2) == (5 + 3) + (3 + 3)
