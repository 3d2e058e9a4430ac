"""Attention by flex_attention over the arena equals SDPA; xformers' mask of pages equals ours."""

import sys

import numpy as np
import pytest
import torch
from hf_models import load, padded, prompt
from torch.nn.functional import scaled_dot_product_attention

from paged_kv.hf import PagedCache, PagePool, providers
from paged_kv.hf.arena import Geometry, NativeArena
from paged_kv.hf.paged_attention import visible
from paged_kv.hf.providers import Flex, Held, paged_bias

SNAPKV = {"policy": "snapkv", "budget": 80, "observation_window": 16, "page_size": 16}


def held(sizes: list[int], page_size: int = 16, kv_heads: int = 3, dtype=torch.float32) -> Held:
    """Random entries in scattered pages."""
    torch.manual_seed(0)
    own = np.array(sizes, dtype=np.int64)
    counts = -(-own // page_size)
    capacity = int(counts.sum()) + 5
    geometry = Geometry(kv_heads, 64, 64, dtype, dtype, torch.device("cpu"))
    arena = NativeArena(geometry, page_size, capacity)
    arena.keys.normal_()
    arena.values.normal_()
    order = np.random.default_rng(0).permutation(capacity)
    # materialize(), unlike a kernel, overwrites the pages that a table names past a row's end.
    pages = np.full((len(sizes), counts.max()), order[-1])  # nobody's, past a row's end
    for row, count in enumerate(counts):
        start = counts[:row].sum()
        pages[row, :count] = order[start : start + count]
    return Held(arena, pages, own)


def definition(query: torch.Tensor, what: Held, scale: float) -> torch.Tensor:
    outputs = []
    for row, (count, size) in enumerate(zip(what.counts, what.sizes, strict=True)):
        keys, values = (
            tensor[:, what.pages[row, :count]].flatten(1, 2)[:, :size]
            for tensor in (what.arena.keys, what.arena.values)
        )
        group = query.shape[1] // len(keys)
        keys, values = (part.repeat_interleave(group, 0) for part in (keys, values))
        outputs.append(scaled_dot_product_attention(query[row], keys, values, scale=scale))
    return torch.stack(outputs)


# ---- flex


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize(
    "sizes", [[1], [16], [700], [33, 1, 16, 500], [20] * 9, [2000, 1999]], ids=str
)
def test_flex_reads_scattered_pages(sizes):
    what = held(sizes)
    query = torch.randn(len(sizes), 9, 1, 64)  # as SmolLM2: 9 heads, 3 KV heads
    with torch.no_grad():
        found = Flex().attend(query, what, 0.125)
    torch.testing.assert_close(found, definition(query, what, 0.125), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_flex_takes_an_arena_that_grows():
    """The code that is compiled once serves arenas of all sizes."""
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    with torch.no_grad():
        for size in (100, 900, 40, 1500):
            what = held([size, size // 2])
            query = torch.randn(2, 9, 1, 64)
            found = Flex().attend(query, what, 0.125)
            torch.testing.assert_close(found, definition(query, what, 0.125), atol=1e-5, rtol=1e-5)
            graphs.append(counters["unique_graphs"])
    assert len(set(graphs)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("settings", [{"page_size": 16}, SNAPKV], ids=["full", "snapkv"])
def test_flex_in_generate(options, settings, monkeypatch):
    calls = []
    attend = Flex.attend
    monkeypatch.setattr(Flex, "attend", lambda *args: calls.append(1) or attend(*args))
    model = load("llama")
    inputs = padded([prompt(100), prompt(41, seed=1), prompt(7, seed=2)])
    wanted = {"do_sample": False, "max_new_tokens": 24, **options}
    with PagedCache(model.config, **settings) as cache:
        expected = model.generate(**inputs, past_key_values=cache, **wanted)
        stats = cache.stats()
    assert not calls
    with PagedCache(model.config, attention="flex", **settings) as cache:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **wanted), expected)
        assert cache.stats() == stats
    assert len(calls) == 4 * 23


@pytest.mark.slow
def test_flex_leaves_to_sdpa_what_is_not_plain():
    """A softcap, scores to be added up, two dtypes under autocast."""
    inputs = padded([prompt(100), prompt(41, seed=1)])
    wanted = {"do_sample": False, "max_new_tokens": 8}
    for name, policy in [("gemma2", "streaming"), ("gpt_oss", "streaming"), ("llama", "h2o")]:
        model, settings = load(name), {"policy": policy, "budget": 80, "page_size": 16}
        with PagedCache(model.config, **settings) as cache:
            expected = model.generate(**inputs, past_key_values=cache, **wanted)
        with PagedCache(model.config, attention="flex", **settings) as cache:
            assert torch.equal(model.generate(**inputs, past_key_values=cache, **wanted), expected)
    query, what = torch.randn(1, 9, 1, 64), held([20])
    assert Flex().takes(query, what)
    assert not Flex().takes(query.bfloat16(), what)
    assert not Flex().takes(query.requires_grad_(), what)
    assert not Flex().takes(query.detach().expand(300, -1, -1, -1), what)


# ---- what is refused


def test_names():
    model = load("llama")
    with pytest.raises(ValueError, match="attention must be one of sdpa, flex, xformers, not 'fl'"):
        PagedCache(model.config, attention="fl")
    assert providers.create("sdpa", 32) is None


def test_flex_needs_a_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def nothing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        PagedCache(load("llama").config, attention="flex")


def test_xformers_needs_a_gpu(monkeypatch):
    pytest.importorskip("xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        PagedCache(load("llama").config, attention="xformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="a page_size that is a multiple of 64, not 32"):
        PagedCache(load("llama").config, attention="xformers")


def test_xformers_must_be_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ValueError, match="pip install xformers"):
        PagedCache(load("llama").config, attention="xformers", page_size=64)


# ---- xformers' mask


def expected_mask(what: Held, num_queries: list[int]) -> torch.Tensor:
    """bool [queries of all rows, slots of the arena]: our rule, slot by slot."""
    page_size = what.arena.page_size
    seen = torch.zeros(
        sum(num_queries), what.arena.allocator.capacity * page_size, dtype=torch.bool
    )
    start = 0
    for row, count in enumerate(num_queries):
        size = int(what.sizes[row])
        own = visible([size - count], count, size, torch.device("cpu"))[0, 0]
        slot = np.arange(size)
        places = what.pages[row, slot // page_size] * page_size + slot % page_size
        seen[start : start + count, torch.from_numpy(places)] = own
        start += count
    return seen


@pytest.mark.parametrize(
    ("sizes", "num_queries"),
    [([1], [1]), ([64, 65, 300], [1, 1, 1]), ([70, 128, 9], [5, 5, 5]), ([200, 50], [9, 1])],
)
def test_xformers_mask_is_ours(sizes, num_queries):
    pytest.importorskip("xformers")
    what = held(sizes, page_size=64)
    bias = paged_bias(what, num_queries, torch.device("cpu"))
    slots = len(sizes) * what.pages.shape[1] * 64
    mask = bias.materialize((sum(num_queries), slots)) == 0
    ours = expected_mask(what, num_queries)
    assert torch.equal(mask, ours[:, : mask.shape[1]])
    assert not ours[:, mask.shape[1] :].any()


def test_xformers_mask_of_a_cache_after_compactions():
    pytest.importorskip("xformers")
    model, pool = load("llama"), PagePool(page_size=16)
    inputs = padded([prompt(100), prompt(41, seed=1)])
    settings = {key: value for key, value in SNAPKV.items() if key != "page_size"}
    with PagedCache(model.config, pool=pool, **settings) as cache:
        model.generate(**inputs, past_key_values=cache, num_beams=3, max_new_tokens=40)
        own = cache.sequences
        assert cache.stats().compactions > 0
        for layer in range(4):
            ids, arena = own.tables.ids[layer], own.tables.arena(0)
            spare = np.flatnonzero(arena.allocator.references == 0)[0]  # see held()
            what = Held(arena, np.where(ids < 0, spare, ids), own.size[layer])
            bias = paged_bias(what, [1] * 6, torch.device("cpu"))
            mask = bias.materialize((6, 6 * what.pages.shape[1] * 16)) == 0
            ours = expected_mask(what, [1] * 6)
            assert torch.equal(mask, ours[:, : mask.shape[1]])
