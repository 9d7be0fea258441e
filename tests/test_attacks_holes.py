"""Places where split groups may show, and passes that may run twice or on the wrong.

What subclasses override, what others see meanwhile, and decay beside any class's step.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from selective_optim import selective
from selective_optim.policies import as_policy, exclude, form, is_bias, is_norm, towards
from tests.support import attacks
from tests.support.attacks import (
    DECOUPLED,
    LR,
    OURS,
    RIGHT,
    SERVED,
    WD,
    Own,
    assert_right,
    assert_whole,
    make,
    net,
)
from tests.support.compare import assert_same

each_name = pytest.mark.parametrize("name", SERVED)
each_of_ours = pytest.mark.parametrize("name", OURS)
KINDS = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
USUAL = exclude(is_bias, is_norm)


def make_of(cls, name, model, **more):
    numbers = {"lr": LR, "weight_decay": WD, **DECOUPLED.get(name, {}), **more}
    numbers = {"wd_policy": "no_bias_norm", **numbers}
    return cls(model.parameters(), **numbers)


# What subclasses override.


@each_of_ours
def test_subclass_that_adds_groups_itself_sees_those_of_the_user(name):
    seen = []

    class Watching(SERVED[name]):
        def add_param_group(self, param_group):
            super().add_param_group(param_group)
            seen.append((len(param_group["params"]), param_group["weight_decay"]))

    model = net()
    optimizer = make_of(Watching, name, model)
    assert_right(model, optimizer)
    optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
    attacks.zero_grads([*model.parameters()])
    optimizer.step()
    optimizer.state_dict()
    assert seen == [(6, WD), (2, WD)]


@each_of_ours
@each_kind
def test_subclass_that_begins_groups_itself_sees_parts(name, kind):
    """Once for each, as over groups that were split by hand."""
    seen = []

    class Watching(SERVED[name]):
        def _init_group(self, group, params, *lists):
            result = super()._init_group(group, params, *lists)
            seen.append((len(params), group["weight_decay"]))
            return result

    model = net()
    optimizer = make_of(Watching, name, model, **KINDS[kind])
    for _ in range(2):
        seen.clear()
        assert_right(model, optimizer)
        assert sorted(seen) == [(2, WD), (4, 0.0)]


@each_of_ours
@each_kind
def test_subclass_may_change_gradients_where_groups_begin(name, kind):
    """As torch's class with that method over groups split by hand, to the bit."""

    def halved(base):
        class Halved(base):
            def _init_group(self, group, params, grads, *lists):
                result = super()._init_group(group, params, grads, *lists)
                grads[:] = [grad / 2 for grad in grads]
                return result

        return Halved

    model = net()
    optimizer = make_of(halved(SERVED[name]), name, model, **KINDS[kind])
    judge = attacks.Judge(
        halved(getattr(torch.optim, name)),
        attacks.clones([*model.parameters()]),
        **(KINDS[kind] or {"fused": True}),
        **DECOUPLED.get(name, {}),
    )
    judge.decay([*RIGHT.values()])
    for step in range(3):
        for own, other in (
            ([*model.parameters()], optimizer),
            (judge.params, judge.optimizer),
        ):
            attacks.set_grads(own, step)
            other.step()
    judge.require([*model.parameters()], optimizer)


@each_of_ours
def test_other_thread_sees_the_users_groups_while_parts_begin(name):
    inside, go = threading.Event(), threading.Event()

    class Waiting(SERVED[name]):
        waits = False

        def _init_group(self, *args):
            if self.waits:
                self.waits = False
                inside.set()
                assert go.wait(20)
            return super()._init_group(*args)

    model = net()
    optimizer = make_of(Waiting, name, model, foreach=False)
    assert_right(model, optimizer)
    optimizer.waits = True
    attacks.zero_grads([*model.parameters()])
    other = threading.Thread(target=optimizer.step)
    other.start()
    assert inside.wait(20)
    try:
        assert_whole(optimizer)
        assert attacks.reported(optimizer) == RIGHT
        assert [len(g["params"]) for g in optimizer.state_dict()["param_groups"]] == [6]
    finally:
        go.set()
        other.join(20)
    assert_right(model, optimizer)


