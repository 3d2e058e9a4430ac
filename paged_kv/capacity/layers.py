"""Bytes of a page in each layer, and of what lies beside it, on one rank."""

from __future__ import annotations

from dataclasses import dataclass

from paged_kv.capacity.cases import CPU, GPU_DTYPES, Case, Engine
from paged_kv.capacity.model import Model
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.model_rules import DTYPE_BYTES

GPU_SCALE_BYTES = 4  # vLLM's, of a key or a value whose format has one for each token and head


@dataclass(frozen=True)
class LayerBytes:
    """Sizes in bytes.

    Args:
        formats: page format of each layer.
        pages: of a page of each layer.
        side_names: what lies beside a page of a compressed layer; () for nothing.
        side: of all that, for one page.
        observation_window: last queries that are kept of a request; 0 for none.
        query_row: of these, in one compressed layer.
        residual_row: of a request's native pages beside quantized ones, in all layers.
        native_page: of a page in the model's dtype.
    """

    formats: tuple[str, ...]
    pages: list[int]
    side_names: tuple[str, ...]
    side: int
    observation_window: int
    query_row: int
    residual_row: int
    native_page: int


def kv_heads_of_rank(model: Model, num_ranks: int) -> int:
    """KV heads of each rank: replicated where there are fewer than ranks. Raises ValueError."""
    fewer, more = sorted((model.kv_heads, num_ranks))
    if model.num_heads % num_ranks or more % fewer:
        raise ValueError(
            f"tensor-parallel {num_ranks}: the model has {model.num_heads} query heads and "
            f"{model.kv_heads} KV heads, which so many ranks cannot share"
        )
    return max(1, model.kv_heads // num_ranks)


def entry_bytes(page_format: str, model: Model, page_size: int, device: str) -> int:
    """A key and a value of one KV head, scales included.

    Args:
        page_format: of the layer.
        model: has head_dim and dtype.
        page_size: tokens per page.
        device: cpu or gpu; a GPU's pages are vLLM's.

    Raises:
        ValueError: packed pages cannot have these sizes.
    """
    size = model.head_dim
    if page_format == NATIVE:
        return 2 * size * DTYPE_BYTES[model.dtype]
    if device == CPU:
        import torch

        from paged_kv.quant import make_layout

        dtype = getattr(torch, model.dtype)
        return make_layout(page_format, dtype, size, size, page_size).entry_bytes
    numbers = size // 2 if page_format == "int4" else size
    has_scales = GPU_DTYPES[page_format].endswith("_per_token_head")
    return 2 * (numbers + GPU_SCALE_BYTES * has_scales)


def page_bytes(page_format: str, model: Model, engine: Engine) -> int:
    """Of a page of one layer, on one rank. Raises ValueError: see entry_bytes."""
    per_head = entry_bytes(page_format, model, engine.page_size, engine.device)
    return kv_heads_of_rank(model, engine.num_ranks) * engine.page_size * per_head


def layer_bytes(model: Model, engine: Engine, case: Case) -> LayerBytes:
    """The sizes of a case.

    Raises:
        ValueError: the page format or a policy's option does not fit the model.
    """
    heads = kv_heads_of_rank(model, engine.num_ranks)
    if case.page_format in GPU_DTYPES:
        formats = (case.page_format,) * model.num_layers
    else:
        formats = layer_formats(case.page_format, model.num_layers)
    page = {name: page_bytes(name, model, engine) for name in {*formats, NATIVE}}
    quantized = sum(name != NATIVE for name in formats)
    names, per_slot, window = _beside(model, engine, case)
    of_query = model.num_heads // engine.num_ranks * model.head_dim * DTYPE_BYTES[model.dtype]
    return LayerBytes(
        formats=formats,
        pages=[page[name] for name in formats],
        side_names=names,
        side=per_slot * heads * engine.page_size,
        observation_window=window,
        query_row=window * of_query,
        residual_row=case.config.residual_pages * quantized * page[NATIVE],
        native_page=page[NATIVE],
    )


def _beside(model: Model, engine: Engine, case: Case) -> tuple[tuple[str, ...], int, int]:
    """(names of side data, its bytes per slot and KV head, observation window) of the policy."""
    if not case.config.enabled:
        return (), 0, 0
    from paged_kv.store import side_data

    # On a CPU our kernels read the pages, and sum up attention as they go.
    config = case.config.settled(str(model.directory), engine.device == CPU, model.text)
    policy = config.create_policy()
    if policy.is_positional:
        return (), 0, 0
    names = tuple(side_data.names(policy))
    return names, side_data.bytes_per_slot(policy), policy.observation_window
