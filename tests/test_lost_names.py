"""A torch without one of the private names that the library uses: as exact, slower.

One process imports torch, and forks for every name: the library is imported there
as in a torch that lacks it.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import selective_optim

FILE = Path(selective_optim.__file__).parent / "_torch.py"
NAMES = [
    node.args[0].value
    for node in ast.walk(ast.parse(FILE.read_text()))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_find"
    if isinstance(node.args[0], ast.Constant)
]
ALL = "all at once"
CASES = [
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "decoupled_weight_decay": True}),
]
IMPLEMENTATIONS: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False, "fused": False},
    {"differentiable": True},
]
WD = 0.3


class Without:
    """A module that lacks one name, at any depth."""

    def __init__(self, module: Any, path: str) -> None:
        self._module, self._path = module, path

    def __getattr__(self, name: str) -> Any:
        first, _, rest = self._path.partition(".")
        if name != first:
            return getattr(self._module, name)
        if not rest:
            raise AttributeError(name)
        return Without(getattr(self._module, name), rest)


def make_params(differentiable: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (5, 2), (2,)]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [torch.nn.Parameter(tensor) for tensor in drawn]
    if not differentiable:
        return list(params)
    copies = [param.clone() for param in params]  # autograd follows no edit of a leaf
    for each in copies:
        each.retain_grad()
    return copies


def train(optimizer: Any, params: list[torch.Tensor], unscales: bool) -> list[Any]:
    """Step with changing rates, absent gradients, and a scale in the fourth step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        for position, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator)
            param.grad = None if step == position + 1 else grad
            if step == 3 and not unscales and param.grad is not None:
                param.grad /= 8
        if step == 2:  # counters that are not the library's own advance one by one
            for own in optimizer.state.values():
                own.update({k: v.clone() for k, v in own.items() if k == "step"})
        scaled = step == 3 and unscales
        optimizer.grad_scale = torch.tensor(8.0) if scaled else None
        optimizer.found_inf = torch.tensor(0.0) if scaled else None
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        with torch.no_grad():
            optimizer.step()
    return [*map(bits, params), *followed(params)]


def bits(tensor: torch.Tensor) -> list[str]:
    return [value.hex() for value in tensor.detach().flatten().tolist()]


def followed(params: list[torch.Tensor]) -> list[str]:
    """Name what autograd saw last of each parameter that is no leaf."""
    return [param.grad_fn.name() for param in params if param.grad_fn is not None]


def unscaled() -> list[list[str]]:
    """Unscale what torch's functional will step, sparse gradients among it."""
    library = importlib.import_module("selective_optim.step.setting")
    grads = [torch.arange(5.0), torch.eye(3).to_sparse()]
    library.unscale_(grads, torch.tensor(3.0))
    return [bits(grad.to_dense()) for grad in grads]


def train_ours(name: str, hyper: Any, implementation: Any) -> list[Any]:
    params = make_params("differentiable" in implementation)
    cls = getattr(selective_optim, name)
    policy = {"weight_decay": WD, "wd_policy": "matrices"}
    optimizer = cls(params, **hyper, **implementation, **policy)
    return train(optimizer, params, unscales=not implementation)


def train_in_forms() -> list[Any]:
    """Step in forms that torch's kernels do not do: for these there is no twin."""
    params = make_params()
    policy = "form('cautious') * towards('init', 'a.*') * form('l2', 'a.*')"
    named = [(f"{'ab'[i % 2]}.{i}", param) for i, param in enumerate(params)]
    cls, hyper = selective_optim.AdamW, {"lr": 0.01, "foreach": False}
    optimizer = cls(named, weight_decay=WD, wd_policy=policy, **hyper)
    return train(optimizer, params, unscales=False)


def train_torchs(name: str, hyper: Any, implementation: Any) -> list[Any]:
    """Step torch's class; what its SGD lacks, decoupled decay, is a multiply before."""
    params = make_params("differentiable" in implementation)
    matrices = [param for param in params if param.ndim > 1]
    hyper = dict(hyper)
    decoupled = hyper.pop("decoupled_weight_decay", False)
    groups = [
        {"params": matrices, "weight_decay": 0.0 if decoupled else WD},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = getattr(torch.optim, name)(groups, **hyper, **implementation)
    step = optimizer.step

    def decay_and_step() -> None:
        for param in matrices:
            if decoupled and param.grad is not None:
                param.mul_(1 - optimizer.param_groups[0]["lr"] * WD)
        step()

    optimizer.step = decay_and_step
    return train(optimizer, params, unscales=bool(implementation.get("fused")))


def in_torch_without(lost: str) -> dict[str, Any]:
    """Import the library as in a torch that lacks a name, and train with it."""
    missing = [name.partition(":")[::2] for name in (NAMES if lost == ALL else [lost])]
    imported = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        found = imported(name, package)
        for module, path in missing:
            found = Without(found, path) if name == module else found
        return found

    importlib.import_module = import_module
    for name in [name for name in sys.modules if name.startswith("selective_optim")]:
        del sys.modules[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        globals()["selective_optim"] = imported("selective_optim")
    return {
        "warnings": [str(each.message) for each in caught],
        "unscaled": unscaled(),
        "trained": [train_ours(*c, i) for c in CASES for i in IMPLEMENTATIONS],
        "in forms": train_in_forms(),
    }


def main() -> None:
    """Fork for every name, and write what came out."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # once, and not in every child
    for name in [*NAMES, ALL]:
        sys.stdout.flush()
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            print(json.dumps([name, in_torch_without(name)]), flush=True)
            os._exit(0)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.test_lost_names"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, cwd=root
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(NAMES) + 1, done.stderr
    return dict(json.loads(line) for line in lines)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch once")
@pytest.mark.parametrize("name", [*NAMES, ALL])
def test_a_lost_name_costs_time_and_no_bits(name, results):
    trained = iter(results[name]["trained"])
    for case in CASES:
        for implementation in IMPLEMENTATIONS:
            wanted = train_torchs(*case, implementation or {"fused": True})
            assert next(trained) == wanted, (case, implementation)
    assert results[name]["in forms"] == train_in_forms()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch once")
@pytest.mark.parametrize("name", [*NAMES, ALL])
def test_a_lost_name_is_told_once_with_what_it_costs(name, results):
    (message,) = results[name]["warnings"]
    assert message.startswith(f"torch {torch.__version__} lacks names that")
    for each in NAMES if name == ALL else [name]:
        assert f"{each.replace(':', '.')} (" in message
    assert message.endswith("Install a newer selective_optim.")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch once")
@pytest.mark.parametrize("name", [*NAMES, ALL])
def test_a_lost_name_unscales_as_grad_scaler_does(name, results):
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0)
    params = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(3, 3))]
    params[0].grad, params[1].grad = torch.arange(5.0), torch.eye(3)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(torch.optim.SGD(params))
    assert results[name]["unscaled"] == [bits(param.grad) for param in params]


if __name__ == "__main__":
    main()