# What is computed for a part is no business of the user's.


def mixed():
    """Make parameters that one implementation cannot all take."""
    shapes = [(3, 4), (4,), (2, 3)]
    dtypes = [torch.float32, torch.float32, torch.complex64]
    return [nn.Parameter(torch.ones(s, dtype=d)) for s, d in zip(shapes, dtypes)]


@each_of_ours
def test_implementation_of_a_part_is_never_shown_nor_saved(name):
    params = mixed()
    optimizer = make(name, params, "matrices")
    shown = []

    def look(*args):
        shown.extend((g["foreach"], g["fused"]) for g in optimizer.param_groups)
        saved = optimizer.state_dict()["param_groups"]
        shown.extend((g["foreach"], g["fused"]) for g in saved)

    for register in ("register_step_pre_hook", "register_step_post_hook"):
        getattr(optimizer, register)(look)
    for step in range(3):
        attacks.set_grads(params, step)
        optimizer.step(look)
    look()
    assert len(shown) == 3 * 3 * 2 + 2
    assert set(shown) == {(None, None)}


@each_name
def test_keys_of_a_group_are_those_of_torch_at_every_moment(name):
    model = net()
    cls = getattr(torch.optim, name, Own)
    expected = set(cls(net().parameters(), lr=LR).param_groups[0])
    optimizer = make(name, model)
    found = []

    def look(*args):
        found.extend(set(group) for group in optimizer.param_groups)

    for register in ("register_step_pre_hook", "register_step_post_hook"):
        getattr(optimizer, register)(look)
    for step in range(2):
        attacks.set_grads([*model.parameters()], step)
        optimizer.step(look)
    assert all(keys == expected for keys in found)


# What leaves is freed.


@each_name
@each_kind
def test_parameter_that_leaves_is_freed(name, kind):
    kinds = KINDS[kind] if name in OURS else {}
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 3))]
    optimizer = make(name, params, "matrices", **kinds)
    for step in range(2):
        attacks.set_grads(params, step)
        optimizer.step()
    gone = weakref.ref(params[1])
    optimizer.param_groups[0]["params"].pop()
    optimizer.state.pop(params.pop(), None)
    gc.collect()
    assert gone() is None
    optimizer.step()


@each_name
def test_group_that_leaves_is_freed(name):
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 3))]
    optimizer = make(name, [{"params": [param]} for param in params], "matrices")
    for step in range(2):
        attacks.set_grads(params, step)
        optimizer.step()
    gone = weakref.ref(params[1])
    optimizer.param_groups.pop()
    optimizer.state.pop(params.pop(), None)
    optimizer.step()  # what a class keeps for each group goes by the next step
    gc.collect()
    assert gone() is None


# Decay beside the step of any class: passes run once, after the closure.


class Twice(Own):
    """Evaluates its closure twice, as a class that looks ahead does."""

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        return super().step(closure)


def one_param(value=1.0, grad=0.0):
    param = nn.Parameter(torch.full((2, 3), value))
    param.grad = torch.full_like(param, grad)
    return param


@pytest.mark.parametrize("cls", [Own, Twice])
@pytest.mark.parametrize("form_name", ["decoupled", "l2"])
def test_target_beside_any_class_is_pulled_to_once(cls, form_name):
    param, calls = one_param(), []
    policy = form(form_name) * towards(3.0)
    optimizer = selective(cls)([param], lr=LR, weight_decay=WD, wd_policy=policy)

    def closure():
        calls.append(param.detach().clone())
        param.grad = torch.zeros_like(param)

    optimizer.step(closure)
    assert len(calls) == (2 if cls is Twice else 1)
    assert calls[0].eq(1.0).all()
    torch.testing.assert_close(param.detach(), torch.full((2, 3), 1.0 + LR * WD * 2))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "RAdam", "Own"])
