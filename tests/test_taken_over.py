"""A wrapper that applies decay itself is told that groups no longer decay."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from selective_optim import WeightDecay, param_groups
from tests.support import attacks
from tests.support.attacks import (
    DECOUPLED,
    LR,
    SERVED,
    WD,
    Own,
    make,
    net,
)

each_name = pytest.mark.parametrize("name", SERVED)


class Wrapper:
    """Decays by itself, and lets an optimizer step without decay."""

    def __init__(self, optim):
        self.optim = optim

    @torch.no_grad()
    def decay(self, group, wd):
        for param in group["params"]:
            if param.grad is not None:
                param.grad.add_(param, alpha=float(wd))


class OneByOne(Wrapper):
    """As a short LARC: group by group."""

    def step(self):
        for group in self.optim.param_groups:
            wd, group["weight_decay"] = group["weight_decay"], 0
            self.decay(group, wd)
            self.optim.step()
            group["weight_decay"] = wd


class AllAtOnce(Wrapper):
    """As apex's LARC and torchlars' LARS: all groups, one step, all groups back."""

    def step(self):
        decays = []
        for group in self.optim.param_groups:
            decays.append(group.get("weight_decay", 0))
            group["weight_decay"] = 0
            self.decay(group, decays[-1])
        self.optim.step()
        for group, wd in zip(self.optim.param_groups, decays):
            group["weight_decay"] = wd


class ForGood(Wrapper):
    """Takes decay over when it is made, and keeps it to itself."""

    def __init__(self, optim):
        super().__init__(optim)
        self.decays = [group["weight_decay"] for group in optim.param_groups]
        for group in optim.param_groups:
            group["weight_decay"] = 0.0

    def step(self):
        for group, wd in zip(self.optim.param_groups, self.decays):
            self.decay(group, wd)
        self.optim.step()


WRAPPERS = [OneByOne, AllAtOnce, ForGood]
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def told(steps):
    """Call every function in turn, and list what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            step()
    return [str(w.message) for w in caught]


def stepping(model, stepper, times=1):
    """Give gradients of 0 and step, so many times."""

    def step():
        attacks.zero_grads([*model.parameters()])
        stepper.step()

    return [step] * times


@each_name
@each_wrapper
def test_decay_that_is_taken_over_is_told_once(name, wrapper):
    model = net()
    wrapped = wrapper(make(name, model))
    first = told(stepping(model, wrapped))
    second = told(stepping(model, wrapped))
    later = told(stepping(model, wrapped, times=5))
    [message] = [*first, *second]
    assert "param_groups(" in message
    assert later == []


@each_name
@each_wrapper
def test_decay_that_is_taken_over_after_steps_of_warm_up_is_told(name, wrapper):
    """Steps at rate 0 move nothing, and are not counted."""
    model = net()
    optimizer = make(name, model)
    wrapped = wrapper(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    assert told(stepping(model, wrapped, times=3)) == []
    optimizer.param_groups[0]["lr"] = LR
    [message] = told(stepping(model, wrapped, times=3))
    assert "param_groups(" in message


TORCHS = {name: getattr(torch.optim, name, Own) for name in SERVED}


@each_name
@each_wrapper
def test_what_the_warning_advises_is_typed_and_works(name, wrapper):
    model = net()
    groups = param_groups(model, "no_bias_norm", weight_decay=WD, lr=LR)
    more = DECOUPLED.get(name, {})
    wrapped = wrapper(TORCHS[name](groups, **more))
    before = [param.detach().clone() for param in model.parameters()]
    assert told(stepping(model, wrapped, times=3)) == []
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before)]
    assert same == [False, True, True, True, False, True]


# What is no wrapper.


def quiet(name, policy="no_bias_norm", **more):
    model = net()
    return model, make(name, model, policy, **more)


@each_name
def test_one_step_without_decay_is_none_that_is_taken_over(name):
    """A schedule that begins at 0 has one."""
    model, optimizer = quiet(name)
    scheduler = LambdaLR(WeightDecay(optimizer), lambda step: min(step / 4, 1))
    for _ in range(3):
        assert told([*stepping(model, optimizer), scheduler.step]) == []


@each_name
def test_decay_that_stops_later_is_not_told(name):
    model, optimizer = quiet(name)
    assert told(stepping(model, optimizer, times=2)) == []
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert told(stepping(model, optimizer, times=4)) == []


@each_name
def test_group_that_goes_on_decaying_is_enough(name):
    model = net()
    groups = [{"params": own.parameters()} for own in model.children()]
    optimizer = make(name, groups)
    for group in optimizer.param_groups[:-1]:
        group["weight_decay"] = 0.0
    assert told(stepping(model, optimizer, times=4)) == []


@each_name
def test_optimizer_without_a_policy_has_nothing_to_lose(name):
    model, optimizer = quiet(name, None)
    assert told(stepping(model, AllAtOnce(optimizer), times=4)) == []


@each_name
def test_decay_of_0_at_construction_is_told_there_and_not_again(name):
    model = net()
    with pytest.warns(UserWarning, match="`weight_decay` is 0 in every group"):
        optimizer = make(name, model, weight_decay=0.0)
    assert told(stepping(model, optimizer, times=4)) == []


@each_name
def test_usual_training_is_not_told(name):
    model, optimizer = quiet(name)
    assert told(stepping(model, optimizer, times=20)) == []
