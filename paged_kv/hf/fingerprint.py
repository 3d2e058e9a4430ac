"""Which model a cache is of, as far as a config says: its shape, its layers, its RoPE."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig

# What a model's class declares, and what changes no key and no value.
_OTHER = {"use_cache", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id"}
_OTHER |= {"is_causal"}  # transformers writes it into a config for a call, and may leave it there


def fingerprint(config: Any) -> dict[str, Any]:
    """What the class of a model's config declares, in values that JSON can carry.

    Two models of one architecture that were trained on different texts have the same.

    Args:
        config: of the model, or of its decoder.
    """
    decoder = config.get_text_config(decoder=True)
    common = set(PreTrainedConfig().to_dict()) - {"model_type"}
    values = {key: value for key, value in decoder.to_dict().items() if key not in common | _OTHER}
    fields: dict[str, Any] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return fields


def dtype_of(config: Any) -> str:
    """What a config says of its model's dtype: "float32"; empty if it says nothing."""
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None)
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two fingerprints do not have in common: "name: there, here"; empty for nothing.

    Args:
        there: the one that is mentioned first.
        here: the other one.
    """
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    return "; ".join(f"{name}: {there.get(name)!r}, {here.get(name)!r}" for name in names)
