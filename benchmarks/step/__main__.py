"""How long a step takes: the bare kernel, torch in four ways, and this library.

Examples::

    python -m benchmarks.step --quick --case tiny
    python -m benchmarks.step --json
    python -m benchmarks.step --device cuda --json
    python -m benchmarks.step --picture benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import require
from benchmarks.step import results as runs
from benchmarks.step import tables
from benchmarks.step.arms import CLASSES
from benchmarks.step.cases import CASES, Case
from benchmarks.step.gpu import run as gpu
from benchmarks.step.gpu import tables as gpu_tables
from benchmarks.step.gpu.device import device_for
from benchmarks.step.gpu.training import TRAININGS, run_training, trainings
from benchmarks.step.measure import clock_for

THREADS = 2  # as on the machine that the goals for a CPU are written for


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cpu"))
    add("--optimizer", nargs="+", choices=list(CLASSES), default=["adamw", "sgd"])
    add(
        "--case",
        nargs="+",
        choices=[*(case.name for case in CASES), *TRAININGS],
        help="by default all that are of interest on the device",
    )
    add(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="save the run, without FILE under benchmarks/results",
    )
    add("--quick", action="store_true", help="few rounds: shows that all runs")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile torch's step too, which takes minutes",
    )
    add(
        "--limit",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="that a case on a GPU may take, begun rounds and building aside",
    )
    add(
        "--rehearse",
        action="store_true",
        help="measure on the CPU as on a GPU: shows that all runs",
    )
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw a saved run beside its file and measure nothing",
    )
    args = parser.parse_args(words)
    args.on_gpu = args.rehearse or args.device.type != "cpu"
    return args


def chosen_cases(names: Sequence[str] | None, device: torch.device) -> list[Case]:
    if names is None and device.type != "cpu":
        names = gpu.CASES
    if names is not None:
        return [case for case in CASES if case.name in names]
    return [case for case in CASES if not case.large]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases; show and save each as soon as it is measured."""
    effort = runs.QUICK if args.quick else runs.FULL
    run = runs.describe_run(args.device, args.quick)
    once = runs.run_once(args.device, clock_for(args.device), effort)
    results: dict[str, Any] = {"run": run, "once": once, "cases": []}
    # On a GPU one case that fails does not cost the others their results.
    caught = Exception if args.on_gpu else torch.OutOfMemoryError
    for case, optimizer in product(
        chosen_cases(args.case, args.device), args.optimizer
    ):
        try:
            add_case(results, case, optimizer, args, effort)
        except caught as error:
            show([f"{case.title}, {optimizer}: left out, {error}"])
            results.setdefault("left_out", []).append(
                {"case": case.name, "optimizer": optimizer, "error": str(error)[:1000]}
            )
        save(results, args.json)
        free_memory(args.device)
    if args.on_gpu:
        add_trainings(results, args, effort)
    return results


def add_case(
    results: dict[str, Any],
    case: Case,
    optimizer: str,
    args: argparse.Namespace,
    effort: runs.Effort,
) -> None:
    own = (case, optimizer, args.device, effort, args.compile)
    if args.on_gpu:
        record = gpu.run_case(*own, args.limit)
        show(gpu_tables.case_lines(record, results["once"]["copy_gb_per_s"]))
    else:
        record = runs.run_case(*own)
        show(tables.case_lines(record))
    results["cases"].append(record)


def add_trainings(
    results: dict[str, Any], args: argparse.Namespace, effort: runs.Effort
) -> None:
    results["training"] = []
    for training, optimizer in product(trainings(), args.optimizer):
        if args.case is not None and training.name not in args.case:
            continue
        record = run_training(
            *(training, optimizer, args.device, device_for(args.device)),
            *(effort.rounds, args.limit, args.quick),
        )
        show(gpu_tables.training_lines(record))
        results["training"].append(record)
        save(results, args.json)
        free_memory(args.device)


def save(results: dict[str, Any], wanted: str | None) -> Path | None:
    """Save under the wanted name, under the usual one if it is empty, or not."""
    if wanted is None:
        return None
    path = Path(wanted) if wanted else runs.default_path(results["run"])
    runs.save(results, path)
    return path


def free_memory(device: torch.device) -> None:
    """Give the next case the memory of this one."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def show(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)


def main(words: Sequence[str] | None = None) -> None:
    args = parse(words)
    if args.picture:
        require("matplotlib")
        from benchmarks.step.picture import draw

        print(draw(runs.load(args.picture), args.picture.with_suffix(".png")))
        return
    if args.device.type == "cpu":
        torch.set_num_threads(THREADS)
    results = measure(args)
    show(tables.once_lines(results))
    if not args.on_gpu:  # there it stands beside each arm
        show(tables.share_lines(results))
    goal_lines = gpu_tables.goal_lines if args.on_gpu else tables.goal_lines
    show(goal_lines(results))
    if path := save(results, args.json):
        print(f"saved as {path}")


if __name__ == "__main__":
    main()
