"""Frameworks whose own constructor makes both model and optimizer of bare tensors.

Small stand-ins, each of how one of them does it; mup itself where it is installed.
"""

import copy

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, selective
from tests.support.compare import assert_same

SETTINGS = {"lr": 0.1, "weight_decay": 0.1, "wd_policy": "no_bias_norm"}


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def decayed(optimizer):
    return {row.name for row in optimizer.decay_report() if row.weight_decay}


class Actor(nn.Module):
    """stable-baselines3: a policy makes parts, and an optimizer for some of each."""

    def __init__(self, optimizer_class, optimizer_kwargs):
        super().__init__()
        self.features = Net()
        self.critic = nn.ModuleDict({"features": self.features, "q": Net()})
        chosen = [p for n, p in self.critic.named_parameters() if "features" not in n]
        self.critic.optimizer = optimizer_class(chosen, **optimizer_kwargs)


def baselines(cls):
    policy = Actor(cls, SETTINGS)
    return policy, policy.critic.optimizer, {"critic.q.body.weight"}


class Estimator:
    """skorch: parameters are set by name, and the module made when it is fitted."""

    def __init__(self, optimizer, **arguments):
        self.optimizer, self.arguments = optimizer, arguments

    def initialize(self):
        self.module_ = Net(**self._of("module__"))
        pairs = list(self.module_.named_parameters())
        groups = [{"params": [p for n, p in pairs if n.startswith("body")], "lr": 0.5}]
        groups += [{"params": [p for n, p in pairs if not n.startswith("body")]}]
        self.optimizer_ = self.optimizer(groups, **self._of("optimizer__"))
        return self

    def _of(self, prefix):
        items = self.arguments.items()
        return {k.removeprefix(prefix): v for k, v in items if k.startswith(prefix)}


def skorch(cls):
    arguments = {f"optimizer__{key}": value for key, value in SETTINGS.items()}
    first = Estimator(cls, **arguments, module__width=4).initialize()
    cloned = copy.deepcopy(first).initialize()  # as a search over a grid does
    assert decayed(first.optimizer_) == decayed(cloned.optimizer_)
    return cloned, cloned.optimizer_, {"body.weight"}


class SAM(torch.optim.Optimizer):
    """The wrapper that is copied most: its groups become the inner optimizer's."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups


def sam(cls):
    model = Net()
    wrapper = SAM(model.parameters(), cls, **SETTINGS)
    return model, wrapper.base_optimizer, {"body.weight"}


def keyed(cls):
    """torchrec: a dictionary of parameters, and a function that gets their list."""
    model = Net()
    return model, cls(list(dict(model.named_parameters()).values()), **SETTINGS), set()


MADE = [baselines, skorch, sam, keyed]


@pytest.mark.parametrize("cls", [SGD, AdamW, selective(torch.optim.NAdam)])
@pytest.mark.parametrize("made", MADE)
def test_model_that_a_constructor_makes_is_found(made, cls):
    alive, optimizer, some = made(cls)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    report = optimizer.decay_report()
    assert some <= decayed(optimizer)
    assert [row.weight_decay > 0 for row in report] == [p.ndim > 1 for p in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    del alive


def test_optimizer_for_each_parameter_decides_alike():
    """Pyro: one is made for a parameter when it is met first."""
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    optimizers = {p: AdamW([p], **SETTINGS) for p in model.parameters()}
    whole = AdamW(twin.parameters(), **SETTINGS)
    for one, other in zip(model.parameters(), twin.parameters()):
        one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
        optimizers[one].step()
    whole.step()
    assert_same(list(model.parameters()), list(twin.parameters()))


@pytest.mark.integration
def test_tensordict_of_parameters():
    tensordict = pytest.importorskip("tensordict")
    model = Net()
    params = tensordict.TensorDict.from_module(model)
    params = tensordict.nn.TensorDictParams(params)
    for given in (params, params.parameters(), params.values(True, True)):
        assert decayed(AdamW(given, **SETTINGS)) == {"body.weight", "head.weight"}


@pytest.mark.integration
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_mup(cls):
    mup = pytest.importorskip("mup")

    def made(width):
        layers = [nn.Linear(4, width), nn.LayerNorm(width), nn.ReLU()]
        return nn.Sequential(*layers, mup.MuReadout(width, 2))

    model = made(64)
    mup.set_base_shapes(model, made(8), delta=made(16))
    make = mup.MuSGD if cls is SGD else mup.MuAdam
    optimizer = make(model.parameters(), impl=cls, **SETTINGS)
    assert decayed(optimizer) == {"0.weight", "3.weight"}
