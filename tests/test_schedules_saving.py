"""Schedules of weight decay in training: order of calls, resuming, scaling."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import selective_optim
from selective_optim.schedules import WeightDecay
from tests.support.schedule_cases import (
    OPTIMIZERS,
    SCHEDULES,
    one_cycle,
    optimizers,
    run,
    schedules,
    two_groups,
    values,
)

# SequentialLR of torch 2.7 calls the step of its parts in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")


# The order of calls

FIRST = r"lr_scheduler.step\(\)` before `optimizer.step"


@optimizers
def test_scheduler_that_comes_first_is_warned_of(kind):
    scheduler = torch_schedulers.ExponentialLR(WeightDecay(two_groups(kind)), 0.9)
    with pytest.warns(UserWarning, match=FIRST):
        scheduler.step()


@optimizers
@pytest.mark.parametrize("wrapped", [True, False])
def test_scheduler_that_comes_second_is_not(kind, wrapped):
    optimizer = two_groups(kind)
    scheduler = torch_schedulers.ExponentialLR(WeightDecay(optimizer), 0.9)
    step = optimizer.step
    if wrapped:  # as GradScaler, Accelerate and others patch it
        optimizer.step = lambda *args: step(*args)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_view_steps_the_optimizer_and_its_hooks_once():
    optimizer = two_groups(selective_optim.SGD)
    view = WeightDecay(optimizer)
    scheduler = torch_schedulers.ExponentialLR(view, 0.9)
    calls: list[object] = []
    view.register_step_pre_hook(lambda opt, *_: calls.append(opt))
    loss = view.step(lambda: 7.0)
    scheduler.step()
    assert (loss, calls) == (7.0, [optimizer])
    assert optimizer.param_groups[0]["params"][0].tolist() != [1.0, -2.0]
    view.zero_grad()
    assert optimizer.param_groups[0]["params"][0].grad is None


# Saving and resuming


def trained(kind: Any, make: Callable[[Any], Any], steps: int) -> Any:
    optimizer = two_groups(kind)
    scheduler = make(WeightDecay(optimizer))
    run(optimizer, scheduler, steps, "lr")
    return optimizer, scheduler


@schedules
@optimizers
def test_schedule_resumes_from_state_dicts(kind, make):
    expected = run(*trained(kind, make, 4), 6, "weight_decay")
    saved = [part.state_dict() for part in trained(kind, make, 4)]
    parts = trained(kind, make, 0)
    for part, state in zip(parts, pickle.loads(pickle.dumps(saved)), strict=True):
        part.load_state_dict(state)
    assert run(*parts, 6, "weight_decay") == expected


@optimizers
def test_schedule_made_after_loading_resumes_too(kind):
    make = SCHEDULES["cosine"]
    expected = run(*trained(kind, make, 4), 4, "weight_decay")
    saved = [part.state_dict() for part in trained(kind, make, 4)]
    optimizer = two_groups(kind)
    optimizer.load_state_dict(saved[0])
    scheduler = make(WeightDecay(optimizer))
    scheduler.load_state_dict(saved[1])
    assert run(optimizer, scheduler, 4, "weight_decay") == expected


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("schedule", ["cosine", "one cycle", "sequential"])
@optimizers
def test_copy_of_optimizer_and_schedule_continues(kind, schedule, copied):
    both = trained(kind, SCHEDULES[schedule], 4)
    twins = copied(both)
    expected = run(*both, 4, "weight_decay")
    assert twins[1].last_epoch == 4
    assert run(*twins, 4, "weight_decay") == expected


def test_copy_warns_of_the_order_as_the_original():
    _, scheduler = copy.deepcopy(trained(selective_optim.AdamW, one_cycle, 0))
    with pytest.warns(UserWarning, match=FIRST):
        scheduler.step()


def test_view_that_is_not_made_yet_has_no_attributes():
    """Debuggers and copiers may look while pickle fills it."""
    assert not hasattr(WeightDecay.__new__(WeightDecay), "state")


def test_view_hands_state_dicts_to_the_optimizer():
    optimizer = two_groups(selective_optim.SGD)
    view = WeightDecay(optimizer)
    state = view.state_dict()
    assert state == optimizer.state_dict()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    view.load_state_dict(state)
    assert view.param_groups[0]["lr"] == 0.04
    assert view.state is optimizer.state
    assert repr(view).startswith("WeightDecay(SGD (")


# GradScaler


@pytest.mark.parametrize("kind", ["AdamW", "torch.AdamW"])
def test_schedule_goes_on_when_the_scaler_skips_a_step(kind):
    param = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OPTIMIZERS[kind]([param], lr=0.1, weight_decay=0.04)
    scheduler = torch_schedulers.ExponentialLR(WeightDecay(optimizer), 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for grad in (0.0, math.inf, 0.0):
        before = param.detach().clone()
        wd = optimizer.param_groups[0]["weight_decay"]
        param.grad = torch.zeros_like(param)
        scaler.scale(param.new_zeros(()))
        param.grad.fill_(grad)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        shrunk = before * (1 - 0.1 * wd)
        expected = before if math.isinf(grad) else shrunk
        torch.testing.assert_close(param.detach(), expected)
    assert values(optimizer, "weight_decay") == [0.005]
