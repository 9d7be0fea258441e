"""A step of a selective class against groups split by hand, interleaved.

python -m benchmarks.any_class --tensors 1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from selective_optim import param_groups, selective


def model_of(tensors: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(tensors // 2))


def arms(cls: Any, tensors: int, arguments: dict[str, Any]) -> list[Any]:
    """Make ours and two split by hand, with gradients, and warm them up.

    The second of those shows how far equal arms differ.
    """
    made = []
    for split in (False, True, True):
        model = model_of(tensors)
        if split:
            groups = param_groups(model, "no_bias", weight_decay=0.1)
            optimizer = cls(groups, **arguments)
        else:
            optimizer = selective(cls)(
                model, weight_decay=0.1, wd_policy="no_bias", **arguments
            )
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        for _ in range(5):
            optimizer.step()
        made.append(optimizer)
    return made


def times(optimizers: Sequence[Any], rounds: int) -> list[list[float]]:
    """Time the steps in turn, in an order that alternates."""
    taken: list[list[float]] = [[] for _ in optimizers]
    order = list(range(len(optimizers)))
    for _ in range(rounds):
        order.reverse()
        for arm in order:
            start = perf_counter()
            optimizers[arm].step()
            taken[arm].append(perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("NAdam", torch.optim.NAdam, {}),
        ("NAdam, foreach", torch.optim.NAdam, {"foreach": True}),
        ("RMSprop, foreach", torch.optim.RMSprop, {"foreach": True}),
        ("Adagrad", torch.optim.Adagrad, {}),
    ]
    for name, cls, arguments in cases:
        optimizers = arms(cls, options.tensors, arguments)
        ours, hand, again = (
            median(taken) * 1e3 for taken in times(optimizers, options.rounds)
        )
        print(f"{name:20} ours {ours:7.3f} ms, by hand {hand:7.3f} ms", end="")
        print(f", ratio {ours / hand:.3f}, by hand again {again / hand:.3f}")


if __name__ == "__main__":
    main()
