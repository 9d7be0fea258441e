"""Parameters, gradients and the hand-split torch optimizers that ours must equal."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selective_optim
from selective_optim import Decay
from tests.support.compare import assert_same

STEPS = 7
HYPER = {"lr": 0.05, "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """A class by name, with what its constructor is given."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("sgd", "SGD"),
    Case("sgd-maximize", "SGD", {"maximize": True}),
    Case("momentum", "SGD", {"momentum": 0.9}),
    Case("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
    Case("dampening", "SGD", {"momentum": 0.9, "dampening": 0.3}),
    Case("adam", "Adam"),
    Case("adam-amsgrad", "Adam", {"amsgrad": True}),
    Case("adam-maximize", "Adam", {"maximize": True}),
    Case("adam-decoupled", "Adam", {"decoupled_weight_decay": True}),
    Case("adamw", "AdamW"),
    Case("adamw-amsgrad", "AdamW", {"amsgrad": True}),
    Case("adamw-maximize", "AdamW", {"maximize": True}),
]
# One of each kind, for tests of what does not depend on every argument.
CHOSEN = [
    Case("sgd", "SGD"),
    Case("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
    Case("sgd-decoupled", "SGD", {"momentum": 0.9, "decoupled_weight_decay": True}),
    Case("adam-amsgrad", "Adam", {"amsgrad": True}),
    Case("adamw", "AdamW"),
]
COUNTING = CHOSEN[3:]  # those that count their steps
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "for-loop": {"fused": False, "foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
KINDS: dict[str, dict[str, bool]] = {"automatic": {}, **IMPLEMENTATIONS}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_chosen = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
each_counting = pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.id)
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def explicit(kind: dict[str, bool]) -> dict[str, bool]:
    """Say what the automatic choice takes for plain parameters on CPU and CUDA."""
    return kind or IMPLEMENTATIONS["fused"]


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Give Adam in float16 an eps that float16 has."""
    if dtype != torch.float16 or case.name == "SGD":
        return case
    return replace(case, arguments={**case.arguments, "eps": 1e-3})


# What is decided for each parameter of `make_params`, by position.
VERDICTS: dict[str, list[Decay]] = {
    "all": [Decay()] * 8,
    "exempt": [Decay(i % 2) for i in range(8)],
    "scale": [Decay((0, 0.5, 1, 3)[i % 4]) for i in range(8)],
    "forms": [
        Decay((1, 0, 0.5)[i % 3], ("l2", "decoupled", None)[i % 3]) for i in range(8)
    ],
}


def make_params(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[nn.Parameter]:
    """Make the shapes that break kernels: 0-d, empty, strided, and never used."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype)

    tensors = [
        rand(5, 4),
        rand(4),
        rand(),
        rand(0, 3),
        rand(33, 64).t(),  # dense, and not contiguous
        rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        rand(7, 3),  # without a gradient on step four
        rand(3),  # never gets one
    ]
    return [nn.Parameter(tensor) for tensor in tensors]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """Assign fresh gradients, the same for every list of like parameters."""
    generator = torch.Generator().manual_seed(100 + step)
    for position, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = torch.empty_like(param).copy_(grad)  # strides as autograd makes
        if position == 7 or (position == 6 and step == 3):
            param.grad = None


def clone_params(params: Sequence[Tensor]) -> list[nn.Parameter]:
    """Copy parameters, strides included."""
    return [nn.Parameter(torch.empty_like(p).copy_(p.detach())) for p in params]


def ours(
    case: Case,
    params: Sequence[Tensor],
    verdicts: Sequence[Decay],
    lrs: Sequence[float] | None = None,
    **arguments: Any,
) -> torch.optim.Optimizer:
    """Build the selective optimizer: one group, or one per parameter with its rate."""
    table = dict(enumerate(verdicts))
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    groups: Any = named
    if lrs is not None:
        groups = [{"params": [n], "lr": lr} for n, lr in zip(named, lrs)]
    return getattr(selective_optim, case.name)(
        groups,
        wd_policy=lambda info: table[int(info.name[1:])],
        **case.arguments,
        **arguments,
    )


class HandSplit:
    """torch's optimizers over groups split by hand, one optimizer per form."""

    def __init__(
        self,
        case: Case,
        params: Sequence[Tensor],
        verdicts: Sequence[Decay],
        lrs: Sequence[float] | None = None,
        *,
        lr: float,
        weight_decay: float,
        **arguments: Any,
    ) -> None:
        default = "decoupled" if self._decoupled(case) else "l2"
        groups: dict[str, dict[tuple[float, float], list[Tensor]]] = {}
        for i, (param, verdict) in enumerate(zip(params, verdicts)):
            key = (lrs[i] if lrs else lr, weight_decay * verdict.multiplier)
            form = verdict.form or default
            groups.setdefault(form, {}).setdefault(key, []).append(param)
        self.optimizers = [
            self._build(case, form, [*split.items()], arguments)
            for form, split in groups.items()
        ]
        self._owners = {
            id(param): optimizer
            for optimizer, split in zip(self.optimizers, groups.values())
            for param in chain.from_iterable(split.values())
        }

    @staticmethod
    def _decoupled(case: Case) -> bool:
        return case.name == "AdamW" or bool(
            case.arguments.get("decoupled_weight_decay")
        )

    def _build(
        self, case: Case, form: str, split: list[Any], arguments: dict[str, Any]
    ) -> torch.optim.Optimizer:
        own = {k: v for k, v in case.arguments.items() if k != "decoupled_weight_decay"}
        name = case.name
        if name != "SGD":
            name = {"l2": "Adam", "decoupled": "AdamW"}[form]
        cls = DecoupledSGD if (name, form) == ("SGD", "decoupled") else None
        return (cls or getattr(torch.optim, name))(
            [
                {"params": params, "lr": lr, "weight_decay": wd}
                for (lr, wd), params in split
            ],
            **own,
            **arguments,
        )

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self, param: Tensor) -> dict[str, Any]:
        for optimizer in self.optimizers:
            if param in optimizer.state:
                return optimizer.state[param]
        return {}

    def adopt(self, param: Tensor, state: dict[str, Any]) -> None:
        """Go on from the state of another optimizer's parameter."""
        self._owners[id(param)].state[param] = state


