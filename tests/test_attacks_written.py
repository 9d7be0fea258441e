"""Policies and modules that are written where nobody reads them are told, always.

An optimizer takes both in its constructor, in ``add_param_group`` and by assignment.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from tests.support import attacks
from tests.support.attacks import RIGHT, SERVED, WD, assert_right, make, net

each_name = pytest.mark.parametrize("name", SERVED)


# What is written.


def a_policy():
    return "wd_policy", "none"


def a_wrong_policy():
    return "wd_policy", "no_bais"


def a_module():
    return "model", nn.Linear(2, 2)


def some_modules():
    return "model", [nn.Linear(2, 2), nn.LayerNorm(2)]


WHAT = [a_policy, a_wrong_policy, a_module, some_modules]


# Where, and how it is taken back.


def into_a_group(optimizer, key, value):
    (group,) = optimizer.param_groups
    group[key] = value
    return lambda: group.pop(key)


def by_update(optimizer, key, value):
    (group,) = optimizer.param_groups
    group.update({key: value, "lr": group["lr"]})
    return lambda: group.pop(key)


def into_a_group_that_replaces_one(optimizer, key, value):
    (group,) = optimizer.param_groups
    optimizer.param_groups[0] = {**group, key: value}
    return lambda: optimizer.param_groups[0].pop(key)


def into_a_new_list(optimizer, key, value):
    optimizer.param_groups = [{**g, key: value} for g in optimizer.param_groups]
    return lambda: optimizer.param_groups[0].pop(key)


def into_the_same_list(optimizer, key, value):
    optimizer.param_groups[:] = [{**g, key: value} for g in optimizer.param_groups]
    return lambda: optimizer.param_groups[0].pop(key)


def into_a_group_that_is_appended(optimizer, key, value):
    params = [nn.Parameter(torch.ones(2))]
    optimizer.param_groups.append(
        {**optimizer.param_groups[0], "params": params, key: value}
    )
    return lambda: optimizer.param_groups.pop()


def into_the_defaults(optimizer, key, value):
    optimizer.defaults[key] = value
    return lambda: optimizer.defaults.pop(key)


WHERE = [
    into_a_group,
    by_update,
    into_a_group_that_replaces_one,
    into_a_new_list,
    into_the_same_list,
    into_a_group_that_is_appended,
    into_the_defaults,
]


# When. Each returns the model and the optimizer that go on.


def at_once(model, optimizer):
    return model, optimizer


def after_a_step(model, optimizer):
    assert_right(model, optimizer)
    return model, optimizer


def after_loading(model, optimizer):
    after_a_step(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, optimizer


def after_loading_and_a_step(model, optimizer):
    return after_a_step(*after_loading(model, optimizer))


def after_a_copy(model, optimizer):
    return copy.deepcopy(after_a_step(model, optimizer))


def after_a_pickle(model, optimizer):
    return pickle.loads(pickle.dumps(after_a_step(model, optimizer)))


def after_an_assignment(model, optimizer):
    after_a_step(model, optimizer)
    optimizer.wd_policy = "all"
    optimizer.wd_policy = "no_bias_norm"
    return model, optimizer


def after_many(model, optimizer):
    """Keep a plan as long as it may be kept."""
    for _ in range(20):
        optimizer.step()
    return after_a_step(model, optimizer)


WHEN = [
    at_once,
    after_a_step,
    after_loading,
    after_loading_and_a_step,
    after_a_copy,
    after_a_pickle,
    after_an_assignment,
    after_many,
]


def require_told_and_nothing_stepped(model, optimizer, key):
    attacks.set_grads([*model.parameters()], 0)
    before = [param.detach().clone() for param in model.parameters()]
    state = copy.deepcopy([dict(own) for own in optimizer.state.values()])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`{key}`"):
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    after = [dict(own) for own in optimizer.state.values()]
    assert str(after) == str(state)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam", "Own"])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("what", [a_policy, a_module])
def test_what_is_written_is_told_at_the_next_step(name, when, where, what):
    model = net()
    model, optimizer = when(model, make(name, model))
    key, value = what()
    take_back = where(optimizer, key, value)
    require_told_and_nothing_stepped(model, optimizer, key)
    take_back()
    for param in model.parameters():
        param.grad = None
    assert attacks.decays(model, optimizer) == RIGHT
    assert [group["weight_decay"] for group in optimizer.param_groups] == [WD]


@each_name
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("wd_policy", ["no_bias_norm", "matrices", None])
def test_whatever_it_says_and_whoever_decides_it_is_told(name, what, wd_policy):
    model = net()
    optimizer = make(name, model, wd_policy)
    attacks.zero_grads([*model.parameters()])
    optimizer.step()
    key, value = what()
    into_a_group(optimizer, key, value)
    require_told_and_nothing_stepped(model, optimizer, key)


@each_name
def test_policy_that_is_written_says_the_line_that_was_meant(name):
    """The line is typed, and does what was asked."""
    model = net()
    optimizer = make(name, model)
    assert_right(model, optimizer)
    take_back = into_a_group(optimizer, "wd_policy", "none")
    with pytest.raises(ValueError, match=r"optimizer\.wd_policy = "):
        optimizer.step()
    take_back()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it exempts all
        optimizer.wd_policy = "none"
    assert not any(attacks.decays(model, optimizer).values())


@each_name
def test_written_policy_is_told_once_the_closure_has_written_it(name):
    """In that step or in the next one; the groups stay the user's."""
    model = net()
    optimizer = make(name, model)
    assert_right(model, optimizer)

    def closure():
        optimizer.param_groups[0]["wd_policy"] = "none"

    def two_steps():
        optimizer.step(closure)
        optimizer.step(closure)

    with pytest.raises(ValueError, match="`wd_policy`"):
        two_steps()
    del optimizer.param_groups[0]["wd_policy"]
    assert_right(model, optimizer)


@each_name
@pytest.mark.parametrize("what", WHAT)
def test_what_is_written_is_not_saved(name, what):
    model = net()
    optimizer = make(name, model)
    assert_right(model, optimizer)
    key, value = what()
    take_back = into_a_group(optimizer, key, value)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert key not in loaded["param_groups"][0]
    take_back()
    optimizer.load_state_dict(loaded)
    assert_right(model, optimizer)


# What is left alone.


@each_name
@pytest.mark.parametrize("tag", ["backbone", 3, None, ("a", "b")])
def test_tag_of_a_user_under_model_is_left_alone(name, tag):
    model = net()
    optimizer = make(name, model)
    for _ in range(2):
        optimizer.param_groups[0]["model"] = tag
        assert attacks.decays(model, optimizer) == RIGHT
        assert optimizer.param_groups[0]["model"] == tag


@each_name
def test_policy_of_the_group_may_be_written_back(name):
    """As ZeroRedundancyOptimizer does at every step."""
    model = net()
    optimizer = make(name, model)
    for _ in range(2):
        optimizer.param_groups[0]["wd_policy"] = "no_bias_norm"
        assert attacks.decays(model, optimizer) == RIGHT


@each_name
def test_groups_that_are_added_rightly_bring_their_own(name):
    model, extra = net(), nn.Linear(3, 3)
    optimizer = make(name, model)
    assert_right(model, optimizer)
    group = {"params": list(extra.parameters()), "wd_policy": "none", "model": extra}
    given = dict(group)
    optimizer.add_param_group(group)
    assert group == given
    assert attacks.decays(model, optimizer) == RIGHT
    assert not any(attacks.moved(optimizer.step, [*extra.parameters()]))
    assert not {"wd_policy", "model"} & optimizer.param_groups[1].keys()
