"""How long a step takes: the bare kernel, torch in four ways, and this library.

Examples::

    python -m benchmarks.step --quick --case tiny
    python -m benchmarks.step --json
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
        choices=[case.name for case in CASES],
        help="by default all, on a CPU without the large ones",
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
        help="compile torch's step too, which takes minutes; by default on a GPU",
    )
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw a saved run beside its file and measure nothing",
    )
    return parser.parse_args(words)


def chosen_cases(names: Sequence[str] | None, device: torch.device) -> list[Case]:
    if names:
        return [case for case in CASES if case.name in names]
    on_cpu = device.type == "cpu"
    return [c for c in CASES if not (c.large if on_cpu else c.busy)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases; show and save each as soon as it is measured."""
    effort = runs.QUICK if args.quick else runs.FULL
    compiled = args.device.type != "cpu" if args.compile is None else args.compile
    run = runs.describe_run(args.device, args.quick)
    once = runs.run_once(args.device, clock_for(args.device), effort)
    results = {"run": run, "once": once, "cases": []}
    for case, optimizer in product(
        chosen_cases(args.case, args.device), args.optimizer
    ):
        try:
            record = runs.run_case(case, optimizer, args.device, effort, compiled)
        except torch.OutOfMemoryError as error:
            show([f"{case.title}, {optimizer}: left out, {error}"])
        else:
            show(tables.case_lines(record))
            results["cases"].append(record)
        save(results, args.json)
        free_memory(args.device)
    return results


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
    show(tables.goal_lines(results))
    if path := save(results, args.json):
        print(f"saved as {path}")


if __name__ == "__main__":
    main()
