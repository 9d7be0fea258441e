"""Code that reads groups unsplit is refused, told, or shown what to decay."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref

import pytest
import torch

import selective_optim
from selective_optim import selective
from selective_optim.fused import stepper
from tests.support import attacks, twins
from tests.support.attacks import (
    LR,
    OURS,
    RIGHT,
    SERVED,
    WD,
    Own,
    assert_right,
    assert_whole,
    built,
    make,
    net,
)
from tests.support.twins import KINDS

each_name = pytest.mark.parametrize("name", SERVED)
OTHERS = [name for name in SERVED if name not in OURS]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam"])
@pytest.mark.parametrize("hooked", [True, False])
def test_step_of_torchs_class_is_refused(name, hooked):
    model, optimizer = built(name)
    before = [param.detach().clone() for param in model.parameters()]
    step = getattr(torch.optim, name).step
    if not hooked:
        step = step.__wrapped__
    attacks.zero_grads([*model.parameters()])
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\)"):
        step(optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert_right(model, optimizer)


def test_step_of_a_users_class_is_refused():
    model, optimizer = built("Own")
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"optimizer\.step\(\)"):
        Own.step(optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert_right(model, optimizer)


class Scaling(torch.optim.SGD):
    """Reads a key of its own in the groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.mul_(group.get("scale", 1.0))
        return super().step(closure)


class Between(selective_optim.SGD, Scaling):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_class_between_ours_and_torchs_reads_its_own_keys_at_every_step(kind):
    params, others = ([torch.nn.Parameter(torch.ones(2, 2))] for _ in range(2))
    given = {"lr": LR, "weight_decay": WD}
    optimizer = Between(params, **given, **KINDS[kind], wd_policy="matrices")
    oracle = Scaling(others, **given, **(KINDS[kind] or {"fused": True}))
    for scale in (1.0, 0.5, 0.1):
        for each in (optimizer, oracle):
            each.param_groups[0]["scale"] = scale
            each.param_groups[0]["params"][0].grad = torch.ones(2, 2)
            each.step()
        assert torch.equal(params[0], others[0])


def patch(monkeypatch, method):
    """Wrap a method of torch's AdamW, and return what it reads in the groups."""
    original, read = getattr(torch.optim.AdamW, method), []

    @functools.wraps(original)
    def patched(self, *args, **named):
        groups = self.param_groups if method == "step" else args[:1]
        read.extend(group["tag"] for group in groups)
        return original(self, *args, **named)

    monkeypatch.setattr(torch.optim.AdamW, method, patched)
    return read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["step", "_init_group"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_patch_of_torchs_class_is_called_and_sees_all_keys(
    kind, method, steps_before, monkeypatch
):
    pairs, hooks = [], []
    for make_one in (twins.ours, twins.torchs):
        params = twins.make_params()
        pairs.append((params, make_one("AdamW", kind, params)))
    (mine, optimizer), (theirs, oracle) = pairs
    optimizer.param_groups[0]["tag"] = 7
    optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    for number in range(steps_before):
        twins.step(mine, optimizer, number)
        twins.step(theirs, oracle, number)
    # Before the patch, which reads a key that these groups lack.
    twins.step(theirs, oracle, steps_before)
    read = patch(monkeypatch, method)
    twins.step(mine, optimizer, steps_before)
    assert read == [7, 7]  # once for each part
    assert len(hooks) == steps_before + 1
    twins.assert_twins(mine, theirs, optimizer, oracle)


class Counting:
    """Stands for a method, as wrapt's proxies do: it answers as what it calls."""

    __hash__ = None

    def __init__(self, method, calls):
        self.method, self.calls = method, calls

    def __getattr__(self, name):
        return getattr(self.method, name)

    def __call__(self, *args, **named):
        self.calls.append(1)
        return self.method(*args, **named)

    def __get__(self, optimizer, cls=None):
        if optimizer is None:
            return self
        return Counting(self.method.__get__(optimizer, cls), self.calls)


class Hidden(Counting):
    """Shows the class what it patches, and each optimizer the patch."""

    def __get__(self, optimizer, cls=None):
        return self.method if optimizer is None else super().__get__(optimizer, cls)


def partial_method(method, calls):
    def patched(self, *args, tag, **named):
        calls.append(tag)
        return method(self, *args, **named)

    return functools.partialmethod(patched, tag=1)


def decorated(method, calls):
    @torch.no_grad()
    def patched(self, *args, **named):
        calls.append(1)
        return method(self, *args, **named)

    return patched


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["step", "_init_group"])
@pytest.mark.parametrize("patched", [Counting, Hidden, partial_method, decorated, None])
def test_any_kind_of_patch_is_called(kind, method, patched, monkeypatch):
    """``None`` patches one optimizer; the others, torch's class."""
    pairs = []
    for make_one in (twins.ours, twins.torchs):
        params, calls = twins.make_params(), []
        with monkeypatch.context() as patching:
            if patched is not None:
                original = getattr(torch.optim.AdamW, method)
                patching.setattr(torch.optim.AdamW, method, patched(original, calls))
            optimizer = make_one("AdamW", kind, params)
            if patched is None:
                own = Counting(getattr(optimizer, method), calls)
                setattr(optimizer, method, own)
            for number in range(3):
                twins.step(params, optimizer, number)
        twins.step(params, optimizer, 3)
        pairs.append((params, optimizer, len(calls)))
    (mine, optimizer, ours), (theirs, oracle, torchs) = pairs
    assert ours == torchs > 0
    twins.assert_twins(mine, theirs, optimizer, oracle)


