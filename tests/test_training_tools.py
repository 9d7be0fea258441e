"""What stands around an optimizer: averages, accumulation, clipping, scaling."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import selective_optim
from tests.support.compare import assert_same
from tests.support.framework_cases import (
    batches,
    hand_split,
    snapshot,
    unmoved,
)

CASES = {
    "SGD": {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
}
names = pytest.mark.parametrize("name", CASES)
DATA = batches(6, 8, 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def pair(name: str) -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """Return a network with our optimizer of one group, and one with torch's of two."""
    ours, torchs = network(), network()
    one = getattr(selective_optim, name)(
        ours.parameters(), wd_policy="no_bias_norm", **CASES[name]
    )
    two = getattr(torch.optim, name)(hand_split(torchs), fused=True, **CASES[name])
    return (ours, one), (torchs, two)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def train(model: nn.Module, optimizer: Any) -> None:
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def accumulate(model: nn.Module, optimizer: Any) -> None:
    for index, batch in enumerate(DATA):
        (loss_of(model, batch) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=index > 2)


def clip_norm(model: nn.Module, optimizer: Any) -> None:
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()


def clip_value(model: nn.Module, optimizer: Any) -> None:
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.001)
        optimizer.step()


def with_closures(model: nn.Module, optimizer: Any) -> None:
    for batch in DATA:

        def closure(batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert loss.requires_grad


def with_hooks(model: nn.Module, optimizer: Any) -> None:
    """Double the gradients before a step, and round the weights after it."""

    def double(opt: Any, *_: Any) -> None:
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad.mul_(2)

    def round_off(opt: Any, *_: Any) -> None:
        with torch.no_grad():
            for group in opt.param_groups:
                for param in group["params"]:
                    param.copy_(param.bfloat16())

    handles = [
        optimizer.register_step_pre_hook(double),
        optimizer.register_step_post_hook(round_off),
    ]
    train(model, optimizer)
    for handle in handles:
        handle.remove()
    train(model, optimizer)


def scaled(model: nn.Module, optimizer: Any) -> None:
    """Train under a scaler that grows, is unscaled by hand, and skips a step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    for index, batch in enumerate(DATA):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if index == 3:
            next(model.parameters()).grad.fill_(float("inf"))
        if index % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()


def averaged(model: nn.Module, optimizer: Any) -> None:
    """Train at the rate of SWA, and leave the average in the model."""
    average = AveragedModel(model)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=3)
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    update_bn([inputs for inputs, _ in DATA], average)
    model.load_state_dict(average.module.state_dict())


def moving_average(model: nn.Module, optimizer: Any) -> None:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for batch in DATA:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())


def swapped_in_and_out(model: nn.Module, optimizer: Any) -> None:
    """Put other values into the parameters in the middle of training and back."""
    train(model, optimizer)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    model.load_state_dict(kept)
    train(model, optimizer)


LOOPS = [
    train,
    accumulate,
    clip_norm,
    clip_value,
    with_closures,
    with_hooks,
    scaled,
    averaged,
    moving_average,
    swapped_in_and_out,
]


@pytest.mark.parametrize("loop", LOOPS, ids=[loop.__name__ for loop in LOOPS])
@names
def test_one_group_in_a_training_loop_has_the_bits_of_two(name, loop):
    (ours, one), (torchs, two) = pair(name)
    loop(ours, one)
    loop(torchs, two)
    assert_same(ours, torchs)


@names
def test_step_that_the_scaler_skips_decays_nothing(name):
    (model, optimizer), _ = pair(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)
    scaler.scale(loss_of(model, DATA[0])).backward()
    next(model.parameters()).grad.fill_(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert unmoved(before, model) == set(before)
    assert scaler.get_scale() == 2.0


@names
def test_accumulating_step_leaves_parameters_without_a_gradient_alone(name):
    (model, optimizer), _ = pair(name)
    before = snapshot(model)
    loss_of(model, DATA[0]).backward()
    for param in model[2].parameters():
        param.grad = None
    optimizer.step()
    assert {"2.weight", "2.bias"} <= unmoved(before, model)
    assert "0.weight" not in unmoved(before, model)


@names
def test_average_of_a_copy_has_no_share_in_the_optimizer(name):
    (model, optimizer), _ = pair(name)
    average = AveragedModel(model)
    before = snapshot(average.module)
    train(model, optimizer)
    assert unmoved(before, average.module) == set(before)
