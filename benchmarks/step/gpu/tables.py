"""A run on a GPU as text: a table per case, and the goals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.step.cases import case_named
from benchmarks.step.gpu.goals import not_run, unjudged, verdicts

Record = dict[str, Any]
NONE = "-"
HEAD = f"{'':22s}{'device ms':>27s}{'host ms':>10s}{'idle ms':>10s}{'launches':>9s}"


def case_lines(record: Record, copy_gb_per_s: float | None = None) -> Iterator[str]:
    """Show the arms of a case in their order."""
    yield f"{case_named(record['case']).title}, {record['optimizer']}: " + (
        f"{record['tensors']} tensors, {record['elements']:,} elements, "
        f"{record['groups']} groups, {record['seconds']:.0f} s"
    )
    yield f"  {HEAD}{'GB/s':>8s}{'of copy':>8s}{'MB more':>9s}"
    for name, arm in record["arms"].items():
        yield f"  {name:22s}" + _arm_line(arm, copy_gb_per_s)
    for name, error in record["errors"].items():
        yield f"  {name:22s} cannot: {error[:100]}"
    for name, first in record["first_step_ms"].items():
        yield f"  first step, {name:12s}{_spread(first):>23s}"


def _spread(value: Record | None) -> str:
    if value is None:
        return NONE
    return f"{value['median']:.4f} ({value['p10']:.4f} to {value['p90']:.4f})"


def _arm_line(arm: Record, copy_gb_per_s: float | None) -> str:
    rate = arm.get("gb_per_s")
    share = rate / copy_gb_per_s if rate and copy_gb_per_s else None
    return (
        f"{_spread(arm.get('ms')):>27s}"
        f"{arm['host_ms']['median']:10.4f}{arm['idle_ms']['median']:10.4f}"
        f"{arm['launches'] or NONE:>9}"
        f"{NONE if rate is None else f'{rate:.0f}':>8s}"
        f"{NONE if share is None else f'{share:.3f}':>8s}"
        f"{arm['peak_extra_bytes'] / 1e6:9.2f}"
    )


def launch_line(record: Record) -> str:
    counts = ", ".join(
        f"{name} {arm['launches']}" for name, arm in record["arms"].items()
    )
    return f"Launches of {record['case']}, {record['optimizer']}: {counts}"


def training_lines(record: Record) -> Iterator[str]:
    yield f"Training {record['case']}, {record['optimizer']}: batch {record['batch']}"
    for name, arm in record["arms"].items():
        yield f"  {name:22s}{_spread(arm['ms']):>27s} ms a step"


def goal_lines(results: Record) -> Iterator[str]:
    """Show every goal: met, not met, or why nothing says."""
    yield "Goals"
    for goal, measured, met in verdicts(results):
        yield f"  {'met    ' if met else 'NOT MET'}  {goal:74s} {measured}"
    for goal, reason in unjudged(results):
        yield f"  UNKNOWN  {goal:74s} {reason}"


def left_lines(results: Record) -> Iterator[str]:
    """Show what a whole run would have, and this has not."""
    for left in results.get("left_out", ()):
        yield f"{left['case']}, {left['optimizer']}: left out, {left['error']}"
    if missing := "; ".join(not_run(results)):
        yield f"Not measured: {missing}"


def all_lines(results: Record) -> Iterator[str]:
    """Show a whole run."""
    for record in results["cases"]:
        yield from case_lines(record, results["once"].get("copy_gb_per_s"))
    for record in results.get("training", ()):
        yield from training_lines(record)
    yield from left_lines(results)
    yield from goal_lines(results)
