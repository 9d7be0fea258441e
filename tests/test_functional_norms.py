"""Gains that a module hands to a functional norm are told by its source."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import layer_norm

from selective_optim import AdamW
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import is_norm, recognition


class Holding(nn.Module):
    """Holds vectors of all the names that the modules below use."""

    def __init__(self):
        super().__init__()
        for leaf in ("gamma", "beta", "scale", "query", "weight"):
            setattr(self, leaf, nn.Parameter(torch.ones(3)))


class FeatureMap(Holding):
    def forward(self, x):
        return F.layer_norm(x, (3,), self.gamma, self.beta) * self.scale


class ByKeyword(Holding):
    def forward(self, x):
        return F.rms_norm(x, (3,), weight=self.gamma.float())


class InAnother(Holding):
    def forward(self, x):
        return self.normalized(x) @ self.weight

    def normalized(self, x):
        return F.group_norm(x, 1, self.gamma.to(x.dtype), self.beta.to(x.dtype))


class WithoutGradients(Holding):
    @torch.no_grad()
    def forward(self, x):
        return F.layer_norm(x, (3,), self.gamma)


class Derived(FeatureMap):
    pass


class Fused(Holding):
    def forward(self, x):
        return F.linear(F.layer_norm(x, (3,), self.gamma), self.weight)


class Normalized(Holding):
    """What is normalized, or made into another value, is no gain."""

    def forward(self, x):
        x = x + F.layer_norm(self.query, (3,)) + F.layer_norm(input=self.beta)
        return F.batch_norm(x, None, None, weight=(self.gamma * self.scale).view(-1))


class ByName(Holding):
    def forward(self, x):
        return layer_norm(x, (3,), self.gamma)


class ByIndex(Holding):
    """What is called has no name to tell a norm by."""

    def forward(self, x):
        return [layer_norm][0](x, (3,), self.gamma)


class OwnMethod(Holding):
    """A method or module of the model's own may do anything with it."""

    def layer_norm(self, x, scale):
        return x + scale

    def forward(self, x):
        return self.layer_norm(x, self.scale)


FOUND = {
    FeatureMap: {"gamma", "beta"},
    ByKeyword: {"gamma"},
    InAnother: {"gamma", "beta"},
    WithoutGradients: {"gamma"},
    Derived: {"gamma", "beta"},
    Fused: {"gamma"},
    Normalized: set(),
    ByName: {"gamma"},
    ByIndex: set(),
    OwnMethod: set(),
}


def selected(module, selector=is_norm):
    infos = ModuleIndex(module).everyone()
    return {info.name for info in infos if selector.matches(info)}


@pytest.mark.parametrize("cls", FOUND)
def test_gain_is_what_a_functional_norm_takes_beside_its_input(cls):
    assert selected(cls()) == FOUND[cls]


def test_reason_tells_the_call_and_the_method():
    optimizer = AdamW(Derived().parameters(), wd_policy="no_bias_norm")

    reasons = {row.name: row.reason for row in optimizer.decay_report().rows}

    how = "layer_norm takes gamma in FeatureMap.forward"
    assert reasons["gamma"] == f"exclude is_norm: {how}"
    assert reasons["scale"] == "decays in full"


def test_class_without_a_source_holds_no_gains():
    space = {"Holding": Holding, "F": F}
    exec(
        "class Typed(Holding):\n"
        "    def forward(self, x):\n"
        "        return F.layer_norm(x, (3,), self.gamma)\n",
        space,
    )

    assert selected(space["Typed"]()) == set()


def of(package, name, *bases, **parts):
    """Make an empty module of a class that a package might define."""
    # Of a class without a method nothing would be known.
    own = {"__module__": f"{package}.models", "forward": lambda self, x: x}
    cls = type(name, bases or (nn.Module,), own)
    module = cls()
    for leaf, shape in parts.items():
        setattr(module, leaf, nn.Parameter(torch.ones(shape)))
    return module


def test_known_gains_are_norms_with_a_reason():
    down = of("monai", "MedNeXtBlock").__class__
    module = of("monai", "Down", down, global_resp_gamma=(1, 4, 1), scale=(4,))

    optimizer = AdamW(module.parameters(), wd_policy="no_norm")

    reasons = {row.name: row.reason for row in optimizer.decay_report().rows}
    how = "Down.global_resp_gamma is known as a gain"
    assert reasons["global_resp_gamma"] == f"exclude is_norm: {how}"
    assert reasons["scale"] == "decays in full"


@pytest.mark.parametrize("entry", recognition.KNOWN_GAINS)
def test_known_gains_are_those_of_one_package(entry):
    package, name = entry
    leaves = dict.fromkeys(recognition.KNOWN_GAINS[entry], (3,))

    assert selected(of(package, name, **leaves)) == set(leaves)
    assert selected(of("another", name, **leaves)) == set()
