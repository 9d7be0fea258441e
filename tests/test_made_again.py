"""Optimizers that are made again from one that has a policy do not lose it in silence.

Look-ahead copies, federated clients, architecture search, Horovod and torchrl make an
optimizer from the class and numbers, or from the groups, of another.
"""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings

import pytest
import torch

from selective_optim import _optimizer, deciding_for
from tests.support.attacks import (
    DECOUPLED,
    LR,
    RIGHT,
    SERVED,
    WD,
    assert_right,
    make,
    net,
)

each_name = pytest.mark.parametrize("name", SERVED)


@pytest.fixture(autouse=True)
def alone():
    """Let no optimizer of another test be the one that an optimizer is made of."""
    _optimizer.alive.clear()


def told(build):
    """Build, and return the result and what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        built = build()
    return built, [str(w.message) for w in caught]


# Ways in which people make an optimizer again; all are given another model's tensors.


def arguments_of(optimizer):
    """List what its constructor takes of its defaults: Adam's flag is none of AdamW."""
    taken = inspect.signature(type(optimizer)).parameters
    return {k: v for k, v in optimizer.defaults.items() if k in taken}


def from_class_and_defaults(optimizer, model):
    return type(optimizer)(model.parameters(), **arguments_of(optimizer))


def from_class_and_a_list(optimizer, model):
    return type(optimizer)(list(model.parameters()), **arguments_of(optimizer))


def from_what_a_group_says(optimizer, model):
    taken = inspect.signature(type(optimizer)).parameters
    (group,) = optimizer.param_groups
    own = {k: v for k, v in group.items() if k in taken and k != "params"}
    return optimizer.__class__(model.parameters(), **own)


def from_copied_groups(optimizer, model):
    params = iter(model.parameters())
    groups = [
        {**group, "params": [next(params) for _ in group["params"]]}
        for group in optimizer.param_groups
    ]
    return type(optimizer)(groups)


