"""A compiled step follows what is decided, whenever it is decided."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo

from selective_optim import Decay
from selective_optim.policies import exclude, form, only, scale, towards
from tests.support import attacks
from tests.support.attacks import DECOUPLED, LR, OURS, RIGHT, WD, Judge, make, net

pytestmark = [
    # torch says so of its own optimizers, once per process.
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = {
    "automatic": {},
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
}
each_name = pytest.mark.parametrize("name", OURS)
each_kind = pytest.mark.parametrize("kind", KINDS)
ARGUMENTS = {"SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "AdamW": {}}


@pytest.fixture(scope="module", autouse=True)
def _no_collection():
    """Compilers make garbage so fast that all that is alive is walked at every test."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    # torch times the guards of every graph for its log, on emptied caches of the CPU.
    guards = "torch._dynamo.guards.profile_guard_manager"
    monkeypatch.setattr(guards, lambda *args: 0.0, raising=False)
    # More policies are assigned below than torch compiles by itself.
    torch._dynamo.reset()
    with dynamo.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def compiled(optimizer):
    return torch.compile(optimizer.step, backend="eager")


def half_of_the_last(info):
    return 0.5 if info.name.startswith("last") else 1


# What is assigned, and the multipliers that it comes to for the parameters of `Net`.
ASSIGNED = [
    ("none", [0, 0, 0, 0, 0, 0]),
    (None, [1, 1, 1, 1, 1, 1]),
    ({"last.*": 0.5, "*.bias": 0}, [1, 0, 1, 0, 0.5, 0.5]),
    (only("norm.*"), [0, 0, 1, 1, 0, 0]),
    (scale("first.*", by=3) * exclude("*.bias"), [3, 0, 1, 0, 1, 0]),
    (half_of_the_last, [1, 1, 1, 1, 0.5, 0.5]),
]


@each_name
@each_kind
def test_assigned_policy_reaches_the_compiled_step(name, kind):
    model = net()
    params = [*model.parameters()]
    arguments = {**KINDS[kind], **ARGUMENTS[name]}
    optimizer = make(name, model, **arguments)
    torchs = getattr(torch.optim, name)
    judge = Judge(
        torchs, attacks.clones(params), **DECOUPLED.get(name, {}), **arguments
    )
    judge.decay([1, 0, 0, 0, 1, 0])
    mine, theirs = compiled(optimizer), compiled(judge.optimizer)
    # Two steps under each: compiled for it, and not again.
    assigned = ASSIGNED if kind == "for-loop" else ASSIGNED[:3]
    for number, (policy, multipliers) in enumerate([(..., None), *assigned]):
        if policy is not ...:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one of them exempts all
                optimizer.wd_policy = policy
            judge.decay(multipliers)
        for step in (2 * number, 2 * number + 1):
            attacks.set_grads(params, step)
            attacks.set_grads(judge.params, step)
            mine()
            theirs()
        judge.require(params, optimizer)


@pytest.mark.parametrize("name", ["NAdam", "RAdam"])
def test_assigned_policy_reaches_the_compiled_step_of_any_class(name):
    model = net()
    optimizer = make(name, model, "all")
    step = compiled(optimizer)
    assert all(attacks.moved(step, [*model.parameters()]))
    optimizer.wd_policy = "no_bias_norm"
    for _ in range(2):
        assert attacks.moved(step, [*model.parameters()]) == [*RIGHT.values()]


@each_name
def test_report_and_compiled_step_agree_after_an_eager_one(name):
    model = net()
    params = [*model.parameters()]
    optimizer = make(name, model, "all")
    step = compiled(optimizer)
    assert all(attacks.moved(optimizer.step, params))
    assert all(attacks.moved(step, params))
    optimizer.wd_policy = "no_bias_norm"
    assert attacks.moved(step, params) == [*attacks.reported(optimizer).values()]
    assert attacks.moved(optimizer.step, params) == [*RIGHT.values()]
    optimizer.wd_policy = "all"
    assert all(attacks.moved(step, params))


@each_name
def test_policy_that_is_assigned_where_no_graph_sees_it_is_followed(name):
    """A training step is compiled whole, and the policy changes between two calls."""
    model = net()
    params = [*model.parameters()]
    optimizer = make(name, model, "all")

    @torch.compile(backend="eager")
    def train(shift):
        optimizer.step()
        return shift + 1

    assert all(attacks.moved(lambda: train(torch.ones(1)), params))
    optimizer.wd_policy = "no_bias_norm"
    assert attacks.moved(lambda: train(torch.ones(1)), params) == [*RIGHT.values()]


