"""The goals of a GPU: which ratio of host or device times must be how small."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from benchmarks.step.arms import FUSED, OURS
from benchmarks.step.cases import case_named
from benchmarks.step.goals import Verdict, of_memory
from benchmarks.step.gpu.run import (
    CASES,
    FUSED_GRAPH,
    OURS_GRAPH,
    has_graphs,
)
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
    # Half the launches, of kernels that are tiny: torch counts by group.
    Goal("tiny_layers", DEVICE, 0.75, COUNTING, EAGER),
    Goal("tiny_groups_lr", DEVICE, 0.75, COUNTING, GRAPHS),
)
WHOLE_STEP = 1.01


TRAINED = "train_vit_s", "train_resnet50"


class Claim(NamedTuple):
    """One arm's times, over another's, of one case with one optimizer."""

    case: str
    optimizer: str
    times: str
    limit: float
    arms: tuple[str, str]

    def __str__(self) -> str:
        what = {DEVICE: "device", HOST: "host"}[self.times]
        first, second = self.arms
        named = f"{self.case}, {self.optimizer}: {what} of {first}"
        return f"{named} at most {self.limit} x {second}"


def verdicts(results: Record) -> Iterator[Verdict]:
    """Hold a saved run against the goals, as far as it was run."""
    for record in results["cases"]:
        for claim in claims(record["case"], record["optimizer"]):
            yield from _held(record, claim)
        if record["elements"] > 1_000_000 and OURS in record["arms"]:
            yield of_memory(record)
    for record in results.get("training", ()):
        yield from _held(record, _of_training(record["case"], record["optimizer"]))


def claims(case: str, optimizer: str) -> list[Claim]:
    """List what is to hold of a case."""
    pairs = (EAGER, GRAPHS) if has_graphs(case_named(case)) else (EAGER,)
    general = [Claim(case, optimizer, DEVICE, NO_SLOWER, pair) for pair in pairs]
    return general + [
        Claim(case, optimizer, goal.times, goal.limit, goal.arms)
        for goal in GOALS
        if goal.case == case and optimizer in goal.optimizers
    ]


def _of_training(case: str, optimizer: str) -> Claim:
    return Claim(case, optimizer, DEVICE, WHOLE_STEP, EAGER)


def unjudged(results: Record) -> Iterator[tuple[str, str]]:
    """Name the goals that a run says nothing of, and why: nothing counts as met."""
    for record in results["cases"]:
        for claim in claims(record["case"], record["optimizer"]):
            yield from _missing(claim, record)
    for record in results.get("training", ()):
        claim = _of_training(record["case"], record["optimizer"])
        yield from _missing(claim, record)


def not_run(results: Record) -> Iterator[str]:
    """Name the cases of which a whole run would judge the goals."""
    records = [*results["cases"], *results.get("training", ())]
    there = {(record["case"], record["optimizer"]) for record in records}
    for case, optimizer in product((*CASES, *TRAINED), BOTH):
        if (case, optimizer) not in there:
            yield f"{case}, {optimizer}"


def _missing(claim: Claim, record: Record) -> Iterator[tuple[str, str]]:
    for arm in claim.arms:
        if error := record.get("errors", {}).get(arm):
            yield str(claim), f"{arm} cannot: {error[:100]}"
            return
        if not record["arms"].get(arm, {}).get(claim.times):
            yield str(claim), f"no such time of {arm}"
            return


def _held(record: Record, claim: Claim) -> Iterator[Verdict]:
    mine, theirs = (record["arms"].get(arm, {}).get(claim.times) for arm in claim.arms)
    if not mine or not theirs:
        return  # see `unjudged`
    value = ratio(mine, theirs)
    yield Verdict(
        str(claim),
        f"{value.median:.3f} ({value.p10:.3f} to {value.p90:.3f})",
        value.median <= claim.limit,
    )
