"""Never silent about its own words: keys, written policies, reading and assigning."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW
from selective_optim.policies import exclude, is_bias, named
from tests.test_errors import whole

CLASSES = (SGD, Adam, AdamW)
each_class = pytest.mark.parametrize("cls", CLASSES)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def make(cls=AdamW, wd_policy="no_bias"):
    return cls(net().parameters(), lr=0.1, weight_decay=0.5, wd_policy=wd_policy)


def make_with_model(cls):
    model = net()  # an optimizer does not keep it alive
    return model, cls(model.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias")


def exempt(optimizer):
    return [row.name for row in optimizer.decay_report().rows if not row.weight_decay]


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()


# Keys of groups.

MISSPELT = {
    "wd_polcy": "wd_policy",
    "weigth_decay": "weight_decay",
    "weight_decays": "weight_decay",
    "parms": "params",
    "beta": "betas",
}


def told_of(key, cls=AdamW):
    group = {"params": list(net().parameters()), key: 0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cls([group], lr=0.1)
    return caught


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items(), ids=MISSPELT)
def test_misspelt_key_is_told_with_the_one_that_was_meant(key, meant):
    [warning] = told_of(key)
    assert str(warning.message) == (
        f"{key!r} in a parameter group has no effect. Did you mean {meant!r}?"
    )


@pytest.mark.parametrize(
    "key",
    [
        *("lr_scale", "name", "initial_lr", "weight_decay_mult"),
        *("weight_decay_1", "my_weight_decay"),  # nearer than misspelt ones are
        "reach",  # five letters of eight of "foreach"
    ],
)
def test_keys_of_others_are_left_alone(key):
    assert told_of(key) == []


# Policies written where nobody reads them.


@each_class
def test_policy_written_into_a_group_is_refused_at_the_next_step(cls):
    optimizer = make(cls)
    optimizer.param_groups[0]["wd_policy"] = "no_norm"
    with pytest.raises(
        ValueError,
        match=whole(
            "a `wd_policy` was written into group 0, where nothing reads it. "
            "Type optimizer.wd_policy = ... to decide anew, and del "
            "optimizer.param_groups[0]['wd_policy']."
        ),
    ):
        step(optimizer)
    del optimizer.param_groups[0]["wd_policy"]
    step(optimizer)


def name_of_none(optimizer):
    optimizer.param_groups[0]["wd_policy"] = "no_bais"


def no_policy(optimizer):
    optimizer.param_groups[0]["wd_policy"] = 3


def group_of_its_own(optimizer):
    late = list(nn.Linear(2, 2).parameters())
    like = optimizer.param_groups[0]
    optimizer.param_groups.append({**like, "params": late, "wd_policy": "no_bias"})


@pytest.mark.parametrize("write", [name_of_none, no_policy, group_of_its_own])
def test_policy_written_by_hand_is_told_whatever_it_says(write):
    optimizer = make()
    write(optimizer)
    with pytest.raises(ValueError, match=r"^a `wd_policy` was written into group \d, "):
        step(optimizer)


@each_class
def test_policy_that_a_group_was_decided_by_may_be_written_back(cls):
    # ZeroRedundancyOptimizer does.
    optimizer = make(cls)
    optimizer.param_groups[0]["wd_policy"] = "no_bias"
    step(optimizer)


@each_class
def test_policy_written_into_the_defaults_is_refused_at_the_next_step(cls):
    optimizer = make(cls)
    optimizer.defaults["wd_policy"] = "no_norm"
    with pytest.raises(
        ValueError,
        match=whole(
            "a `wd_policy` was written into optimizer.defaults, where nothing reads "
            "it. Type optimizer.wd_policy = ... to decide anew, and del "
            "optimizer.defaults['wd_policy']."
        ),
    ):
        step(optimizer)


# Reading and assigning.


@each_class
def test_policy_is_read_and_assigned(cls):
    _model, optimizer = make_with_model(cls)
    step(optimizer)
    assert optimizer.wd_policy == exclude(is_bias)
    optimizer.wd_policy = "no_norm"
    assert exempt(optimizer) == ["1.weight", "1.bias"]
    optimizer.wd_policy = None
    assert optimizer.wd_policy is None
    assert exempt(optimizer) == []


def test_assigned_policy_decides_the_next_step():
    optimizer = make(SGD, "no_norm")
    step(optimizer)
    params = optimizer.param_groups[0]["params"]
    before = [param.detach().clone() for param in params]
    optimizer.wd_policy = {"0.weight": 1, "*": 0}
    step(optimizer)
    assert [torch.equal(a, b) for a, b in zip(params, before)] == [False] + [True] * 5


@each_class
def test_refused_assignment_changes_nothing(cls):
    optimizer = make(cls)
    report = str(optimizer.decay_report())
    for wrong in ("no_bais", exclude("haed"), 3, lambda info: -1):
        with pytest.raises((TypeError, ValueError)):
            optimizer.wd_policy = wrong
        assert optimizer.wd_policy == exclude(is_bias)
        assert str(optimizer.decay_report()) == report


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_keep_the_policy(copied):
    assert copied(make(wd_policy="timm")).wd_policy == named("timm")


def test_callable_that_does_not_pickle_is_known_by_name_and_asked_no_more():
    optimizer = pickled(make(SGD, lambda info: info.ndim > 1))
    step(optimizer)
    assert exempt(optimizer) == ["0.bias", "1.weight", "1.bias", "2.bias"]
    shown = repr(optimizer.wd_policy)
    assert re.fullmatch(r"<lambda at test_policy_attribute\.py:\d+>", shown)
    late = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="did not pickle") as caught:
        optimizer.add_param_group({"params": late.parameters()})
    assert str(caught.value).endswith(
        f"ValueError: {shown} did not pickle, and a new parameter is to be decided "
        f"for. Type optimizer.wd_policy = ..., or write the policy as a function."
    )
    optimizer.wd_policy = "no_bias"
    optimizer.add_param_group({"params": late.parameters()})
    assert exempt(optimizer)[-1] == "bias"


# What an optimizer prints.


@each_class
def test_repr_shows_the_policy(cls):
    optimizer = make(cls, exclude("*.bias") * named("timm"))
    lines = repr(optimizer).splitlines()
    assert lines[0].startswith(f"{cls.__name__} (")
    assert lines[-2:] == ["wd_policy: exclude('*.bias') * named('timm')", ")"]


def test_repr_without_a_policy_is_that_of_torch():
    model = net()
    ours, torchs = (cls(model.parameters(), lr=0.1) for cls in (SGD, torch.optim.SGD))
    assert repr(ours) == repr(torchs)
