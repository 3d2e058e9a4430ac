"""Rotary position embeddings, backwards and ahead: what looks at queries before RoPE needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """A model's RoPE, at any position: `scale` times a turn by position * frequency.

    Args:
        frequencies: float32 [rotary_dim / 2], radians per position.
        scale: of cos and sin, not 1 in YaRN and LongRoPE.
        neox: whether dimension i turns with i + rotary_dim / 2 (Llama), or with its neighbour
            (GPT-J). Dimensions from rotary_dim on do not turn.
    """

    frequencies: torch.Tensor
    scale: float = 1.0
    neox: bool = True

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Turns x [..., head_dim] by positions [...]; back: undoes it."""
        return self.turn(x, *self.at(positions, back))

    def at(self, positions: torch.Tensor, back: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at positions [...]: [..., rotary_dim / 2] each; back: of the inverse."""
        angles = positions[..., None].float() * self.frequencies
        if back:
            return angles.cos() / self.scale, -angles.sin() / self.scale
        return angles.cos() * self.scale, angles.sin() * self.scale

    def mean(self, start: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cos and sin over `count` positions from start [...]: [..., rotary_dim / 2] each.

        The geometric series of exp(i * frequency * position): a turn to the middle, and shorter.
        """
        half = self.frequencies / 2
        still = half == 0  # a dimension that does not turn
        length = torch.where(still, 1.0, (count * half).sin() / (count * half.sin()))
        cos, sin = self.at(start + (count - 1) / 2)
        return cos * length, sin * length

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim] turned by cos and sin [..., rotary_dim / 2]."""
        half = len(self.frequencies)
        turning, tail = x[..., : 2 * half], x[..., 2 * half :]
        if self.neox:
            first, second = turning[..., :half], turning[..., half:]
        else:
            first, second = turning[..., 0::2], turning[..., 1::2]
        turned = first * cos - second * sin, second * cos + first * sin
        if self.neox:
            return torch.cat([*turned, tail], -1)
        return torch.cat([torch.stack(turned, -1).flatten(-2), tail], -1)

    def pair_means(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """x [..., head_dim]: dimensions that turn together get their mean, times a factor.

        Args:
            x: [..., head_dim].
            factors: [rotary_dim / 2], of each pair; dimensions that do not turn have none.
        """
        half = len(self.frequencies)
        turning, tail = x[..., : 2 * half], x[..., 2 * half :]
        if self.neox:
            means = turning.unflatten(-1, (2, half)).mean(-2) * factors
            return torch.cat([means, means, tail], -1)
        means = turning.unflatten(-1, (half, 2)).mean(-1) * factors
        return torch.cat([means.repeat_interleave(2, -1), tail], -1)


def from_tables(
    positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, neox: bool = True
) -> Rotary:
    """The Rotary that has these values, as every RoPE has whose frequencies are constant.

    Each frequency follows from the angles at 0, 1, 2, 4, 8, ...: every one doubles the precision,
    until it is float32's. All other rows are compared.

    Args:
        positions: int64 [rows]: 0, 1, powers of two, and any others; on the CPU.
        cos: float32 [rows, rotary_dim / 2], not rounded to the model's dtype; on the CPU.
        sin: like cos.
        neox: see Rotary.

    Raises:
        ValueError: these are no turns by constant frequencies.
    """
    rows = {position: row for row, position in enumerate(positions.tolist())}
    scale = float(cos[rows[0]].max())
    angles = torch.atan2(sin.double(), cos.double())
    frequencies = angles[rows[1]]
    power = 2
    while power in rows:
        turns = ((frequencies * power - angles[rows[power]]) / (2 * torch.pi)).round()
        frequencies = (angles[rows[power]] + 2 * torch.pi * turns) / power
        power *= 2
    rotary = Rotary(frequencies.float(), scale, neox)
    # float32 angles are rounded, here and there: an error in proportion to the angle.
    bound = scale * (1e-5 + 5e-7 * positions[:, None] * rotary.frequencies.abs())
    for values, table in zip(rotary.at(positions), (cos, sin), strict=True):
        if not bool(((values - table).abs() <= bound).all()):
            raise ValueError("these rotary position embeddings are no turns by fixed frequencies")
    return rotary


def compose(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of one turn after the other; scales multiply."""
    (cos, sin), (cos_, sin_) = first, second
    return cos * cos_ - sin * sin_, cos * sin_ + sin * cos_
