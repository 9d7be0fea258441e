"""What the tests of attacks share: a judge, and a look at what really decays."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import selective_optim
from selective_optim import selective
from tests.support.compare import assert_same

WD = 0.5
LR = 0.1


class Own(torch.optim.Optimizer):
    """What users write: a loop over groups, decay and all."""

    def __init__(self, params: Any, lr: float = LR, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(param.grad, alpha=-group["lr"])
        return loss


# By name, what is served: three with the plan, torch's others, and a user's own.
SERVED = {
    "SGD": selective_optim.SGD,
    "Adam": selective_optim.Adam,
    "AdamW": selective_optim.AdamW,
    "NAdam": selective(torch.optim.NAdam),
    "RAdam": selective(torch.optim.RAdam),
    "Own": selective(Own),
}
OURS = ("SGD", "Adam", "AdamW")
# Decay that goes into moments would move a parameter long after it was exempted.
DECOUPLED = {
    name: {"decoupled_weight_decay": True} for name in ("Adam", "NAdam", "RAdam")
}


class Net(nn.Module):
    """Two matrices, two biases and a norm; names and kinds are known."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)


def net(value: float | None = None) -> Net:
    """Make the same module at every call; all of one value if that is given."""
    made = Net()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
            if value is not None:
                param.fill_(value)
    return made


def make(name: str, given: Any, wd_policy: Any = "no_bias_norm", **more: Any) -> Any:
    """Make the optimizer of a class over a model, or over groups."""
    numbers = {"lr": LR, "weight_decay": WD, **DECOUPLED.get(name, {}), **more}
    params = given.parameters() if isinstance(given, nn.Module) else given
    return SERVED[name](params, wd_policy=wd_policy, **numbers)


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """Give the same gradients to every list of like parameters."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        drawn = torch.randn(param.shape, generator=generator).to(param.dtype)
        if param.grad is None:
            param.grad = drawn
        else:  # kept: compiled code is made for these very tensors
            param.grad.copy_(drawn)


def zero_grads(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = torch.zeros_like(param)


def moved(step: Callable[[], Any], params: Sequence[Tensor]) -> list[bool]:
    """Step with gradients of 0, under which decay alone moves a parameter."""
    zero_grads(params)
    before = [param.detach().clone() for param in params]
    step()
    return [not torch.equal(p, q) for p, q in zip(params, before)]


def decays(model: nn.Module, optimizer: Any) -> dict[str, bool]:
    """Find out by a step which parameters of a model decay."""
    names, params = zip(*model.named_parameters())
    return dict(zip(names, moved(optimizer.step, params)))


def reported(optimizer: Any) -> dict[str, bool]:
    """Read which parameters decay according to the report."""
    rows = optimizer.decay_report().rows
    return {row.name: row.weight_decay > 0 for row in rows}


RIGHT = {
    "first.weight": True,
    "first.bias": False,
    "norm.weight": False,
    "norm.bias": False,
    "last.weight": True,
    "last.bias": False,
}


def assert_right(model: nn.Module, optimizer: Any) -> None:
    """Require that step and report leave biases and norms alone, and nothing else."""
    assert decays(model, optimizer) == RIGHT
    assert reported(optimizer) == RIGHT
    assert_whole(optimizer)


def assert_whole(optimizer: Any, groups: int = 1) -> None:
    """Require that the groups are the user's: so many, of the decay that was given."""
    assert len(optimizer.param_groups) == groups
    assert [group["weight_decay"] for group in optimizer.param_groups] == [WD] * groups


def built(name: str, **more: Any) -> tuple[Net, Any]:
    """Make an optimizer that has taken a step, and found right in it."""
    model = net()
    optimizer = make(name, model, **more)
    assert_right(model, optimizer)
    return model, optimizer


class Judge:
    """torch's class with a group for each parameter, the finest split by hand.

    Args:
        cls: A class of ``torch.optim``.
        params: Its parameters.
        arguments: Of the constructor.
    """

    def __init__(self, cls: Any, params: Sequence[Tensor], **arguments: Any) -> None:
        groups = [{"params": [param]} for param in params]
        self.optimizer = cls(groups, **{"lr": LR, "weight_decay": WD, **arguments})
        self.params = list(params)

    def decay(self, multipliers: Sequence[float]) -> None:
        for group, multiplier in zip(self.optimizer.param_groups, multipliers):
            group["weight_decay"] = WD * multiplier

    def require(self, params: Sequence[Tensor], optimizer: Any) -> None:
        """Compare parameters, and the state of each."""
        assert_same(list(params), self.params)
        mine = [dict(optimizer.state.get(p) or {}) for p in params]
        theirs = [dict(self.optimizer.state.get(p) or {}) for p in self.params]
        assert_same(mine, theirs)


def clones(params: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def seen(optimizer: Any) -> list[dict[str, Any]]:
    """Copy what the groups show, tensors by identity."""
    return [
        {k: [*map(id, v)] if k == "params" else copy.deepcopy(v) for k, v in g.items()}
        for g in optimizer.param_groups
    ]


class Lines:
    """Raises at one line of the package, counted from 0, as Ctrl+C may."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.folder = selective_optim.__file__.removesuffix("__init__.py")

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.number -= 1
            if self.number == -1:
                raise KeyboardInterrupt
        return self

    def run(self, function: Callable[[], Any]) -> bool:
        """Call a function, and tell whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
            # Tests that follow would fail, far away.
            assert torch.is_grad_enabled(), "an interrupt has left autograd off"
        return False
