"""Where exempting norms and biases matters on digits: few images, much decay.

Trains on the first 256 images alone, over several seeds, with norms and biases
exempt and with everything decayed, and compares how sure the networks are of images
that they have not seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from benchmarks import require
from benchmarks.digits.arms import ALL, ARMS, SELECTIVE
from benchmarks.digits.networks import NETWORKS, build
from benchmarks.digits.training import (
    Data,
    accuracy,
    held_out_loss,
    load,
    reproducible,
    train,
)

IMAGES, EPOCHS, SEEDS = 256, 60, 3
DECAYS = (3.0, 10.0)
HEADERS = ("network", "decay", "norms and biases", "held-out loss", "accuracy")
SHOWN = {SELECTIVE: "exempt", ALL: "decayed"}


def few(data: Data, count: int = IMAGES) -> Data:
    """Keep the first images to train on, and all that are held out."""
    return data._replace(images=data.images[:count], labels=data.labels[:count])


def measure(
    data: Data, decays: Sequence[float], seeds: int, epochs: int
) -> Iterator[dict[str, Any]]:
    """Train every network at every decay, exempt and decayed, once per seed."""
    for network in NETWORKS:
        for decay in decays:
            for arm in SHOWN:
                runs = [one(network, decay, arm, data, s, epochs) for s in range(seeds)]
                losses, accuracies = zip(*runs, strict=True)
                yield {
                    "network": network,
                    "weight_decay": decay,
                    "norms_and_biases": SHOWN[arm],
                    "losses": losses,
                    "accuracies": accuracies,
                }


def one(
    network: str, decay: float, arm: str, data: Data, seed: int, epochs: int
) -> tuple[float, float]:
    """Train one network and return its held-out loss and accuracy."""
    model = build(network, seed, data.images.device)
    train(model, ARMS[arm](model, decay), data, epochs, seed=seed)
    return held_out_loss(model, data), accuracy(model, data)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write mean and standard deviation."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ± {deviation:.{digits}f}"


def line(result: dict[str, Any]) -> str:
    """Write one row of the table."""
    cells = (
        f"{result['network']:<12}",
        f"{result['weight_decay']:>5g}",
        f"{result['norms_and_biases']:<16}",
        f"{spread(result['losses']):>15}",
        f"{spread(result['accuracies']):>15}",
    )
    return "  ".join(cells)


def show(decays: Sequence[float], seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Print a row per network, decay and arm, as they are done, and return them."""
    print(
        f"{IMAGES} images to train on, {epochs} epochs, {seeds} seeds:\n"
        f"{HEADERS[0]:<12}  {HEADERS[1]}  {HEADERS[2]:<16}  "
        f"{HEADERS[3]:>15}  {HEADERS[4]:>15}",
        flush=True,
    )
    results = []
    with reproducible():
        for result in measure(few(load()), decays, seeds, epochs):
            results.append(result)
            print(line(result), flush=True)
    return results


class Study(NamedTuple):
    """A comparison over decays and seeds, with what it does if nothing else is said."""

    name: str
    description: str | None
    images: int
    decays: Sequence[float]
    seeds: int
    epochs: int
    show: Callable[[Sequence[float], int, int], list[dict[str, Any]]]


def run(study: Study, arguments: Sequence[str] | None) -> int:
    """Print the table of a study, and save it if that is asked for."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.digits.{study.name}", description=study.description
    )
    parser.add_argument("--seeds", type=int, default=study.seeds)
    parser.add_argument("--epochs", type=int, default=study.epochs)
    parser.add_argument("--decays", type=float, nargs="+", default=study.decays)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)
    require("sklearn")
    results = study.show(options.decays, options.seeds, options.epochs)
    if options.json:
        own = {"images": study.images, "epochs": options.epochs, "seeds": options.seeds}
        told = {"torch": torch.__version__, **own, "results": results}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and save it if that is asked for."""
    study = Study("effect", __doc__, IMAGES, DECAYS, SEEDS, EPOCHS, show)
    return run(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
