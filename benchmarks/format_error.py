"""How well can numbers of 4 and 8 bits hold real keys and values? The formats and what they beat.

A text is read by the model in float32; every key (after RoPE) and value passes through each format
by itself, as it does when it is stored. Errors are ||x - x'|| / ||x|| of a layer, mean and maximum
over layers. bits count scales.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer, DynamicCache

from paged_kv.bench import script
from paged_kv.hf.driver.decoding import load
from paged_kv.kernels.page_layout import rotate
from paged_kv.quant import QUANTIZED

TEXT = Path(__file__).parent.parent / "docs" / "architecture.md"
Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


def scaled(numbers: Tensor, limit: int) -> Tensor:
    """Symmetric codes, a bfloat16 scale."""
    scale = bfloat16(numbers.abs().amax(-1, keepdim=True) / limit)
    return (numbers / scale).round().clamp(-limit, limit) * scale


def shifted(numbers: Tensor) -> Tensor:
    """Codes of 0 to 15, a bfloat16 scale and minimum."""
    low = bfloat16(numbers.amin(-1, keepdim=True))
    scale = bfloat16((numbers.amax(-1, keepdim=True) - low) / 15)
    return ((numbers - low) / scale).round().clamp(0, 15) * scale + low


def shifted_best(numbers: Tensor) -> Tensor:
    """shifted, of ranges cut by several factors the one with the least error."""
    middle = (numbers.amin(-1, keepdim=True) + numbers.amax(-1, keepdim=True)) / 2
    half = numbers.amax(-1, keepdim=True) - middle
    best = shifted(numbers)
    for factor in (0.95, 0.9, 0.85, 0.8):
        low = bfloat16(middle - half * factor)
        scale = bfloat16(half * factor * 2 / 15)
        new = ((numbers - low) / scale).round().clamp(0, 15) * scale + low
        better = (numbers - new).square().sum(-1, keepdim=True)
        better = better < (numbers - best).square().sum(-1, keepdim=True)
        best = torch.where(better, new, best)
    return best


def gaussian(numbers: Tensor) -> Tensor:
    """The 16 levels with the least error for a Gaussian (Lloyd, Max), scaled by the rms."""
    half = torch.tensor([0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326])
    levels = torch.cat([-half.flip(0), half])
    scale = bfloat16(numbers.square().mean(-1, keepdim=True).sqrt())
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize((numbers / scale).contiguous(), middles)] * scale


def bfloat16(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).float()


def grouped(change: Change, size: int) -> Change:
    return lambda numbers: change(numbers.unflatten(-1, (-1, size))).flatten(-2)


def rotated(change: Change) -> Change:
    def both(numbers: Tensor) -> Tensor:
        size = numbers.shape[-1] & -numbers.shape[-1]
        return rotate(change(rotate(numbers, size)), size)

    return both


def candidates(size: int) -> dict[str, tuple[float, Change]]:
    """(bits per number, numbers -> what comes back) by name; the package's formats first."""
    found: dict[str, tuple[float, Change]] = {}
    for name, codec in QUANTIZED.items():
        own = codec(size)
        found[name] = (8 * own.num_bytes / size, lambda x, own=own: own.decode(own.encode(x)))
    one, two, four = 4 + 16 / size, 4 + 32 / size, 4 + 64 / size
    found["4 bits, symmetric"] = (one, lambda x: scaled(x, 7))
    found["4 bits, minimum"] = (two, shifted)
    found["4 bits, minimum, 2 groups"] = (four, grouped(shifted, size // 2))
    found["4 bits, rotated, symmetric"] = (one, rotated(lambda x: scaled(x, 7)))
    found["4 bits, rotated, minimum"] = (two, rotated(shifted))
    found["4 bits, rotated, minimum, 2 groups, searched"] = (
        four, rotated(grouped(shifted_best, size // 2)))  # fmt: skip
    found["4 bits, rotated, Gaussian levels"] = (one, rotated(gaussian))
    found["8 bits, symmetric"] = (8 + 16 / size, lambda x: scaled(x, 127))
    return found


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    model = load(args.model, "float32")
    text = Path(args.text).read_text()
    tokens = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids
    tokens = tokens[:, : args.tokens]
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    for name, (bits, change) in candidates(cache.layers[0].keys.shape[-1]).items():
        errors: dict[str, list[float]] = {"key": [], "value": []}
        for layer in cache.layers:
            for part, numbers in (("key", layer.keys), ("value", layer.values)):
                errors[part].append(float((change(numbers) - numbers).norm() / numbers.norm()))
        line = {"bits": round(bits, 3), "tokens": tokens.shape[1]}
        for part, own in errors.items():
            line[f"{part}_error"] = round(math.fsum(own) / len(own), 5)
            line[f"worst_{part}_error"] = round(max(own), 5)
        script.emit("format_error", args, {"case": name, **line})


if __name__ == "__main__":
    parser = script.make_parser(__doc__)
    parser.add_argument("--text", default=str(TEXT), help=f"default {TEXT.name}", metavar="FILE")
    parser.add_argument("--tokens", type=script.positive, default=2048, metavar="N",
                        help="of the text (default 2048)")  # fmt: skip
    raise SystemExit(script.run(main, parser))
