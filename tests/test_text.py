"""How messages show what a user gave."""

import pytest
import torch
from torch import nn

from selective_optim._text import received

SHOWN = {
    "number": (3, "3 (int)"),
    "text": ("*.bias", "'*.bias' (str)"),
    "class": (dict, "<class 'dict'> (type)"),
    "module": (nn.Sequential(nn.Linear(2, 2)), "a Sequential"),
    "tensor": (torch.ones(2, 3), "a tensor (shape 2 x 3)"),
    "scalar": (torch.ones(()), "a tensor (shape scalar)"),
    "lazy": (nn.LazyLinear(2).weight, "a tensor (no shape yet)"),
    "several lines": (
        [nn.ModuleList([nn.ReLU(), nn.ReLU(True)])],
        "[ModuleList( (0): ReLU() (1): ReLU(inplace=True) )] (list)",
    ),
    "just short enough": ("a" * 58, f"'{'a' * 58}' (str)"),
    "large": ({"a": "b" * 99}, f"{{'a': '{'b' * 53}... (dict)"),
}


@pytest.mark.parametrize("case", SHOWN)
def test_received_value_shows_on_one_short_line(case):
    value, expected = SHOWN[case]
    assert received(value) == expected
