"""Decay towards where training began, against decay towards 0, on few new digits.

Trains on all digits, then goes on with the first 64 of them seen in a mirror, over
several seeds, and compares how many mirrored digits the networks read that they have
not seen. L2-SP of Li et al. 2018 is the same question on larger networks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.digits.effect import Study, few, run, spread
from benchmarks.digits.networks import NETWORKS, build
from benchmarks.digits.training import (
    Data,
    accuracy,
    held_out_loss,
    load,
    reproducible,
    train,
)
from selective_optim import AdamW
from selective_optim.policies import exclude, is_bias, is_norm, towards

IMAGES, EPOCHS, SEEDS, BEFORE, LR = 64, 60, 5, 20, 3e-3
DECAYS = (0.0, 1.0, 10.0, 30.0)
TARGETS: tuple[float | str, ...] = (0.0, "init")
HEADERS = ("network", "decay", "towards", "held-out loss", "accuracy")


def mirrored(data: Data) -> Data:
    """See all images in a mirror, and train on the first of them."""
    images, held_out = data.images.flip(-1), data.held_out_images.flip(-1)
    return few(data._replace(images=images, held_out_images=held_out), IMAGES)


def pretrained(network: str, seed: int, data: Data) -> Any:
    """Train a network on all digits as they are."""
    model = build(network, seed, data.images.device)
    optimizer = AdamW(model, lr=LR, weight_decay=0.1, wd_policy="no_bias_norm")
    train(model, optimizer, data, BEFORE, seed=seed)
    return model


def one(
    model: Any, decay: float, target: Any, data: Data, seed: int, epochs: int
) -> Any:
    """Go on with a copy of a network; return its held-out loss and accuracy."""
    model = copy.deepcopy(model)
    policy = exclude(is_bias, is_norm) * towards(target) if decay else None
    optimizer = AdamW(model, lr=LR, weight_decay=decay, wd_policy=policy)
    train(model, optimizer, data, epochs, seed=seed)
    return held_out_loss(model, data), accuracy(model, data)


def measure(
    data: Data, decays: Sequence[float], seeds: int, epochs: int
) -> Iterator[dict[str, Any]]:
    """Train every network at every decay towards every target, once per seed."""
    task = mirrored(data)
    for network in NETWORKS:
        models = [pretrained(network, seed, data) for seed in range(seeds)]
        for decay in decays:
            for target in TARGETS if decay else TARGETS[:1]:
                runs = [
                    one(model, decay, target, task, seed, epochs)
                    for seed, model in enumerate(models)
                ]
                losses, accuracies = zip(*runs, strict=True)
                yield {
                    "network": network,
                    "weight_decay": decay,
                    "towards": target,
                    "losses": losses,
                    "accuracies": accuracies,
                }


def show(decays: Sequence[float], seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Print a row per network, decay and target, as they are done, and return them."""
    print(f"{IMAGES} mirrored images, {epochs} epochs, {seeds} seeds:")
    print(f"{HEADERS[0]:<12}  {HEADERS[1]}  {HEADERS[2]:<7}", end="  ")
    print(f"{HEADERS[3]:>15}  {HEADERS[4]:>15}", flush=True)
    results = []
    with reproducible():
        for result in measure(load(), decays, seeds, epochs):
            results.append(result)
            print(
                f"{result['network']:<12}  {result['weight_decay']:>5g}  "
                f"{result['towards']:<7}  {spread(result['losses']):>15}  "
                f"{spread(result['accuracies']):>15}",
                flush=True,
            )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and save it if that is asked for."""
    study = Study("finetune", __doc__, IMAGES, DECAYS, SEEDS, EPOCHS, show)
    return run(study, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