class DecoupledSGD:
    """The definition: the multiply, then torch's SGD without decay."""

    def __init__(self, groups: list[dict[str, Any]], **arguments: Any) -> None:
        self.decays = [group.pop("weight_decay") for group in groups]
        self.sgd = torch.optim.SGD(groups, **arguments)
        self.state = self.sgd.state

    @torch.no_grad()
    def step(self) -> None:
        for group, wd in zip(self.sgd.param_groups, self.decays):
            for param in group["params"]:
                if param.grad is not None and wd != 0:
                    param.mul_(1 - group["lr"] * wd)
        self.sgd.step()


def train(
    optimizer: Any, params: Sequence[Tensor], steps: Sequence[int] = range(STEPS)
) -> None:
    """Step on fresh gradients, the same for every list of like parameters."""
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def assert_trains_alike(
    actual: Sequence[Tensor],
    optimizer: Any,
    expected: Sequence[Tensor],
    oracle: Any,
    steps: Sequence[int] = range(STEPS),
) -> None:
    """Train both and compare."""
    train(optimizer, actual, steps)
    train(oracle, expected, steps)
    assert_same_training(actual, optimizer, expected, oracle)


def assert_same_training(
    actual: Sequence[Tensor], optimizer: Any, expected: Sequence[Tensor], oracle: Any
) -> None:
    """Compare parameters, and their state in ours and in torch's or a hand split."""
    assert_same(actual, expected)
    theirs = oracle.state if isinstance(oracle, HandSplit) else oracle.state.get
    for position, (p, q) in enumerate(zip(actual, expected)):
        own = dict(optimizer.state.get(p) or {})
        assert_same(own, dict(theirs(q) or {}), where=f"state of {position}")


def frozen(optimizer: Any, params: Sequence[Tensor]) -> Any:
    """Copy what a step may change: parameters and state."""
    state = [copy.deepcopy(dict(optimizer.state.get(p) or {})) for p in params]
    return [p.detach().clone() for p in params], state
