"""What is loaded leaves an explicit choice alone; what fails leaves all as it was."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from selective_optim import selective
from tests.support import attacks
from tests.support.attacks import (
    DECOUPLED,
    LR,
    OURS,
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
each_of_ours = pytest.mark.parametrize("name", OURS)


# The implementation that was chosen.

CHOICES = {
    "open": {},
    "for-loop": {"foreach": False, "fused": False},
    "no foreach": {"foreach": False},
    "no fused": {"fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FLAGS = ("foreach", "fused")


def torchs(name, model, **choice):
    cls = getattr(torch.optim, name)
    more = {**DECOUPLED.get(name, {}), **choice}
    return cls(model.parameters(), lr=LR, weight_decay=WD, **more)


def saved(name, model, whose, **choice):
    """Train for a step and save, in torch's class or in ours."""
    if whose == "torch":
        optimizer = torchs(name, model, **choice)
    else:
        optimizer = make(name, model, "all", **choice)
    attacks.set_grads([*model.parameters()], 0)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def without_flags(state_dict):
    """As saved by a torch that had no such choice, or by a tool that dropped it."""
    for group in state_dict["param_groups"]:
        for flag in FLAGS:
            del group[flag]
    return state_dict


def with_flags(state_dict):
    return state_dict


@each_of_ours
@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("theirs", CHOICES)
@pytest.mark.parametrize("whose", ["torch", "ours"])
def test_explicit_choice_stays_where_the_checkpoint_leaves_it_open(
    name, chosen, theirs, whose
):
    model = net()
    state_dict = saved(name, model, whose, **CHOICES[theirs])
    twin = copy.deepcopy(model)
    optimizer = make(name, model, "all", **CHOICES[chosen])
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    # What was chosen automatically is chosen again; of two explicit choices that in
    # the checkpoint wins, as in torch.
    wanted = (CHOICES[theirs] or CHOICES[chosen]) if CHOICES[chosen] else {}
    (group,) = optimizer.param_groups
    assert [group[flag] for flag in FLAGS] == [wanted.get(flag) for flag in FLAGS]
    require_steps_of(name, model, optimizer, twin, state_dict, wanted)


def require_steps_of(name, model, optimizer, twin, state_dict, wanted):
    """Compare with torch's class that loads the same and makes the same choice."""
    judge = torchs(name, twin)
    judge.load_state_dict(copy.deepcopy(state_dict))
    chosen = wanted or {"fused": True}  # what is taken where nobody chose
    judge.param_groups[0].update({"foreach": None, "fused": None, **chosen})
    for step in range(1, 4):
        for own, other in ((model, optimizer), (twin, judge)):
            attacks.set_grads([*own.parameters()], step)
            other.step()
    assert_same(model, twin)


@each_of_ours
@pytest.mark.parametrize("chosen", [name for name in CHOICES if name != "open"])
def test_explicit_choice_of_a_group_stays(name, chosen):
    model = net()
    state_dict = saved(name, model, "torch")
    groups = [{"params": list(model.parameters()), **CHOICES[chosen]}]
    optimizer = make(name, groups, "all")
    optimizer.load_state_dict(state_dict)
    (group,) = optimizer.param_groups
    wanted = CHOICES[chosen]
    assert [group[flag] for flag in FLAGS] == [wanted.get(flag) for flag in FLAGS]


@each_of_ours
@pytest.mark.parametrize("chosen", CHOICES)
def test_checkpoint_without_a_word_leaves_the_choice(name, chosen):
    model = net()
    state_dict = without_flags(saved(name, model, "torch"))
    twin = copy.deepcopy(model)
    optimizer = make(name, model, "all", **CHOICES[chosen])
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    require_steps_of(name, model, optimizer, twin, state_dict, CHOICES[chosen])


@each_of_ours
def test_explicit_choice_stays_through_two_checkpoints_and_a_copy(name):
    model = net()
    state_dict = saved(name, model, "torch")
    optimizer = make(name, model, "all", foreach=True)
    for _ in range(2):
        optimizer.load_state_dict(copy.deepcopy(state_dict))
        model, optimizer = copy.deepcopy((model, optimizer))
    assert optimizer.param_groups[0]["foreach"] is True


# What fails.


def snapshot(optimizer):
    """Copy all that may be seen of an optimizer."""
    groups = attacks.seen(optimizer)
    ids = [id(group) for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict())
    return groups, ids, id(optimizer.param_groups), state, str(optimizer.decay_report())


def require_as_before(before, optimizer):
    after = snapshot(optimizer)
    for one, other in zip(after, before):
        assert_same(one, other)


def noted(groups):
    """Remember the user's dicts: their keys, their values by identity, their lists."""
    lists = [list(g["params"]) for g in groups if isinstance(g.get("params"), list)]
    return [{k: id(v) for k, v in g.items()} for g in groups], [
        [id(item) for item in each] for each in lists
    ]


