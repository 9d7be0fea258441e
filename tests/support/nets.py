"""Networks whose parameters are odd in every way that a step or a name may meet."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """A scalar, no elements, matrices, vectors and a norm."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.scale * self.head(self.body(x))


class OddNet(Net):
    """Beside them a transposed view, one without gradients, and one that is late."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        self.idle = nn.Parameter(torch.randn(4))
        self.late = nn.Parameter(torch.randn(2, 2))


class TokenNet(nn.Module):
    """Reads three tokens and gives a number, with shapes that mislead.

    The norm's parameters are matrices, and the last weight has one row, so that
    sharding it leaves one rank with nothing.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm((3, 7))
        self.last = nn.Linear(7, 1)

    def forward(self, tokens):
        hidden = torch.relu(self.first(self.embed(tokens)))
        return self.last(self.norm(hidden)).sum(dim=(1, 2))
