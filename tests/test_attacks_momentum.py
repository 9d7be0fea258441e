"""SGD's momentum has begun with its first gradient, whatever values it holds.

torch dampens every gradient but the first. A buffer of zeros, of either sign, has had
its first one; and a step that a scaler dropped was none.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from tests.support import attacks
from tests.support.attacks import WD, Judge
from tests.support.compare import assert_same
from tests.support.kernels import HALF_SGD_ON_CPU

KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
ARGUMENTS = {"momentum": 0.9, "dampening": 0.5}
DTYPES = [torch.float32, torch.bfloat16, torch.complex64]
SHAPES = [(4, 3), (3,)]


def served(kind, dtype):
    """Tell whether torch's implementation takes this dtype, and steps it right."""
    half = dtype == torch.bfloat16 and not HALF_SGD_ON_CPU
    return kind != "fused" or not (dtype.is_complex or half)


CASES = [(kind, dtype) for kind in KINDS for dtype in DTYPES if served(kind, dtype)]
each_case = pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)


def pair(kind, dtype, **more):
    """Make ours, whose matrices decay, and torch's with a group for each parameter."""
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = selective_optim.SGD(
        params, lr=1.0, weight_decay=WD, wd_policy="matrices",
        **{**ARGUMENTS, **KINDS[kind], **more},
    )  # fmt: skip
    chosen = KINDS[kind] or {"fused": served("fused", dtype)}
    judge = Judge(
        torch.optim.SGD, attacks.clones(params), lr=1.0,
        **{**ARGUMENTS, **chosen, **more},
    )  # fmt: skip
    judge.decay([1, 0])
    return params, optimizer, judge


def step(params, optimizer, value):
    for param in params:
        param.grad = torch.full_like(param, value)
    optimizer.step()


# What happens between two steps; what it returns goes on.


def nothing(params, optimizer):
    return params, optimizer


