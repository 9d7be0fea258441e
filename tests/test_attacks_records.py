"""What a state dict records of decisions: by name, comparable, and typed again."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import suppress

import pytest
import torch
from torch import nn

from selective_optim import policies
from selective_optim.policies import exclude, form, only, scale, towards
from tests.support import attacks
from tests.support.attacks import LR, OURS, RIGHT, SERVED, WD, make, net
from tests.support.compare import assert_same

each_name = pytest.mark.parametrize("name", SERVED)


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(name, given, policy="no_bias_norm", **more):
    optimizer = make(name, given, policy, **more)
    attacks.set_grads([p for g in optimizer.param_groups for p in g["params"]], 0)
    optimizer.step()
    return optimizer


def told(load):
    """List what is warned while something is loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


# Loading by names, as torch's documentation of load_state_dict does it.


class InFront(nn.Module):
    """``Net`` behind one more layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 3)
        for name, module in net().named_children():
            setattr(self, name, module)


class Behind(nn.Module):
    """``Net`` before one more norm."""

    def __init__(self):
        super().__init__()
        for name, module in net().named_children():
            setattr(self, name, module)
        self.tail = nn.LayerNorm(2)


class Reordered(nn.Module):
    """``Net``, its layers registered the other way round."""

    def __init__(self):
        super().__init__()
        for name, module in reversed([*net().named_children()]):
            setattr(self, name, module)


class Shorter(nn.Module):
    """``Net`` without its norm."""

    def __init__(self):
        super().__init__()
        self.first, self.last = net().first, net().last


MODELS = [InFront, Behind, Reordered, Shorter]
each_model = pytest.mark.parametrize("model", MODELS)


def by_name(optimizer, state_dict):
    """Adapt a state dict to the names of an optimizer: torch's own recipe."""
    saved = state_dict["param_groups"][0]
    ids = dict(zip(saved["param_names"], saved["params"]))
    names = optimizer.param_groups[0]["param_names"]
    state = {
        i: state_dict["state"][ids[name]]
        for i, name in enumerate(names)
        if name in ids and ids[name] in state_dict["state"]
    }
    group = {**saved, "params": list(range(len(names))), "param_names": list(names)}
    return {**state_dict, "state": state, "param_groups": [group]}


def hooked(optimizer, state_dict):
    optimizer.register_load_state_dict_pre_hook(by_name)
    optimizer.load_state_dict(state_dict)


def adapted(optimizer, state_dict):
    optimizer.load_state_dict(by_name(optimizer, state_dict))


WAYS = [hooked, adapted]
each_way = pytest.mark.parametrize("load", WAYS)


def saved_and_fresh(name, model, before, after, **more):
    """Train ``Net`` under a policy, and make the optimizer of a changed model."""
    first, second = net(), model()
    old = trained(name, list(first.named_parameters()), before, **more)
    new = make(name, list(second.named_parameters()), after, **more)
    return first, through_file(old.state_dict()), second, new


USUAL = exclude("*bias", "norm.*", "tail.*", missing_ok=True)


@each_name
@each_model
@each_way
def test_same_decisions_loaded_by_names_are_silent(name, model, load):
    _, state_dict, second, optimizer = saved_and_fresh(name, model, USUAL, USUAL)
    assert told(lambda: load(optimizer, state_dict)) == []
    names = dict(second.named_parameters())
    if name != "Own" and "momentum" not in optimizer.defaults:
        loaded = {n for n, param in names.items() if optimizer.state.get(param)}
        assert loaded == set(names) & set(RIGHT)
    expected = {n: RIGHT.get(n, n == "stem.weight") for n in names}
    assert attacks.reported(optimizer) == expected
    optimizer.state.clear()  # whose moments would move what is exempt
    assert attacks.decays(second, optimizer) == expected


@each_name
@each_model
@each_way
def test_changed_decision_loaded_by_names_names_its_parameter(name, model, load):
    """The last layer decayed, and is exempt now; wherever it stands, it is named."""
    after = USUAL * exclude("last.*")
    *_, optimizer = made = saved_and_fresh(name, model, USUAL, after)
    [message] = told(lambda: load(optimizer, made[1]))
    assert "'last.weight'" in message
    others = ("stem.weight", "first.weight", "norm.weight", "last.bias")
    assert not any(f"'{other}'" in message for other in others)