def stranger():
    return [nn.Parameter(torch.ones(4, 5))]


def asks_wrongly(info):
    raise KeyError(info.name)


# A group, and what is wrong with it: the error, and a word of it.
WRONG = {
    "unknown policy": (lambda m: {"wd_policy": "no_bais"}, ValueError, "no_bais"),
    "no policy": (lambda m: {"wd_policy": 3.5}, TypeError, "wd_policy"),
    "glob": (lambda m: {"wd_policy": {"absent.*": 0}}, ValueError, "matches no"),
    "negative": (lambda m: {"wd_policy": lambda info: -1}, ValueError, "-1"),
    "raises": (lambda m: {"wd_policy": asks_wrongly}, (KeyError, ValueError), "weight"),
    "stranger": (lambda m: {"params": stranger()}, ValueError, "known"),
    "set": (lambda m: {"params": {m.last.weight}}, TypeError, "set"),
    "no tensor": (lambda m: {"params": [3]}, TypeError, "int"),
    "no leaf": (
        lambda m: {"params": [m.last.weight * 2]},
        ValueError,
        "parameter|leaf",
    ),
    "text": (lambda m: {"lr": "0.1"}, TypeError, "lr"),
    "model": (lambda m: {"model": 3}, TypeError, "model"),
}


def groups_of(model, wrong):
    """Give a right group, and a wrong one."""
    right = {"params": [*model.first.parameters(), *model.norm.parameters()]}
    return [right, {"params": list(model.last.parameters()), "model": model, **wrong}]


@each_name
@pytest.mark.parametrize("case", WRONG)
def test_constructor_that_fails_leaves_the_callers_dicts_alone(name, case):
    model = net()
    wrong, kind, word = WRONG[case]
    groups = groups_of(model, wrong(model))
    before = noted(groups)
    with pytest.raises(kind, match=word):
        make(name, groups, "no_bias")
    assert noted(groups) == before


@each_name
def test_constructor_of_the_class_that_fails_leaves_the_callers_dicts_alone(name):
    groups = groups_of(net(), {})
    before = noted(groups)
    with pytest.raises((TypeError, ValueError)):
        make(name, groups, "no_bias", lr=-1.0, absent=3)
    with pytest.raises((TypeError, ValueError)):
        make(name, groups, "no_bias", weight_decay="much")
    assert noted(groups) == before


@each_name
def test_groups_of_a_failed_constructor_can_be_given_again(name):
    model = net()
    groups = groups_of(model, {})
    with pytest.raises(ValueError, match="no_bais"):
        make(name, groups, "no_bais")
    optimizer = make(name, groups)
    assert attacks.decays(model, optimizer) == RIGHT
    assert_whole(optimizer, groups=2)


@each_name
@pytest.mark.parametrize("case", WRONG)
def test_group_that_is_refused_leaves_all_as_it_was(name, case):
    model, optimizer = built(name)
    extra = nn.Sequential()
    extra.last = nn.Linear(4, 2)
    wrong, kind, word = WRONG[case]
    group = {"params": list(extra.parameters()), "model": extra, **wrong(extra)}
    before, given = snapshot(optimizer), noted([group])
    for _ in range(2):
        with pytest.raises(kind, match=word):
            optimizer.add_param_group(group)
        require_as_before(before, optimizer)
        assert noted([group]) == given
    assert_right(model, optimizer)
    optimizer.add_param_group({"params": extra.parameters()})
    assert_whole(optimizer, groups=2)


@each_name
def test_parameter_that_stands_already_is_refused_and_nothing_changes(name):
    model, optimizer = built(name)
    group = {"params": [nn.Parameter(torch.ones(2)), model.first.bias]}
    before, given = snapshot(optimizer), noted([group])
    with pytest.raises(ValueError, match=r"known|more than one"):
        optimizer.add_param_group(group)
    require_as_before(before, optimizer)
    assert noted([group]) == given
    assert_right(model, optimizer)


@each_name
@pytest.mark.parametrize("policy", ["no_bais", {"absent.*": 0}, asks_wrongly, 3.5])
def test_policy_that_is_refused_leaves_all_as_it_was(name, policy):
    model, optimizer = built(name)
    before = snapshot(optimizer)
    with pytest.raises((KeyError, TypeError, ValueError)):
        optimizer.wd_policy = policy
    require_as_before(before, optimizer)
    assert_right(model, optimizer)


# State dicts that cannot be loaded.


def fewer_parameters(state_dict):
    state_dict["param_groups"][0]["params"].pop()


def more_groups(state_dict):
    state_dict["param_groups"].append(dict(state_dict["param_groups"][0], params=[]))


def without_state(state_dict):
    del state_dict["state"]


def without_groups(state_dict):
    del state_dict["param_groups"]


def without_decay(state_dict):
    del state_dict["param_groups"][0]["weight_decay"]


def without_parameters(state_dict):
    del state_dict["param_groups"][0]["params"]


