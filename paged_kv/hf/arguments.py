"""What users pass to the caches, read and refused."""

from __future__ import annotations

from typing import Any

import torch

from paged_kv.config import DEFAULT_PAGE_SIZE, CompressionConfig
from paged_kv.core.options import MOST_OBSERVED
from paged_kv.core.page_formats import NATIVE, layer_formats
from paged_kv.hf.pool import PagePool
from paged_kv.quant import make_layout
from paged_kv.tiers.files import check_spill_dir


def read_options(
    policy: str | CompressionConfig | None, budget: int | float | None, options: dict[str, Any]
) -> CompressionConfig:
    """What the arguments, the environment and the defaults come to. Raises ValueError."""
    if not isinstance(policy, CompressionConfig):
        policy = CompressionConfig.from_env(policy=policy, budget=budget, **options)
    elif budget is not None or options:
        names = sorted(options | ({} if budget is None else {"budget": budget}))
        raise ValueError(f"policy is a CompressionConfig: {', '.join(names)} must be in it")
    for name in ("swap_space", "swap_dir", "swap_dir_space", "swap_format"):
        if (value := getattr(policy, name)) != getattr(CompressionConfig(), name):
            raise ValueError(f"{name} {value!r} is an option of vLLM: here no request is swapped")
    check_spill_dir(policy.spill_dir)
    return policy


def settle(compression: CompressionConfig, config: Any) -> CompressionConfig:
    """With what the policy leaves open decided.

    Pages in the model's dtype are read by SDPA, which shows nobody what entries get.

    Args:
        compression: as the user asked.
        config: of the model, as from_pretrained made it: it says where the model lies.
    """
    decoder = config.get_text_config(decoder=True)
    formats = layer_formats(compression.page_format, decoder.num_hidden_layers)
    name = getattr(config, "name_or_path", "")
    return compression.settled(name, NATIVE not in formats, decoder)


def read_pool(pool: PagePool | None, page_size: int | None) -> PagePool:
    """The pool, or a new one without a limit. Raises ValueError: page_size is not the pool's."""
    if pool is None:
        return PagePool(page_size=DEFAULT_PAGE_SIZE if page_size is None else page_size)
    if page_size not in (None, pool.page_size):
        raise ValueError(f"page_size {page_size} differs from the pool's, {pool.page_size}")
    return pool


def check_page_format(
    compression: CompressionConfig, decoder: Any, page_size: int, attention: str = "sdpa"
) -> None:
    """Refuses what packed pages cannot do, as far as it is known before the first keys come.

    Args:
        compression: has the format.
        decoder: the model's config.
        page_size: entries per page.
        attention: who computes it; see PagedCache.

    Raises:
        ValueError: names the option.
    """
    formats = set(layer_formats(compression.page_format, decoder.num_hidden_layers))
    if formats == {NATIVE}:
        if compression.residual_pages:
            raise ValueError(
                f"residual_pages {compression.residual_pages}: with page_format native all pages "
                "are in the model's dtype"
            )
        return
    longest = getattr(decoder, "max_position_embeddings", None) or MOST_OBSERVED
    compression.check_residual(page_size, longest)
    if attention != "sdpa":
        raise ValueError(
            f"attention {attention!r} reads pages of page_format native only, not "
            f"{compression.page_format}: leave it at 'sdpa'"
        )
    sizes = (getattr(decoder, name, None) for name in ("head_dim", "d_kv"))
    size = next((size for size in sizes if isinstance(size, int)), None)
    for name in formats - {NATIVE}:
        make_layout(name, torch.float32, size or 16, size or 16, page_size)
