"""A small network that scores entries."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from paged_kv.core.options import text
from paged_kv.policies.base import ScoringPolicy
from paged_kv.policies.region import Region

SHIPPED = Path(__file__).with_name("learned_smollm2.npz")
NUM_FEATURES = 5


class Learned(ScoringPolicy):
    """Entries that a small network, trained on a model's own attention, rates highest.

    After KVzap: Jegou and Jeblick, "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning"
    (2601.07891), whose networks predict importance from a layer's hidden states.
    Here one network of one hidden layer serves all layers and heads of a model; `paged-kv
    train-learned` fits it. The option weights is the path of its .npz; empty for the one that is
    shipped, of SmolLM2-135M.
    """

    options = {
        "weights": text(
            "", "file of a trained network (paged-kv train-learned); none: the one for SmolLM2"
        )
    }
    reads = frozenset({"keys", "values"})

    def __init__(
        self, num_sink_tokens: int, recent_window: int, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(num_sink_tokens, recent_window, options)
        self.network = load(Path(self.settings["weights"] or SHIPPED).expanduser())
        self._num_layers = int(self.network["num_layers"])
        self._copies: dict[torch.device, dict[str, torch.Tensor]] = {}

    def score(self, region: Region) -> torch.Tensor:
        """What the network says."""
        network = self._on(region.keys.device)
        inputs = features(region, self._num_layers)  # [..., m, 5]
        inputs = (inputs - network["mean"]) / network["std"]
        hidden = torch.tanh(inputs @ network["w1"] + network["b1"])  # [..., m, h]
        return (hidden @ network["w2"] + network["b2"]).squeeze(-1)

    def _on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The network there; copied once, since such a copy is waited for."""
        if device not in self._copies:
            self._copies[device] = {name: x.to(device) for name, x in self.network.items()}
        return self._copies[device]


def features(region: Region, num_layers: int) -> torch.Tensor:
    """What the network sees of each entry: float32 [layers, events, kv_heads, m, 5]; padding 0.

    log(1 + age), age being num_tokens - position; logs of the norms of key and value; 1 - cosine
    of the key and the mean of all keys; index of the layer / num_layers.
    """
    valid = region.valid[..., None]  # padding may be NaN, and has the largest position there is
    keys, values = region.keys.where(valid, 0), region.values.where(valid, 0)
    age = (region.num_tokens[:, None, None] - region.positions).clamp_min(0)
    tiny = torch.finfo(keys.dtype).tiny  # for entries of zeros, whose logarithm is none
    mean = keys.sum(-2, keepdim=True) / region.num_entries[:, None, None, None]  # [..., 1, d]
    cosine = (F.normalize(keys, dim=-1) * F.normalize(mean, dim=-1)).sum(-1)  # [..., m]
    depth = (region.layers.to(keys.dtype) / num_layers)[:, None, None, None]  # [layers, 1, 1, 1]
    columns = [
        age.to(keys.dtype).log1p(),
        keys.norm(dim=-1).clamp_min(tiny).log(),
        values.norm(dim=-1).clamp_min(tiny).log(),
        1 - cosine,
        depth.expand(cosine.shape),
    ]
    return torch.stack(columns, -1).where(valid, 0)


def load(path: Path) -> dict[str, torch.Tensor]:
    """The network: w1 [5, h], b1 [h], w2 [h, 1], b2 [1], mean [5], std [5], num_layers [].

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        with file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"weights: {path} is no readable .npz file: {error}") from error
    hidden = arrays["b1"].shape[-1] if arrays.get("b1", np.empty(())).ndim else 0
    shapes = {
        "w1": (NUM_FEATURES, hidden),
        "b1": (hidden,),
        "w2": (hidden, 1),
        "b2": (1,),
        "mean": (NUM_FEATURES,),
        "std": (NUM_FEATURES,),
        "num_layers": (),
    }
    for name, shape in shapes.items():
        _check(path, name, arrays.get(name), shape)
    if not (arrays["std"] > 0).all() or not arrays["num_layers"] >= 1:
        raise ValueError(f"weights: {path}: std must be above 0 and num_layers at least 1")
    return {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in shapes}


def _check(path: Path, name: str, array: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the array exists, has this shape and is finite."""
    if array is None or array.shape != shape or array.dtype.kind not in "iuf":
        fault = "is missing" if array is None else f"is {array.dtype} {list(array.shape)}"
        raise ValueError(f"weights: {path}: {name} {fault}; it must be numbers {list(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"weights: {path}: {name} is not finite")