@pytest.mark.parametrize("stated", ["l2", "decoupled"])
def test_gradient_is_the_users_after_a_step_of_any_form(name, stated):
    param = one_param(grad=0.25)
    optimizer = make(name, [param], form(stated) * towards(3.0))
    for _ in range(2):
        grad = param.grad
        optimizer.step()
        assert param.grad is grad
        assert grad.eq(0.25).all()


class Fails(Own):
    def step(self, closure=None):
        super().step(closure)
        raise ArithmeticError


def test_gradient_is_the_users_after_a_step_that_failed():
    param = one_param(grad=0.25)
    policy = form("l2") * towards(3.0)
    optimizer = selective(Fails)([param], lr=LR, weight_decay=WD, wd_policy=policy)
    grad = param.grad
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert param.grad is grad
    assert grad.eq(0.25).all()


GRADS = {"agrees": (0.5, True), "disagrees": (-0.5, False), "zero": (0.0, True)}


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Own"])
@pytest.mark.parametrize("case", GRADS)
def test_cautious_decay_looks_at_the_update_of_the_first_step(name, case):
    """Compared with the same step without decay."""
    grad, decays = GRADS[case]
    left = []
    for decayed in (True, False):
        param, other = one_param(grad=grad), one_param()
        policy = {"p": float(decayed), "other": 1}
        optimizer = make(
            name, [("p", param), ("other", other)], as_policy(policy) * form("cautious")
        )
        optimizer.step()
        left.append(param.detach())
    expected = left[1] - LR * WD if decays else left[1]
    torch.testing.assert_close(left[0], expected)


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Own"])
@pytest.mark.parametrize("stated", ["cautious", "independent", "corrected"])
def test_forms_serve_any_class_without_touching_what_is_exempt(name, stated):
    model = net()
    optimizer = make(name, model, USUAL * form(stated))
    assert_right(model, optimizer)


# Passes and scaled gradients.

SCALE = 1024.0


def scaled_step(scaler, optimizer, params, step, bad=False):
    attacks.set_grads(params, step)
    for param in params:
        param.grad.mul_(SCALE)
    if bad:
        params[0].grad[0, 0] = torch.inf
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update(SCALE)


PASSES = {
    "l2 towards": form("l2") * towards(2.0),
    "towards": form("decoupled") * towards(2.0),
    "cautious": form("cautious"),
    "plain": form("decoupled"),
    "l2": form("l2"),
}


@pytest.mark.parametrize("name", [*OURS, "NAdam", "Own"])
@pytest.mark.parametrize("case", PASSES)
@pytest.mark.parametrize("kind", ["automatic", "fused"])
def test_scaled_gradients_are_never_decayed(name, case, kind):
    """The same bits as without a scaler, with steps that are dropped in between."""
    kinds = KINDS[kind] if name in OURS else {}
    runs = []
    for scaling in (True, False):
        model = net()
        params = [*model.parameters()]
        more = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = make(name, model, USUAL * PASSES[case], **kinds, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        for step, bad in enumerate([True, False, False, True, False]):
            if scaling:
                scaled_step(scaler, optimizer, params, step, bad)
            elif not bad:
                attacks.set_grads(params, step)
                optimizer.step()
        runs.append(params)
    assert_same(*runs)


# Hooks, as often as torch's class runs them.


def counted(cls, again, **arguments):
    """Count hooks over a step of a class, or of a subclass that calls its base."""

    class Again(cls):
        def step(self, closure=None):
            return super().step(closure)

    cls([nn.Parameter(torch.ones(1))], lr=LR)  # torch wraps a class when it is made
    made = (Again if again else cls)(**arguments)
    calls = []
    made.register_step_pre_hook(lambda *args: calls.append("pre"))
    made.register_step_post_hook(lambda *args: calls.append("post"))
    made.step()
    return calls


@each_of_ours
@pytest.mark.parametrize("again", [True, False])
def test_hooks_run_as_often_as_in_torch(name, again):
    def arguments():
        return {"params": [one_param()], "lr": LR}

    actual = counted(SERVED[name], again, **arguments())
    assert actual == counted(getattr(torch.optim, name), again, **arguments())
