"""What a model of transformers turned the keys and queries of a cache by.

Most kinds of RoPE have constant frequencies. Two have not: longrope has other ones in forward
passes that reach past original_max_position_embeddings, dynamic (NTK) in each that reaches past
max_position_embeddings. Which were used is not seen in the keys, but follows from the length.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from paged_kv.hf.modes import keeps
from paged_kv.kernels.rotary import Rotary, from_tables

_HIGHEST = 15  # frequencies are read at powers of two below 2 ** 15
_CHECKED = (3, 7, 100, 1000, 5000, 30000)
_NOWHERE_BUT_SLIDING = {"cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "afmoe"}
_NORM_AFTER_ROPE = {"hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl"}  # with a weight


@dataclass(frozen=True)
class Rope:
    """RoPE of a model, and which of its tables the held keys and queries were turned by.

    Args:
        make: the tables: from whether they are those past the switch.
        kind: transformers' rope_type.
        switch: longest forward pass that uses the first tables; None: there are no others.
        drops: whether the model says that a cache is worth nothing past the switch (Phi-3).
        is_past: whether the held keys were turned by the tables past the switch; None: nothing is
            held.
        is_mixed: whether some were, and some were not.
        is_known: whether there are tables: not for a cache from a file, before a model uses it.
    """

    make: Callable[[bool], Rotary]
    kind: str = "default"
    switch: int | None = None
    drops: bool = False
    is_past: bool | None = None
    is_mixed: bool = False
    is_known: bool = True

    def after(self, length: int, reader: str | None = None) -> Rope:
        """What is held after a forward pass.

        Args:
            length: 1 + the highest position of the pass, of all rows.
            reader: name of the policy that compresses, if it reads RoPE.

        Raises:
            ValueError: reader, and the model has no RoPE, or no one table for all that is held; or
                the model itself takes keys of two tables for wrong. Nothing has changed.
        """
        is_past = self.switch is not None and length > self.switch
        is_mixed = self.is_mixed or self.is_past not in (None, is_past)
        rope = replace(self, is_past=is_past, is_mixed=is_mixed)
        if is_mixed and self.drops:
            raise ValueError(f"this model {self._says()}")
        if reader is not None:
            rope(f"kv-policy {reader!r}")
        return rope

    def holding(self, other: Rope | None) -> Rope:
        """This one, for what a cache holds whose model was not known: it comes from a file."""
        assert other is not None, "nothing is held"
        return replace(self, is_past=other.is_past, is_mixed=other.is_mixed)

    def __call__(self, reader: str = "this kv-policy") -> Rotary:
        """The tables of all that is held.

        Args:
            reader: for the message.

        Raises:
            ValueError: the model has no RoPE, one of an unknown form, or there is no one table.
        """
        if self.is_mixed or (self.is_past and "dynamic" in self.kind):
            raise ValueError(f"{reader} undoes the model's RoPE, but this model {self._says()}")
        return self.make(bool(self.is_past))

    def _says(self) -> str:
        if "dynamic" in self.kind:
            return (
                f"has rope_type {self.kind!r}: each forward pass past max_position_embeddings has "
                f"frequencies of its own. Keep prompt and output within {self.switch} tokens, or "
                "take a policy that reads no RoPE, such as snapkv or streaming"
            )
        return (
            f"has rope_type {self.kind!r}: keys get other frequencies in forward passes past "
            f"original_max_position_embeddings={self.switch}, so what is cached from before is "
            f"worth nothing there. Keep prompt and output within {self.switch} tokens, or give "
            "generate() and a new PagedCache a prompt that is longer than that (the text so far)"
        )


def of_file(is_past: bool | None, is_mixed: bool) -> Rope:
    """What a saved cache holds; its model, which has the tables, is yet to come."""

    def make(_: bool) -> Rotary:
        raise AssertionError("no model has used this cache")

    return Rope(make, is_past=is_past, is_mixed=is_mixed, is_known=False)


def drops_caches(config: Any) -> bool:
    """Whether a model throws away a cache that is true in Python's sense (Phi-3 and its like).

    Its prepare_inputs_for_generation does so past this length, for longrope's sake, without a word;
    also if the cache is empty, or the model has no longrope.
    """
    return hasattr(config, "original_max_position_embeddings")


def of_embedding(find: Callable[[], Any], config: Any, device: torch.device) -> Rope:
    """Rope of a rotary embedding that is made when it is needed.

    Args:
        find: makes the embedding: one of its own, since forward passes change some. Raises
            ValueError: there is none.
        config: the decoder's.
        device: where the tables go.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    settings = settings.get("full_attention", settings)
    kind = settings.get("rope_type") or "default"
    switch = None
    if "dynamic" in kind:  # one token less: transformers goes back to the first tables only there
        switch = config.max_position_embeddings - 1
    if kind == "longrope":
        switch = settings["original_max_position_embeddings"]
    drops = kind == "longrope" and drops_caches(config)

    @cache
    @keeps
    def make(is_past: bool) -> Rotary:
        if config is not None:
            _check_layers(config)
        return _tables(find(), switch, is_past, device)

    return Rope(make, kind, switch, drops)