@pytest.mark.parametrize("name", OURS)
@each_model
@each_way
def test_what_training_began_with_is_loaded_by_names(name, model, load):
    """Each pulls to what it was itself, and not to what stood in its place."""
    pull = towards("init") * USUAL
    _, state_dict, second, optimizer = saved_and_fresh(name, model, pull, pull)
    origin = {n: p.detach().clone() for n, p in net().named_parameters()}
    with torch.no_grad():
        for param in second.parameters():
            param.fill_(7.0)
    messages = told(lambda: load(optimizer, state_dict))
    assert all("'stem.weight'" in message for message in messages)  # in no record
    optimizer.state.clear()
    attacks.zero_grads([*second.parameters()])
    optimizer.step()
    for n, param in second.named_parameters():
        if n in ("first.weight", "last.weight"):
            expected = 7.0 - LR * WD * (7.0 - origin[n])
            torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize("name", OURS)
@each_way
@pytest.mark.parametrize("shape", ["independent", "corrected"])
def test_rate_that_training_began_with_is_loaded_by_names(name, load, shape):
    policy = form(shape) * USUAL
    first, second = net(), InFront()
    old = trained(name, list(first.named_parameters()), policy)
    for group in old.param_groups:
        group["lr"] = LR / 4
    state_dict = through_file(old.state_dict())
    new = make(name, list(second.named_parameters()), policy, lr=LR / 4)
    messages = told(lambda: load(new, state_dict))
    rates = {row.name: row.lr0 for row in new.decay_report().rows}
    assert rates["first.weight"] == rates["last.weight"] == LR
    assert all("stem.weight" in message for message in messages)


# Names, also where torch's groups have none.


