"""A run as text: a table per case, what is paid once, and the goals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.step.arms import BARE, FUSED, OURS
from benchmarks.step.cases import case_named
from benchmarks.step.goals import copy_share, verdicts
from benchmarks.step.measure import ratio

Record = dict[str, Any]


def _spread(value: Record) -> str:
    return f"{value['median']:9.3f} ({value['p10']:.3f} to {value['p90']:.3f})"


def case_lines(record: Record) -> Iterator[str]:
    """Show the arms of a case, fastest first as they were listed."""
    title = case_named(record["case"]).title
    yield f"{title}, {record['optimizer']}: {record['tensors']} tensors, " + (
        f"{record['elements']:,} elements, {record['groups']} groups"
    )
    bare = record["arms"].get(BARE)
    for name, arm in record["arms"].items():
        over = ratio(arm["round_ms"], bare["round_ms"]).median if bare else 0.0
        extra = arm["peak_extra_bytes"] / 1e6
        ms = _spread(arm["ms"])
        mean = f"mean {arm['mean_ms']:9.3f} ms"
        yield f"  {name:20s}{ms:34s} ms {mean} {over:8.2f} x bare {extra:9.2f} MB"
    for name, error in record["errors"].items():
        yield f"  {name:20s} cannot: {error[:100]}"
    for name, first in record["first_step_ms"].items():
        yield f"  first step, {name:8s}{_spread(first):34s} ms"


def once_lines(results: Record) -> Iterator[str]:
    once = results["once"]
    yield "Paid once"
    for name, build in once.get("build_ms", {}).items():
        yield f"  build, {name:21s}{_spread(build)} ms"
    if "import_ms" in once:
        yield f"  import after torch          {_spread(once['import_ms'])} ms"
    yield f"  copy bandwidth {once['copy_gb_per_s']:.1f} GB/s"


def share_lines(results: Record) -> Iterator[str]:
    yield "Share of the copy bandwidth per step"
    for record in results["cases"]:
        shares = [
            f"{arm} {copy_share(results, record, arm):.3f}"
            for arm in (BARE, FUSED, OURS)
            if arm in record["arms"]
        ]
        yield f"    {record['case']}, {record['optimizer']}: {', '.join(shares)}"


def goal_lines(results: Record) -> Iterator[str]:
    yield "Goals"
    for goal, measured, met in verdicts(results):
        yield f"  {'met    ' if met else 'NOT MET'}  {goal:62s} {measured}"
