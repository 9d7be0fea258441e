"""Whatever happens inside a step, nothing stays half-entered.

The groups are the user's at every moment at which somebody else looks, and the next
step decides as before.
"""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from selective_optim import selective
from tests.support import attacks
from tests.support.attacks import (
    LR,
    RIGHT,
    SERVED,
    WD,
    Lines,
    Own,
    assert_right,
    assert_whole,
    built,
    make,
    net,
)
from tests.support.compare import assert_same

each_name = pytest.mark.parametrize("name", SERVED)
SOME = ["SGD", "AdamW", "NAdam", "Own"]  # where every line is tried


def undo(optimizer, groups):
    """Take back what a closure did to the groups, as a user would who reads the error.

    Groups and their lists stay the objects that they are.
    """
    del optimizer.param_groups[len(groups) :]
    for group, own in zip(optimizer.param_groups, groups):
        for key in group.keys() - own.keys():
            del group[key]
        group["params"][:] = own["params"]
        group.update({k: v for k, v in own.items() if k != "params"})


def remembered(optimizer):
    return [{**g, "params": list(g["params"])} for g in optimizer.param_groups]


# What a closure or a hook may do to spoil the step that runs it.


def appends_what_cannot_be_decided(model, optimizer):
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(4, 5)))


def appends_a_group_that_cannot_be_decided(model, optimizer):
    group = {**optimizer.param_groups[0], "params": [nn.Parameter(torch.ones(4, 5))]}
    optimizer.param_groups.append(group)


def replaces_one_by_what_cannot_be_decided(model, optimizer):
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(7, 7))


def writes_a_policy(model, optimizer):
    optimizer.param_groups[0]["wd_policy"] = "none"


def writes_a_model(model, optimizer):
    optimizer.param_groups[0]["model"] = nn.Linear(2, 2)


SPOILERS = [
    appends_what_cannot_be_decided,
    appends_a_group_that_cannot_be_decided,
    replaces_one_by_what_cannot_be_decided,
    writes_a_policy,
    writes_a_model,
]
each_spoiler = pytest.mark.parametrize("spoil", SPOILERS)


def two_steps(optimizer, closure):
    """Step twice: what is written is told in its own step, or in the next."""
    optimizer.step(closure)
    optimizer.step()


@each_name
@each_spoiler
def test_closure_that_spoils_leaves_nothing_behind(name, spoil):
    model, optimizer = built(name)
    before = remembered(optimizer)

    def closure():
        attacks.zero_grads([*model.parameters()])
        spoil(model, optimizer)

    with pytest.raises(ValueError, match=r"wd_policy|model|no_bias_norm"):
        two_steps(optimizer, closure)
    undo(optimizer, before)
    assert_right(model, optimizer)


@each_name
@each_spoiler
def test_what_was_spoiled_is_told_until_it_is_undone(name, spoil):
    model, optimizer = built(name)
    before = remembered(optimizer)
    spoil(model, optimizer)
    attacks.zero_grads([*model.parameters()])
    values = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"wd_policy|model|no_bias_norm"):
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), values))
    undo(optimizer, before)
    assert_right(model, optimizer)


class Broken(Exception):
    """Raised on purpose."""


def raises(*args):
    raise Broken


def interrupts(*args):
    raise KeyboardInterrupt


each_error = pytest.mark.parametrize("error", [raises, interrupts])


@each_name
@each_error
def test_closure_that_raises_leaves_nothing_behind(name, error):
    model, optimizer = built(name)
    before = attacks.seen(optimizer)
    with pytest.raises((Broken, KeyboardInterrupt)):
        optimizer.step(error)
    assert attacks.seen(optimizer) == before
    assert_right(model, optimizer)


def pre_hook(optimizer, function):
    return optimizer.register_step_pre_hook(function)


def post_hook(optimizer, function):
    return optimizer.register_step_post_hook(function)


def global_pre_hook(optimizer, function):
    return register_optimizer_step_pre_hook(function)


def global_post_hook(optimizer, function):
    return register_optimizer_step_post_hook(function)


HOOKS = [pre_hook, post_hook, global_pre_hook, global_post_hook]
each_hook = pytest.mark.parametrize("register", HOOKS)