def split_by_hand(state_dict):
    (group,) = state_dict["param_groups"]
    rest = {**group, "params": group["params"][1:], "weight_decay": 0.0}
    state_dict["param_groups"] = [{**group, "params": group["params"][:1]}, rest]


BAD = [
    fewer_parameters,
    more_groups,
    without_state,
    without_groups,
    without_decay,
    without_parameters,
    split_by_hand,
]


@each_name
@pytest.mark.parametrize("spoil", BAD)
def test_load_that_fails_leaves_all_as_it_was(name, spoil):
    model, optimizer = built(name)
    bad = copy.deepcopy(optimizer.state_dict())
    spoil(bad)
    before, given = snapshot(optimizer), copy.deepcopy(bad)
    for _ in range(2):
        with pytest.raises((KeyError, TypeError, ValueError)):
            optimizer.load_state_dict(bad)
        require_as_before(before, optimizer)
        assert_same(bad, given)
    assert_right(model, optimizer)


@each_name
def test_hand_split_state_dict_is_told_with_the_call_to_type(name):
    _model, optimizer = built(name)
    bad = copy.deepcopy(optimizer.state_dict())
    split_by_hand(bad)
    with pytest.raises(ValueError, match="merge_groups"):
        optimizer.load_state_dict(bad)


class Broken(Exception):
    """Raised on purpose."""


def raises(*args):
    raise Broken


@each_name
def test_hook_that_raises_before_loading_leaves_all_as_it_was(name):
    model, optimizer = built(name)
    state_dict = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer)
    handle = optimizer.register_load_state_dict_pre_hook(raises)
    with pytest.raises(Broken):
        optimizer.load_state_dict(state_dict)
    require_as_before(before, optimizer)
    handle.remove()
    optimizer.load_state_dict(state_dict)
    assert_right(model, optimizer)


@each_name
@pytest.mark.parametrize("place", ["load_state_dict_post", "state_dict_pre"])
def test_hook_that_raises_around_loading_and_saving_leaves_groups_whole(name, place):
    model, optimizer = built(name)
    state_dict = copy.deepcopy(optimizer.state_dict())
    handle = getattr(optimizer, f"register_{place}_hook")(raises)
    failing = optimizer.state_dict
    if place.startswith("load"):
        failing = partial(optimizer.load_state_dict, state_dict)
    with pytest.raises(Broken):
        failing()
    handle.remove()
    assert_right(model, optimizer)


@each_name
def test_loading_leaves_the_callers_state_dict_alone(name):
    model, optimizer = built(name)
    state_dict = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(state_dict)
    optimizer.load_state_dict(state_dict)
    assert_same(state_dict, given)
    assert_right(model, optimizer)


class Refuses(Own):
    """A class whose own loading fails, after torch's has begun."""

    def __setstate__(self, state):
        super().__setstate__(state)
        if getattr(self, "refuses", False):
            raise Broken


def test_class_that_fails_while_it_loads_leaves_groups_whole():
    model = net()
    optimizer = selective(Refuses)(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm"
    )
    assert_right(model, optimizer)
    optimizer.refuses = True
    with pytest.raises(Broken):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.refuses = False
    assert_right(model, optimizer)


# Interrupts, between any two lines.


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_interrupt_at_any_line_of_loading_leaves_decisions_and_groups(name):
    number, interrupted = 0, True
    while interrupted:
        model, optimizer = built(name)
        load = partial(optimizer.load_state_dict, copy.deepcopy(optimizer.state_dict()))
        interrupted = Lines(number).run(load)
        assert_right(model, optimizer)
        number += 1
    assert number > 1


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_interrupt_at_any_line_of_adding_adds_a_group_or_none(name):
    number, interrupted = 0, True
    while interrupted:
        model, optimizer = built(name)
        extra = nn.Linear(3, 3)
        group = {"params": list(extra.parameters()), "model": extra}
        interrupted = Lines(number).run(partial(optimizer.add_param_group, group))
        groups = len(optimizer.param_groups)
        assert groups in (1, 2)
        assert_whole(optimizer, groups)
        assert attacks.decays(model, optimizer) == RIGHT
        acted = attacks.moved(optimizer.step, [*extra.parameters()])
        assert acted == [groups == 2, False]
        number += 1
    assert groups == 2


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_interrupt_at_any_line_of_an_assignment_leaves_one_policy_in_force(name):
    number, interrupted = 0, True
    while interrupted:
        model, optimizer = built(name)
        interrupted = Lines(number).run(partial(setattr, optimizer, "wd_policy", "all"))
        acted = attacks.decays(model, optimizer)
        assert acted in (RIGHT, dict.fromkeys(RIGHT, True))
        assert attacks.reported(optimizer) == acted
        optimizer.wd_policy = "no_bias_norm"
        assert_right(model, optimizer)
        number += 1
    assert all(acted.values())
