"""The goals of a CPU: which ratio must be how small, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.step.arms import (
    BARE,
    DEFAULT,
    FOREACH,
    FUSED,
    ONE_GROUP,
    OURS,
    PLAIN,
)
from benchmarks.step.measure import ratio

Record = dict[str, Any]
BEST_OF_TORCH = (FUSED, FOREACH, DEFAULT)


class Goal(NamedTuple):
    """Ours is to take at most ``limit`` times the fastest of some other arms."""

    case: str
    optimizers: tuple[str, ...]
    others: tuple[str, ...]
    limit: float


class Verdict(NamedTuple):
    """A goal, what was measured, and whether it is met."""

    goal: str
    measured: str
    met: bool


BOTH = ("adamw", "sgd")
GOALS = (
    Goal("tiny", ("adamw",), (BARE,), 1.5),
    Goal("tiny", ("adamw",), (FUSED,), 0.2),
    Goal("tiny", ("sgd",), (BARE,), 2.0),
    Goal("tiny", ("sgd",), (FUSED,), 0.3),
    # Faster than the bare kernel, which takes all threads for the smallest tensor.
    Goal("small", ("adamw",), (BARE,), 0.7),
    Goal("small", ("adamw",), (FUSED,), 0.1),
    Goal("small", ("sgd",), (BARE,), 0.9),
    Goal("small", ("sgd",), (FUSED,), 0.25),
    Goal("resnet50", BOTH, (BARE,), 1.03),
    Goal("resnet50", BOTH, (DEFAULT,), 0.6),
    Goal("vit_s", BOTH, (BARE,), 1.03),
    Goal("vit_s", BOTH, (DEFAULT,), 0.6),
    Goal("tiny_groups", BOTH, (ONE_GROUP,), 1.3),
    Goal("tiny_groups", BOTH, (FUSED,), 0.08),
    Goal("tiny_groups_lr", BOTH, (FUSED,), 0.5),
    Goal("tiny_layers", BOTH, (ONE_GROUP,), 1.3),
    Goal("vit_s_layers", BOTH, (ONE_GROUP,), 1.05),
    Goal("dtensor", BOTH, (PLAIN,), 1.5),
    Goal("dtensor", BOTH, BEST_OF_TORCH, 0.1),
)
BUILD_MS, IMPORT_MS = 20, 30
EXTRA_SHARE = 0.001  # of the parameters' bytes, where these are many


def verdicts(results: Record) -> Iterator[Verdict]:
    """Hold a run on a CPU against the goals, as far as it was run."""
    for goal in GOALS:
        for record in results["cases"]:
            if (record["case"], record["optimizer"]) in _asked(goal):
                yield from _of_arms(record, goal.others, goal.limit)
    for record in results["cases"]:
        if record["case"] == "small_busy":
            yield from _of_busy(record)
    yield from _of_once(results["once"])
    for record in results["cases"]:
        if record["elements"] > 1_000_000:
            yield of_memory(record)


def _asked(goal: Goal) -> list[tuple[str, str]]:
    return [(goal.case, optimizer) for optimizer in goal.optimizers]


def _title(record: Record) -> str:
    return f"{record['case']}, {record['optimizer']}"


def _of_arms(
    record: Record, others: tuple[str, ...], limit: float
) -> Iterator[Verdict]:
    arms = record["arms"]
    present = [name for name in others if name in arms]
    if OURS not in arms or not present:
        return
    best = min(present, key=lambda name: arms[name]["ms"]["median"])
    value = ratio(arms[OURS]["round_ms"], arms[best]["round_ms"])
    yield Verdict(
        f"{_title(record)}: at most {limit} x {best}",
        f"{value.median:.3f} ({value.p10:.3f} to {value.p90:.3f})",
        value.median <= limit,
    )


def _of_busy(record: Record) -> Iterator[Verdict]:
    """Hold what a busy machine makes of a step against torch's default."""
    ours, other = record["arms"][OURS], record["arms"][DEFAULT]
    for what, mine, theirs in (
        ("mean", ours["mean_ms"], other["mean_ms"]),
        ("90th percentile", ours["ms"]["p90"], other["ms"]["p90"]),
    ):
        yield Verdict(
            f"{_title(record)}: {what} at most {DEFAULT}'s",
            f"{mine:.2f} and {theirs:.2f} ms",
            mine <= theirs,
        )


def _of_once(once: Record) -> Iterator[Verdict]:
    for what, limit, ms in (
        ("build from 1,000 parameters", BUILD_MS, once["build_ms"][OURS]["median"]),
        ("import after torch", IMPORT_MS, once["import_ms"]["median"]),
    ):
        yield Verdict(f"{what}: at most {limit} ms", f"{ms:.1f} ms", ms <= limit)


def of_memory(record: Record) -> Verdict:
    """Hold the memory that a step of ours takes against that of the parameters."""
    extra = record["arms"][OURS]["peak_extra_bytes"]
    share = extra / (4 * record["elements"])
    return Verdict(
        f"{_title(record)}: no extra memory that grows with the model",
        f"{extra:,} bytes",
        share <= EXTRA_SHARE,
    )


def copy_share(results: Record, record: Record, arm: str) -> float:
    """Return the bandwidth of a step as a part of that of a copy."""
    ms = record["arms"][arm]["ms"]["median"]
    return float(record["step_bytes"] / ms / 1e6 / results["once"]["copy_gb_per_s"])
