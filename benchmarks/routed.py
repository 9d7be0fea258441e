"""A step of one Routed against the separate optimizers that it stands for.

python -m benchmarks.routed --json FILE
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

from selective_optim import Muon, param_groups

SIZES = ((8, 100), (64, 12), (192, 6))
RATES = {"lr": 1e-3, "weight_decay": 0.1}


class Net(nn.Module):
    """Blocks of two matrices and a norm between an embedding and an output layer."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
            )
            for _ in range(depth)
        )
        self.lm_head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> Any:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def separate(model: nn.Module, like: Any) -> list[Any]:
    """Make torch's Muon and its AdamW, whose groups are split by hand."""
    routes = {row.name: row.route for row in like.decay_report()}
    named = list(model.named_parameters())
    body = [param for name, param in named if routes[name] == "muon"]
    rest = [(name, param) for name, param in named if routes[name] != "muon"]
    groups = param_groups(rest, "no_bias_norm", **RATES, model=model)
    return [torch.optim.Muon(body, **RATES), torch.optim.AdamW(groups, fused=True)]


def arms(width: int, depth: int) -> list[list[Any]]:
    """Make ours and the separate ones twice, which shows how far equal arms differ."""
    torch.manual_seed(0)
    model = Net(width, depth)
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    one = Muon(model, **RATES, rest={}, wd_policy="no_bias_norm")
    made = [[one], *(separate(twin, one) for twin in models[1:])]
    for twin in models:
        for param in twin.parameters():
            param.grad = torch.randn(
                param.shape, generator=torch.Generator().manual_seed(1)
            )
    return made


def ratios(optimizers: Sequence[Sequence[Any]], rounds: int) -> list[list[float]]:
    """Time the steps in turn; return each arm's time over that of the second."""
    found: list[list[float]] = [[] for _ in optimizers]
    order = list(range(len(optimizers)))
    for number in range(rounds + 5):
        taken = [0.0] * len(optimizers)
        order.reverse()
        for arm in order:
            start = perf_counter()
            for optimizer in optimizers[arm]:
                optimizer.step()
            taken[arm] = perf_counter() - start
        for own, time in zip(found, taken, strict=True):
            if number >= 5:  # after a warm-up
                own.append(time / taken[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.routed")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for size in SIZES:
        case = f"{size[1]} blocks of width {size[0]}"
        ours, _, again = ratios(arms(*size), options.rounds)
        tenths = quantiles(ours, n=10)
        told = {"median": median(ours), "p10": tenths[0], "p90": tenths[-1]}
        results.append({"case": case, "ratio": told, "equal_arms": median(again)})
        print(f"{case:22} {told['median']:.3f}, equal arms {median(again):.3f}")
    if options.json:
        saved = {"torch": torch.__version__, "threads": 1, "results": results}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
