"""A PagedCache in a file, and back: what it holds, under which options, and of which model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from paged_kv.config import CompressionConfig
from paged_kv.hf import fingerprint, layer_state, page_state, state_file
from paged_kv.hf.arena import Geometry
from paged_kv.hf.counters import Counters
from paged_kv.hf.modes import keeps
from paged_kv.hf.rope import of_file
from paged_kv.hf.sequences import Sequences
from paged_kv.hf.spilled import part_of
from paged_kv.hf.state_of_cache import CacheState
from paged_kv.hf.step import interrupted
from paged_kv.kernels.operands import Terms
from paged_kv.option_table import current_names
from paged_kv.store.query_gathering import QueryGathering

Tensor = torch.Tensor


class Saveable:
    """What keeps a PagedCache in a file."""

    def save(self: Any, path: str | os.PathLike[str]) -> None:
        """Writes all that it holds to a safetensors file; load makes a cache of it.

        The file appears, or changes, all at once.

        Args:
            path: its directory exists.

        Raises:
            ValueError: the cache holds nothing, has been closed, or was interrupted by an error;
                there is no such directory.
            OSError: the file cannot be written.
        """
        save(self, path)

    @classmethod
    def load(
        cls: Any,
        path: str | os.PathLike[str],
        config: Any,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Any:
        """A cache that goes on where the saved one was, with its policy and its options.

        That the model's weights are those of the saved one, nobody can check.

        Args:
            path: what save wrote.
            config: that of the model, `model.config` itself.
            device: the model's; None: that of the saved cache.
            options: pool and attention, see PagedCache; spill_dir and spill_host_budget, if spilled
                entries are to lie elsewhere.

        Raises:
            ValueError: the file is missing or damaged; its model, page size, dtype or page formats
                are others; the pool has no room for it (PoolFull).
        """
        return load(cls, path, config, device, options)


_ROWS = ("num_tokens", "prompt_lens", "pressed", "size", "settled")
_FLAGS = ("waits_for_crop", "knows_prompts", "is_late", "num_passes")
_PLACES = ("spill_dir", "spill_host_budget")  # options that say where something lies


def save(cache: CacheState, path: str | os.PathLike[str]) -> None:
    """Writes all that a cache holds to a file; see Saveable.save."""
    cache._check_open()
    sequences = cache.sequences
    if sequences.step is not None:
        raise interrupted()
    if not sequences.num_tokens.any():
        raise ValueError("this cache holds nothing yet that could be saved")
    tensors, rows = state_of(sequences)
    layers = {f"layers.{at}": layer for at, layer in enumerate(cache.layers) if layer in
              cache._others()}  # fmt: skip
    about = {
        "model": fingerprint.fingerprint(cache._config),
        "dtype": fingerprint.dtype_of(cache._config),
        "options": cache.compression.to_dict(),
        "page_size": cache.pool.page_size,
        "progress": cache.progress[0],
        "padded_at": cache._padded_at,
        "rows": rows,
        "layers": {
            name: layer_state.encode(layer, name, tensors) for name, layer in layers.items()
        },
    }
    state_file.write(path, tensors, about)


@keeps
def load(
    kind: Any,
    path: str | os.PathLike[str],
    config: Any,
    device: str | torch.device | None,
    options: dict[str, Any],
) -> Any:
    """A cache that goes on where the saved one was; see Saveable.load."""
    tensors, about = state_file.read(path)
    geometry = _geometry(about["rows"]["geometry"], device)
    _check_model(path, about, config, geometry)
    places = {name: options.pop(name) for name in _PLACES if name in options}
    unknown = sorted(set(options) - {"pool", "page_size", "attention"})
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: a saved cache keeps its policy and its options; load takes "
            f"pool, attention, device, {', '.join(_PLACES)}"
        )
    compression = CompressionConfig.from_dict(current_names(about["options"]) | places)
    page_size = options.pop("page_size", None) or about["page_size"]
    if page_size != about["page_size"]:
        raise ValueError(f"{path} has pages of {about['page_size']} entries, not {page_size}")
    cache = kind(config, compression, page_size=page_size, **options)
    try:
        restore(cache.sequences, tensors, about["rows"], geometry)
        for name, encoded in about["layers"].items():
            layer = cache.layers[int(name.removeprefix("layers."))]
            layer_state.decode(layer, encoded, tensors, geometry.device)
    except ValueError:
        cache.close()
        raise
    cache.progress[0], cache._padded_at = about["progress"], about["padded_at"]
    return cache


def recognizes(cache: CacheState, owner: Any) -> bool:
    """Whether a cache from a file, which no model has used yet, is of the model of this config."""
    return not fingerprint.differences(
        fingerprint.fingerprint(cache._config), fingerprint.fingerprint(owner)
    )


def state_of(sequences: Sequences) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What rows hold: tensors by name, and what JSON can carry."""
    sinks = {str(at): terms.sinks for at, terms in enumerate(sequences.terms)}
    parts = {
        "": {name: torch.from_numpy(getattr(sequences, name).copy()) for name in _ROWS},
        "pages.": page_state.state_of(sequences.tables),
        "ring.": sequences.ring.state(sequences.num_tokens),
        "residual.": sequences.residual.state(sequences.num_tokens),
        "spilled.": sequences.spilled.state(sequences.num_rows),
        "queries.": _gathered(sequences),
        "sinks.": {at: tensor for at, tensor in sinks.items() if tensor is not None},
    }
    tensors = {key + name: tensor for key, part in parts.items() for name, tensor in part.items()}
    counters, rope = sequences.counters, sequences.rotary
    assert rope is not None, "no model has used this cache"
    about = {
        "geometry": _described(sequences.geometry),
        "formats": sequences.formats,
        "terms": [(terms.scale, terms.softcap) for terms in sequences.terms],
        "counters": {
            "evicted": counters.evicted,
            "compactions": counters.compactions,
            "shrunk": counters.shrunk,
            "shrunk_entries": counters.shrunk_entries,
            "peak_bytes": counters.peak_bytes,
            "merged": counters.num_merged,
            "fetched": counters.fetched,
        },
        "rope": (rope.is_past, rope.is_mixed),
        **{name: getattr(sequences, name) for name in _FLAGS},
    }
    return tensors, about


