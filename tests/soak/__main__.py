"""Try random configurations against hand-split torch, for as long as asked.

Run ``python -m tests.soak --steps 50000 --seed 0``. Every configuration has a
seed of its own, such as ``0:17``, from which ``--replay 0:17`` runs it again.
``--attacks`` draws closures that spoil, swaps, zeros and threads as well.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch

from tests.soak.config import Config
from tests.soak.draw import draw
from tests.soak.events import ATTACKS, EVENTS, joins
from tests.soak.world import World


@dataclass
class Tally:
    """What was tried so far."""

    configurations: int = 0
    steps: int = 0
    mismatches: int = 0

    def __str__(self) -> str:
        return (
            f"{self.configurations} configurations, {self.steps} steps, "
            f"{self.mismatches} mismatches"
        )


def run(config: Config) -> int:
    """Run one configuration and return the number of steps taken.

    Raises:
        Mismatch: Ours differs from torch or from the formulas.
    """
    with warnings.catch_warnings():
        # Policies that exempt everything and decay that rounds away are drawn, too.
        warnings.simplefilter("ignore")
        world = World(config)
        for number, plan in enumerate(config.rounds):
            joins(world, number)
            for event in plan.events:
                {**EVENTS, **ATTACKS}[event.kind](world, event.which, event.value)
            world.take(plan)
        world.compare_state()
    return world.steps


def soak(
    seeds: Iterator[str], steps: int, tally: Tally, attacks: bool = False
) -> Tally:
    """Run configurations until so many steps are taken; print what goes wrong."""
    for seed in seeds:
        tally.configurations += 1
        try:
            tally.steps += run(draw(seed, attacks))
        except Exception as error:  # whatever goes wrong belongs to this seed
            tally.mismatches += 1
            text = " ".join(str(error).split())[:200]
            print(f"configuration {seed}: {type(error).__name__}: {text}")
            option = " --attacks" if attacks else ""
            print(f"  replay it with: python -m tests.soak --replay {seed}{option}")
        if tally.steps >= steps:
            break
    return tally


def replay(seed: str, attacks: bool = False) -> int:
    """Print one configuration, run it, and print the traceback if it fails."""
    config = draw(seed, attacks)
    for name in ("name", "decoupled", "policy", "source", "values", "grad_scale"):
        print(f"{name}: {getattr(config, name)}")
    for name in ("params", "groups", "rounds"):
        print(f"{name}:", *getattr(config, name), sep="\n  ")
    try:
        print(f"{run(config)} steps, no mismatch")
    except Exception:  # as in soak
        traceback.print_exc()
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser("tests.soak", description=__doc__)
    top.add_argument("--steps", type=int, help="stop after so many optimizer steps")
    top.add_argument("--configurations", type=int, help="stop after so many of them")
    top.add_argument("--seed", type=int, default=0, help="where to start (0)")
    top.add_argument("--replay", metavar="SEED", help="run one configuration again")
    top.add_argument("--attacks", action="store_true", help="draw more events")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if anything mismatched."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)  # tiny tensors
    if options.replay:
        return replay(options.replay, options.attacks)
    steps = options.steps
    if steps is None:
        steps = sys.maxsize if options.configurations else 10_000
    seeds = (f"{options.seed}:{number}" for number in count())
    start = time.perf_counter()
    drawn = islice(seeds, options.configurations)
    tally = soak(drawn, steps, Tally(), options.attacks)
    seconds = time.perf_counter() - start
    print(
        f"{tally} in {seconds:.0f} s (seed {options.seed}, torch {torch.__version__})"
    )
    return int(tally.mismatches > 0)


if __name__ == "__main__":
    raise SystemExit(main())
