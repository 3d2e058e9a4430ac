"""Rotary position embeddings, backwards and ahead: what looks at queries before RoPE needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """A model's RoPE.

    Args:
        cos: float32 [positions, rotary_dim / 2].
        sin: float32 [positions, rotary_dim / 2].
        neox: whether dimension i turns with i + rotary_dim / 2 (Llama), or with its neighbour
            (GPT-J). Dimensions from rotary_dim on do not turn.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    neox: bool = True

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Turns x [..., head_dim] by positions [...]; back: undoes it."""
        return self.turn(x, *self.at(positions, back))

    def at(self, positions: torch.Tensor, back: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at positions [...]: [..., rotary_dim / 2] each; back: of the inverse."""
        index = positions.clamp(0, len(self.cos) - 1)
        cos, sin = self.cos[index], self.sin[index]
        if back:
            squared = cos**2 + sin**2  # not 1 where RoPE also scales (YaRN)
            cos, sin = cos / squared, -sin / squared
        return cos, sin

    def mean(self, start: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cos and sin over `count` positions from start [...]: [..., rotary_dim / 2] each."""
        index = start[..., None] + torch.arange(count, device=start.device)
        index = index.clamp(0, len(self.cos) - 1)
        return self.cos[index].mean(-2), self.sin[index].mean(-2)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim] turned by cos and sin [..., rotary_dim / 2]."""
        half = self.cos.shape[-1]
        turning, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self.neox:
            first, second = turning[..., :half], turning[..., half:]
        else:
            first, second = turning[..., 0::2], turning[..., 1::2]
        turned = first * cos - second * sin, second * cos + first * sin
        if self.neox:
            return torch.cat([*turned, rest], -1)
        return torch.cat([torch.stack(turned, -1).flatten(-2), rest], -1)


def compose(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one turn after the other; scales multiply."""
    (cos, sin), (cos_, sin_) = first, second
    return cos * cos_ - sin * sin_, cos * sin_ + sin * cos_
