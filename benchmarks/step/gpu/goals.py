"""The goals of a GPU: which ratio of host or device times must be how small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.step.arms import FUSED, OURS
from benchmarks.step.goals import Verdict, of_memory
from benchmarks.step.gpu.run import FUSED_GRAPH, ONE_LAUNCH, OURS_GRAPH
from benchmarks.step.measure import ratio

Record = dict[str, Any]
DEVICE, HOST = "round_ms", "round_host_ms"
NO_SLOWER = 1.02


class Goal(NamedTuple):
    """Ours is to take at most ``limit`` times what torch split by hand takes.

    No case promises less of the device's time where the kernels already run at the
    memory's speed.
    """

    case: str
    times: str
    limit: float
    optimizers: tuple[str, ...]
    arms: tuple[str, str]


BOTH, COUNTING = ("adamw", "sgd"), ("adamw",)
EAGER, GRAPHS = (OURS, FUSED), (OURS_GRAPH, FUSED_GRAPH)
GOALS = (
    Goal("tiny_layers", HOST, 0.3, BOTH, EAGER),
    Goal("tiny_groups", HOST, 0.05, BOTH, EAGER),
    Goal("tiny_groups", DEVICE, 0.1, BOTH, GRAPHS),
    # The kernel of rates per tensor is kept if it pays at 26 rates.
    Goal("tiny_layers", DEVICE, 0.5, COUNTING, (ONE_LAUNCH, OURS)),
    Goal("tiny_layers", HOST, 0.8, COUNTING, (ONE_LAUNCH, OURS)),
    Goal("vit_l_layers", DEVICE, 1.0, COUNTING, (ONE_LAUNCH, OURS)),
    # Half the launches, of kernels that are tiny: torch counts by group.
    Goal("tiny_layers", DEVICE, 0.75, COUNTING, EAGER),
    Goal("tiny_groups_lr", DEVICE, 0.75, COUNTING, GRAPHS),
)
WHOLE_STEP = 1.01


def verdicts(results: Record) -> Iterator[Verdict]:
    """Hold a saved run against the goals, as far as it was run."""
    for record in results["cases"]:
        for arms in (EAGER, GRAPHS):
            yield from _held(record, DEVICE, arms, NO_SLOWER)
        for goal in GOALS:
            if goal.case == record["case"] and record["optimizer"] in goal.optimizers:
                yield from _held(record, goal.times, goal.arms, goal.limit)
        if record["elements"] > 1_000_000 and OURS in record["arms"]:
            yield of_memory(record)
    for record in results.get("training", ()):
        yield from _held(record, DEVICE, EAGER, WHOLE_STEP)


def _held(
    record: Record, times: str, arms: tuple[str, str], limit: float
) -> Iterator[Verdict]:
    mine, theirs = (record["arms"].get(arm, {}).get(times) for arm in arms)
    if not mine or not theirs:
        return
    value = ratio(mine, theirs)
    what = {DEVICE: "device", HOST: "host"}[times]
    yield Verdict(
        f"{record['case']}, {record['optimizer']}: {what} of {arms[0]} at most "
        f"{limit} x {arms[1]}",
        f"{value.median:.3f} ({value.p10:.3f} to {value.p90:.3f})",
        value.median <= limit,
    )