def from_detached_groups(optimizer, model):
    groups = [
        {
            **group,
            "params": [p.detach().clone().requires_grad_() for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    return type(optimizer)(groups)


def from_deep_copied_groups(optimizer, model):
    return type(optimizer)(copy.deepcopy(optimizer.param_groups))


def from_its_groups(optimizer, model):
    """As Horovod's DistributedOptimizer, over the same tensors."""
    return type(optimizer)(optimizer.param_groups)


def from_its_groups_by_a_subclass(optimizer, model):
    cls = type(type(optimizer).__name__, (type(optimizer),), {})
    return cls(optimizer.param_groups)


IDIOMS = [
    from_class_and_defaults,
    from_class_and_a_list,
    from_what_a_group_says,
    from_copied_groups,
    from_detached_groups,
    from_deep_copied_groups,
    from_its_groups,
    from_its_groups_by_a_subclass,
]
each_idiom = pytest.mark.parametrize("again", IDIOMS)


@each_name
@each_idiom
def test_optimizer_that_is_made_again_without_the_policy_is_told(name, again):
    model = net()
    optimizer = make(name, model)
    made, messages = told(lambda: again(optimizer, net()))
    assert made.wd_policy is None
    [message] = messages
    assert "deciding_for(model, wd_policy=" in message
    assert_right(model, optimizer)


@each_name
@each_idiom
def test_it_is_told_also_after_steps(name, again):
    model = net()
    optimizer = make(name, model)
    assert_right(model, optimizer)
    _, messages = told(lambda: again(optimizer, net()))
    assert len(messages) == 1


@each_name
@pytest.mark.parametrize("again", IDIOMS[:4])
def test_what_the_warning_advises_is_typed_and_works(name, again):
    optimizer = make(name, net())
    other = net()
    with deciding_for(other, wd_policy="no_bias_norm"):
        made, messages = told(lambda: again(optimizer, other))
    assert messages == []
    assert_right(other, made)


@each_name
def test_advice_works_for_copies_whose_tensors_no_module_owns(name):
    """The detached ones of a look-ahead are decided where shapes suffice."""
    model = net()
    optimizer = make(name, model, "matrices")
    with deciding_for(model, wd_policy="matrices"):
        made, messages = told(lambda: from_detached_groups(optimizer, model))
    assert messages == []
    rows = made.decay_report().rows
    assert [row.weight_decay > 0 for row in rows] == [*RIGHT.values()]


@each_name
def test_groups_by_rate_are_told_once(name):
    model = net()
    groups = [{"params": own.parameters(), "lr": 0.1} for own in model.children()]
    optimizer = make(name, groups)
    made, messages = told(lambda: from_detached_groups(optimizer, model))
    assert len(messages) == 1
    assert len(made.param_groups) == 3


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_rate_that_is_a_tensor_is_compared_as_well(name):
    optimizer = make(name, net(), lr=torch.tensor(LR), foreach=False)
    _, messages = told(lambda: from_class_and_defaults(optimizer, net()))
    assert len(messages) == 1


# Innocent ones.


def plain(name, model, **more):
    """Make one as a second network of the same program has it."""
    numbers = {"lr": LR, "weight_decay": WD, **DECOUPLED.get(name, {})}
    return SERVED[name](model.parameters(), **{**numbers, **more})


def twin(name, optimizer):
    return plain(name, net())


def twin_of_another_decay(name, optimizer):
    return plain(name, net(), weight_decay=WD / 2)


def twin_with_a_policy(name, optimizer):
    numbers = arguments_of(optimizer)
    return SERVED[name](net().parameters(), **numbers, wd_policy="all")


def again_at_another_rate(name, optimizer):
    numbers = {**arguments_of(optimizer), "lr": LR / 3}
    return SERVED[name](net().parameters(), **numbers)


def again_without_decay(name, optimizer):
    numbers = {**arguments_of(optimizer), "weight_decay": 0.0}
    return SERVED[name](net().parameters(), **numbers)


def copied_groups_without_decay(name, optimizer):
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return from_detached_groups(optimizer, None)


def copied_deeply(name, optimizer):
    return copy.deepcopy(optimizer)


def pickled(name, optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def copied_groups_with_a_policy(name, optimizer):
    groups = [{**g, "wd_policy": "all"} for g in copy.deepcopy(optimizer.param_groups)]
    return SERVED[name](groups)


INNOCENT = [
    twin_of_another_decay,
    twin_with_a_policy,
    again_at_another_rate,
    again_without_decay,
    copied_groups_without_decay,
    copied_deeply,
    pickled,
    copied_groups_with_a_policy,
]


@each_name
@pytest.mark.parametrize("innocent", INNOCENT)
def test_innocent_optimizers_stay_without_a_word(name, innocent):
    model = net()
    optimizer = make(name, model)
    assert told(lambda: innocent(name, optimizer))[1] == []


@pytest.mark.parametrize("name", [name for name in SERVED if name != "Own"])
def test_twin_that_states_some_numbers_stays_without_a_word(name):
    """A user's own class may have no others, and then all are stated."""
    optimizer = make(name, net())
    assert told(lambda: twin(name, optimizer))[1] == []


@each_name
@each_idiom
def test_one_made_again_from_one_without_a_policy_stays_without_a_word(name, again):
    model = net()
    optimizer = make(name, model, None)
    assert told(lambda: again(optimizer, net()))[1] == []


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam"])
def test_one_that_is_dead_is_not_remembered(name):
    optimizer = make(name, net())
    numbers = arguments_of(optimizer)
    del optimizer
    gc.collect()
    assert told(lambda: SERVED[name](net().parameters(), **numbers))[1] == []


def test_another_class_with_the_same_numbers_stays_without_a_word():
    optimizer = make("AdamW", net())
    numbers = {k: v for k, v in arguments_of(optimizer).items() if k in ("lr", "eps")}
    assert told(lambda: SERVED["Adam"](net().parameters(), **numbers))[1] == []


@each_name
def test_torchs_class_is_never_told_of(name):
    cls = type(make(name, net(), None)).__mro__[1:]
    base = next(c for c in cls if c.__module__.startswith(("torch.", "tests.")))
    optimizer = make(name, net())
    groups = copy.deepcopy(optimizer.param_groups)
    assert told(lambda: base(groups))[1] == []


@each_name
def test_lost_groups_of_a_module_that_was_moved_are_no_second_optimizer(name):
    """Composer clears the groups and adds them again, complete as they are."""
    model = net()
    optimizer = make(name, model)
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups.clear()
    _, messages = told(lambda: [optimizer.add_param_group(group) for group in groups])
    assert messages == []
    assert_right(model, optimizer)
