"""Decay that is divided by the rate of the beginning, under a rate that rises above.

``"independent"`` and ``"corrected"`` divide by the rate that training began with.
Where that is not the rate that schedules begin from, decay is too strong.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from selective_optim import Decay, selective
from selective_optim.policies import (
    everything,
    exclude,
    first_match,
    form,
    is_bias,
    is_norm,
)
from tests.support import attacks
from tests.support.attacks import SERVED, WD, make, net

USUAL = exclude(is_bias, is_norm)
DIVIDED = ["independent", "corrected"]
FLAGGED = [name for name in SERVED if name != "Own"]
each_name = pytest.mark.parametrize("name", FLAGGED)
each_form = pytest.mark.parametrize("shape", DIVIDED)


def told(model, optimizer, rates):
    """Step at these rates, or at those of the groups, and list what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rate in rates:
            if rate is not None:
                optimizer.param_groups[0]["lr"] = rate
            attacks.zero_grads([*model.parameters()])
            optimizer.step()
    return [str(w.message) for w in caught if "lr_scheduler" not in str(w.message)]


class WithoutRate(torch.optim.Optimizer):
    """Has a rate only in groups that bring one, as Adafactor of transformers."""

    def __init__(self, params, lr=None, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        pass


def test_group_without_a_rate_beside_one_that_is_divided_steps():
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    groups = [
        {"params": [*first.parameters()], "lr": 0.1},
        {"params": [*second.parameters()]},
    ]
    policy = first_match({first: Decay(1, "independent"), everything: 0})
    cls = selective(WithoutRate)
    optimizer = cls(
        groups, model=torch.nn.ModuleList([first, second]), wd_policy=policy
    )
    assert told(first, optimizer, [None, 0.05]) == []


def under_one_cycle(name, shape, given, top=1e-2):
    model = given if isinstance(given, torch.nn.Module) else given[0]
    params = given if given is model else given[1]
    optimizer = make(name, params, form(shape) * USUAL, lr=1e-3)
    scheduler = OneCycleLR(
        optimizer, max_lr=top, total_steps=20, pct_start=0.3, cycle_momentum=False
    )
    return model, optimizer, scheduler


@each_name
@each_form
def test_cycle_above_the_rate_of_the_beginning_is_told_once(name, shape):
    model, optimizer, _ = under_one_cycle(name, shape, net())
    [message] = told(model, optimizer, [None] * 12)
    assert "initial_lr" in message


@each_name
@each_form
def test_ten_steps_in_a_row_above_it_are_told_once(name, shape):
    model = net()
    optimizer = make(name, model, form(shape) * USUAL, lr=1e-3)
    assert told(model, optimizer, [2e-3] * 9) == []
    [message] = told(model, optimizer, [2e-3] * 20)
    assert "initial_lr" in message


@each_name
@each_form
def test_steps_above_it_that_are_not_in_a_row_are_not_told_of(name, shape):
    model = net()
    optimizer = make(name, model, form(shape) * USUAL, lr=1e-3)
    assert told(model, optimizer, [*[2e-3] * 9, 1e-3] * 3) == []


@each_name
@pytest.mark.parametrize("shape", ["decoupled", "l2"])
def test_forms_that_divide_by_nothing_are_not_told_of(name, shape):
    model, optimizer, _ = under_one_cycle(name, shape, net())
    assert told(model, optimizer, [*[None] * 3, *[1e-2] * 20]) == []


@each_name
@each_form
def test_rates_up_to_that_of_the_beginning_are_not_told_of(name, shape):
    model, optimizer, _ = under_one_cycle(name, shape, net(), top=1e-3)
    assert told(model, optimizer, [*[None] * 12, *[1e-3] * 12]) == []


@each_name
@each_form
def test_what_the_warning_advises_is_typed_and_works(name, shape):
    """With the cycle's top as the beginning, decay is what the form says."""
    model = net(1.0)
    group = {"params": model.parameters(), "initial_lr": 1e-2}
    model, optimizer, scheduler = under_one_cycle(name, shape, (model, [group]))
    assert told(model, optimizer, [None] * 3) == []
    for _ in range(4):
        scheduler.step()
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    rate = optimizer.param_groups[0]["lr"]
    assert told(model, optimizer, [None]) == []
    power = {"independent": 1, "corrected": 2}[shape]
    expected = 1 - WD * rate**power / 1e-2
    torch.testing.assert_close(
        model.first.weight.detach(), torch.full((4, 3), expected)
    )


@each_name
def test_group_without_decay_is_not_told_of(name):
    model = net()
    groups = [
        {"params": model.first.parameters(), "weight_decay": 0.0},
        {"params": model.last.parameters()},
    ]
    optimizer = make(name, groups, form("independent") * USUAL, lr=1e-3)
    assert told(model, optimizer, [2e-3] * 20) == []


@each_name
@each_form
def test_group_that_comes_later_is_told_of(name, shape):
    model, later = net(), net()
    optimizer = make(name, model, form(shape) * USUAL, lr=1e-3)
    assert told(model, optimizer, [None] * 3) == []
    optimizer.add_param_group({"params": later.parameters(), "max_lr": 1e-2})
    [message] = told(later, optimizer, [None] * 3)
    assert "group 1" in message
    assert "initial_lr" in message


@each_name
@each_form
def test_form_that_is_assigned_later_is_told_of(name, shape):
    model = net()
    optimizer = make(name, model, lr=1e-3)
    assert told(model, optimizer, [2e-3] * 20) == []
    optimizer.wd_policy = form(shape) * USUAL
    assert told(model, optimizer, [2e-3] * 9) == []
    assert len(told(model, optimizer, [2e-3] * 20)) == 1
