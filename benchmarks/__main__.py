"""Train two networks on digits in three arms and compare what comes out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import require
from benchmarks.digits.arms import ARMS, SELECTIVE, Result, run, selective
from benchmarks.digits.networks import NETWORKS, build
from benchmarks.digits.picture import draw
from benchmarks.digits.training import Data, differences, load, reproducible

EPOCHS, QUICK_EPOCHS = 20, 3
HEADERS = ("network", "arm", "groups", "held-out accuracy", "seconds")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="train a few epochs only")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument(
        "--picture", type=Path, default=Path("digits.png"), help="file to write"
    )
    parser.add_argument("--device", help="default: the GPU if there is one")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def run_all(data: Data, epochs: int, seed: int) -> Iterator[Result]:
    """Train every network in every arm under one progress bar."""
    from tqdm import tqdm

    steps = len(NETWORKS) * len(ARMS) * epochs * data.steps_per_epoch
    pause = 0.1 if sys.stderr.isatty() else 10  # seconds; a log keeps every line
    with tqdm(total=steps, unit="step", mininterval=pause, dynamic_ncols=True) as bar:
        for network in NETWORKS:
            for arm in ARMS:
                bar.set_description(f"{network}: {arm}", refresh=False)
                yield run(network, arm, data, epochs, seed, lambda step: bar.update())


def table(results: Sequence[Result]) -> str:
    """Align one line per network and arm."""
    rows = [
        (r.network, r.arm, str(r.groups), f"{r.accuracy:.2%}", f"{r.seconds:.1f}")
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(HEADERS, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [HEADERS, *rows]
    )


def verdict(first: Result, second: Result) -> tuple[bool, str]:
    """Say whether two arms of one network ended with the same bits."""
    differing = differences(first.tensors, second.tensors)
    arms = f"{first.network}: {first.arm!r} and {second.arm!r}"
    what = f"{len(first.tensors)} parameters, buffers and optimizer states"
    if differing:
        share = f"{len(differing)} of {what}"
        return False, f"{arms} differ in {share}, first in {differing[0]!r}."
    return True, f"{arms} ended with identical bits in all {what}."


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    require("sklearn", "matplotlib", "tqdm")
    for network in NETWORKS:
        report = selective(build(network, options.seed)).decay_report()
        print(f"What {SELECTIVE} decays in the {network}:\n{report}\n")
    epochs = QUICK_EPOCHS if options.quick else EPOCHS
    with reproducible():
        data = load(options.device)
        results = list(run_all(data, epochs, options.seed))
    draw(results, data.steps_per_epoch, options.picture)
    images = (
        f"{len(data.labels):,} images to train on, {len(data.held_out_labels)} held out"
    )
    print(f"{images}, {epochs} epochs, torch {torch.__version__} on {options.device}")
    print(f"{table(results)}\n")
    verdicts = [
        verdict(*list(arms)[:2])
        for _, arms in groupby(results, key=lambda result: result.network)
    ]
    print("\n".join(sentence for _, sentence in verdicts))
    print(f"Norm gains, biases and weights over training: {options.picture}")
    return 0 if all(same for same, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
