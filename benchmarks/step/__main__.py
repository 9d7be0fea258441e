"""How long a step takes: the bare kernel, torch in four ways, and this library.

Examples::

    python -m benchmarks.step --quick --case tiny
    python -m benchmarks.step --json
    python -m benchmarks.step --device cuda --json
    python -m benchmarks.step --picture benchmarks/results/NAME.json
    python -m benchmarks.step --show benchmarks/results/NAME_OF_A_GPU.json
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import require
from benchmarks.step import results as runs
from benchmarks.step import tables
from benchmarks.step.arms import CLASSES
from benchmarks.step.cases import CASES, Case, case_named
from benchmarks.step.gpu import run as gpu
from benchmarks.step.gpu import tables as gpu_tables
from benchmarks.step.gpu.device import device_for
from benchmarks.step.gpu.training import (
    TRAININGS,
    Training,
    run_training,
    trainings,
)
from benchmarks.step.measure import clock_for

DEAD = 3  # exit code where the device answers no more
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
        "--resume",
        action="store_true",
        help="go on with the file of --json, whose process ended",
    )
    add("--commit", help="to note where there is no git to ask")
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw a saved run beside its file and measure nothing",
    )
    add("--show", type=Path, metavar="FILE", help="print a saved run of a GPU")
    args = parser.parse_args(words)
    args.on_gpu = args.rehearse or args.device.type != "cpu"
    return args


def chosen_cases(names: Sequence[str] | None, device: torch.device) -> list[Case]:
    if names is None and device.type != "cpu":
        names = gpu.CASES
    if names is not None:
        return [case for case in CASES if case.name in names]
    return [case for case in CASES if not case.large]


def chosen_trainings(names: Sequence[str] | None) -> list[Training]:
    return [each for each in trainings() if names is None or each.name in names]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases; show and save each as soon as it is measured."""
    effort = runs.QUICK if args.quick else runs.FULL
    results = begin(args, effort)
    chosen: list[Case | Training] = [*chosen_cases(args.case, args.device)]
    if args.on_gpu:
        chosen += chosen_trainings(args.case)
    for work, optimizer in product(chosen, args.optimizer):
        if (work.name, optimizer) not in done(results):
            attempt(results, work, optimizer, args, effort)
    if args.on_gpu:
        add_launches(results, args)
    return results


def begin(args: argparse.Namespace, effort: runs.Effort) -> dict[str, Any]:
    """Start a record, or go on with one whose process ended."""
    if args.resume and args.json and Path(args.json).exists():
        results = runs.load(Path(args.json))
        if lost := results.pop("under_way", None):
            note_death(results, lost, "the process ended")
        return results
    run = runs.describe_run(args.device, args.quick)
    if args.commit:
        run["commit"] = args.commit
    once = runs.run_once(args.device, clock_for(args.device), effort)
    return {"run": run, "once": once, "cases": []}


def done(results: dict[str, Any]) -> set[tuple[str, str]]:
    """Name what was measured, or could not be."""
    records = [*results["cases"], *results.get("training", ())]
    records += results.get("left_out", ())
    return {(record["case"], record["optimizer"]) for record in records}


def leave_out(results: dict[str, Any], names: dict[str, str], error: str) -> None:
    show([f"{names['case']}, {names['optimizer']}: left out, {error}"])
    entry = {**names, "error": error[:1000]}
    results.setdefault("left_out", []).append(entry)


def note_death(results: dict[str, Any], names: dict[str, str], error: str) -> None:
    """Note what took its process with it; the first time, another may try it."""
    died = results.setdefault("died", [])
    if names in died:
        leave_out(results, names, error)
    died.append(names)


def attempt(
    results: dict[str, Any],
    work: Case | Training,
    optimizer: str,
    args: argparse.Namespace,
    effort: runs.Effort,
) -> None:
    """Measure a case or a training and save it, or what kept it from being measured.

    Raises:
        SystemExit: The device answers no more; a new process can go on.
    """
    names = {"case": work.name, "optimizer": optimizer}
    results["under_way"] = names
    save(results, args.json)
    # On a GPU one case that fails does not cost the others their results.
    caught = Exception if args.on_gpu else torch.OutOfMemoryError
    add = add_case if isinstance(work, Case) else add_training
    failed: str | None = None
    try:
        add(results, work, optimizer, args, effort)
    except caught as error:
        failed = str(error) or type(error).__name__
    alive = answers(args.device)
    if failed is not None:
        (leave_out if alive else note_death)(results, names, failed)
    del results["under_way"]
    save(results, args.json)
    if not alive:
        sys.exit(DEAD)
    free_memory(args.device)


def answers(device: torch.device) -> bool:
    """Tell whether a device works: after some errors it does for no one here."""
    try:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
    except RuntimeError:
        return False
    return True


def add_case(
    results: dict[str, Any],
    case: Case,
    optimizer: str,
    args: argparse.Namespace,
    effort: runs.Effort,
) -> None:
    own = (case, optimizer, args.device, effort, args.compile)
    if args.on_gpu:
        again = {"case": case.name, "optimizer": optimizer} in results.get("died", ())
        record = gpu.run_case(*own, args.limit, careful=again)
        show(gpu_tables.case_lines(record, results["once"]["copy_gb_per_s"]))
    else:
        record = runs.run_case(*own)
        show(tables.case_lines(record))
    results["cases"].append(record)


def add_training(
    results: dict[str, Any],
    training: Training,
    optimizer: str,
    args: argparse.Namespace,
    effort: runs.Effort,
) -> None:
    record = run_training(
        *(training, optimizer, args.device, device_for(args.device)),
        *(effort.rounds, args.limit, args.quick),
    )
    show(gpu_tables.training_lines(record))
    results.setdefault("training", []).append(record)


def add_launches(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Count the launches of every case, when there is nothing left to time."""
    if results.get("counting"):  # a process ended of it
        return
    results["counting"] = True
    for record in results["cases"]:
        try:
            counts = gpu.count_launches(
                case_named(record["case"]), record["optimizer"], args.device
            )
        except Exception as error:
            show([f"{record['case']}: launches not counted, {error}"])
            continue
        for name, arm in record["arms"].items():
            arm["launches"] = counts.get(name)
        show([gpu_tables.launch_line(record)])
        save(results, args.json)
        free_memory(args.device)
    del results["counting"]
    save(results, args.json)


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

        saved = runs.load(args.picture)
        if not saved["cases"]:
            sys.exit(f"{args.picture} holds no case to draw: --show prints what it has")
        print(draw(saved, args.picture.with_suffix(".png")))
        return
    if args.show:
        show(gpu_tables.all_lines(runs.load(args.show)))
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
