"""A kept plan notices everything that makes it stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from selective_optim import Decay, _torch
from selective_optim.fused.plan import Plan
from tests.support.compare import assert_same
from tests.support.devices import MARKS
from tests.support.problems import (
    CASES,
    HYPER,
    HandSplit,
    assert_same_training,
    assert_trains_alike,
    clone_params,
    each_chosen,
    each_kind,
    explicit,
    make_params,
    ours,
    set_grads,
    train,
)

VERDICTS = [Decay(m) for m in (1, 0, 0.5, 1, 1, 0, 1, 1)]
EACH = [case for case in CASES if case.id in ("momentum", "adam-amsgrad", "adamw")]


class Pair:
    """Ours and hand-split torch over like parameters, stepped together."""

    def __init__(self, case: Any, lrs: Any = None, make: Any = make_params) -> None:
        self.actual, self.expected = make(), make()
        lrs = lrs and lrs[: len(self.actual)]
        self.ours = ours(case, self.actual, VERDICTS, lrs, **HYPER)
        # One optimizer per parameter: torch's fused SGD cannot start some parameters
        # of a group later than others.
        self.oracles = [
            HandSplit(case, [param], [verdict], lrs and [lr], **HYPER, fused=True)
            for param, verdict, lr in zip(self.expected, VERDICTS, lrs or [0] * 8)
        ]
        self.torch = [oracle.optimizers[0] for oracle in self.oracles]
        self.steps = 0

    def step(self, absent: tuple[int, ...] = ()) -> None:
        for params in (self.actual, self.expected):
            set_grads(params, self.steps)
            for position in absent:
                params[position].grad = None
        self.ours.step()
        for optimizer in self.torch:
            optimizer.step()
        self.steps += 1

    def each(self, change: Callable[[list[nn.Parameter], Any], None]) -> None:
        """Make the same change to both sides."""
        change(self.actual, self.ours.state)
        for optimizer in self.torch:
            change(self.expected, optimizer.state)

    def check(self) -> None:
        for p, q, oracle in zip(self.actual, self.expected, self.oracles, strict=True):
            assert_same_training([p], self.ours, [q], oracle)


def gradients_vanish(pair: Pair) -> None:
    pair.step(absent=(0, 1))


def gradients_vanish_and_return(pair: Pair) -> None:
    pair.step(absent=(0,))
    pair.step()
    pair.step(absent=(1, 4))


def state_entry_is_replaced(pair: Pair) -> None:
    def change(params, state):
        for own in state.values():
            for name, value in own.items():
                own[name] = value.clone()

    pair.each(change)


def step_counter_is_replaced(pair: Pair) -> None:
    def change(params, state):
        for own in state.values():
            if "step" in own:
                own["step"] = torch.tensor(40.0)

    pair.each(change)


def state_entry_is_edited_in_place(pair: Pair) -> None:
    def change(params, state):
        for own in state.values():
            for value in own.values():
                value.mul_(2)

    pair.each(change)


def state_of_one_is_cleared(pair: Pair) -> None:
    pair.ours.state[pair.actual[0]].clear()
    pair.torch[0].state[pair.expected[0]].clear()


def all_state_is_cleared(pair: Pair) -> None:
    pair.each(lambda params, state: state.clear())


def state_is_replaced_by_a_copy(pair: Pair) -> None:
    copied = {
        p: {k: v.clone() for k, v in s.items()} for p, s in pair.ours.state.items()
    }
    pair.ours.state.clear()
    pair.ours.state.update(copied)


def states_change_places(pair: Pair) -> None:
    a, b = pair.actual[0], pair.actual[4]
    state = pair.ours.state
    state[a], state[b] = dict(state[a]), dict(state[b])


def values_are_swapped(pair: Pair) -> None:
    for params in (pair.actual, pair.expected):
        params[0].data = params[0].data.clone().mul_(3)


def gradient_flag_is_flipped(pair: Pair) -> None:
    for params in (pair.actual, pair.expected):
        params[1].requires_grad_(False)


def learning_rate_changes(pair: Pair) -> None:
    for groups in all_groups(pair):
        for group in groups:
            group["lr"] *= 0.5


def weight_decay_changes(pair: Pair) -> None:
    for groups in all_groups(pair):
        for group in groups:
            group["weight_decay"] *= 3


def state_dict_is_loaded(pair: Pair) -> None:
    pair.ours.load_state_dict(copy.deepcopy(pair.ours.state_dict()))


def state_dict_of_an_earlier_step_is_loaded(pair: Pair) -> None:
    saved = [copy.deepcopy(o.state_dict()) for o in (pair.ours, *pair.torch)]
    pair.step()
    for optimizer, state_dict in zip((pair.ours, *pair.torch), saved):
        optimizer.load_state_dict(state_dict)


def copy_takes_over(pair: Pair) -> None:
    pair.ours, pair.actual = copy.deepcopy((pair.ours, pair.actual))


def unpickled_takes_over(pair: Pair) -> None:
    pair.ours, pair.actual = pickle.loads(pickle.dumps((pair.ours, pair.actual)))


def step_is_wrapped(pair: Pair) -> None:
    inner = pair.ours.step
    pair.ours.step = lambda *args: inner(*args)


def parameters_are_replaced(pair: Pair) -> None:
    """As a framework that shards does: new tensors in the same order, state moved."""
    fresh = [nn.Parameter(p.detach().clone()) for p in pair.actual]
    for group in pair.ours.param_groups:
        group["params"] = [
            next(f for p, f in zip(pair.actual, fresh) if p is old)
            for old in group["params"]
        ]
    for old, new in zip(pair.actual, fresh):
        if old in pair.ours.state:
            pair.ours.state[new] = pair.ours.state.pop(old)
    pair.actual = fresh


def parameter_is_replaced_and_begins_anew(pair: Pair) -> None:
    """As by hand: the old one keeps its state, and nobody gives it a gradient."""
    for params, optimizer in ((pair.actual, pair.ours), (pair.expected, pair.torch[0])):
        params[0].grad = None
        params[0] = nn.Parameter(params[0].detach().clone())
        optimizer.param_groups[0]["params"][0] = params[0]


def parameters_change_places(pair: Pair) -> None:
    for group in pair.ours.param_groups:
        group["params"].reverse()


def all_groups(pair: Pair) -> list[list[dict[str, Any]]]:
    return [o.param_groups for o in (pair.ours, *pair.torch)]


EVENTS = [
    gradients_vanish,
    gradients_vanish_and_return,
    state_entry_is_replaced,
    step_counter_is_replaced,
    state_entry_is_edited_in_place,
    state_of_one_is_cleared,
    all_state_is_cleared,
    state_is_replaced_by_a_copy,
    states_change_places,
    values_are_swapped,
    gradient_flag_is_flipped,
    learning_rate_changes,
    weight_decay_changes,
    state_dict_is_loaded,
    state_dict_of_an_earlier_step_is_loaded,
    copy_takes_over,
    unpickled_takes_over,
    step_is_wrapped,
    parameters_are_replaced,
    parameter_is_replaced_and_begins_anew,
    parameters_change_places,
]


def make_arrays() -> list[nn.Parameter]:
    """Make parameters that all step, and none of one element.

    All are in the state then, and lists of them are compared as they are.
    """
    params = make_params()[:6]
    params[2] = nn.Parameter(torch.ones(2))
    return params


@pytest.mark.parametrize(
    "lrs", [None, [0.05] * 8, [0.01 * i for i in range(8)]], ids=str
)
@pytest.mark.parametrize("make", [make_params, make_arrays])
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("case", EACH, ids=lambda case: case.id)
def test_step_is_right_after(case, event, make, lrs):
    pair = Pair(case, lrs, make)
    for _ in range(3):  # planned, proved, replayed
        pair.step()
    event(pair)
    for _ in range(3):
        pair.step()
    pair.check()


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.id)
def test_merged_groups_part_when_one_changes(case):
    pair = Pair(case, [0.05] * 8)
    for _ in range(3):
        pair.step()
    pair.ours.param_groups[4]["lr"] = 0.5
    pair.torch[4].param_groups[0]["lr"] = 0.5
    for _ in range(3):
        pair.step()
    pair.check()


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.id)
def test_added_group_steps_with_its_own_decay(case):
    pair = Pair(case)
    pair.step()
    pair.step()
    extra = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    group = {"params": [("extra", extra[0])], "lr": 0.2, "wd_policy": None}
    pair.ours.add_param_group(group)
    oracle = HandSplit(
        case, [extra[1]], [Decay()], lr=0.2, weight_decay=0.1, fused=True
    )
    pair.oracles.append(oracle)
    pair.torch.append(oracle.optimizers[0])
    pair.actual.append(extra[0])
    pair.expected.append(extra[1])
    for _ in range(3):
        pair.step()
    pair.check()


@pytest.mark.parametrize(
    "target",
    [
        pytest.param({"dtype": torch.float64}, id="to-float64"),
        pytest.param({"device": "cuda"}, marks=MARKS["cuda"], id="to-cuda"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 3])
@each_kind
@each_chosen
def test_moved_module_takes_its_state_along(case, kind, steps_before, target):
    module = nn.ParameterList(make_params())
    params = [*module]
    optimizer = ours(case, params, VERDICTS, **HYPER, **kind)
    train(optimizer, params, range(steps_before))
    module.to(**target)
    assert [*module] == params
    twins = clone_params(params)
    oracle = HandSplit(case, twins, VERDICTS, **HYPER, **explicit(kind))
    fused = explicit(kind).get("fused")
    for param, twin in zip(params, twins):
        own = dict(optimizer.state.get(param, {}))
        for key, value in own.items():
            # Counters keep their dtype, and wait on the CPU unless a fused kernel
            # reads them.
            counter = {"device": target.get("device", "cpu") if fused else "cpu"}
            own[key] = value.to(**{"step": counter}.get(key, target), copy=True)
        oracle.adopt(twin, own)
    # Not step three, where one has no gradient: torch's fused SGD starts all at once.
    assert_trains_alike(params, optimizer, twins, oracle, range(4, 7))


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.id)
def test_memory_format_change_is_stepped_element_by_element(case):
    actual, expected = make_params(), make_params()
    optimizer = ours(case, actual, VERDICTS, **HYPER)
    kind = {"fused": False, "foreach": False}
    oracle = HandSplit(case, expected, VERDICTS, **HYPER, **kind)
    for step in range(6):
        for params in (actual, expected):
            if step == 3:  # the moments keep the strides of channels_last
                params[5].data = params[5].data.contiguous()
            set_grads(params, step)
        optimizer.step()
        oracle.step()
    # Fused and for-loop round differently in the last bits of float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_sparse_gradient_after_a_dense_one_is_refused_before_anything_moves():
    weight, other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(2))
    optimizer = ours(CASES[0], [other, weight], [Decay()] * 2, **HYPER)
    train(optimizer, [other, weight], range(3))
    before = [other.detach().clone(), weight.detach().clone()]
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(
        RuntimeError, match=r"'p1' has a sparse gradient and decays.*Exempt it"
    ):
        optimizer.step()
    assert_same([other, weight], before)


def test_nan_hyperparameter_is_refused_before_anything_moves():
    params = make_params()
    optimizer = ours(CASES[-1], params, VERDICTS, **HYPER)
    train(optimizer, params, range(3))
    before = copy.deepcopy([p.detach() for p in params])
    for name in ("lr", "weight_decay"):
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = float("nan")
        set_grads(params, 3)
        with pytest.raises(ValueError, match=rf"`{name}` of group 0 is nan"):
            optimizer.step()
        assert_same(params, before)
        optimizer.param_groups[0][name] = good
    optimizer.step()


def test_gradients_are_not_kept_alive_between_steps():
    params = make_params()
    optimizer = ours(CASES[-1], params, VERDICTS, **HYPER)
    train(optimizer, params, range(3))
    gone = weakref.ref(params[0].grad)
    for param in params:
        param.grad = None
    assert gone() is None


def test_state_is_not_searched_for_edits_until_someone_has_looked():
    params = make_params()
    optimizer = ours(CASES[-1], params, VERDICTS, **HYPER)
    train(optimizer, params, range(3))
    optimizer.decay_report()
    assert not optimizer._stepper.exposed
    assert optimizer.state
    assert optimizer._stepper.exposed


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.id)
def test_hyperparameters_that_stay_are_not_read_anew_at_every_step(case, monkeypatch):
    params = make_arrays()
    optimizer = ours(case, params, VERDICTS, **HYPER)
    train(optimizer, params, range(3))
    monkeypatch.delattr(Plan, "_reread")
    train(optimizer, params, range(3, 5))


def test_parameter_that_never_stepped_is_not_kept_alive():
    params = make_arrays()
    optimizer = ours(CASES[-1], params, VERDICTS, **HYPER)
    for step in range(3):
        set_grads(params[:-1], step)
        optimizer.step()
    gone = weakref.ref(params[-1])
    del optimizer.param_groups[0]["params"][-1], params[-1]
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("steps", [0, 3])
def test_counters_that_fail_to_advance_stand_as_before(steps, monkeypatch):
    params = make_arrays()
    optimizer = ours(CASES[-1], params, VERDICTS, **HYPER)
    train(optimizer, params, range(steps))
    before = [param.detach().clone() for param in params]
    add_ = torch.Tensor.add_

    def fails(*args: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(_torch, "adding", lambda *_: fails)
        patch.setattr(torch.Tensor, "add_", fails)
        optimizer._stepper.forget()
        with pytest.raises(torch.OutOfMemoryError):
            train(optimizer, params, [steps])
    assert torch.Tensor.add_ is add_
    assert_same(params, before)
    stepped = {own["step"].item() for own in optimizer.state.values()}
    assert stepped == {float(steps)}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("failing", range(4))
def test_call_that_fails_leaves_the_counters_of_its_parameters(
    failing, steps, monkeypatch
):
    """As where a device has no memory: one call for each of four decays."""
    calls = count(-4 * steps)
    kernel = torch._fused_adamw_

    def fails_once(*args: Any, **kwargs: Any) -> None:
        if next(calls) == failing:
            raise torch.OutOfMemoryError
        kernel(*args, **kwargs)

    monkeypatch.setattr(_torch, "fused_adamw_", fails_once)
    params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    verdicts = [Decay(m) for m in (0, 1, 2, 3)]
    optimizer = ours(CASES[-3], params, verdicts, **HYPER)
    train(optimizer, params, range(steps))
    with pytest.raises(torch.OutOfMemoryError):
        train(optimizer, params, [steps])
    stepped = [optimizer.state[param]["step"].item() - steps for param in params]
    assert stepped == [1.0] * failing + [0.0] * (4 - failing)
