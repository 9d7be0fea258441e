"""Every warning points at the line of the user's that led to it."""

from __future__ import annotations

import warnings
from itertools import count

import pytest
import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW, deciding_for, selective


def params():
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 3))]


def add_misspelt():
    AdamW(params()).add_param_group({"params": params(), "weight_decays": 1})


def assign():
    AdamW(params(), wd_policy="matrices").wd_policy = "none"


def load():
    saved = AdamW(params(), wd_policy="matrices").state_dict()
    AdamW(params(), wd_policy="all").load_state_dict(saved)


def step():
    param = nn.Parameter(torch.ones(3, 3).bfloat16())
    loop = {"foreach": False, "fused": False}
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.01, **loop)
    param.grad = torch.ones_like(param)
    optimizer.step()


def pass_groups_on():
    first = AdamW(params(), wd_policy="matrices")
    AdamW(first.param_groups)


def decide_otherwise():
    answers = count()
    AdamW(params(), wd_policy=lambda info: next(answers))


def decide_for_nothing():
    with deciding_for(nn.Linear(2, 2), wd_policy="no_bias"):
        pass


WARNING = {
    "exempt": lambda: AdamW(params(), wd_policy="none"),
    "small multiplier": lambda: AdamW(nn.Linear(2, 2), wd_policy={"bias": 1e-5}),
    "unsteady": decide_otherwise,
    "exempt, SGD": lambda: SGD(params(), weight_decay=0.1, wd_policy="none"),
    "exempt, any": lambda: selective(torch.optim.NAdam)(
        params(), weight_decay=0.1, wd_policy="none"
    ),
    "no decay": lambda: Adam(params(), wd_policy="matrices"),
    "misspelt": lambda: AdamW([{"params": params(), "wd_polcy": "none"}]),
    "misspelt later": add_misspelt,
    "passed on": pass_groups_on,
    "assigned": assign,
    "loaded": load,
    "rounded away": step,
    "block without an optimizer": decide_for_nothing,
}


@pytest.mark.parametrize("what", WARNING)
def test_warning_points_at_the_users_line(what):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        WARNING[what]()
    (warning,) = caught
    assert warning.filename == __file__