def texts(value):
    """List every text in a state dict, but what torch writes by itself."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield from () if key == "param_names" else texts(own)
            yield from [key] if isinstance(key, str) else ()
    elif isinstance(value, (list, tuple)):
        for own in value:
            yield from texts(own)
    elif isinstance(value, str):
        yield value


@each_name
def test_record_holds_the_names_that_are_known(name):
    optimizer = trained(name, net())
    assert "param_names" not in optimizer.param_groups[0]
    assert set(RIGHT) <= set(texts(through_file(optimizer.state_dict())))


@each_name
def test_record_holds_canonical_names(name):
    wrapped = nn.Module()
    wrapped.module = net()
    optimizer = trained(name, wrapped)
    found = set(texts(optimizer.state_dict()))
    assert set(RIGHT) <= found
    assert not any("module." in text for text in found)


@each_name
def test_record_without_names_is_one(name):
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    saved = trained(name, params, "matrices")
    other = make(name, attacks.clones(params), "matrices")
    assert told(lambda: other.load_state_dict(through_file(saved.state_dict()))) == []
    other.wd_policy = "all"
    [message] = told(lambda: other.load_state_dict(through_file(saved.state_dict())))
    assert "parameter 1 of group 0" in message


@each_name
def test_layers_that_changed_places_have_changed_no_decision(name):
    """torch loads by position; whether that is refused or not, it is no new policy."""
    policy = {"a.*": 0}
    layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
    saved = trained(name, nn.ModuleDict(layers), policy)
    turned = nn.ModuleDict({key: nn.Linear(3, 3) for key in ("b", "a")})
    other = make(name, turned, policy)
    state_dict = through_file(saved.state_dict())
    with suppress(ValueError):
        assert told(lambda: other.load_state_dict(state_dict)) == []


# The old policy, as the line to type.

TYPED = [
    "no_bias",
    "all",
    "matrices",
    exclude("*.bias", "norm.*"),
    only("last.*"),
    scale("first.*", by=0.5) * exclude("*.bias"),
    {"last.*": 0.1, "*.bias": 0},
    "exclude('*.bias', is_norm) * scale('last.*', by=0.5)",
]


@each_name
@pytest.mark.parametrize("old", TYPED, ids=str)
def test_old_policy_is_told_as_it_is_typed(name, old):
    """Typed as the warning tells it, it loads without a word."""
    model = net()
    saved = trained(name, model, old)
    text = repr(saved.wd_policy)
    state_dict = through_file(saved.state_dict())
    other = net()  # kept: an optimizer keeps no model alive
    new = make(name, other, {"first.weight": 3, "*": 2})
    [message] = told(lambda: new.load_state_dict(copy.deepcopy(state_dict)))
    assert text in message or f"{old!r}" in message
    new.wd_policy = policies.parse(text)
    assert told(lambda: new.load_state_dict(copy.deepcopy(state_dict))) == []


@each_name
def test_old_policy_of_none_is_told_as_all(name):
    saved = trained(name, net(), None)
    new = make(name, net())
    [message] = told(lambda: new.load_state_dict(through_file(saved.state_dict())))
    assert "None" in message or "all" in message
    new.wd_policy = None
    assert told(lambda: new.load_state_dict(through_file(saved.state_dict()))) == []


def decays_matrices(info):
    return info.ndim > 1


@each_name
def test_old_policy_that_cannot_be_typed_is_named(name):
    saved = trained(name, net(), decays_matrices)
    new = make(name, net(), {"first.weight": 3, "*": 2})
    [message] = told(lambda: new.load_state_dict(through_file(saved.state_dict())))
    assert "decays_matrices" in message


@each_name
def test_policy_of_a_group_is_told_as_well(name):
    def groups(policy):
        model = net()
        body = [*model.first.parameters(), *model.norm.parameters()]
        head = {"params": model.last.parameters(), "wd_policy": policy}
        return model, [{"params": body, "model": model}, head]

    first, given = groups(exclude("*.bias"))  # kept: an optimizer keeps no model alive
    saved = trained(name, given)
    second, given = groups("none")
    new = make(name, given)
    [message] = told(lambda: new.load_state_dict(through_file(saved.state_dict())))
    assert repr(exclude("*.bias")) in message
    assert first is not second


# Checkpoints of others before.

OLD = [[[1.0, None], [0.0, None], [0.0, None], [0.0, None], [1.0, None], [0.0, None]]]


def old_record(state_dict, form):
    """Write the record as release 0.1.0 did: no names."""
    groups = [
        {k: v for k, v in group.items() if k not in ("decay", "wd_policy")}
        for group in state_dict["param_groups"]
    ]
    record = [[[multiplier, form] for multiplier, _ in own] for own in OLD]
    state = {k: v for k, v in state_dict["state"].items() if isinstance(k, int)}
    return {"state": state, "param_groups": groups, "decay": record}


FORMS = {"SGD": "l2", "Own": None}


@each_name
def test_checkpoint_of_the_last_release_loads(name):
    saved = trained(name, net())
    state_dict = old_record(
        through_file(saved.state_dict()), FORMS.get(name, "decoupled")
    )
    model = net()
    new = make(name, model)
    assert told(lambda: new.load_state_dict(copy.deepcopy(state_dict))) == []
    assert [len(own) for own in new.state.values()] == [
        len(own) for own in saved.state.values()
    ]
    new.wd_policy = "all"
    [message] = told(lambda: new.load_state_dict(copy.deepcopy(state_dict)))
    assert "'first.bias'" in message


@each_name
def test_checkpoint_of_the_last_release_brings_what_training_began_with(name):
    policy = form("independent") * exclude("*bias", "norm.*")
    saved = trained(name, net(), policy)
    state_dict = old_record(through_file(saved.state_dict()), "independent")
    for entry in state_dict["decay"][0]:
        entry.extend([{"lr0": 0.4}] if entry[0] else [])
    new = make(name, net(), policy)
    assert told(lambda: new.load_state_dict(state_dict)) == []
    rates = {row.name: row.lr0 for row in new.decay_report().rows}
    assert rates["first.weight"] == rates["last.weight"] == 0.4


@pytest.mark.parametrize("name", OURS)
def test_state_dict_loads_into_torchs_class_and_steps_there(name):
    model = net()
    saved = trained(name, model)
    twin = copy.deepcopy(model)
    more = attacks.DECOUPLED.get(name, {})
    torchs = getattr(torch.optim, name)(
        twin.parameters(), lr=1.0, foreach=False, **more
    )
    torchs.load_state_dict(through_file(saved.state_dict()))
    assert torchs.param_groups[0]["lr"] == LR
    saved.wd_policy = "all"
    for group in (*saved.param_groups, *torchs.param_groups):
        group.update(foreach=False, fused=False)
    for own, other in ((model, saved), (twin, torchs)):
        attacks.set_grads([*own.parameters()], 1)
        other.step()
    assert_same(model, twin)
