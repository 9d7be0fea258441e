"""What a step asks of a CUDA device, counted on tensors that only claim to be there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import selective_optim
from selective_optim.policies import form, towards
from tests.support.fake_cuda import Calls, copy_works, let_fakes_pass_for_plain

COUNT = 1000
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
KERNELS = {"SGD": "_fused_sgd_", "Adam": "_fused_adam_", "AdamW": "_fused_adamw_"}
# What torch's profiler is told of a step.
NOTED = {"_record_function_enter_new": 1, "_record_function_exit": 1}
needs_copy = pytest.mark.skipif(
    not copy_works(), reason="Tensor.copy_ asks for CUDA itself here"
)
each_class = pytest.mark.parametrize("name", SETTINGS)


FAKE = FakeTensorMode()  # one for all: fake tensors of two do not mix


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Make every tensor of a test a fake one."""
    let_fakes_pass_for_plain(monkeypatch)
    with FAKE:
        yield


def make_params(count: int = COUNT) -> list[nn.Parameter]:
    shapes = [(4,) if index % 2 else (4, 4) for index in range(count)]
    return [nn.Parameter(torch.empty(shape, device="cuda")) for shape in shapes]


def make_groups(params: list[Any], count: int, lr: Any = None) -> list[dict[str, Any]]:
    """Cut parameters into groups, each with a rate of its own if one is given."""
    bounds = [index * len(params) // count for index in range(count + 1)]
    rates = [{} if lr is None else {"lr": lr * (i + 1) / count} for i in range(count)]
    return [
        {"params": params[start:end], **rate}
        for (start, end), rate in zip(pairwise(bounds), rates)
    ]


def hand_split(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    halves = [
        {**group, "params": [p for p in group["params"] if p.ndim == ndim], **decay}
        for group in groups
        for ndim, decay in ((2, {}), (1, {"weight_decay": 0.0}))
    ]
    return [half for half in halves if half["params"]]


def ours(name: str, groups: Any, **arguments: Any) -> Any:
    own = {**SETTINGS[name], "wd_policy": "matrices", **arguments}
    return getattr(selective_optim, name)(groups, **own)


def torchs(name: str, groups: Any) -> Any:
    own = getattr(torch.optim, name)
    return own(hand_split(groups), **SETTINGS[name], fused=True)


def called(optimizer: Any) -> Counter[str]:
    """List the calls of a step."""
    with Calls() as calls:
        optimizer.step()
    return calls.counts


def step(optimizer: Any, params: list[Any], without: int = 0) -> Counter[str]:
    """Step with fresh gradients, none for the first parameters; list the calls."""
    for position, param in enumerate(params):
        param.grad = None if position < without else torch.empty_like(param)
    return called(optimizer)


def steady_step(optimizer: Any, params: list[Any]) -> Counter[str]:
    """Return the calls of the third step."""
    return [step(optimizer, params) for _ in range(3)][-1]


def scale(optimizer: Any) -> None:
    """Hand over what a ``GradScaler`` does."""
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")


# groups, a rate each, buckets of ours, calls of ours and of torch split by hand
STEADY = [
    (1, False, 2, 5, 6),
    (2, False, 2, 5, 10),
    (26, True, 52, 55, 106),
    (COUNT, False, 2, 5, 2002),
    (COUNT, True, COUNT, 1003, 2002),
]


# Made once: no step changes them, as fused kernels are not run.
@cache
def thousand() -> list[nn.Parameter]:
    """Make the parameters of the cases above."""
    return make_params()


@cache
def grads_of_thousand(number: int) -> list[torch.Tensor]:
    """Make the gradients of a step."""
    return [torch.empty_like(param) for param in thousand()]


def step_thousand(optimizer: Any, number: int) -> Counter[str]:
    """Step with gradients that are others in every step."""
    for param, grad in zip(thousand(), grads_of_thousand(number)):
        param.grad = grad
    return called(optimizer)


@cache
def state_of_torch() -> dict[torch.Tensor, Any]:
    """Make torch's state of the parameters, the same in all groups."""
    begun = torchs("AdamW", make_groups(thousand(), 1))
    step_thousand(begun, 0)
    return dict(begun.state)


def calls_of_torch(groups: int, lr: float | None) -> int:
    """Count what torch's second step calls."""
    oracle = torchs("AdamW", make_groups(thousand(), groups, lr))
    oracle.state.update(state_of_torch())
    return step_thousand(oracle, 1).total()


@pytest.mark.parametrize(("groups", "each", "buckets", "mine", "theirs"), STEADY)
def test_steady_step_calls_one_kernel_per_setting(groups, each, buckets, mine, theirs):
    lr = 0.01 if each else None
    optimizer = ours("AdamW", make_groups(thousand(), groups, lr))
    calls = [step_thousand(optimizer, number) for number in range(3)][-1]
    assert calls == {"_fused_adamw_": buckets, "add_": 1, **NOTED}
    assert calls.total() == mine
    assert calls_of_torch(groups, lr) == theirs


FEW = 40


def make_rate() -> torch.Tensor:
    return torch.ones((), device="cuda")


# groups, and what makes their rates
WAYS: dict[str, tuple[int, Callable[[], Any]]] = {
    "one rate": (1, lambda: None),
    "rates": (5, lambda: 0.01),
    "tensor rates": (5, make_rate),
}


def beside(name: str, scaled: bool) -> dict[str, int]:
    """Name the calls that advance counters, and take them back under a scaler."""
    if name == "SGD":
        return {"clamp": 1} if scaled else {}
    return {"clamp": 1, "neg": 1, "add_": 2} if scaled else {"add_": 1}


@each_class
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_steady_step_neither_waits_nor_copies(name, way, scaled):
    params = make_params(FEW)
    count, make = WAYS[way]
    optimizer = ours(name, make_groups(params, count, make()))
    step(optimizer, params)  # begins momentum, where a scaled step would wait
    if scaled:
        scale(optimizer)
    expected = {KERNELS[name]: 2 * count, **beside(name, scaled), **NOTED}
    assert steady_step(optimizer, params) == expected


@each_class
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_first_step_and_changing_gradients_neither_wait_nor_copy(name, scaled):
    params = make_params(FEW)
    optimizer = ours(name, params)
    if name == "SGD":
        step(optimizer, params)  # begins momentum, where a scaled step would wait
    if scaled:
        scale(optimizer)
    for without in (10, 10, 0, 0, 5, 5, 0, FEW - 1, FEW):
        calls = step(optimizer, params, without)
        kernels = min(2, FEW - without)
        assert calls[KERNELS[name]] == kernels


def decoupled_sgd(params: list[Any], lr: Any) -> Any:
    # Not to the constructor: torch looks there whether a rate is negative.
    return ours("SGD", [{"params": params, "lr": lr}], decoupled_weight_decay=True)


@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_decoupled_sgd_neither_waits_nor_copies(lr):
    params = make_params(FEW)
    optimizer = decoupled_sgd(params, 0.1 if lr == "number" else make_rate())
    calls = steady_step(optimizer, params)
    assert (calls["_fused_sgd_"], calls["_foreach_mul_"]) == (2, 1)


@needs_copy
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_decoupled_sgd_under_a_scaler_neither_waits_nor_copies(lr):
    params = make_params(FEW)
    optimizer = decoupled_sgd(params, 0.1 if lr == "number" else make_rate())
    scale(optimizer)
    assert steady_step(optimizer, params)["_fused_sgd_"] == 2


FORMS = ("l2", "decoupled", "independent", "corrected", "cautious")


@pytest.mark.parametrize("scaled", [False, pytest.param(True, marks=needs_copy)])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("target", [0, 0.5, "init"])
@pytest.mark.parametrize("kind", FORMS)
@each_class
def test_no_form_waits_or_copies(name, kind, target, lr, scaled):
    params = make_params(4)
    rate = 0.1 if lr == "number" else make_rate()
    group = {"params": params, "lr": rate, "initial_lr": 0.1}
    optimizer = ours(name, [group], wd_policy=form(kind) * towards(target))
    if scaled:
        scale(optimizer)
    calls = steady_step(optimizer, params)
    # Of Adam and AdamW, that of the form.
    assert sum(n for call, n in calls.items() if call.startswith("_fused_")) == 1


ASKING: dict[str, Callable[[torch.Tensor], object]] = {
    "item": torch.Tensor.item,
    "truth": bool,
    "nonzero": torch.ops.aten.nonzero.default,
    "equal": lambda tensor: torch.equal(tensor, tensor.clone()),
    "to the host": torch.Tensor.cpu,
    "to the device": lambda tensor: torch.ones(()).to(tensor.device),
    "copy": lambda tensor: torch.ops.aten.copy_.default(tensor, torch.ones(())),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_waiting_and_copying_would_be_seen(ask):
    tensor = torch.ones((), device="cuda")
    with Calls(), pytest.raises(AssertionError, match=r"waits|copies"):
        ask(tensor)
