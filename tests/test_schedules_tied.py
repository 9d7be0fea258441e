"""Weight decay that is proportional to the learning rate."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

import selective_optim
from selective_optim.policies import exclude, form, towards
from selective_optim.schedules import WeightDecay, proportional_to_lr
from tests.support.schedule_cases import optimizers, run, schedules, two_groups, values

# SequentialLR of torch 2.7 calls the step of its parts in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")


@schedules
@optimizers
def test_tied_decay_follows_the_rate(kind, make):
    optimizer = two_groups(kind)
    proportional_to_lr(optimizer)
    scheduler = make(optimizer)
    for _ in range(8):
        rates = values(optimizer, "lr")
        optimizer.step()
        expected = [0.04 * (rates[0] / 0.1), 0.02 * (rates[1] / 0.05)]
        assert values(optimizer, "weight_decay") == expected
        scheduler.step()


def test_tied_decay_is_the_base_at_the_base_rate():
    """0.07 * 0.3 / 0.3 is not 0.07 in floating point."""
    optimizer = two_groups(torch.optim.SGD, lr=0.3, weight_decay=0.07)
    proportional_to_lr(optimizer)
    optimizer.step()
    assert values(optimizer, "weight_decay") == [0.07, 0.035]


def test_tied_decay_is_that_of_adamc():
    """Decoupled decay of ``lr ** 2 / max_lr * weight_decay``, Defazio 2025."""
    param = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = selective_optim.AdamW([param], lr=0.5, weight_decay=0.1)
    proportional_to_lr(optimizer)
    scheduler = torch_schedulers.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
    expected = 2.0
    for step in range(4):
        param.grad = torch.zeros_like(param)
        optimizer.step()
        scheduler.step()
        lr = 0.5 * (1 - step / 4)
        expected *= 1 - lr**2 / 0.5 * 0.1
    torch.testing.assert_close(param.item(), expected, rtol=1e-12, atol=0)


def test_tied_decay_is_the_corrected_form_to_the_bit():
    """Under any schedule, which the form follows without a hook."""
    left = []
    for policy in (None, form("corrected")):
        param = nn.Parameter(torch.linspace(-1, 2, 7))
        optimizer = selective_optim.AdamW(
            [param], lr=0.3, weight_decay=0.07, wd_policy=policy
        )
        if policy is None:
            proportional_to_lr(optimizer)
        scheduler = torch_schedulers.CosineAnnealingLR(optimizer, 5)
        for step in range(5):
            param.grad = torch.full_like(param, step - 2.0)
            optimizer.step()
            scheduler.step()
        left.append(param)
    assert torch.equal(*left)


def test_decay_is_not_corrected_twice():
    param = nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    optimizer = selective_optim.AdamW([param], wd_policy=form("corrected"))
    told = "parameter of group 0 decays in form 'corrected', which follows the rate"
    with pytest.raises(ValueError, match=told):
        proportional_to_lr(optimizer)
    optimizer.wd_policy = None
    proportional_to_lr(optimizer)
    optimizer.step()
    optimizer.wd_policy = form("corrected")
    with pytest.raises(ValueError, match=told):
        optimizer.step()


@pytest.mark.parametrize("kind", ["independent", "corrected", "cautious"])
def test_a_schedule_of_decay_composes_with_a_form(kind):
    """As if the decay were set by hand at each step."""
    policy = form(kind) * towards(0.5)
    decays: list[float] = []
    left = []
    for by_hand in (False, True):
        param = nn.Parameter(torch.linspace(-1, 2, 7))
        optimizer = selective_optim.SGD(
            [param], lr=0.3, weight_decay=0.2, wd_policy=policy
        )
        decay = WeightDecay(optimizer)
        schedule = torch_schedulers.LinearLR(decay, 1.0, 0.0, total_iters=4)
        for step in range(4):
            if by_hand:
                optimizer.param_groups[0]["weight_decay"] = decays[step]
            else:
                decays.append(optimizer.param_groups[0]["weight_decay"])
            param.grad = torch.full_like(param, step - 1.5)
            optimizer.step()
            if not by_hand:
                schedule.step()
        left.append(param)
    assert decays == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert torch.equal(*left)


def test_tie_leaves_exempt_parameters_of_a_corrected_form_alone():
    policy = form("corrected") * exclude("*")
    named = [("p", nn.Parameter(torch.ones(2)))]
    proportional_to_lr(selective_optim.AdamW(named, lr=0.3, wd_policy=policy))


@pytest.mark.parametrize("kind", ["l2", "decoupled", "independent", "cautious"])
def test_tie_takes_the_forms_that_do_not_follow_the_rate_twice(kind):
    named = [("p", nn.Parameter(torch.ones(2)))]
    optimizer = selective_optim.AdamW(named, lr=0.3, wd_policy=form(kind))
    proportional_to_lr(optimizer)


def test_tie_ends_with_its_handle():
    optimizer = two_groups(torch.optim.SGD)
    handle = proportional_to_lr(optimizer)
    handle.remove()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert values(optimizer, "weight_decay") == [0.04, 0.02]
    WeightDecay(optimizer)


def test_tie_takes_in_a_group_added_later():
    optimizer = two_groups(selective_optim.AdamW)
    proportional_to_lr(optimizer)
    late = {"params": [nn.Parameter(torch.ones(2))], "lr": 0.4, "weight_decay": 0.2}
    optimizer.add_param_group(late)
    optimizer.step()
    optimizer.param_groups[2]["lr"] = 0.2
    optimizer.step()
    assert values(optimizer, "weight_decay") == [0.04, 0.02, 0.1]


@optimizers
def test_tie_made_before_loading_resumes(kind):
    def tied_and_warm() -> Any:
        optimizer = two_groups(kind, lr=0.3, weight_decay=0.07)
        proportional_to_lr(optimizer)
        return optimizer, torch_schedulers.LinearLR(optimizer, 0.1, total_iters=9)

    straight = tied_and_warm()
    run(*straight, 4, "lr")
    resumed = tied_and_warm()
    for part, saved in zip(resumed, straight, strict=True):
        part.load_state_dict(saved.state_dict())
    expected = run(*straight, 4, "weight_decay")
    assert run(*resumed, 4, "weight_decay") == expected


def test_tie_reads_a_tensor_rate():
    optimizer = two_groups(torch.optim.SGD, lr=0.25)
    rate = torch.tensor(0.25)
    optimizer.param_groups[0]["lr"] = rate
    proportional_to_lr(optimizer)
    rate.fill_(0.125)
    optimizer.step()
    assert values(optimizer, "weight_decay") == [0.02, 0.02]