def _check_layers(config: Any) -> None:
    """Raises ValueError: RoPE is not what layers with full attention do last, all alike."""
    rope_layers = getattr(config, "no_rope_layers", None)  # 1 where there is RoPE
    thetas = getattr(config, "layer_rope_theta", None)  # 0 where there is none
    types = getattr(config, "layer_types", None) or []
    settings = getattr(config, "rope_parameters", None) or {}
    sliding_only = config.model_type in _NOWHERE_BUT_SLIDING and len(set(types)) > 1
    refused = {
        "has layers without": sliding_only or not all(rope_layers or [1]) or not all(thetas or [1]),
        "has several kinds": len(set(thetas or [1])) > 1,
        "has none": getattr(config, "position_embedding_type", "rope") != "rope",
        "has a norm after it": config.model_type in _NORM_AFTER_ROPE,
        "has positions of several dimensions": "mrope_section" in settings,
    }
    for what, present in refused.items():
        if present:
            raise ValueError(
                f"this policy undoes the model's RoPE, and a {config.model_type} model {what}: use "
                "a policy that reads no RoPE (snapkv, streaming, ...)"
            )


def _tables(embedding: Any, switch: int | None, is_past: bool, device: torch.device) -> Rotary:
    name = type(embedding).__name__
    turn = getattr(sys.modules[type(embedding).__module__], "rotate_half", None)
    if embedding is None or turn is None:
        raise ValueError(f"{name} is no rotary position embedding that we know")
    turned = turn(torch.arange(1.0, 5.0)).tolist()
    if turned not in ([-3, -4, 1, 2], [-2, 1, -4, 3]):
        raise ValueError(f"{name} turns dimensions in an unknown order")
    neox = turned[0] == -3
    wanted = {0, *(2**power for power in range(_HIGHEST)), *_CHECKED}
    if switch is not None:
        wanted = wanted | {switch} if is_past else {at for at in wanted if at < switch}
    positions = torch.tensor(sorted(wanted), device="cpu")
    by_type = "layer_type" in inspect.signature(embedding.forward).parameters
    with torch.no_grad():
        which = ["full_attention"] if by_type else []
        like = torch.zeros(1, dtype=torch.float32, device="cpu")
        cos, sin = embedding.cpu()(like, positions[None], *which)
    half = cos.shape[-1] // 2
    # Where neighbours turn together, a table has each number twice in a row (Cohere), or it is that
    # of halves, and repeated when it is used (GLM, ERNIE 4.5, Helium).
    halves = torch.equal(cos[..., :half], cos[..., half:])
    place = slice(0, half) if neox or halves else slice(0, None, 2)
    rotary = from_tables(positions, cos[0, :, place].float(), sin[0, :, place].float(), neox)
    return replace(rotary, frequencies=rotary.frequencies.to(device))
