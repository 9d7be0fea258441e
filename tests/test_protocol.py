"""What frameworks ask an optimizer and do to it: answered as torch's class answers."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import selective_optim
from selective_optim.fused.plan import Bucket, Plan
from tests.support import twins
from tests.support.twins import (
    CLASSES,
    KINDS,
    assert_twins,
    both,
    default_torchs,
    make_params,
    ours,
    torchs,
)

numpy = pytest.importorskip("numpy", reason="odd numbers are numpy's")
each_name = pytest.mark.parametrize("name", CLASSES)
each_counting = pytest.mark.parametrize("name", ["Adam", "AdamW"])
each_kind = pytest.mark.parametrize("kind", KINDS)


# GradScaler.


@each_name
@each_kind
def test_scaling_is_supported_where_torchs_class_says_so(name, kind):
    """Left open, as it is by most, GradScaler, Lightning and Accelerate do it."""
    mine = ours(name, kind, make_params())
    cls = getattr(torch.optim, name)
    theirs = cls(make_params(), **CLASSES[name], **KINDS[kind])
    flag = "_step_supports_amp_scaling"
    assert getattr(mine, flag, False) == getattr(theirs, flag, False)
    assert getattr(mine, flag, False) == (kind == "fused")


class Calls(TorchDispatchMode):
    """Counts what is called while it is on."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_scaled_step_clamps_once_whatever_the_groups(name, decoupled):
    params = make_params([(3, 3)] * 50)
    groups = [{"params": [p], "lr": 0.001 * i} for i, p in enumerate(params)]
    extra = {"decoupled_weight_decay": decoupled} if name != "AdamW" else {}
    optimizer = ours(name, "fused", groups, **extra)
    twins.step(params, optimizer, 0)
    twins.set_grads(params, 1)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(0.0)
    with Calls() as calls:
        optimizer.step()
    assert calls.counts["clamp"] == 1
    # Waiting for the device, once it is one, is what reading a number on the host is.
    assert calls.counts["_local_scalar_dense"] == 0


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("decoupled", [False, True])
def test_scaled_steps_of_sgd_read_the_host_where_momentum_begins(momentum, decoupled):
    """Only the host can leave a buffer out that a dropped step must not begin."""
    params = make_params()
    arguments = {"momentum": momentum, "decoupled_weight_decay": decoupled}
    optimizer = ours("SGD", "fused", params, **arguments)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(0.0)
    for expected in (int(momentum > 0), 0, 0):
        twins.set_grads(params, 0)
        with Calls() as calls:
            optimizer.step()
        assert calls.counts["_local_scalar_dense"] == expected