def _gathered(sequences: Sequences) -> dict[str, Tensor]:
    """The statistics of queries, unless they are in a file of their own, or nobody reads them."""
    gathering = sequences.query_statistics
    return gathering.state() if isinstance(gathering, QueryGathering) else {}


def restore(
    sequences: Sequences,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    geometry: Geometry,
) -> None:
    """Rows that hold this, where there were none.

    Raises:
        ValueError: the layers have other page formats; PoolFull; no row is there then.
    """
    if about["formats"] != sequences.formats:
        raise ValueError(
            f"page_format {sequences.page_format}: its layers are {', '.join(sequences.formats)}, "
            f"but the saved ones {', '.join(about['formats'])}"
        )
    sequences.add_rows(len(tensors["num_tokens"]))
    sequences.bind(geometry)
    page_state.restore(sequences.tables, part_of(tensors, "pages."))
    for name in _ROWS:
        if name in tensors:  # older files have no pressed, and start=always
            setattr(sequences, name, tensors[name].numpy().copy())
    num_tokens = sequences.num_tokens
    sequences.ring.restore(part_of(tensors, "ring."), num_tokens, geometry.device)
    sequences.residual.restore(part_of(tensors, "residual."), geometry.device)
    sequences.spilled.restore(part_of(tensors, "spilled."), geometry)
    if isinstance(sequences.query_statistics, QueryGathering):
        sequences.query_statistics.restore(part_of(tensors, "queries."), geometry.device)
    for name in _FLAGS:
        setattr(sequences, name, about[name])
    sequences.rotary = of_file(*about["rope"])
    sinks = part_of(tensors, "sinks.")
    for at, (scale, softcap) in enumerate(about["terms"]):  # the next compaction needs them
        layer_sinks = sinks[str(at)].clone().to(geometry.device) if str(at) in sinks else None
        sequences.terms[at] = Terms(scale, softcap, layer_sinks)
    counters = dict(about["counters"])
    counters["merged"] = [torch.tensor(counters["merged"])]
    sequences.counters = Counters(**counters)


def _check_model(path: Any, about: Mapping[str, Any], config: Any, geometry: Geometry) -> None:
    """Raises ValueError: names what differs."""
    differences = fingerprint.differences(about["model"], fingerprint.fingerprint(config))
    if differences:
        raise ValueError(f"{path} is of another model; there, and in this config: {differences}")
    key_type, dtype = str(geometry.key_dtype).removeprefix("torch."), fingerprint.dtype_of(config)
    if dtype not in ("", about["dtype"], key_type):
        raise ValueError(f"{path} holds keys of dtype {key_type}, but the model's dtype is {dtype}")


def _described(geometry: Geometry) -> dict[str, Any]:
    """A geometry in values that JSON can carry."""
    return {
        name: value if isinstance(value, int) else str(value).removeprefix("torch.")
        for name, value in geometry._asdict().items()
    }


def _geometry(described: Mapping[str, Any], device: str | torch.device | None) -> Geometry:
    """Back, on another device. Raises ValueError: this machine does not have it."""
    chosen = described["device"] if device is None else device
    try:
        place = torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {str(chosen)!r} cannot be used here ({reason}): give load another one, "
            "device='cpu'"
        ) from None
    dtypes = {name: getattr(torch, described[name]) for name in ("key_dtype", "value_dtype")}
    return Geometry(**{**described, **dtypes, "device": place})
