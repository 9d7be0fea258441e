"""A model with a body for Muon, and the separate optimizers that a Routed equals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from selective_optim import AdamW, Routed
from selective_optim.policies import is_hidden_matrix

# torch has no Muon before 2.9; RMSprop takes the same two arguments.
Body = getattr(torch.optim, "Muon", torch.optim.RMSprop)
needs_muon = pytest.mark.skipif(
    Body is torch.optim.RMSprop, reason="torch has no Muon before 2.9"
)
MUON = {"lr": 0.02, "momentum": 0.9}
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95)}
# What other projects' optimizers read in groups of Muon, and in the others.
HALVES = {
    "use_muon": (True, False),
    "use_fallback": (False, True),
    "algorithm": ("muon", "adamw"),
    "kind": ("muon", "adamw"),
}


class Net(nn.Module):
    """Embedding, blocks of a matrix and a norm, and an output layer."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(6, 7, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        """Predict each token from itself."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss_of(model, number):
    """Return the loss on a batch of its own."""
    tokens = torch.randint(
        0, 7, (3, 4), generator=torch.Generator().manual_seed(number)
    )
    return cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def twins(**arguments):
    """Make the same model twice."""
    torch.manual_seed(0)
    model = Net(**arguments)
    return model, copy.deepcopy(model)


def routes(**changed):
    """Write the usual two routes."""
    two = {
        "muon": (is_hidden_matrix, Body, MUON),
        "adamw": ("*", AdamW, ADAMW),
    }
    return {**two, **changed}


def routed(model, **arguments):
    """Make the usual optimizer."""
    given = {"routes": routes(), "weight_decay": 0.1, "wd_policy": "no_bias_norm"}
    return Routed(model.parameters(), **{**given, **arguments})


def split(model):
    """List the matrices of the body, what else decays, and what does not, by hand."""
    named = dict(model.named_parameters())
    body = [f"blocks.{i}.0.weight" for i in range(2)]
    decayed = [name for name in ("embed.weight", "head.weight") if name in named]
    exempt = [name for name in named if name not in (*body, *decayed)]
    return [[named[name] for name in names] for names in (body, decayed, exempt)]


def separate(model, first=(Body, MUON), rest=(torch.optim.AdamW, ADAMW)):
    """Make the optimizers that a user makes by hand."""
    body, decayed, exempt = split(model)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    (one, one_given), (other, other_given) = first, rest
    return [
        one(body, **one_given, weight_decay=0.1),
        other(groups, **other_given, weight_decay=0.1),
    ]
