"""A saved run as a picture: time over the bare kernel, by case and arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.step.arms import (
    BARE,
    COMPILED,
    DEFAULT,
    FOREACH,
    FUSED,
    OURS,
)
from benchmarks.step.cases import case_named
from benchmarks.step.measure import Spread, ratio

Record = dict[str, Any]

LOOKS = {
    DEFAULT: ("#b9bec7", "s"),
    FOREACH: ("#8c95a3", "D"),
    COMPILED: ("#9a7fc9", "v"),
    FUSED: ("#4c72b0", "^"),
    OURS: ("#d1495b", "o"),
}
TITLES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD with momentum"}
INK, GRID, BAND = "#30343b", "#dde1e7", "#f6f7f9"


def draw(results: Record, path: Path) -> Path:
    """Draw a panel per optimizer and return the file."""
    optimizers = list(dict.fromkeys(r["optimizer"] for r in results["cases"]))
    cases = list(dict.fromkeys(r["case"] for r in results["cases"]))
    with mpl.rc_context({"font.size": 9.5, "text.color": INK, "axes.edgecolor": GRID}):
        size = (2.6 + 3.7 * len(optimizers), 1.7 + 0.4 * len(cases))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(
            1, len(optimizers), sharex=True, sharey=True, squeeze=False
        )[0]
        for panel, optimizer in zip(panels, optimizers, strict=True):
            _panel(panel, results["cases"], optimizer, cases)
        medians = [s.median for r in results["cases"] for s in over_bare(r).values()]
        # Not by the bars: beside busy processes they may reach over seven decades.
        panels[0].set_xlim(min([1, *medians]) / 2, 2 * max([1, *medians]))
        _frame(figure, panels[0], cases, results["run"])
        figure.savefig(path, dpi=160)
    return path


def over_bare(record: Record) -> dict[str, Spread]:
    """Return the ratios to the bare kernel of the arms that are shown."""
    # Of what has a device time: on a GPU not everything has.
    arms = {n: arm for n, arm in record["arms"].items() if "round_ms" in arm}
    return {
        name: ratio(arms[name]["round_ms"], arms[BARE]["round_ms"])
        for name in LOOKS
        if name in arms and BARE in arms
    }


def _panel(axes: Axes, records: list[Record], optimizer: str, cases: list[str]) -> None:
    for row in range(0, len(cases), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, zorder=0)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    for record in records:
        if record["optimizer"] == optimizer:
            _row(axes, cases.index(record["case"]), over_bare(record))
    axes.set_title(TITLES[optimizer], loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _row(axes: Axes, row: int, ratios: dict[str, Spread]) -> None:
    if not ratios:
        return
    medians = [value.median for value in ratios.values()]
    ends = [min(1, *medians), max(medians)]
    axes.plot(ends, [row, row], color="#cfd4dc", linewidth=1.4, zorder=2)
    for name, value in ratios.items():
        color, marker = LOOKS[name]
        ours = name == OURS
        axes.plot([value.p10, value.p90], [row, row], color=color, linewidth=2.6,
                  alpha=0.45, zorder=3, solid_capstyle="round")  # fmt: skip
        axes.plot(value.median, row, marker, color=color, markersize=8 if ours else 6.5,
                  markeredgecolor="white", markeredgewidth=0.8, zorder=5 if ours else 4,
                  label=name)  # fmt: skip
    if OURS in ratios:
        axes.annotate(f"{ratios[OURS].median:.2f}", (ratios[OURS].median, row),
                      xytext=(0, 6), textcoords="offset points", ha="center",
                      fontsize=7.5, color=LOOKS[OURS][0], zorder=6)  # fmt: skip


def _frame(figure: Figure, first: Axes, cases: list[str], run: Record) -> None:
    first.set_yticks(range(len(cases)), [case_named(case).title for case in cases])
    first.set_ylim(len(cases) - 0.5, -0.6)
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    names = [name for name in reversed(LOOKS) if name in shown]
    handles = [shown[name] for name in names]
    figure.legend(
        handles,
        names,
        ncols=len(names),
        loc="outside upper left",
        frameon=False,
        handletextpad=0.2,
    )
    threads = f", {run['threads']} threads" if run["device"] == "cpu" else ""
    figure.supxlabel(
        f"time of a step over the bare fused kernel · {run['device_name']}{threads}, "
        f"torch {run['torch'].split('+')[0]}, {run['date']} · "
        "bars: p10 to p90, cut at the edge",
        fontsize=8,
        color="#6b7280",
    )
