"""Charts, written as PNG without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLORS = ("#7a7a7a", "#1f77b4", "#2ca02c", "#d9822b")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def demo(
    path: Path,
    title: str,
    timelines: Mapping[str, Mapping[str, Sequence[float]]],
    speeds: Mapping[str, float],
    pool_mb: float,
) -> None:
    """Memory and running sequences over time, and tokens per second.

    Args:
        path: the PNG.
        title: above all.
        timelines: by engine: seconds, used_mb, running.
        speeds: output tokens per second by engine.
        pool_mb: size of the pool.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(11, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[2.6, 1])
        memory = figure.add_subplot(grid[0, 0])
        sequences = figure.add_subplot(grid[1, 0], sharex=memory)
        figure.suptitle(f"{title}\n", fontsize=12)
        for color, (name, line) in zip(COLORS, timelines.items(), strict=False):
            drawn = {"color": color, "label": name, "drawstyle": "steps-post"}
            memory.plot(line["seconds"], line["used_mb"], **drawn)
            sequences.plot(line["seconds"], line["running"], **drawn)
        _line(memory, pool_mb, f"pool: {pool_mb:.0f} MB", "#b22222")
        memory.set(title="KV cache in use (MB)", ylim=(0, pool_mb * 1.15))
        memory.tick_params(labelbottom=False)
        sequences.set(title="Running sequences", xlabel="seconds")
        sequences.set_ylim(bottom=0)
        sequences.set_xlim(left=0)
        sequences.legend()
        _bars(figure.add_subplot(grid[:, 1]), "Output tokens per second", speeds)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def ratios(path: Path, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Speed relative to plain vLLM (y) by the share of the demand that the pool holds (x)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for color, (name, points) in zip(COLORS[1:], lines.items(), strict=False):
            axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name)
        _line(axes, 1, "plain vLLM", COLORS[0])
        axes.invert_xaxis()
        axes.set(xlabel="pool / what all requests need uncompressed  (ample → tight)")
        axes.set(ylabel="output tokens/s, relative to plain vLLM", title=title)
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def elastic(
    path: Path,
    title: str,
    speed: Mapping[str, Sequence[tuple[float, float]]],
    lost: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Speed relative to plain vLLM, and requests that lost entries, by the size of the pool (x)."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        figure.suptitle(title, fontsize=12)
        for axes, lines in ((left, speed), (right, lost)):
            for color, (name, points) in zip(COLORS[1:], lines.items(), strict=False):
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=name)
            axes.invert_xaxis()
            axes.set(xlabel="pool / what all requests need uncompressed  (ample → tight)")
            axes.set_ylim(bottom=0)
        _line(left, 1, "plain vLLM", COLORS[0])
        left.set(title="Output tokens/s, relative to plain vLLM")
        right.set(title="Share of the requests that lost entries")
        right.legend()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def per_token(path: Path, title: str, times: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Milliseconds (y) by tokens of context (x); how often the last line is faster than the first.

    Args:
        path: the PNG.
        title: above all.
        times: by name: (tokens, milliseconds), at the same tokens for all.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        for color, (name, points) in zip(COLORS, times.items(), strict=False):
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=name)
        slow, *_, fast = times.values()
        for (tokens, most), (_, least) in zip(slow, fast, strict=True):
            axes.annotate(f"{most / least:.1f}×", (tokens, most), (0, 6), ha="center",
                          textcoords="offset points", fontweight="bold")  # fmt: skip
        axes.set(title=title, xlabel="tokens of context", ylabel="ms per token")
        axes.set(xscale="log", yscale="log")
        lengths = [tokens for tokens, _ in fast]
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], minor=False)
        axes.set_xticks([], minor=True)
        axes.legend()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _line(axes: Any, height: float, text: str, color: str) -> None:
    """A dashed line across, with its meaning at the right end."""
    axes.axhline(height, color=color, linewidth=1, linestyle="--")
    axes.annotate(
        text,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=color,
    )


def _bars(axes: Any, title: str, values: Mapping[str, float]) -> None:
    bars = axes.bar(list(values), list(values.values()), width=0.6, color=COLORS[: len(values)])
    first = next(iter(values.values()))
    labels = [
        f"{value:.0f}" if index == 0 else f"{value:.0f}\n({value / first:.2f}×)"
        for index, value in enumerate(values.values())
    ]
    axes.bar_label(bars, labels, padding=3, fontweight="bold")
    axes.set(title=title, ylim=(0, max(values.values()) * 1.18))
    axes.grid(axis="x", visible=False)