def test_what_a_patch_keeps_is_freed_when_it_goes(monkeypatch):
    class Kept:
        pass

    kept, params = Kept(), twins.make_params()
    alive, original = weakref.ref(kept), torch.optim.AdamW.step
    optimizer = twins.ours("AdamW", "automatic", params)

    def patched(self, closure=None, kept=kept):
        return original(self, closure)

    with monkeypatch.context() as patching:
        patching.setattr(torch.optim.AdamW, "step", patched)
        twins.step(params, optimizer, 0)
    twins.step(params, optimizer, 1)
    del patched, kept
    assert alive() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not stepper.PLANNING, reason="counts plans")
@pytest.mark.parametrize("compiled", ["nothing", "torchs", "ours"])
def test_plan_is_kept_after_torchs_compiler_has_wrapped_the_steps(compiled):
    params = twins.make_params()
    optimizer = twins.ours("AdamW", "automatic", params)
    other = twins.torchs("AdamW", "foreach", twins.make_params())
    if compiled == "ours":
        other = twins.ours("AdamW", "foreach", twins.make_params())
    if compiled != "nothing":
        twins.set_grads([p for g in other.param_groups for p in g["params"]], 0)
        torch.compile(other.step, backend="eager")()
    for number in range(4):
        twins.step(params, optimizer, number)
    assert optimizer._stepper.plans == 1


@pytest.mark.parametrize("kind", KINDS)
def test_own_gathering_of_one_optimizer_is_called(kind):
    params = twins.make_params()
    optimizer, calls = twins.ours("AdamW", kind, params), []
    gather = optimizer._init_group

    def own(group, *lists):
        calls.append(len(group["params"]))
        return gather(group, *lists)

    optimizer._init_group = own
    twins.step(params, optimizer, 0)
    assert calls == [2, 2]


class Tagged(torch.optim.SGD):
    """Reads keys of its own where it gathers parameters."""

    def _init_group(self, group, *lists):
        self.read = (group["tag"], group.get("param_names"), group.get("initial_lr"))
        return super()._init_group(group, *lists)


class Halving(torch.optim.AdamW):
    """Reads the rate by its place in torch's signature."""

    def __init__(self, params, *args, **kwargs):
        lr, *others = args or [LR]
        super().__init__(params, lr / 2, *others, **kwargs)


class HalvingBetween(selective_optim.AdamW, Halving):
    pass


def test_class_between_ours_and_torchs_is_given_arguments_by_position():
    theirs = Halving([torch.nn.Parameter(torch.ones(2))], 0.5)
    mine = HalvingBetween([torch.nn.Parameter(torch.ones(2))], 0.5)
    assert mine.defaults["lr"] == theirs.defaults["lr"] == 0.25


