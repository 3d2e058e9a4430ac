"""The names of page formats, and which layer has which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paged_kv.core.options import read_json

NATIVE = "native"
FORMATS = (NATIVE, "int8", "int4", "fp8")


def layer_formats(page_format: str, num_layers: int) -> tuple[str, ...]:
    """The format of each layer.

    Args:
        page_format: one of FORMATS for all layers, or a file that `paged-kv calibrate` wrote.
        num_layers: of the model.

    Raises:
        ValueError: no such format, or the file is not such a file, or of another model.
    """
    if page_format in FORMATS:
        return (page_format,) * num_layers
    formats = read_calibration(page_format)["layers"]
    if len(formats) != num_layers:
        raise ValueError(
            f"page_format {page_format}: the file has {len(formats)} layers, the model {num_layers}"
        )
    return tuple(formats)


def read_calibration(path: str) -> dict[str, Any]:
    """What `paged-kv calibrate` wrote: "layers", a format for each, and what was measured.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    try:
        calibration = read_json(Path(path).read_text())
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"page_format {path}: the file cannot be read: {reason}") from None
    except ValueError as error:
        raise ValueError(f"page_format {path}: the file is not JSON: {error}") from None
    layers = calibration.get("layers") if isinstance(calibration, dict) else None
    if not isinstance(layers, list) or not layers or not set(map(str, layers)) <= set(FORMATS):
        raise ValueError(
            f'page_format {path}: the file needs "layers", a list of {", ".join(FORMATS)}, one for '
            "each layer: `paged-kv calibrate` writes it"
        )
    return dict(calibration)
