"""What each form of decay costs: a step in every form, beside decoupled, interleaved.

python -m benchmarks.forms --json benchmarks/results/forms.json
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import selective_optim
from benchmarks.step.arms import CLASSES, SETTINGS
from benchmarks.step.cases import case_named
from benchmarks.step.measure import ratio, spread
from benchmarks.step.workload import Workload
from selective_optim.policies import form, towards

CASES = ("tiny", "resnet50")
OPTIMIZERS = ("adamw", "sgd")
POLICIES = {
    "decoupled": form("decoupled"),
    "decoupled again": form("decoupled"),  # how far equal arms differ
    "independent": form("independent"),
    "corrected": form("corrected"),
    "cautious": form("cautious"),
    "decoupled towards 1": form("decoupled") * towards(1),
    "decoupled towards init": form("decoupled") * towards("init"),
    "l2 towards init": form("l2") * towards("init"),
    "cautious towards init": form("cautious") * towards("init"),
}


def steps_of(load: Workload, optimizer: str) -> dict[str, Any]:
    """Make an optimizer per form over the same parameters, and warm it up."""
    cls = getattr(selective_optim, CLASSES[optimizer])
    made = {}
    for name, policy in POLICIES.items():
        own = cls(load.params, **SETTINGS[optimizer], wd_policy=policy)
        for _ in range(3):
            load.refresh()
            own.step()
        made[name] = own.step
    return made


def times(load: Workload, steps: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Time the steps in turn, in milliseconds, with fresh gradients at each."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    gc.collect()
    for _ in range(rounds):
        order.reverse()
        for name in order:
            load.refresh()
            start = perf_counter()
            steps[name]()
            taken[name].append((perf_counter() - start) * 1e3)
    return taken


def measure(case: str, optimizer: str, rounds: int) -> list[dict[str, Any]]:
    """Measure every form on one case; ratios are round by round to decoupled."""
    load = Workload(case_named(case), torch.device("cpu"))
    taken = times(load, steps_of(load, optimizer), rounds)
    return [
        {
            "case": case,
            "optimizer": optimizer,
            "form": name,
            "ms": spread(values).median,
            "ratio": ratio(values, taken["decoupled"])._asdict(),
        }
        for name, values in taken.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per case, optimizer and form, and save them if that is asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks.forms", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)
    results = []
    for case in options.cases:
        for optimizer in OPTIMIZERS:
            results += measure(case, optimizer, options.rounds)
            for row in results[-len(POLICIES) :]:
                low, high = row["ratio"]["p10"], row["ratio"]["p90"]
                print(
                    f"{case:<10}{optimizer:<7}{row['form']:<23}{row['ms']:9.2f} ms"
                    f"  {row['ratio']['median']:6.2f} x ({low:.2f} to {high:.2f})",
                    flush=True,
                )
    if options.json:
        threads = torch.get_num_threads()
        told = {"torch": torch.__version__, "threads": threads, "results": results}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
