"""A form is one thing in the step, the report, the state dict and the schedules.

What one step without a gradient takes off a parameter is measured, and everything
that tells of it must say the same, at any rate of the schedule.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from selective_optim import Decay, policies
from selective_optim.policies import exclude, form, scale, towards
from tests.support import attacks
from tests.support.attacks import OURS, SERVED, WD, make

LR0 = 0.1
# What stands for the share that one step takes off, of `wd`, `lr` and `lr0`.
SHARES = {
    "decoupled": lambda wd, lr, lr0: lr * wd,
    "independent": lambda wd, lr, lr0: lr / lr0 * wd,
    "corrected": lambda wd, lr, lr0: lr**2 / lr0 * wd,
    "cautious": lambda wd, lr, lr0: lr * wd,
}
RATES = [LR0, 0.02, 0.2]
MULTIPLIERS = [1, 0.25]
each_name = pytest.mark.parametrize("name", SERVED)
each_form = pytest.mark.parametrize("shape", SHARES)
each_rate = pytest.mark.parametrize("rate", RATES)
KINDS = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
CASES = [(name, kind) for name in OURS for kind in KINDS]
CASES += [(name, "automatic") for name in SERVED if name not in OURS]


def built(name, shape, kind="automatic", lr=LR0, multiplier=1.0):
    param = nn.Parameter(torch.full((2, 3), 2.0, dtype=torch.float64))
    policy = form(shape) * scale("p", by=multiplier)
    return param, make(name, [("p", param)], policy, lr=lr, **KINDS[kind])


def share(param, optimizer):
    """Measure which share of a parameter a step takes off."""
    attacks.zero_grads([param])
    optimizer.step()
    return (1 - param.detach()[0, 0] / 2.0).item()


@pytest.mark.parametrize(("name", "kind"), CASES)
@each_form
@each_rate
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_step_takes_off_what_the_form_says(name, kind, shape, rate, multiplier):
    param, optimizer = built(name, shape, kind, multiplier=multiplier)
    optimizer.param_groups[0]["lr"] = rate
    expected = SHARES[shape](WD * multiplier, rate, LR0)
    # Some classes compute in one order and some in another.
    assert share(param, optimizer) == pytest.approx(expected, rel=1e-12)


@each_name
@each_form
@each_rate
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
def test_timescale_of_the_report_is_that_of_the_step(name, shape, rate, multiplier):
    param, optimizer = built(name, shape, multiplier=multiplier)
    optimizer.param_groups[0]["lr"] = rate
    [row] = optimizer.decay_report().rows
    taken = share(param, optimizer)
    assert row.form == shape
    assert row.weight_decay == WD * multiplier
    if shape == "cautious":  # of which nobody knows how much of the time it decays
        assert row.timescale is None
    else:
        assert row.timescale == pytest.approx(1 / taken, rel=1e-12)


# torch says so of its own optimizers, once per process.
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each_name
@each_form
def test_compiled_step_takes_off_the_same(name, shape):
    torch._dynamo.reset()
    param, optimizer = built(name, shape, "for-loop" if name in OURS else "automatic")
    optimizer.param_groups[0]["lr"] = 0.02
    attacks.zero_grads([param])
    torch.compile(optimizer.step, backend="eager")()
    taken = (1 - param.detach()[0, 0] / 2.0).item()
    assert taken == pytest.approx(SHARES[shape](WD, 0.02, LR0), rel=1e-12)
    torch._dynamo.reset()


@each_name
@each_form
@each_rate
def test_share_survives_copies_and_checkpoints(name, shape, rate):
    """The rate of the beginning comes along, at whatever rate one goes on."""
    param, optimizer = built(name, shape)
    attacks.zero_grads([param])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    other, fresh = built(name, shape, lr=rate)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    [twin], copied = copy.deepcopy(([param], optimizer))
    for own, each in ((other, fresh), (twin, copied), (param, optimizer)):
        with torch.no_grad():
            own.fill_(2.0)
        expected = SHARES[shape](WD, rate, LR0)
        assert share(own, each) == pytest.approx(expected, rel=1e-12)


@each_name
@each_form
def test_form_is_the_same_in_every_way_of_stating_it(name, shape):
    taken = set()
    for policy in (
        form(shape),
        f"form({shape!r})",
        lambda info: Decay(1, shape),
        policies.parse(repr(form(shape))),
    ):
        param = nn.Parameter(torch.full((2, 3), 2.0, dtype=torch.float64))
        optimizer = make(name, [("p", param)], policy, lr=LR0)
        optimizer.param_groups[0]["lr"] = 0.02
        taken.add(share(param, optimizer))
    assert len(taken) == 1


@each_name
@pytest.mark.parametrize("shape", SHARES)
@pytest.mark.parametrize("target", [-1.0, 3.0])
def test_target_changes_the_distance_and_not_the_share(name, shape, target):
    param = nn.Parameter(torch.full((2, 3), 2.0, dtype=torch.float64))
    policy = form(shape) * towards(target)
    optimizer = make(name, [("p", param)], policy, lr=LR0)
    optimizer.param_groups[0]["lr"] = 0.02
    attacks.zero_grads([param])
    optimizer.step()
    expected = 2.0 - SHARES[shape](WD, 0.02, LR0) * (2.0 - target)
    assert param[0, 0].item() == pytest.approx(expected, rel=1e-12)


@each_name
@pytest.mark.parametrize("shape", SHARES)
def test_parameters_of_every_form_step_beside_each_other(name, shape):
    """One optimizer, one parameter of each form, and an exempt one."""
    params = {
        own: nn.Parameter(torch.full((2, 3), 2.0, dtype=torch.float64))
        for own in (*SHARES, "exempt")
    }
    policy = exclude("exempt")
    for own in SHARES:
        policy = policy * form(own, own)
    optimizer = make(name, list(params.items()), policy, lr=LR0)
    optimizer.param_groups[0]["lr"] = 0.05
    attacks.zero_grads([*params.values()])
    optimizer.step()
    left = {own: (1 - p.detach()[0, 0] / 2.0).item() for own, p in params.items()}
    assert left["exempt"] == 0.0
    assert left[shape] == pytest.approx(SHARES[shape](WD, 0.05, LR0), rel=1e-12)
