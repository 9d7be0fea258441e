"""Decay towards ``"init"`` pulls to what parameters were when training began.

That is the first step in which the rate of their group is not 0. Until then a model
may be loaded, broadcast or initialized; a checkpoint of the optimizer knows better.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils import swap_tensors

from selective_optim.policies import exclude, is_bias, is_norm, towards
from tests.support import attacks
from tests.support.attacks import LR, OURS, RIGHT, SERVED, WD, make, net
from tests.support.distributed import Ranks

USUAL = exclude(is_bias, is_norm)
PULL = USUAL * towards("init")
FLAGGED = [name for name in SERVED if name != "Own"]
each_name = pytest.mark.parametrize("name", FLAGGED)
each_of_ours = pytest.mark.parametrize("name", OURS)
PULLED = [name for name, decays in RIGHT.items() if decays]


def step(model, optimizer):
    """Step with gradients of 0, and with moments that are 0."""
    optimizer.state.clear()
    attacks.zero_grads([*model.parameters()])
    optimizer.step()


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def require_pull_to(start, model, optimizer, lr=LR):
    """Move all to 7.0, step, and see where that leads."""
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    step(model, optimizer)
    for name, param in model.named_parameters():
        expected = torch.full_like(param, 7.0)
        if name in PULLED:
            expected = 7.0 - lr * WD * (7.0 - start[name])
        torch.testing.assert_close(param.detach(), expected.detach())


# How weights come in after the optimizer was made.


def other():
    """Make a model of other values."""
    made = net()
    with torch.no_grad():
        for param in made.parameters():
            param.mul_(0.5).add_(0.25)
    return made


def loaded(model):
    model.load_state_dict(other().state_dict())


def copied_into(model):
    with torch.no_grad():
        for param, own in zip(model.parameters(), other().parameters()):
            param.copy_(own)


def data_replaced(model):
    for param, own in zip(model.parameters(), other().parameters()):
        param.data = own.data


def initialized(model):
    torch.manual_seed(3)
    for layer in (model.first, model.last):
        layer.reset_parameters()


def from_a_vector(model):
    vector_to_parameters(parameters_to_vector(other().parameters()), model.parameters())


def swapped(model):
    for param, own in zip(model.parameters(), other().parameters()):
        swap_tensors(param, own)


def filled(model):
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.125)


CHANGES = [
    loaded,
    copied_into,
    data_replaced,
    initialized,
    from_a_vector,
    swapped,
    filled,
]
each_change = pytest.mark.parametrize("change", CHANGES)


@each_name
@each_change
@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"foreach": False}])
def test_weights_that_come_before_the_first_step_are_the_start(name, change, kind):
    model = net()
    optimizer = make(name, model, PULL, **kind)
    change(model)
    start = values(model)
    step(model, optimizer)
    assert all(map(torch.equal, values(model).values(), start.values()))
    require_pull_to(start, model, optimizer)


@each_name
def test_weights_that_a_closure_or_hook_brings_are_the_start(name):
    model = net()
    optimizer = make(name, model, PULL)
    handle = optimizer.register_step_pre_hook(lambda *args: filled(model))
    step(model, optimizer)
    handle.remove()
    start = {n: torch.full_like(p, 0.125) for n, p in model.named_parameters()}
    require_pull_to(start, model, optimizer)


@each_name
def test_what_comes_after_the_first_step_is_no_start(name):
    model = net()
    optimizer = make(name, model, PULL)
    start = values(model)
    step(model, optimizer)
    loaded(model)
    require_pull_to(start, model, optimizer)
    require_pull_to(start, model, optimizer)


@each_name
def test_parameter_without_a_gradient_begins_with_its_group(name):
    model = net()
    optimizer = make(name, model, PULL)
    start = values(model)
    attacks.zero_grads([*model.parameters()])
    model.last.weight.grad = None
    optimizer.step()
    require_pull_to(start, model, optimizer)


# Steps that can move nothing do not begin training.


def make_state(optimizer):
    """As torch.distributed.checkpoint's and torchtitan's making of state."""
    rates = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
        rates.append(group["lr"])
        tensor = isinstance(group["lr"], torch.Tensor)
        group["lr"] = torch.tensor(0.0) if tensor else 0.0
    optimizer.step(closure=None)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


@each_name
@each_change
def test_step_at_rate_0_does_not_begin_training(name, change):
    model = net()
    optimizer = make(name, model, PULL)
    make_state(optimizer)
    change(model)
    start = values(model)
    step(model, optimizer)
    require_pull_to(start, model, optimizer)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_step_at_a_rate_0_that_is_a_tensor_does_not_begin_training(name):
    model = net()
    rate = torch.tensor(LR)
    optimizer = make(name, model, PULL, lr=rate, foreach=False, fused=False)
    make_state(optimizer)
    loaded(model)
    start = values(model)
    step(model, optimizer)
    require_pull_to(start, model, optimizer)


@each_name
def test_each_group_begins_with_its_own_rate(name):
    model = net()
    groups = [
        {"params": model.first.parameters(), "lr": 0.0},
        {"params": [*model.norm.parameters(), *model.last.parameters()]},
    ]
    optimizer = make(name, groups, PULL, model=model)
    begun = values(model)
    step(model, optimizer)
    loaded(model)
    start = values(model)
    optimizer.param_groups[0]["lr"] = LR
    step(model, optimizer)
    start["last.weight"] = begun["last.weight"]
    require_pull_to(start, model, optimizer)


@each_name
def test_warm_up_from_0_begins_with_its_second_step(name):
    model = net()
    optimizer = make(name, model, PULL)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda number: min(number / 2, 1)
    )
    step(model, optimizer)
    scheduler.step()
    filled(model)
    start = values(model)
    step(model, optimizer)
    scheduler.step()
    require_pull_to(start, model, optimizer)


# What comes later, and what is copied.


@each_name
def test_group_that_is_added_begins_by_itself(name):
    model, extra = net(), nn.Linear(3, 3)
    optimizer = make(name, model, PULL)
    start = values(model)
    step(model, optimizer)
    optimizer.add_param_group({"params": extra.parameters()})
    with torch.no_grad():
        extra.weight.fill_(0.5)
    attacks.zero_grads([*extra.parameters()])
    step(model, optimizer)
    assert extra.weight.eq(0.5).all()
    with torch.no_grad():
        extra.weight.fill_(7.0)
    require_pull_to(start, model, optimizer)
    expected = torch.full((3, 3), 7.0 - LR * WD * 6.5)
    torch.testing.assert_close(extra.weight.detach(), expected)


@each_name
def test_policy_that_is_assigned_begins_with_the_next_step(name):
    model = net()
    optimizer = make(name, model, USUAL)
    step(model, optimizer)
    optimizer.wd_policy = PULL
    filled(model)
    start = values(model)
    step(model, optimizer)
    require_pull_to(start, model, optimizer)


def pickled(things):
    return pickle.loads(pickle.dumps(things))


@each_name
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copy_that_was_made_before_training_begins_by_itself(name, copied):
    model = net()
    twin, optimizer = copied((model, make(name, model, PULL)))
    filled(twin)
    start = values(twin)
    step(twin, optimizer)
    require_pull_to(start, twin, optimizer)


@each_name
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copy_that_was_made_later_keeps_the_start(name, copied):
    model = net()
    optimizer = make(name, model, PULL)
    start = values(model)
    step(model, optimizer)
    twin, other_one = copied((model, optimizer))
    loaded(twin)
    require_pull_to(start, twin, other_one)


# Checkpoints of the optimizer.


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def saved(name, begun=True):
    """Save an optimizer, and return what it pulls to, and the state dict."""
    model = net()
    optimizer = make(name, model, PULL)
    if begun:
        step(model, optimizer)
    return values(model), through_file(optimizer.state_dict())


@each_name
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dummy", [True, False])
def test_record_of_a_checkpoint_wins(name, first, dummy):
    """Whether the weights come before the checkpoint or after it."""
    start, state_dict = saved(name)
    model = net()
    optimizer = make(name, model, PULL)
    if dummy:
        make_state(optimizer)
    if first:
        loaded(model)
    optimizer.load_state_dict(state_dict)
    if not first:
        loaded(model)
    require_pull_to(start, model, optimizer)
    require_pull_to(start, model, optimizer)


@each_name
def test_record_wins_over_a_start_that_was_taken(name):
    start, state_dict = saved(name)
    model = other()
    optimizer = make(name, model, PULL)
    step(model, optimizer)
    optimizer.load_state_dict(state_dict)
    require_pull_to(start, model, optimizer)


@each_name
def test_checkpoint_from_before_training_leaves_the_start_to_come(name):
    """Nothing is lost by it, and nothing told."""
    _, state_dict = saved(name, begun=False)
    model = net()
    optimizer = make(name, model, PULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state_dict)
    loaded(model)
    start = values(model)
    step(model, optimizer)
    require_pull_to(start, model, optimizer)


@each_name
def test_checkpoint_of_another_policy_is_told_to_have_no_start(name):
    model = net()
    plain = make(name, model, USUAL)
    step(model, plain)
    optimizer = make(name, net(), PULL)
    state_dict = through_file(plain.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(state_dict)
    assert any("first.weight" in str(w.message) for w in told)


# Compiled steps, and ranks.


@each_of_ours
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_step_begins_training_as_well(name):
    torch._dynamo.reset()
    model = net()
    optimizer = make(name, model, PULL, foreach=False, fused=False)
    loaded(model)
    start = values(model)
    run = torch.compile(optimizer.step, backend="eager")
    attacks.zero_grads([*model.parameters()])
    run()
    assert all(map(torch.equal, values(model).values(), start.values()))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7.0)
    run()
    for pulled in PULLED:
        expected = 7.0 - LR * WD * (7.0 - start[pulled])
        param = dict(model.named_parameters())[pulled]
        torch.testing.assert_close(param.detach(), expected)
    torch._dynamo.reset()


def train(rank, name, before):
    """Train two steps from weights that differ until the wrapper broadcasts them."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    if before:
        optimizer = make(name, model, PULL)
    model = DistributedDataParallel(model)
    if not before:
        optimizer = make(name, model, PULL)
    for number in range(3):
        torch.manual_seed(10 * number + rank)
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().tolist() for param in model.parameters()]


@pytest.mark.distributed
@each_of_ours
def test_ranks_agree_and_the_order_of_wrapping_does_not_matter(name):
    with Ranks() as ranks:
        first, second = ranks(train, name, True)
        assert first == second
        assert [first, second] == ranks(train, name, False)