@each_name
@each_error
@each_hook
def test_hook_that_raises_leaves_nothing_behind(name, error, register):
    model, optimizer = built(name)
    before = attacks.seen(optimizer)
    handle = register(optimizer, error)
    with pytest.raises((Broken, KeyboardInterrupt)):
        optimizer.step()
    handle.remove()
    assert attacks.seen(optimizer) == before
    assert_right(model, optimizer)


@each_name
@each_hook
@each_spoiler
def test_hook_that_spoils_leaves_nothing_behind(name, register, spoil):
    model, optimizer = built(name)
    before = remembered(optimizer)
    handle = register(optimizer, lambda *args: spoil(model, optimizer))
    with pytest.raises(ValueError, match=r"wd_policy|model|no_bias_norm"):
        two_steps(optimizer, None)
    handle.remove()
    undo(optimizer, before)
    assert_right(model, optimizer)


class Interrupting(TorchDispatchMode):
    """Raises at one operation of torch, counted from 0."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number -= 1
        if self.number == -1:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"foreach": False}])
@each_name
def test_operation_that_is_interrupted_leaves_the_groups_whole(name, kind):
    if name == "Own":
        kind = {}  # which has no choice
    for number in range(100):
        model, optimizer = built(name, **kind)
        before = attacks.seen(optimizer)
        attacks.zero_grads([*model.parameters()])
        with Interrupting(number) as mode, contextlib.suppress(KeyboardInterrupt):
            optimizer.step()
        assert attacks.seen(optimizer) == before
        assert_right(model, optimizer)
        if mode.number >= 0:
            break
    assert number


def prepared(name, fresh):
    """Make an optimizer; one that has a step behind it, or has its plan to make."""
    model = net()
    optimizer = make(name, model)
    if not fresh:
        assert_right(model, optimizer)
    attacks.zero_grads([*model.parameters()])
    return model, optimizer


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_interrupt_at_any_line_of_a_step_is_over_with_the_next_step(name, fresh):
    """Between two lines there is no place from which nothing can be left behind."""
    number, interrupted = 0, True
    while interrupted:
        model, optimizer = prepared(name, fresh)
        interrupted = Lines(number).run(optimizer.step)
        assert_right(model, optimizer)
        number += 1
    assert number > 1


@pytest.mark.parametrize("save", ["state_dict", "__getstate__", "decay_report"])
@pytest.mark.parametrize("name", SOME)
def test_interrupt_at_any_line_of_saving_is_over_with_the_next_step(name, save):
    number, interrupted = 0, True
    while interrupted:
        model, optimizer = prepared(name, fresh=False)
        interrupted = Lines(number).run(getattr(optimizer, save))
        assert_right(model, optimizer)
        number += 1
    assert number > 1


# What a closure and hooks see, and may rightly do.


def looks(model, optimizer):
    assert_whole(optimizer)
    assert len(optimizer.state_dict()["param_groups"]) == 1
    assert attacks.reported(optimizer) == RIGHT


def copies(model, optimizer):
    twin, copied = copy.deepcopy((model, optimizer))
    assert_right(twin, copied)


def pickles(model, optimizer):
    twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    assert_whole(copied)
    assert attacks.decays(twin, copied) == RIGHT


def saves_and_loads(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def reorders(model, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def assigns_the_policy_again(model, optimizer):
    optimizer.wd_policy = "all"
    optimizer.wd_policy = "no_bias_norm"


def steps_within(model, optimizer):
    optimizer.step()


ACTS = [
    looks,
    copies,
    saves_and_loads,
    reorders,
    assigns_the_policy_again,
    steps_within,
]


@each_name
@pytest.mark.parametrize("act", ACTS)
def test_closure_finds_and_leaves_the_groups_whole(name, act):
    model, optimizer = built(name)
    params = [*model.parameters()]
    acted = lambda: (attacks.zero_grads(params), act(model, optimizer))  # noqa: E731
    assert attacks.moved(lambda: optimizer.step(acted), params) == [*RIGHT.values()]
    assert_right(model, optimizer)


@each_name
@each_hook
@pytest.mark.parametrize("act", ACTS[:-1])
def test_hooks_find_and_leave_the_groups_whole(name, register, act):
    model, optimizer = built(name)
    run = []

    def hook(ran, *args):
        if ran is optimizer:  # and not a copy, by a hook that copies
            run.append(1)
            if len(run) == 1:
                act(model, optimizer)

    handle = register(optimizer, hook)
    attacks.moved(optimizer.step, [*model.parameters()])
    handle.remove()
    assert len(run) == 1
    assert_right(model, optimizer)


# torch evaluates a closure before it reads its groups; so what it writes is in force.
@pytest.mark.parametrize(
    ("key", "value"), [("lr", 2 * LR), ("weight_decay", 0.0), ("lr", 0.0)]
)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam"])
def test_closure_may_write_numbers_as_in_torch(name, key, value):
    left = []
    for cls in (SERVED[name], getattr(torch.optim, name)):
        param = nn.Parameter(torch.ones(3, 2))
        own = {"wd_policy": "all"} if cls is SERVED[name] else {}
        optimizer = cls(
            [param], lr=LR, weight_decay=WD, foreach=False, **own,
            **attacks.DECOUPLED.get(name, {}),
        )  # fmt: skip

        def closure(param=param, optimizer=optimizer):
            param.grad = torch.ones_like(param)
            optimizer.param_groups[0][key] = value

        for _ in range(3):
            optimizer.step(closure)
        left.append(param)
    assert_same(*left)


def test_closure_that_adds_a_group_has_it_stepped_as_in_torch():
    """torch's for-loop goes over the groups after it has called the closure."""
    for name in SERVED:
        model, optimizer = built(name)
        extra = nn.Linear(3, 3)
        params = [*model.parameters(), *extra.parameters()]

        def closure(optimizer=optimizer, extra=extra, params=params):
            attacks.zero_grads(params)
            optimizer.add_param_group({"params": extra.parameters()})

        with torch.no_grad():
            extra.bias.fill_(1.0)
        acted = attacks.moved(lambda o=optimizer, c=closure: o.step(c), params)
        assert acted == [*RIGHT.values(), True, False], name
        assert attacks.moved(optimizer.step, params) == acted
        assert_whole(optimizer, groups=2)