# What one step of gradients of 0 leaves of SGD's 1.0, by form and target.
SHAPED = [
    (form("decoupled"), 1 - LR * WD),
    (form("l2"), 1 - LR * WD),
    (form("independent"), 1 - WD),
    (form("cautious"), 1 - LR * WD),
    (towards(3.0), 1 + LR * WD * 2),
    (lambda info: Decay(2), 1 - 2 * LR * WD),
]


@each_kind
def test_assigned_form_or_target_reaches_the_compiled_step(kind):
    model = net(1.0)
    params = [*model.parameters()]
    optimizer = make("SGD", model, "all", **KINDS[kind])
    step = compiled(optimizer)
    attacks.moved(step, params)
    for policy, expected in SHAPED:
        optimizer.wd_policy = policy
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)
        attacks.moved(step, params)
        for param in params:
            torch.testing.assert_close(param, torch.full_like(param, expected))


# Changes that a compiled step follows today, which a rebuilt one must not lose.


def rates(optimizer, model):
    optimizer.param_groups[0]["weight_decay"] = 0.0
    return [False] * 6


def order(optimizer, model):
    optimizer.param_groups[0]["params"].reverse()
    return [*RIGHT.values()]


def loading(optimizer, model):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [*RIGHT.values()]


def group_of_its_own(optimizer, model):
    taken = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [taken], "wd_policy": "all"})
    return [*RIGHT.values()]


def exempt_group(optimizer, model):
    taken = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [taken], "wd_policy": "none"})
    return [False, *[*RIGHT.values()][1:]]


def replaced(optimizer, model):
    for own in optimizer.param_groups[0]["params"]:
        own.data = own.data.clone()
    return [*RIGHT.values()]


def exchanged(optimizer, model):
    """The bias of the first layer comes to where its weight stood, and back."""
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]
    return [*RIGHT.values()]


def assigned_twice(optimizer, model):
    optimizer.wd_policy = "all"
    optimizer.wd_policy = "no_bias_norm"
    return [*RIGHT.values()]


def refused(optimizer, model):
    with pytest.raises(ValueError, match="matches no"):
        optimizer.wd_policy = {"absent.*": 0}
    return [*RIGHT.values()]


CHANGES = [
    rates,
    order,
    loading,
    group_of_its_own,
    exempt_group,
    replaced,
    exchanged,
    assigned_twice,
    refused,
]


# One of the changes sets every decay to 0, as a wrapper that takes it over does.
@pytest.mark.filterwarnings("ignore:`weight_decay` is 0 in every group:UserWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
def test_compiled_step_follows_a_change_by_hand(name, change):
    model = net()
    params = [*model.parameters()]
    optimizer = make(name, model)
    step = compiled(optimizer)
    assert attacks.moved(step, params) == [*RIGHT.values()]
    expected = change(optimizer, model)
    for _ in range(2):
        assert attacks.moved(step, params) == expected
        assert attacks.moved(optimizer.step, params) == expected


@each_name
def test_copy_with_another_policy_compiles_its_own_step(name):
    model = net()
    optimizer = make(name, model)
    step = compiled(optimizer)
    assert attacks.moved(step, [*model.parameters()]) == [*RIGHT.values()]
    twin, copied = copy.deepcopy((model, optimizer))
    copied.wd_policy = "all"
    assert all(attacks.moved(compiled(copied), [*twin.parameters()]))
    assert attacks.moved(step, [*model.parameters()]) == [*RIGHT.values()]


@each_name
def test_policy_written_into_a_group_is_told_by_the_compiled_step(name):
    model = net()
    params = [*model.parameters()]
    optimizer = make(name, model)
    step = compiled(optimizer)
    attacks.moved(step, params)
    optimizer.param_groups[0]["wd_policy"] = "none"
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match="wd_policy"):
        step()
    assert all(map(torch.equal, params, before))
    del optimizer.param_groups[0]["wd_policy"]
    assert attacks.moved(step, params) == [*RIGHT.values()]


@each_name
def test_new_tensor_is_decided_by_the_compiled_step(name):
    model = net()
    params = [*model.parameters()]
    optimizer = make(name, model)
    step = compiled(optimizer)
    attacks.moved(step, params)
    model.extra = nn.LayerNorm(4, bias=False)
    optimizer.param_groups[0]["params"].append(model.extra.weight)
    params.append(model.extra.weight)
    assert attacks.moved(step, params) == [*RIGHT.values(), False]
