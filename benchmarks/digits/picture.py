"""Norm gains, biases and weights over training, one curve per arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.digits.arms import (
    ALL,
    HAND_SPLIT,
    SELECTIVE,
    WEIGHT_DECAY,
    Result,
)
from benchmarks.digits.networks import BIAS, GAIN, NETWORKS, WEIGHT

# Two arms should coincide: the pale, wide curve stays visible under the thin one.
STYLES: dict[str, dict[str, Any]] = {
    HAND_SPLIT: {"color": "#9ecae1", "linewidth": 6, "solid_capstyle": "round"},
    SELECTIVE: {"color": "#08519c", "linewidth": 1.6},
    ALL: {"color": "#d95f02", "linewidth": 1.8, "dashes": (4, 1.5)},
}
INK, GRID = "#333333", "#e6e6e6"


def draw(results: Sequence[Result], steps_per_epoch: int, path: Path) -> None:
    """Draw a row per network and a column per kind of parameter, and write the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(NETWORKS), 3, sharex=True, squeeze=False)
    for row, network in zip(grid, NETWORKS, strict=True):
        for axes, kind in zip(row, (GAIN, BIAS, WEIGHT), strict=True):
            _draw_curves(axes, results, network, kind, steps_per_epoch)
            axes.set_ylabel(f"mean |{kind}|")
        row[0].set_title(network, loc="left", fontweight="bold", color=INK)
    for axes in grid[-1]:
        axes.set_xlabel(f"epoch ({steps_per_epoch} steps)")
    figure.align_ylabels(grid)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        title=f"Parameters over training, AdamW with weight decay {WEIGHT_DECAY:g}",
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def _draw_curves(
    axes: Any, results: Sequence[Result], network: str, kind: str, steps_per_epoch: int
) -> None:
    highest = 0.0
    for result in results:
        if result.network != network:
            continue
        epochs = [step / steps_per_epoch for step in result.history.steps]
        curve = result.history.curve(kind)
        highest = max(highest, *curve)
        axes.plot(epochs, curve, label=result.arm, **STYLES[result.arm])
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.12 * highest)
    axes.locator_params(axis="y", nbins=6)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
