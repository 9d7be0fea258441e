"""Hostile input gives one clear error, changes nothing, and can be put right."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import SGD, Adam, AdamW
from selective_optim.policies import exclude, is_bias
from tests.support.compare import assert_same

CLASSES = {
    "SGD": (SGD, {"momentum": 0.9}),
    "Adam": (Adam, {"amsgrad": True}),
    "AdamW": (AdamW, {}),
}
KINDS = [
    {"fused": True},
    {"fused": False, "foreach": False},
    {"foreach": True},
]
each_class = pytest.mark.parametrize("name", CLASSES)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def build(name, model, **arguments):
    cls, own = CLASSES[name]
    arguments = {"lr": 0.05, "weight_decay": 0.1, "wd_policy": "no_bias_norm"} | (
        arguments
    )
    return cls(model.parameters(), **own, **arguments)


def backward(model, step=0):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def trained(name, **arguments):
    model = net()
    optimizer = build(name, model, **arguments)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    backward(model, 3)
    return model, optimizer


def values(model, optimizer):
    """Copy parameters, gradients, state and groups: all that a step goes by."""
    return copy.deepcopy(
        (
            [param.detach() for param in model.parameters()],
            [param.grad for param in model.parameters()],
            [dict(optimizer.state.get(p, {})) for p in model.parameters()],
            [{**group, "params": None} for group in optimizer.param_groups],
            optimizer.state_dict(),
            optimizer.decay_report().rows,
        )
    )


def everything(model, optimizer):
    """Add to the values which tensors are in the groups."""
    ids = [list(map(id, group["params"])) for group in optimizer.param_groups]
    return values(model, optimizer), ids


def assert_refused_and_mended(run, expected, match, act, kind=ValueError):
    """Check that the act fails with everything as it was, then that a step is right."""
    model, optimizer = run
    before = everything(model, optimizer)
    for _ in range(2):  # a second try fails alike
        with pytest.raises(kind, match=match):
            act()
        assert_same(everything(model, optimizer), before)
    optimizer.step()
    expected[1].step()
    assert_same(values(*run), values(*expected))


# Hyperparameters set later through a group

NUMBERS = [
    *[(name, key) for name in CLASSES for key in ("lr", "weight_decay")],
    *[("SGD", "momentum"), ("SGD", "dampening"), ("Adam", "eps"), ("AdamW", "eps")],
]


@pytest.mark.parametrize(("name", "key"), [*NUMBERS, ("Adam", "betas")])
def test_nan_set_through_a_group_is_refused_at_the_step(name, key):
    run, twin = trained(name), trained(name)
    optimizer = run[1]
    [group] = optimizer.param_groups
    good = group[key]
    before = everything(*run)
    group[key] = (math.nan, 0.9) if key == "betas" else math.nan
    with pytest.raises(
        ValueError, match=rf"^`{key}` of group 0 is nan, .* NaN\. Set .* to a number\.$"
    ):
        optimizer.step()
    group[key] = good
    assert_same(everything(*run), before)
    optimizer.step()
    twin[1].step()
    assert_same(values(*run), values(*twin))


# torch's constructors refuse these; its steps take them, as OneCycleLR makes some.
ODD = [
    *[(name, key, -0.01) for name, key in NUMBERS],
    *[(name, key, math.inf) for name, key in NUMBERS],
    ("Adam", "betas", (0.9, 1.0)),
    ("Adam", "betas", (1.05, 0.99)),
    ("AdamW", "betas", (-0.1, 0.9)),
]


@pytest.mark.parametrize("kind", [{"fused": True}, {"fused": False, "foreach": False}])
@pytest.mark.parametrize(("name", "key", "value"), ODD)
def test_odd_value_set_through_a_group_steps_as_in_torch(name, key, value, kind):
    outcomes = []
    for module in (selective_optim, torch.optim):
        param = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
        own = CLASSES[name][1]
        optimizer = getattr(module, name)([param], **{**own, "lr": 0.05}, **kind)
        for step in range(4):
            if step == 2:
                optimizer.param_groups[0][key] = value
            param.grad = torch.linspace(1, 2, 6).reshape(2, 3)
            try:
                optimizer.step()
            except (ArithmeticError, ValueError) as error:
                outcomes.append((type(error), str(error)))
                break
        outcomes.append(param.detach())
    half = len(outcomes) // 2
    assert outcomes[:half][:-1] == outcomes[half:][:-1]
    torch.testing.assert_close(
        outcomes[half - 1], outcomes[-1], rtol=0, atol=0, equal_nan=True
    )


@each_class
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_bad_value_in_the_second_group_moves_nothing_in_the_first(name, key):
    model = net()
    cls, own = CLASSES[name]
    optimizer = cls(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}],
        **own,
        lr=0.05,
    )
    for step in range(3):
        backward(model, step)
        optimizer.step()
    before = everything(model, optimizer)
    good = optimizer.param_groups[1][key]
    optimizer.param_groups[1][key] = math.nan
    with pytest.raises(ValueError, match=f"`{key}` of group 1 is nan"):
        optimizer.step()
    optimizer.param_groups[1][key] = good
    assert_same(everything(model, optimizer), before)


class Moody:
    """A policy that fails for one parameter, until it does not."""

    failing = True

    def __call__(self, info):
        if self.failing and info.name.endswith("bias"):
            raise KeyError("gain")
        return 1.0


@each_class
def test_policy_that_raises_builds_nothing_and_can_be_tried_again(name):
    model, moody = net(), Moody()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(
        ValueError,
        match=r"`wd_policy` .*Moody.* failed for '0\.bias'.*: KeyError: 'gain'",
    ):
        build(name, model, wd_policy=moody)
    assert_same([param.detach() for param in model.parameters()], before)
    moody.failing = False
    optimizer = build(name, model, wd_policy=moody)
    assert {row.weight_decay for row in optimizer.decay_report().rows} == {0.1}


@each_class
def test_policy_that_raises_for_an_added_group_adds_nothing(name):
    run, twin = trained(name), trained(name)
    moody, later = Moody(), nn.Linear(2, 2)
    group = {"params": later, "wd_policy": moody}
    given = dict(group)

    def act():
        run[1].add_param_group(group)

    assert_refused_and_mended(run, twin, r"failed for 'bias'.*: KeyError: 'gain'", act)
    assert group.keys() == given.keys()
    moody.failing = False
    run[1].add_param_group(group)
    assert [len(g["params"]) for g in run[1].param_groups] == [6, 2]


@each_class
def test_parameter_twice_in_one_group_is_told_as_torch_tells_it(name):
    cls, own = CLASSES[name]
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        cls([weight, weight], **own, weight_decay=0.1)


@each_class
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
def test_parameter_listed_twice_steps_as_in_torch(name, kind):
    runs = []
    for module in (selective_optim, torch.optim):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
        own = {**CLASSES[name][1], "lr": 0.05, "weight_decay": 0.1, **kind}
        ours = {"wd_policy": "matrices"} if module is selective_optim else {}
        split = [
            {"params": [params[0], params[0]]},
            {"params": [params[1]], "weight_decay": 0.0},
        ]
        whole = [params[0], params[1], params[0]]
        optimizer = getattr(module, name)(whole if ours else split, **own, **ours)
        for step in range(4):
            for param in params:
                torch.manual_seed(step)
                param.grad = torch.randn_like(param)
            optimizer.step()
        runs.append([params, [dict(optimizer.state[p]) for p in params]])
    assert_same(*runs)


@each_class
def test_parameter_of_another_group_is_refused_and_adds_nothing(name):
    run, twin = trained(name), trained(name)
    assert_refused_and_mended(
        run,
        twin,
        "some parameters appear in more than one parameter group",
        lambda: run[1].add_param_group({"params": [run[0][0].weight]}),
    )


def other_model(state):
    return AdamW(nn.Linear(7, 5).parameters()).state_dict()


def other_shapes(state):
    state = copy.deepcopy(state)
    for own in state["state"].values():
        for key in own.keys() - {"step"}:
            own[key] = torch.zeros(9, 9)
    return state


def fewer_parameters(state):
    state = copy.deepcopy(state)
    state["param_groups"][0]["params"].pop()
    return state


def more_groups(state):
    state = copy.deepcopy(state)
    state["param_groups"].append(dict(state["param_groups"][0], params=[]))
    return state


def without_state(state):
    return {"param_groups": state["param_groups"]}


def without_groups(state):
    return {"state": state["state"]}


def without_rate(state):
    state = copy.deepcopy(state)
    del state["param_groups"][0]["lr"]
    return state


def of_a_model(state):
    return net().state_dict()


DICTS = [
    other_model,
    other_shapes,
    fewer_parameters,
    more_groups,
    without_state,
    without_groups,
    without_rate,
    of_a_model,
]


@each_class
@pytest.mark.parametrize("change", DICTS, ids=lambda change: change.__name__)
def test_state_dict_of_something_else_is_refused(name, change):
    run, twin = trained(name), trained(name)
    bad = change(run[1].state_dict())
    text = "state dict|state_dict|different number of parameter groups"
    assert_refused_and_mended(run, twin, text, lambda: run[1].load_state_dict(bad))
    run[1].load_state_dict(twin[1].state_dict())
    assert_same(values(*run), values(*twin))


@each_class
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_while_it_is_read(name, part, tmp_path):
    run, twin = trained(name), trained(name)
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save(run[1].state_dict(), whole)
    content = whole.read_bytes()
    cut.write_bytes(content[: int(part * len(content))])

    def load(path):
        run[1].load_state_dict(torch.load(path, weights_only=True))

    kind = (RuntimeError, EOFError, OSError)  # torch.load's own
    assert_refused_and_mended(run, twin, None, lambda: load(cut), kind)
    load(whole)
    assert_same(run[1].state_dict(), torch.load(whole, weights_only=True))


def with_later_layer(name):
    model = net()
    cls, own = CLASSES[name]
    arguments = {**own, "lr": 0.05, "weight_decay": 0.1, "wd_policy": "no_bias_norm"}
    optimizer = cls(model.parameters(), model=model, **arguments)
    backward(model)
    optimizer.step()
    return model, optimizer


@each_class
def test_layer_attached_after_construction_is_known_when_it_is_added(name):
    model, optimizer = with_later_layer(name)
    model.append(nn.LayerNorm(2))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    rows = optimizer.decay_report().rows[-2:]
    assert [(row.name, row.weight_decay) for row in rows] == [
        ("3.weight", 0.0),
        ("3.bias", 0.0),
    ]


@each_class
def test_parameter_outside_of_the_module_is_refused_until_it_is_attached(name):
    model, optimizer = with_later_layer(name)
    twin = with_later_layer(name)
    layer = nn.Linear(2, 2)
    for run in (model, twin[0]):
        backward(run, 1)
    assert_refused_and_mended(
        (model, optimizer),
        twin,
        r"parameter 0 of group 1 \(shape 2 x 2\).*",
        lambda: optimizer.add_param_group({"params": list(layer.parameters())}),
    )
    model.append(layer)
    optimizer.add_param_group({"params": list(layer.parameters())})
    rows = optimizer.decay_report().rows[-2:]
    assert [(row.name, row.weight_decay) for row in rows] == [
        ("3.weight", 0.1),
        ("3.bias", 0.0),
    ]


@each_class
def test_layer_removed_after_construction_keeps_its_decision(name):
    model, optimizer = with_later_layer(name)
    twin = with_later_layer(name)
    removed, rows = model[2], optimizer.decay_report().rows
    del model[2]
    assert optimizer.decay_report().rows == rows
    for layers in ([*model, removed], twin[0]):
        backward(nn.Sequential(*layers), 1)
    optimizer.step()
    twin[1].step()
    for a, b in zip([*model.parameters(), *removed.parameters()], twin[0].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@each_class
def test_glob_that_matches_nothing_in_an_added_group_adds_nothing(name):
    run, twin = trained(name), trained(name)
    later = nn.Linear(2, 2)
    assert_refused_and_mended(
        run,
        twin,
        r"'\*\.gain' in `wd_policy` matches none",
        lambda: run[1].add_param_group(
            {"params": later, "wd_policy": exclude("*.gain")}
        ),
    )
    run[1].add_param_group({"params": later, "wd_policy": exclude(is_bias)})
    assert run[1].state_dict()["decay"][1][1][0] == 0.0


@each_class
def test_errors_are_not_accompanied_by_warnings(name):
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(ValueError, match="not the name of a policy"),
    ):
        build(name, net(), wd_policy="no_bias_nrom", weight_decay=0)
    assert caught == []
