"""Modules that torch.jit and torch.export made anew are known for what they were."""

import io

import pytest
import torch
from torch import nn

from selective_optim.parameters import ModuleIndex
from selective_optim.policies.predicates import is_bias, is_embedding, is_norm
from selective_optim.policies.selectors import as_selector

# torch announces the end of torch.jit, and of its own old ways.
IGNORED = ("ignore::DeprecationWarning", "ignore::FutureWarning")
pytestmark = list(map(pytest.mark.filterwarnings, IGNORED))


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.weight


class PreNorm(nn.Module):
    """A wrapper around a norm, with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.norm(x) * self.weight


def net():
    return nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), LlamaRMSNorm(), PreNorm()
    )


BATCH = torch.tensor([[1, 2], [3, 4]])


def traced(model):
    return torch.jit.trace(model, BATCH)


def loaded(model):
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def unflattened(model):
    return torch.export.unflatten(torch.export.export(model, (BATCH,), strict=False))


MADE = {f.__name__: f for f in (torch.jit.script, traced, loaded, unflattened)}
SELECTED = {
    "is_norm": (
        is_norm,
        {"2.weight", "2.bias", "3.weight", "4.norm.weight", "4.norm.bias"},
    ),
    "is_bias": (is_bias, {"1.bias", "2.bias", "4.norm.bias"}),
    "is_embedding": (is_embedding, {"0.weight"}),
    "class": (
        as_selector(nn.LayerNorm),
        {"2.weight", "2.bias", "4.norm.weight", "4.norm.bias"},
    ),
    "class around": (
        as_selector(PreNorm),
        {"4.weight", "4.norm.weight", "4.norm.bias"},
    ),
}


@pytest.mark.parametrize("case", SELECTED)
@pytest.mark.parametrize("make", MADE)
def test_selector_matches_what_a_module_was(make, case):
    selector, expected = SELECTED[case]

    model = MADE[make](net())
    infos = ModuleIndex(model).everyone()

    assert len(infos) == 9
    assert {info.name for info in infos if selector.matches(info)} == expected


def test_class_of_the_same_name_is_another_class():
    model = nn.Sequential(type("LayerNorm", (LlamaRMSNorm,), {})())
    [info] = ModuleIndex(model).everyone()

    assert is_norm.matches(info)
    assert not as_selector(nn.LayerNorm).matches(info)