class Computing(dict):
    """Computes its values, and lacks those that torch does not read."""

    def __getitem__(self, key):
        if key == "note":
            raise NotImplementedError
        return super().__getitem__(key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_group_that_computes_its_values_is_asked_what_torch_reads_alone(name, kind):
    mine, theirs = twins.make_params(), twins.make_params()
    optimizer = twins.ours(name, kind, mine)
    oracle = twins.torchs(name, kind, theirs)
    optimizer.param_groups[0] = Computing(optimizer.param_groups[0], note=1)
    for number in range(2):
        twins.step(mine, optimizer, number)
        twins.step(theirs, oracle, number)
    twins.assert_twins(mine, theirs, optimizer, oracle)


@pytest.mark.parametrize("choice", [{}, {"foreach": True}, {"differentiable": True}])
@pytest.mark.parametrize("name", OURS)
def test_parameter_that_was_added_by_hand_needs_no_name(name, choice):
    named = [("a", torch.ones(3, 2)), ("b", torch.ones(2))]
    exempt = {"wd_policy": "exclude(is_vector)", "weight_decay": WD}
    optimizer = getattr(selective_optim, name)(named, LR, **exempt, **choice)
    chosen = choice or {"fused": True}
    oracle = getattr(torch.optim, name)([torch.ones(4)], LR, weight_decay=0, **chosen)
    added = torch.ones(4)
    for param in (added, oracle.param_groups[0]["params"][0], *dict(named).values()):
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(added)
    optimizer.step()
    oracle.step()
    assert torch.equal(added, oracle.param_groups[0]["params"][0])


@pytest.mark.parametrize("name", OURS)
def test_flag_that_was_a_number_is_looked_at_anew(name):
    params = twins.make_params()
    optimizer = twins.ours(name, "automatic", params)
    optimizer.param_groups[0]["maximize"] = 1  # the class steps
    twins.step(params, optimizer, 0)
    optimizer.param_groups[0]["maximize"] = True
    again = copy.deepcopy(optimizer)
    twins.step(params, optimizer, 1)
    copies = again.param_groups[0]["params"]
    twins.step(copies, again, 1)
    assert all(map(torch.equal, params, copies))


class TaggedBetween(selective_optim.SGD, Tagged):
    pass


class TaggedBelow(selective_optim.SGD):
    def _init_group(self, group, *lists):
        self.read = (group["tag"], group["param_names"], group["initial_lr"])
        return super()._init_group(group, *lists)


@pytest.mark.parametrize("cls", [TaggedBetween, TaggedBelow])
def test_own_gathering_of_parameters_sees_all_keys_of_a_group(cls):
    param = torch.nn.Parameter(torch.ones(2, 2))
    group = {"params": [("weight", param)], "tag": 7, "initial_lr": 0.3}
    optimizer = cls([group], lr=LR, weight_decay=WD, foreach=False)
    for tag in (7, 8):
        optimizer.param_groups[0]["tag"] = tag
        param.grad = torch.ones(2, 2)
        optimizer.step()
        assert optimizer.read == (tag, ["weight"], 0.3)


def test_what_a_user_keeps_in_a_group_is_freed_when_it_goes():
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = selective_optim.SGD(
        [param], weight_decay=WD, foreach=False, wd_policy="matrices"
    )
    optimizer.param_groups[0]["cache"] = torch.ones(3)
    for _ in range(2):
        param.grad = torch.ones(2, 2)
        optimizer.step()
    alive = weakref.ref(optimizer.param_groups[0]["cache"])
    optimizer.param_groups[0]["cache"] = None
    assert alive() is None


@pytest.mark.parametrize("name", OTHERS)
def test_step_of_the_class_serves_where_nothing_is_exempt(name):
    model = net()
    optimizer = make(name, model, None)
    cls = Own if name == "Own" else getattr(torch.optim, name)
    assert all(attacks.moved(lambda: cls.step(optimizer), [*model.parameters()]))


def own_step(self, closure=None):
    """Decay and descend from what the groups say, past the step of the base."""
    with torch.no_grad():
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 - group["lr"] * group["weight_decay"])


@each_name
def test_subclass_whose_own_step_reads_the_decay_is_told(name):
    cls = type("Reads", (SERVED[name],), {"step": own_step})
    model = net()
    more = attacks.DECOUPLED.get(name, {})
    optimizer = cls(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm", **more
    )
    with pytest.warns(UserWarning, match="step") as told:
        optimizer.step()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once


def clipped_step(self, closure=None):
    """Clip and go on: reads no decay, and reaches the step of the base."""
    for group in self.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
    return super(type(self), self).step(closure)


@each_name
def test_subclass_whose_own_step_reaches_ours_is_told_nothing(name):
    cls = type("Clips", (SERVED[name],), {"step": clipped_step})
    model = net()
    more = attacks.DECOUPLED.get(name, {})
    optimizer = cls(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm", **more
    )
    assert_right(model, optimizer)


class DecaysOutside(Own):
    """Decays in a method of its own, which its users call before the step."""

    @torch.no_grad()
    def apply_decay(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(1 - group["lr"] * group["weight_decay"])


def test_method_that_decays_outside_the_step_sees_parts_or_is_told():
    model = net()
    optimizer = selective(DecaysOutside)(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm"
    )
    params = [*model.parameters()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            acted = attacks.moved(optimizer.apply_decay, params)
        except (RuntimeError, ValueError) as error:
            acted, told = None, [error]
    assert told or acted == [*RIGHT.values()]
    assert_whole(optimizer)