def loaded(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return params, optimizer


def loaded_from_a_file(params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return params, optimizer


def copied(params, optimizer):
    return copy.deepcopy((params, optimizer))


def pickled(params, optimizer):
    return pickle.loads(pickle.dumps((params, optimizer)))


def assigned(params, optimizer):
    if isinstance(optimizer, selective_optim.SGD):
        optimizer.wd_policy = "all"
        optimizer.wd_policy = "matrices"
    return params, optimizer


def state_looked_at(params, optimizer):
    assert str(optimizer.state)
    return params, optimizer


def buffers_replaced(params, optimizer):
    for own in optimizer.state.values():
        own["momentum_buffer"] = own["momentum_buffer"].clone()
    return params, optimizer


def turned_around(params, optimizer):
    for group in optimizer.param_groups:
        group["maximize"] = not group["maximize"]
    return params, optimizer


def dampened_more(params, optimizer):
    for group in optimizer.param_groups:
        group["dampening"] = 0.75
    return params, optimizer


def implementation_changed(params, optimizer):
    for group in optimizer.param_groups:
        group.update(foreach=False, fused=False)
    return params, optimizer


def groups_rebuilt(params, optimizer):
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]
    return params, optimizer


EVENTS = [
    nothing,
    loaded,
    loaded_from_a_file,
    copied,
    pickled,
    assigned,
    state_looked_at,
    buffers_replaced,
    turned_around,
    dampened_more,
    implementation_changed,
    groups_rebuilt,
]
each_event = pytest.mark.parametrize("event", EVENTS)


def each(event, params, optimizer, judge):
    """Let the same befall both sides."""
    params, optimizer = event(params, optimizer)
    judge.params, judge.optimizer = event(judge.params, judge.optimizer)
    return params, optimizer


@each_case
@each_event
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_buffer_of_zeros_has_begun(kind, dtype, event, zero):
    params, optimizer, judge = pair(kind, dtype)
    for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
        step(own, other, zero)
    params, optimizer = each(event, params, optimizer, judge)
    for value in (1.0, 1.0):
        for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
            step(own, other, value)
        judge.require(params, optimizer)


@each_case
@each_event
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_buffer_that_was_set_to_zero_by_hand_has_begun(kind, dtype, event, zero):
    params, optimizer, judge = pair(kind, dtype)
    for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
        step(own, other, 2.0)
        for state in other.state.values():
            state["momentum_buffer"].fill_(zero)
    params, optimizer = each(event, params, optimizer, judge)
    for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
        step(own, other, 1.0)
    judge.require(params, optimizer)


def test_first_dampened_step_by_hand():
    """One number: a buffer that began with -0.0 dampens the 1.0 that follows."""
    for event in EVENTS[:6]:
        param = nn.Parameter(torch.zeros(1))
        optimizer = selective_optim.SGD(
            [param], lr=1.0, weight_decay=WD, wd_policy="matrices", **ARGUMENTS
        )
        step([param], optimizer, -0.0)
        [param], optimizer = event([param], optimizer)
        step([param], optimizer, 1.0)
        assert param.item() == -0.5, event
        step([param], optimizer, 1.0)
        assert param.item() == pytest.approx(-0.5 - (0.9 * 0.5 + 0.5)), event


# What has not begun, and is not to be taken for what has.


@each_case
@each_event
def test_parameter_without_a_gradient_begins_with_its_first(kind, dtype, event):
    params, optimizer, judge = pair(kind, dtype)
    for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
        step(own[:1], other, 1.0)
    if event is not buffers_replaced:  # there is none to replace, of the second
        params, optimizer = each(event, params, optimizer, judge)
    for value in (1.0, 0.5):
        for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
            step(own, other, value)
    judge.require(params, optimizer)


@each_case
def test_buffer_that_torch_saved_as_none_has_not_begun(kind, dtype):
    """torch saves so what was stepped without momentum."""
    params, optimizer, judge = pair(kind, dtype, momentum=0.0, dampening=0.0)
    for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
        step(own, other, 1.0)
    merged = torch.optim.SGD(judge.params, lr=1.0, **ARGUMENTS).state_dict()
    merged["state"] = {i: {"momentum_buffer": None} for i in range(2)}
    merged["param_groups"][0].update(weight_decay=WD, fused=KINDS[kind].get("fused"))
    optimizer.load_state_dict(merged)
    for group in judge.optimizer.param_groups:
        group.update(ARGUMENTS)
    for value in (1.0, 0.5):
        for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
            step(own, other, value)
    judge.require(params, optimizer)


# A scaler that drops the first step.

SCALE = 1024.0  # a power of two: scaling and unscaling lose nothing
SCALED = [case for case in CASES if case[1] == torch.float32]


def scaled(params, optimizer, value, bad):
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for param in params:
        param.grad = torch.full_like(param, value * SCALE)
    if bad:
        params[0].grad[0, 0] = torch.inf
    scaler.scale(torch.ones(()))  # a scaler starts with its first scale
    scaler.step(optimizer)
    scaler.update(SCALE)


DROPPED = [e for e in EVENTS if e is not buffers_replaced]


@pytest.mark.parametrize(("kind", "dtype"), SCALED, ids=str)
@pytest.mark.parametrize("event", DROPPED)
@pytest.mark.parametrize("times", [1, 2])
def test_dropped_first_step_is_none(kind, dtype, event, times):
    """Equal to torch's that never heard of it, whatever happens after the drop."""
    params, optimizer, judge = pair(kind, dtype)
    for _ in range(times):
        scaled(params, optimizer, 1.0, bad=True)
    params, optimizer = each(event, params, optimizer, judge)
    for value in (1.0, 0.5):
        scaled(params, optimizer, value, bad=False)
        step(judge.params, judge.optimizer, value)
    judge.require(params, optimizer)


@pytest.mark.parametrize(("kind", "dtype"), SCALED, ids=str)
def test_dropped_first_step_leaves_no_buffer_for_torch_to_go_on_from(kind, dtype):
    params, optimizer, judge = pair(kind, dtype)
    scaled(params, optimizer, 1.0, bad=True)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["weight_decay"] = 0.0
    torchs = torch.optim.SGD(params, lr=1.0, **ARGUMENTS)
    torchs.load_state_dict(saved)
    judge.decay([0, 0])
    step(params, torchs, 1.0)
    step(judge.params, judge.optimizer, 1.0)
    assert_same(params, judge.params)