@each_name
@each_kind
@pytest.mark.parametrize("infinite", [(), (0,), (2,), (0, 1), (0, 3)])
def test_scaler_trains_as_with_torchs_class(name, kind, infinite):
    left = []
    for make in (ours, torchs):
        params = make_params()
        optimizer = make(name, kind, params)
        if make is torchs and name == "SGD" and 0 in infinite:
            # Its fused kernel, told to drop a first step, leaves whatever was in
            # memory as momentum; so the scaler skips the step, and is the judge.
            optimizer._step_supports_amp_scaling = False
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for number in range(5):
            loss = scaler.scale(sum((p * p).sum() for p in params))
            optimizer.zero_grad()
            loss.backward()
            if number in infinite:
                params[0].grad[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        left.append((params, optimizer, scaler.get_scale()))
    (mine, own, scale), (theirs, judge, expected) = left
    assert scale == expected
    # A step that is dropped begins no state in the one and zeros in the other.
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    if 0 not in infinite:
        assert_twins(mine, theirs, own, judge)


# Where torch works.


def run_both(name, kind, prepare, steps=4, judge=torchs, **arguments):
    """Step both under something, and compare; errors must be the same."""
    left = []
    for make in (ours, judge):
        params = make_params()
        optimizer = make(name, kind, params, **arguments)
        error = None
        for number in range(steps):
            twins.set_grads(params, number)
            try:
                with prepare(optimizer, params, number) or contextlib.nullcontext():
                    optimizer.step()
            except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as raised:
                # Of torch's fused kernels, without the arguments that follow.
                error = type(raised), str(raised).partition(" - got ")[0]
                break
        left.append((params, optimizer, error))
    (mine, own, error), (theirs, judge, expected) = left
    assert error == expected
    if error is None:
        assert_twins(mine, theirs, own, judge)


@each_name
@each_kind
def test_first_step_under_a_default_device(name, kind):
    """The judge of the fused kernel steps without one: 2.7 makes its counters there."""
    mine = getattr(selective_optim, name)

    def under(optimizer, params, number):
        alike = kind in ("foreach", "for-loop") or isinstance(optimizer, mine)
        return torch.device("meta") if alike else None

    run_both(name, kind, under)


@each_name
@each_kind
def test_steps_under_inference_mode(name, kind):
    run_both(name, kind, lambda o, p, n: torch.inference_mode() if n == 0 else None)


@each_name
@each_kind
def test_steps_under_no_grad_and_autocast(name, kind):
    def under(optimizer, params, number):
        return torch.autocast("cpu") if number % 2 else torch.no_grad()

    run_both(name, kind, under)


@each_name
@each_kind
@pytest.mark.parametrize(
    "lr",
    [numpy.array(0.03), numpy.float64(0.03), numpy.float32(0.03), -0.01, 0, True],
    ids=repr,
)
def test_odd_rates_set_later(name, kind, lr):
    # torch's fused kernels refuse an array: left open, ours takes another path.
    array = isinstance(lr, numpy.ndarray)

    def set_rate(optimizer, params, number):
        if number == (0 if array else 1):
            for group in optimizer.param_groups:
                group["lr"] = lr

    run_both(name, kind, set_rate, judge=default_torchs if array else torchs)


@pytest.mark.parametrize("name", CLASSES)
def test_rate_that_is_an_array_from_the_start(name):
    rate = numpy.array(0.03)
    run_both(name, "automatic", lambda *_: None, judge=default_torchs, lr=rate)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@each_kind
@pytest.mark.parametrize("betas", [(1.0, 0.9), (1.5, 0.9), (0.9, 1.0), (0.9, 1.2)])
def test_betas_of_one_and_more(name, kind, betas):
    def set_betas(optimizer, params, number):
        if number == 1:
            for group in optimizer.param_groups:
                group["betas"] = betas

    left = []
    for make in (ours, torchs):
        params = make_params()
        optimizer = make(name, kind, params)
        error = None
        for number in range(3):
            set_betas(optimizer, params, number)
            twins.set_grads(params, number)
            try:
                optimizer.step()
            except (RuntimeError, ValueError, ZeroDivisionError) as raised:
                error = type(raised), str(raised)
                break
        left.append((params, error))
    (mine, error), (theirs, expected) = left
    assert error == expected
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        assert torch.equal(a.isnan(), b.isnan())


@each_name
@each_kind
def test_betas_edited_in_place(name, kind):
    key = "momentum" if name == "SGD" else "betas"
    value = numpy.array(0.5) if name == "SGD" else numpy.array([0.5, 0.6])

    def edit(optimizer, params, number):
        for group in optimizer.param_groups:
            if number == 0:
                group[key] = value.copy()
            if number == 2:
                group[key] *= 0.5

    # Of two betas each is a number; a momentum that is an array no fused kernel takes.
    run_both(name, kind, edit, judge=default_torchs if name == "SGD" else torchs)


@each_name
@pytest.mark.parametrize("kind", ["foreach", "for-loop"])
def test_gradient_with_the_negative_bit(name, kind):
    def negate(optimizer, params, number):
        for param in params[:2]:
            param.grad = torch._neg_view(param.grad)

    run_both(name, kind, negate)


@each_name
def test_gradient_with_the_negative_bit_left_open(name):
    """The fused kernel would read its memory unnegated, so foreach is the judge."""
    params, expected = make_params(), make_params()
    optimizer = ours(name, "automatic", params)
    judge = torchs(name, "for-loop", expected)
    for number in range(3):
        for each in (params, expected):
            twins.set_grads(each, number)
            for param in each:
                param.grad = torch._neg_view(param.grad)
        optimizer.step()
        judge.step()
    assert_twins(params, expected, optimizer, judge)


@each_name
@each_kind
def test_set_state_with_groups_alone(name, kind):
    """As torch's own ``load_state_dict`` of old, and some wrappers, do."""

    def edit(optimizer, params):
        groups = [dict(group) for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = 0.02
        optimizer.__setstate__({"param_groups": groups})

    both(name, kind, edit)


@each_name
@pytest.mark.parametrize("groups", [1, 100])
@pytest.mark.parametrize(
    ("old", "new"),
    [(0.0, -0.0), (0.5, numpy.float32(0.5)), (1, True), (0.1, numpy.float32(0.1))],
    ids=repr,
)
def test_values_that_compare_equal_and_are_not_the_same_are_noticed(
    name, groups, old, new
):
    """Kernels compute otherwise with ``-0.0``, and with numbers of less precision."""
    left = []
    for module in (selective_optim, torch.optim):
        params = make_params([(3, 2)] * groups)
        listed = [{"params": [param]} for param in params]
        chosen = {"weight_decay": old, "fused": True, **CLASSES[name]}
        optimizer = getattr(module, name)(listed, **chosen)
        for number in range(4):
            if number == 2:
                for group in optimizer.param_groups:
                    group["weight_decay"] = new
                    group["lr"] = new if new else 0.0
            twins.step(params, optimizer, number)
        left.append((params, optimizer))
    assert_twins(left[0][0], left[1][0], left[0][1], left[1][1])


# Plans are counted, and not timed.


def plans(optimizer):
    return optimizer._stepper.plans


STEADY = {
    "nothing": lambda optimizer, params, number: None,
    "rate": lambda optimizer, params, number: [
        group.update(lr=0.001 * number) for group in optimizer.param_groups
    ],
    "decay": lambda optimizer, params, number: [
        group.update(weight_decay=0.001 * number) for group in optimizer.param_groups
    ],
    "state is read": lambda optimizer, params, number: repr(optimizer.state),
    "state dict": lambda optimizer, params, number: optimizer.state_dict(),
    "gradients come and go": lambda optimizer, params, number: setattr(
        params[number % 4], "grad", None
    ),
    "all gradients go": lambda optimizer, params, number: [
        setattr(param, "grad", None) for param in params if number % 3 == 0
    ],
    "zeroed in place": lambda optimizer, params, number: optimizer.zero_grad(False),
    "report": lambda optimizer, params, number: optimizer.decay_report(),
    "replaced dict": lambda optimizer, params, number: (
        optimizer.param_groups.__setitem__(0, dict(optimizer.param_groups[0]))
    ),
    "same list anew": lambda optimizer, params, number: optimizer.param_groups[
        0
    ].update(params=list(optimizer.param_groups[0]["params"])),
}


@each_name
@each_kind
@pytest.mark.parametrize("what", STEADY)
@pytest.mark.parametrize("groups", [1, 4])
def test_steady_steps_make_no_new_plan(name, kind, what, groups):
    params = make_params()
    listed = [{"params": params}] if groups == 1 else [{"params": [p]} for p in params]
    optimizer = ours(name, kind, listed)
    for number in range(3):  # momentum begins, and goes on
        twins.step(params, optimizer, number)
    STEADY[what](optimizer, params, 1)
    twins.step(params, optimizer, 3)  # taking note that the state is read, if it is
    before = plans(optimizer)
    for number in range(4, 12):
        twins.set_grads(params, number)
        STEADY[what](optimizer, params, number)
        optimizer.step()
    assert plans(optimizer) == before


# What a step may do again, by what changes: look at every tensor, read the numbers,
# put cells together anew.
AGAIN = {
    "nothing": set(),
    "state is read": set(),
    "zeroed in place": set(),
    "report": set(),
    "rate": {"_merge_parts"},
    "decay": {"_merge_parts"},
    "rate, until now": set(),
    "autocast": set(),
}


@each_name
@pytest.mark.parametrize("what", AGAIN)
def test_steady_steps_do_nothing_again(name, what, monkeypatch):
    params = make_params()
    optimizer = ours(name, "automatic", [{"params": [param]} for param in params])

    def change(number):
        twins.set_grads(params, number)
        if what == "autocast":
            return torch.autocast("cpu", enabled=number % 2 == 0)
        kind, _, until_now = what.partition(", ")
        if not until_now or number < 5:
            STEADY[kind](optimizer, params, number)
        return contextlib.nullcontext()

    for number in range(6):
        with change(number):
            optimizer.step()
    done = []
    for cls, method in [(Plan, "_merge_parts"), (Plan, "_arrange"), (Bucket, "fits")]:
        original = getattr(cls, method)

        def noted(*args, _original=original, _method=method):
            done.append(_method)
            return _original(*args)

        monkeypatch.setattr(cls, method, noted)
    for number in range(6, 12):
        with change(number):
            optimizer.step()
    assert set(done) == AGAIN[what]


@each_name
def test_first_steps_make_one_plan(name):
    params = make_params()
    optimizer = ours(name, "automatic", params)
    for number in range(5):
        twins.step(params, optimizer, number)
    # Momentum begins in the class's own step, and goes on in a plan.
    assert plans(optimizer) == 1 + (name == "SGD")


@each_name
@each_kind
def test_autocast_around_a_step_makes_no_new_plan(name, kind):
    params = make_params()
    optimizer = ours(name, kind, params)
    contexts = [
        contextlib.nullcontext(),
        torch.autocast("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ]
    for context in contexts * 2:
        with context:
            twins.step(params, optimizer, 0)
    before = plans(optimizer)
    for number, context in enumerate(contexts * 3):
        with context:
            twins.step(params, optimizer, number)
    assert plans(optimizer) == before


@each_name
def test_an_edit_makes_one_plan(name):
    params = make_params()
    optimizer = ours(name, "automatic", params)
    for number in range(3):
        twins.step(params, optimizer, number)
    before = plans(optimizer)
    new = nn.Parameter(torch.ones(2, 2))
    optimizer.param_groups[0]["params"].append(new)
    for number in range(3, 8):
        twins.step([*params, new], optimizer, number)
    assert plans(optimizer) == before + 1 + (name == "SGD")


# Compiled.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("steps", [3])
def test_unwrapped_step_compiles(name, steps):
    """As torch documents it: ``optimizer.step`` without its profiling wrappers.

    Without momentum, whose first step torch's SGD does not trace either.
    """
    hyper = {"momentum": 0} if name == "SGD" else {}
    left = []
    for make in (ours, torchs):
        torch._dynamo.reset()
        params = make_params()
        optimizer = make(name, "for-loop", params, **hyper)
        step = torch.compile(whole_step(optimizer), backend="eager")
        twins.step(params, optimizer, 0)
        for number in range(1, 1 + steps):
            twins.set_grads(params, number)
            step()
        left.append((params, optimizer))
    assert_twins(left[0][0], left[1][0], left[0][1], left[1][1])


def whole_step(optimizer):
    unwrapped = type(optimizer).step
    while hasattr(unwrapped, "__wrapped__"):
        unwrapped = unwrapped.__wrapped__

    @torch.no_grad()
    def step():
        unwrapped(optimizer)

    return step


# What a second attack found.


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("AdamW", {"amsgrad": 0}),
        ("Adam", {"amsgrad": 1}),
        ("AdamW", {"maximize": None}),
        ("SGD", {"momentum": 0.9, "nesterov": 1}),
        ("SGD", {"maximize": numpy.bool_(True)}),
    ],
    ids=repr,
)
def test_flags_that_are_not_bool_step_as_torchs_default(name, flag):
    run_both(name, "automatic", lambda *_: None, judge=default_torchs, **flag)


def test_decay_in_one_element_steps_as_torchs_default():
    def set_decay(optimizer, params, number):
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = torch.tensor([0.3])

    for name in CLASSES:
        run_both(name, "automatic", set_decay, judge=default_torchs)


@each_name
def test_fake_tensors_step_as_in_torch(name):
    """As memory is estimated before a run."""
    for module in (torch.optim, selective_optim):
        with FakeTensorMode():
            net = nn.Linear(4, 3)
            optimizer = getattr(module, name)(net.parameters(), **CLASSES[name])
            for _ in range(2):
                net(torch.ones(2, 4)).sum().backward()
                optimizer.step()


@each_name
@pytest.mark.parametrize(
    "value",
    [threading.Lock(), (i for i in "a"), gc, object()],
    ids=lambda v: str(type(v)),
)
def test_values_of_others_in_a_group_are_left_alone(name, value):
    run_both(name, "automatic", lambda o, p, n: o.param_groups[0].update(mine=value))


def test_values_of_others_in_a_group_are_not_kept():
    param = nn.Parameter(torch.ones(3))
    big = torch.zeros(99)
    optimizer = selective_optim.AdamW([{"params": [param], "mine": [big]}])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    alive = weakref.ref(big)
    del big
    optimizer.param_groups[0]["mine"].clear()
    assert alive() is None


def test_what_hangs_on_a_parameter_that_left_is_freed_by_the_next_step():
    """Megatron puts a gradient there, vLLM a method of the module."""
    body, head = nn.Linear(2, 2), nn.Linear(3, 3)
    head.weight.main_grad = torch.zeros(9)
    head.bias.weight_loader = head.extra_repr
    optimizer = selective_optim.AdamW([*body.parameters(), *head.parameters()])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    alive = [weakref.ref(head.weight.main_grad), weakref.ref(head.weight)]
    optimizer.param_groups[0]["params"] = list(body.parameters())
    for param in head.parameters():
        optimizer.state.pop(param)
    del head, param
    optimizer.step()
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@each_name
def test_hook_may_wrap_the_state_dict(name):
    params = make_params()
    optimizer = ours(name, "automatic", params)
    twins.step(params, optimizer, 0)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: saved["optimizer"])
    saved = optimizer.state_dict()
    assert set(saved) == {"optimizer"}
    assert "decay" in saved["optimizer"]
    optimizer.load_state_dict(saved)


def test_copy_made_before_its_model_does_not_insist_on_it():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    known = {"wd_policy": "no_bias_norm", "model": net}
    optimizer = selective_optim.AdamW(net.parameters(), **known)
    optimizer, net = copy.deepcopy((optimizer, net))
    net.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Pass model=model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    # Of the module that lives, or that is given, it is known.
    optimizer.add_param_group({"params": [net[2].weight]})
    optimizer.add_param_group({"params": [net[2].bias], "model": net})
    assert optimizer.decay_report().rows[-1].name == "2.bias"


@each_counting
@each_kind
@pytest.mark.parametrize("read", [False, True])
def test_number_as_a_counter_is_refused_as_in_torch(name, kind, read):
    errors = []
    for make in (ours, default_torchs):
        params = make_params()
        optimizer = make(name, kind, params)
        twins.step(params, optimizer, 0)
        if read:
            twins.step(params, optimizer, 1)
        optimizer.state[params[0]]["step"] = 1000
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as caught:
            twins.step(params, optimizer, 2)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@each_name
@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_equal_rates_of_other_types_keep_their_bits(name, kind):
    single = numpy.float32(0.1)
    left = []
    for module in (selective_optim, torch.optim):
        params = make_params([(50,)] * 2)
        groups = [
            {"params": params[:1], "lr": float(single)},
            {"params": params[1:], "lr": single},
        ]
        optimizer = getattr(module, name)(groups, **{**CLASSES[name], **KINDS[kind]})
        for number in range(4):
            twins.step(params, optimizer, number)
        left.append((params, optimizer))
    assert_twins(left[0][0], left[1][0], left[0][1], left[1][1])


# Subclasses, and torch's step on our optimizer.


def subclass(cls, calls):
    class Own(cls):
        """Begins moments at one, and halves every gradient."""

        def _init_group(self, group, params, grads, *lists):
            calls.append(group)
            fresh = [p for p in group["params"] if p.grad is not None]
            fresh = [p for p in fresh if not self.state[p]]
            answer = super()._init_group(group, params, grads, *lists)
            for param in fresh:
                for entry, value in self.state[param].items():
                    if entry.startswith("exp_avg"):
                        value.fill_(1.0)
            grads[:] = [grad / 2 for grad in grads]
            return answer

    return Own


@each_name
@each_kind
def test_subclass_that_begins_state_its_own_way_is_as_in_torch(name, kind):
    left, calls = [], []
    for module, make in ((selective_optim, ours), (torch.optim, torchs)):
        params = make_params()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, subclass(getattr(module, name), calls))
            chosen = "fused" if kind == "automatic" else kind
            optimizer = make(name, chosen if make is torchs else kind, params)
        for number in range(4):
            twins.step(params, optimizer, number)
        left.append((params, optimizer))
    assert len(calls) == 4 * 2 + 4 * 2  # once for each part, once for each group
    (mine, own), (theirs, judge) = left
    assert_twins(mine, theirs, own, judge)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_subclass_that_begins_state_its_own_way_takes_the_scale(name, found_inf):
    left = []
    for module, make in ((selective_optim, ours), (torch.optim, torchs)):
        params = make_params()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, subclass(getattr(module, name), []))
            optimizer = make(name, "fused", params)
        for number in range(3):
            optimizer.grad_scale = torch.tensor(4.0)
            optimizer.found_inf = torch.tensor(found_inf if number else 0.0)
            twins.step(params, optimizer, number)
        left.append((params, optimizer))
    (mine, own), (theirs, judge) = left
    assert_twins(mine, theirs, own, judge)


@each_name
@each_kind
def test_step_of_torchs_class_is_refused_where_it_would_decay_the_exempt(name, kind):
    params, expected = make_params(), make_params()
    optimizer, judge = (make(name, kind, p) for make, p in (
        (ours, params), (torchs, expected)
    ))  # fmt: skip
    twins.step(params, optimizer, 0)
    twins.step(expected, judge, 0)
    foreign = getattr(torch.optim, name).step
    with pytest.raises(RuntimeError, match=r"Type optimizer\.step\(\)"):
        foreign(optimizer)
    twins.step(params, optimizer, 1)
    twins.step(expected, judge, 1)
    assert_twins(params, expected, optimizer, judge)


@each_name
@each_kind
def test_step_of_torchs_class_is_torchs_where_nothing_is_exempt(name, kind):
    left = []
    for module in (selective_optim, torch.optim):
        params = make_params()
        cls, judge = getattr(module, name), getattr(torch.optim, name)
        optimizer = cls(params, **CLASSES[name], **KINDS[kind], weight_decay=0.3)
        for number in range(3):
            twins.set_grads(params, number)
            judge.step(optimizer)
        left.append((params, optimizer))
    (mine, own), (theirs, expected) = left
    assert_twins(mine, theirs, own, expected)
