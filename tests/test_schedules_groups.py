"""Groups under a schedule of weight decay, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

from selective_optim.schedules import WeightDecay, proportional_to_lr
from tests.support.schedule_cases import (
    OPTIMIZERS,
    one_cycle,
    optimizers,
    run,
    two_groups,
    values,
)

# Groups


@optimizers
def test_group_exempt_by_hand_stays_exempt(kind):
    optimizer = two_groups(kind)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    scheduler = torch_schedulers.CosineAnnealingLR(
        WeightDecay(optimizer), 4, eta_min=0.4
    )
    assert run(optimizer, scheduler, 4, "weight_decay")[-1] == [0.4, 0.0]
    assert scheduler.get_last_lr() == [0.4, 0.0]


def test_decay_rises_from_zero_where_every_group_starts_there():
    optimizer = two_groups(torch.optim.AdamW, weight_decay=0.0)
    scheduler = torch_schedulers.CosineAnnealingLR(
        WeightDecay(optimizer), 4, eta_min=0.4
    )
    assert run(optimizer, scheduler, 4, "weight_decay")[-1] == [0.4, 0.4]


@optimizers
@pytest.mark.parametrize("through_view", [True, False])
def test_group_added_later_takes_part(kind, through_view):
    optimizer = two_groups(kind)
    view = WeightDecay(optimizer)
    scheduler = torch_schedulers.ExponentialLR(view, 0.5)
    target = view if through_view else optimizer
    target.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert run(optimizer, scheduler, 1, "weight_decay") == [[0.02, 0.01, 0.02]]
    assert "initial_lr" not in view.param_groups[2]


def test_tensor_decay_is_written_in_place():
    """As torch does with a tensor learning rate, which a graph may have captured."""
    optimizer = two_groups(torch.optim.AdamW)
    decay = torch.tensor(0.04)
    optimizer.param_groups[0]["weight_decay"] = decay
    scheduler = torch_schedulers.ExponentialLR(WeightDecay(optimizer), 0.5)
    scheduler.optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["weight_decay"] is decay
    assert decay.item() == pytest.approx(0.02)


def test_view_is_a_mapping_of_its_group():
    optimizer = two_groups(torch.optim.AdamW)
    torch_schedulers.ExponentialLR(optimizer, 0.9)
    group = WeightDecay(optimizer).param_groups[0]
    own = {**optimizer.param_groups[0]}
    del own["initial_lr"]
    assert dict(group) == {**own, "lr": 0.04}
    assert len(group) == len(own)
    group["initial_lr"] = 1.0
    del group["initial_lr"]
    assert "initial_lr" not in group
    assert optimizer.param_groups[0]["initial_lr"] == 0.1


# Wrappers that skip the constructor of torch's class


class Wrapper(torch.optim.Optimizer):
    """As Opacus' and torch's PostLocalSGDOptimizer."""

    def __init__(self, optimizer):
        self.wrapped = optimizer

    @property
    def param_groups(self):
        return self.wrapped.param_groups

    def step(self, closure=None):
        return self.wrapped.step(closure)


class Keeper:
    """As fastai's, which is no optimizer of torch's."""

    def __init__(self, optimizer):
        self.opt = optimizer

    def step(self):
        self.opt.step()


WRAPPERS = [Wrapper, Keeper, lambda o: Wrapper(Wrapper(o)), WeightDecay]


@pytest.mark.parametrize("wrap", WRAPPERS)
@optimizers
def test_schedule_through_a_wrapper_is_that_of_the_optimizer(kind, wrap):
    optimizer, plain = two_groups(kind), two_groups(kind)
    wrapper = wrap(optimizer)
    scheduler = torch_schedulers.ExponentialLR(WeightDecay(wrapper), 0.5)
    expected = torch_schedulers.ExponentialLR(WeightDecay(plain), 0.5)
    for each in (wrapper, plain):
        each.step()
    scheduler.step()
    expected.step()  # neither warns of the order
    assert values(optimizer, "weight_decay") == values(plain, "weight_decay")
    assert scheduler.optimizer == optimizer


@pytest.mark.parametrize("wrap", WRAPPERS[:3])
@optimizers
def test_tie_through_a_wrapper_is_that_of_the_optimizer(kind, wrap):
    optimizer = two_groups(kind)
    wrapper = wrap(optimizer)
    proportional_to_lr(wrapper)
    optimizer.param_groups[0]["lr"] = 0.05
    wrapper.step()
    assert values(optimizer, "weight_decay") == [0.02, 0.02]


def test_wrapper_that_is_an_optimizer_itself_is_scheduled_itself():
    """As SAM, whose groups the inner one shares, and which frameworks know."""
    inner = two_groups(torch.optim.SGD)
    outer = torch.optim.SGD(inner.param_groups, lr=0.1)
    outer.base_optimizer = inner
    assert WeightDecay(outer) == outer


# What the view refuses

ONE_CYCLE = {"max_lr": 0.4, "total_steps": 10}
CYCLIC = {"base_lr": 0.1, "max_lr": 0.4}
REFUSALS = [
    (torch_schedulers.OneCycleLR, "torch.AdamW", ONE_CYCLE, "betas"),
    (torch_schedulers.OneCycleLR, "SGD", ONE_CYCLE, "momentum"),
    (torch_schedulers.CyclicLR, "AdamW", CYCLIC, "betas"),
    (torch_schedulers.CyclicLR, "torch.SGD", CYCLIC, "momentum"),
]


@pytest.mark.parametrize(("make", "kind", "arguments", "key"), REFUSALS)
def test_cycling_momentum_is_refused_with_the_remedy(make, kind, arguments, key):
    optimizer = two_groups(OPTIMIZERS[kind])
    view = WeightDecay(optimizer)
    before = values(optimizer, key)
    with pytest.raises(ValueError, match=f"'{key}'.*cycle_momentum=False"):
        make(view, **arguments)
    assert values(optimizer, key) == before
    scheduler = make(view, cycle_momentum=False, **arguments)
    fresh = two_groups(OPTIMIZERS[kind])
    again = make(WeightDecay(fresh), cycle_momentum=False, **arguments)
    assert run(optimizer, scheduler, 5, "weight_decay") == run(
        fresh, again, 5, "weight_decay"
    )


def no_decay() -> torch.optim.Optimizer:
    return torch.optim.LBFGS([nn.Parameter(torch.ones(1))])


def tied() -> torch.optim.Optimizer:
    optimizer = two_groups(torch.optim.SGD)
    proportional_to_lr(optimizer)
    return optimizer


def scheduled() -> torch.optim.Optimizer:
    optimizer = two_groups(torch.optim.SGD)
    torch_schedulers.ExponentialLR(WeightDecay(optimizer), 0.9)
    return optimizer


def warming_up() -> torch.optim.Optimizer:
    optimizer = two_groups(torch.optim.SGD)
    torch_schedulers.LinearLR(optimizer, 0.1)
    return optimizer


def in_one_cycle() -> torch.optim.Optimizer:
    optimizer = two_groups(torch.optim.SGD)
    one_cycle(optimizer)
    return optimizer


ERRORS = [
    (WeightDecay, list, TypeError, r"torch.optim.Optimizer, not \[\] \(list\)"),
    (WeightDecay, no_decay, ValueError, r"\(LBFGS\) has no weight_decay"),
    (WeightDecay, tied, ValueError, r"End it first: .*handle.remove\(\)"),
    (proportional_to_lr, dict, TypeError, r"not \{\} \(dict\)"),
    (proportional_to_lr, no_decay, ValueError, "has no weight_decay"),
    (proportional_to_lr, tied, ValueError, "already sets the weight_decay"),
    (proportional_to_lr, scheduled, ValueError, "Leave out that schedule"),
    (
        proportional_to_lr,
        warming_up,
        ValueError,
        "`lr` of group 0 is 0.01.*its initial_lr, 0.1.*before making the scheduler",
    ),
    (proportional_to_lr, in_one_cycle, ValueError, "its max_lr, 0.3"),
    (
        proportional_to_lr,
        lambda: two_groups(torch.optim.SGD, lr=0.0),
        ValueError,
        "`lr` of group 0 is 0",
    ),
]


@pytest.mark.parametrize(("subject", "make", "kind", "message"), ERRORS)
def test_message_names_the_value_and_the_remedy(subject, make, kind, message):
    with pytest.raises(kind, match=message):
        subject(make())