def test_closure_that_assigns_a_policy_has_it_in_force():
    for name in SERVED:
        model, optimizer = built(name)
        params = [*model.parameters()]

        def closure(optimizer=optimizer, params=params):
            attacks.zero_grads(params)
            optimizer.wd_policy = "all"

        assert all(attacks.moved(lambda o=optimizer, c=closure: o.step(c), params))
        assert all(attacks.moved(optimizer.step, params))
        assert_whole(optimizer)


# A class that fails, or that enters once more.


class Fails(Own):
    """Raises after its first group."""

    def step(self, closure=None):
        super().step(closure)
        if self.param_groups[0].get("fails"):
            raise Broken


def test_class_that_raises_leaves_nothing_behind():
    model = net()
    optimizer = selective(Fails)(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm"
    )
    assert_right(model, optimizer)
    optimizer.param_groups[0]["fails"] = True
    with pytest.raises(Broken):
        optimizer.step()
    assert_whole(optimizer)
    optimizer.param_groups[0]["fails"] = False
    assert_right(model, optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam"])
def test_gradient_that_no_kernel_takes_leaves_nothing_behind(name):
    model, optimizer = built(name)
    model.last.weight.grad = torch.zeros(2, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_whole(optimizer)
    assert_right(model, optimizer)


class Within(Own):
    """Lets itself be stepped by what it calls: a profiler, a debugger, a wrapper."""

    inner = None

    def step(self, closure=None):
        inner, self.inner = self.inner, None
        if inner is not None:
            inner()
        return super().step(closure)


def test_step_within_a_step_leaves_the_groups_whole():
    model = net()
    optimizer = selective(Within)(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm"
    )
    params = [*model.parameters()]
    for error in (lambda: None, raises):

        def inner(error=error):
            optimizer.step()
            error()

        optimizer.inner = inner
        attacks.zero_grads(params)
        with contextlib.suppress(Broken):
            optimizer.step()
        assert_right(model, optimizer)
