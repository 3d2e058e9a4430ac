"""What lies beside vLLM's pages: how much room it takes, and that groups of layers share it."""

from __future__ import annotations

from typing import Any

import engines
import pytest
import query_files
import tiny_models
import torch

from paged_kv.store import side_data
from paged_kv.store.layers import PageStore

pytestmark = pytest.mark.vllm

MEMORY, PAGE, HEADS, SIZE = 16 << 20, 32, 2, 32
PAGE_BYTES = PAGE * HEADS * 2 * SIZE * 4  # of a layer
SETTINGS = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": MEMORY, "block_size": PAGE}
CALIBRATED = {"statistics": query_files.shared(6, 2, 2, 32)}
# Numbers of four bytes for each slot and KV head: positions, and ...
POLICIES: dict[str, tuple[dict[str, Any], int]] = {
    "knorm": ({"policy": "knorm"}, 1),
    "h2o": ({"policy": "h2o"}, 2),
    "rated": ({"policy": "calibrated_attention", "fading": "off", **CALIBRATED}, 2),
    "rated and seen": ({"policy": "calibrated_attention", "fading": "on", **CALIBRATED}, 3),
    "merging": ({"policy": "value_merge", "of": "calibrated_attention", **CALIBRATED}, 4),
}


def stores_of(llm: Any) -> list[PageStore]:
    every = engines.worker(llm).compactor.observer._stores.values()
    return [store for several in every for store in several]


def num_bytes(tensors: list[torch.Tensor]) -> int:
    """Of their memory, each piece once."""
    storages = {tensor.untyped_storage() for tensor in tensors}
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def held(llm: Any) -> tuple[int, int]:
    """Bytes of all pages, and of what lies beside them."""
    stores = stores_of(llm)
    pages = [entries.stack for store in stores for entries in store.pages]
    side = [tensor for store in stores for tensor in store.side.tensors.values()]
    return num_bytes(pages), num_bytes(side)


def serve(llm: Any) -> None:
    prompts = [[token % 250 + 3 for token in range(start, start + 230)] for start in range(4)]
    engines.generate(llm, prompts, 40)
    assert engines.worker(llm).compactor.num_events > 0


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_groups_share_it(name, steps, tiny):
    """3 groups of 2 layers: a page is one group's at a time, and so is what lies beside it."""
    options, numbers = POLICIES[name]
    shape = {"policy": f"pyramidal+{options['policy']}", "budget": 128, "pyramid_steps": steps}
    layers = 6 // steps  # for which a page of the pool has room
    with engines.engine(tiny, options | shape, **SETTINGS) as llm:
        serve(llm)
        policy = engines.worker(llm).compactor.policy
        assert side_data.bytes_per_slot(policy) == 4 * numbers
        stores = stores_of(llm)
        assert len(stores) == steps
        for tensors in zip(*(store.side.tensors.values() for store in stores), strict=True):
            assert len({tensor.data_ptr() for tensor in tensors}) == 1
        pages = engines.block_pool(llm).num_gpu_blocks
        beside = PAGE * HEADS * 4 * numbers
        assert held(llm) == (pages * layers * PAGE_BYTES, pages * layers * beside)
        assert pages == MEMORY // (layers * (PAGE_BYTES + beside))


def test_layers_apart_from_their_group(tiny):
    """Skipped ones have nothing beside their pages, which come from the same pool."""
    options = {**POLICIES["rated"][0], "budget": 128, "skip_layers": [0, 3, 4]}
    with engines.engine(tiny, options, **SETTINGS) as llm:
        serve(llm)
        (store,) = stores_of(llm)
        assert store.layer_ids.tolist() == [1, 2, 5]
        assert store.side.tensors["ratings"].shape[0] == 3
        pages, side = held(llm)
        assert pages + side <= MEMORY


def test_groups_of_different_sizes(tmp_path):
    """8, 8, 7 and 7 layers: those of as many share; all of it fits."""
    model = tiny_models.saved("llama-30-layers", tmp_path)
    options = {"policy": "pyramidal", "budget": 192, "pyramid_steps": 4, "fading": "off"}
    statistics = query_files.shared(30, 2, 2, 32)
    settings = {**SETTINGS, "kv_cache_memory_bytes": 2 * MEMORY}
    with engines.engine(model, {**options, "statistics": statistics}, **settings) as llm:
        serve(llm)
        stores = stores_of(llm)
        assert sorted(store.pages.num_layers for store in stores) == [7, 7, 8, 8]
        ratings = {store.side.tensors["ratings"].data_ptr() for store in stores}
        assert len(ratings) == 2
        pages, side = held(llm)
        count = engines.block_pool(llm).num_gpu_blocks
        assert pages == count * 8 * PAGE_BYTES
        assert side == count * 15 * PAGE * HEADS * 8
        assert 0.97 * 2 * MEMORY < pages + side <= 2 * MEMORY
