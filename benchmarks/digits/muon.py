"""Muon with AdamW in one line against AdamW alone, on all digits.

Trains the transformer over several seeds at several rates, takes AdamW's best rate by
its last loss, and tells after how many steps each rate of Muon has come as low.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from benchmarks import require
from benchmarks.digits.effect import spread
from benchmarks.digits.networks import build
from benchmarks.digits.training import (
    Data,
    held_out_loss,
    load,
    reproducible,
    train,
)
from selective_optim import AdamW, Muon

EPOCHS, SEEDS, EVERY = 20, 3, 11  # a loss is taken every so many steps
RATES = (1e-3, 3e-3, 1e-2)
HEADERS = ("optimizer", "rate", "last loss", "held-out loss", "steps to AdamW's best")
SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "wd_policy": "no_bias_norm"}


def adamw(model: nn.Module, lr: float) -> Any:
    return AdamW(model, lr=lr, **SETTINGS)


def muon(model: nn.Module, lr: float) -> Any:
    """One rate for both: that of AdamW, to which Muon's is made to match."""
    rest = {"lr": lr}
    return Muon(model, lr=lr, adjust_lr_fn="match_rms_adamw", rest=rest, **SETTINGS)


ARMS: dict[str, Callable[[nn.Module, float], Any]] = {"AdamW": adamw, "Muon": muon}


@torch.no_grad()
def training_loss(model: nn.Module, data: Data) -> float:
    """Return the mean cross entropy of all images that are trained on."""
    return nn.functional.cross_entropy(model(data.images), data.labels).item()


def one(arm: str, lr: float, seed: int, data: Data, epochs: int) -> dict[str, Any]:
    """Train one network, and return its losses."""
    model = build("transformer", seed, data.images.device)
    losses = []

    def look(step: int) -> None:
        if step % EVERY == 0:
            losses.append(training_loss(model, data))

    train(model, ARMS[arm](model, lr), data, epochs, look, seed=seed)
    return {"losses": losses, "held_out": held_out_loss(model, data)}


def measure(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Train at every rate with both optimizers, once per seed."""
    results = []
    with reproducible():
        run = partial(one, data=load(), epochs=epochs)
        for arm in ARMS:
            for lr in RATES:
                runs = [run(arm, lr, seed) for seed in range(seeds)]
                results.append({"optimizer": arm, "lr": lr, "runs": runs})
                print(arm, lr, spread([own["losses"][-1] for own in runs]), flush=True)
    return results


def best(results: Sequence[dict[str, Any]], arm: str) -> dict[str, Any]:
    """Choose the rate with the lowest mean of the last losses."""
    own = [result for result in results if result["optimizer"] == arm]
    return min(own, key=lambda each: mean(run["losses"][-1] for run in each["runs"]))


def steps_to(result: dict[str, Any], goals: Sequence[float]) -> list[int | None]:
    """Tell after how many steps each seed is as low as its goal, if it ever is."""
    pairs = zip(result["runs"], goals, strict=True)
    return [
        next((EVERY * (i + 1) for i, x in enumerate(run["losses"]) if x <= goal), None)
        for run, goal in pairs
    ]


def lines(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Write one row per optimizer and rate."""
    goals = [run["losses"][-1] for run in best(results, "AdamW")["runs"]]
    rows = []
    for result in results:
        last = [run["losses"][-1] for run in result["runs"]]
        held_out = [run["held_out"] for run in result["runs"]]
        reached = [step for step in steps_to(result, goals) if step is not None]
        never = len(last) - len(reached)
        told = f"{mean(reached):.0f}" if reached else "-"
        told += f" ({never} of {len(last)} never)" if never else ""
        own = [result["optimizer"], f"{result['lr']:g}", spread(last, 4)]
        rows.append([*own, spread(held_out), told])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and save it if that is asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks.digits.muon")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)
    require("sklearn")
    results = measure(options.seeds, options.epochs)
    for row in [list(HEADERS), *lines(results)]:
        print("  ".join(f"{cell:<22}" for cell in row))
    if options.json:
        own = {"epochs": options.epochs, "seeds": options.seeds, "every": EVERY}
        told = {"torch": torch.__version__, **own, "results": results}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
