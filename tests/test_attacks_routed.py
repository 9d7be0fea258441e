"""What users and frameworks do to `Routed`, each of which once went wrong."""

import copy
import warnings

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, Muon, Routed
from selective_optim.policies import is_hidden_matrix
from tests.support.attacks import Lines, Own
from tests.support.compare import assert_same
from tests.support.routes import (
    ADAMW,
    MUON,
    Body,
    loss_of,
    needs_muon,
    routed,
    routes,
    twins,
)


def made(**arguments):
    """Make the usual optimizer, with gradients to step by."""
    model, _ = twins()
    one = routed(model, **arguments)
    loss_of(model, 0).backward()
    return model, one


def decays(one):
    return {row.name: row.weight_decay > 0 for row in one.decay_report()}


def policy_written(one):
    one.param_groups[1]["wd_policy"] = "none"


def stranger_in_place(one):
    one.param_groups[1]["params"].append(nn.Parameter(torch.ones(3)))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (policy_written, r"written into group 1, .*param_groups\[1\]\['wd_policy'\]"),
        (stranger_in_place, "of parameter 9 of group 1 "),
    ],
)
def test_what_the_last_route_refuses_stops_the_first_and_is_numbered(spoil, told):
    model, one = made()
    one.step()
    before = copy.deepcopy(model)
    spoil(one)
    with pytest.raises(ValueError, match=told):
        one.step()
    assert_same(model, before)


def test_a_number_that_is_none_is_told_of_the_group_that_has_it():
    _, one = made()
    one.param_groups[1]["weight_decay"] = float("nan")
    with pytest.raises(ValueError, match=r"of group 1 is nan.*param_groups\[1\]"):
        one.step()


@pytest.mark.parametrize("whose", ["copy", "original"])
def test_a_shallow_copy_and_the_original_decide_each_for_itself(whose):
    _, one = made()
    mine, other = (one, copy.copy(one))[:: 1 if whose == "original" else -1]
    mine.wd_policy = "all"
    assert all(decays(mine).values())
    assert not decays(other)["head.bias"]
    mine.wd_policy = "no_bias"
    assert not decays(mine)["head.bias"]


@pytest.mark.parametrize("how", ["load", "deepcopy"])
def test_groups_are_replaced_by_copies_after_loading(how):
    model, one = made()
    one.step()
    if how == "load":
        one.load_state_dict(one.state_dict())
    else:
        model, one = copy.deepcopy((model, one))
    one.param_groups = [dict(group) for group in one.param_groups]
    one.step()
    assert len(one.state) == 11


def test_state_is_written_for_tensors_of_replaced_groups():
    _, one = made()
    one.step()
    one.param_groups = [dict(group) for group in one.param_groups]
    for group in one.param_groups:
        old = group["params"]
        group["params"] = [nn.Parameter(param.detach().clone()) for param in old]
        for param, new in zip(old, group["params"]):
            one.state[new] = one.state.pop(param)
    assert {p for group in one.param_groups for p in group["params"]} == set(one.state)


def moved(one):
    param = one.param_groups[0]["params"].pop()
    one.param_groups[1]["params"].append(param)
    return param


def renamed(one):
    one.param_groups[0]["route"] = "adamw"
    return one.param_groups[0]["params"][0]


@pytest.mark.parametrize("cls", [AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("how", [moved, renamed])
@pytest.mark.parametrize("saved", [False, True])
def test_state_follows_a_parameter_to_another_route_of_its_class(cls, how, saved):
    same = {"muon": (is_hidden_matrix, cls), "adamw": ("*", cls)}
    _model, one = made(routes=same)
    one.step()
    assert not any(o._stepper.exposed for o in one.optimizers.values() if cls is AdamW)
    param = how(one)
    if saved:
        assert len(one.state_dict()["state"]) == 11
    one.step()
    assert one.state[param]["step"] == 2
    assert param not in one.optimizers["muon"].state
    assert len(one.state) == len(one.state_dict()["state"]) == 11


@pytest.mark.parametrize("then", ["step", "state_dict"])
def test_state_that_a_route_of_another_class_cannot_go_on_with_is_told_once(then):
    _model, one = made()
    one.step()
    param = moved(one)
    told = r"^'blocks\.1\.0\.weight' went by hand to a route .*state begins anew there"
    with pytest.warns(UserWarning, match=told):
        getattr(one, then)()
    one.step()
    assert one.state[param]["exp_avg"].shape == param.shape
    assert "momentum_buffer" not in one.state[param]
    assert len(one.state_dict()["state"]) == 11


def test_one_route_without_decay_is_no_reason_to_warn():
    model, one = made()
    one.param_groups[1]["weight_decay"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            one.step()
    loss_of(model, 1).backward()


def test_all_routes_without_decay_are_told_once():
    _, one = made()
    for group in one.param_groups:
        group["weight_decay"] = 0
    one.step()
    with pytest.warns(UserWarning, match="0 in every group since") as caught:
        one.step()
    assert len(caught) == 1
    one.step()


def test_a_rate_above_its_start_is_told_of_the_route():
    forms = {"adamw": ("*", AdamW, {**ADAMW, "wd_policy": "form('independent')"})}
    _, one = made(routes=routes(**forms))
    one.param_groups[1]["lr"] *= 3
    for _ in range(9):
        one.step()
    with pytest.warns(UserWarning, match="decay in group of route 'adamw' is divided"):
        one.step()


def test_a_policy_among_the_defaults_is_refused():
    _, one = made()
    one.defaults["wd_policy"] = "none"
    with pytest.raises(ValueError, match="was written into optimizer"):
        one.step()


class Modes(Own):
    """Keeps a counter in groups and no state, and steps in a mode of its own."""

    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        assert self.training
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


def test_modes_of_a_class_are_those_of_all():
    _, one = made(routes=routes(adamw=("*", Modes, {"lr": 0.1})))
    one.train()
    one.step()
    one.eval()
    with pytest.raises(AssertionError):
        one.step()
    assert not hasattr(made()[1], "train")


def test_a_class_without_state_loads_its_groups_by_name():
    model, one = made(routes=routes(adamw=("*", Modes, {"lr": 0.1})))
    one.train()
    one.step()
    one.param_groups[1]["lr"] = 0.05
    named = [*model.named_parameters()][::-1]
    again = Routed(named, routes(adamw=("*", Modes, {"lr": 0.1})), model=model)
    with pytest.warns(UserWarning, match="another weight decay policy"):
        again.load_state_dict(one.state_dict())
    assert (again.param_groups[1]["lr"], again.param_groups[1]["count"]) == (0.05, 1)


def test_models_with_the_same_names_load_in_order_or_are_refused():
    nets = [twins()[0] for _ in range(2)]
    rest = {"adamw": ("*", AdamW, ADAMW)}
    one = Routed(nets, rest, model=nn.ModuleList(nets))
    for number, net in enumerate(nets):
        loss_of(net, number).backward()
    one.step()
    saved = copy.deepcopy(one.state_dict())
    params = [param for net in nets for param in net.parameters()]
    again = Routed(params, rest, model=nets)
    again.load_state_dict(saved)
    assert_same([again.state[p] for p in params], [one.state[p] for p in params])
    saved = Routed(nets[0], rest).state_dict()
    with pytest.raises(ValueError, match=r"'embed\.weight' names two parameters of"):
        again.load_state_dict(saved)


def test_a_misspelt_key_is_told_once():
    model, _ = twins()
    group = {"params": list(model.parameters()), "weight_decays": 0.1}
    with pytest.warns(UserWarning, match="Did you mean 'weight_decay'") as caught:
        Routed([group], routes(), model=model)
    assert len(caught) == 1
    one, group = routed(model), {**group, "params": nn.Linear(2, 2), "route": "adamw"}
    with pytest.warns(UserWarning, match="Did you mean 'weight_decay'") as caught:
        one.add_param_group(group)
    assert len(caught) == 1


def test_numbers_of_a_group_are_one_for_each_route_or_for_all():
    model, _ = twins()
    own = {"lr": {"muon": 0.5}, "weight_decay": {"muon": 0.3, "adamw": 0.2}}
    one = Routed([{"params": model, **own}], routes())
    told = [(group["lr"], group["weight_decay"]) for group in one.param_groups]
    assert told == [(0.5, 0.3), (3e-3, 0.2)]
    with pytest.raises(ValueError, match="has the route 'lion', and the routes are"):
        Routed([{"params": model, "lr": {"lion": 0.5}}], routes())
    with pytest.raises(TypeError, match=r"`lr_scale` of a group must be a number"):
        Routed([{"params": model, "lr_scale": "0.5"}], routes())


def test_a_generator_in_a_group_is_not_used_up_by_an_error():
    model, _ = twins()
    group = {"params": model.parameters()}
    with pytest.raises(ValueError, match="no route takes"):
        Routed([group], {"muon": (is_hidden_matrix, Body, MUON)})
    assert len(list(group["params"])) == 11


@needs_muon
def test_a_parameter_without_a_name_is_told_by_its_shape():
    with pytest.warns(UserWarning, match="takes none"):
        one = Muon(nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3)))
    for params in (nn.Linear(2, 2), nn.Linear(2, 2).parameters()):
        with pytest.raises(ValueError, match=r"gives a parameter \(shape 2\) to Muon"):
            one.add_param_group({"params": params, "route": "muon"})


@pytest.mark.parametrize(
    "saved",
    [{}, {"state": {}, "param_groups": []}, [{"state": {}, "param_groups": []}] * 2],
)
def test_a_state_dict_of_nothing_is_refused(saved):
    _, one = made()
    one.step()
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError, match="has nothing for any of 11 parameters"):
        one.load_state_dict(saved)
    assert_same(one.state_dict(), before)


def test_what_looks_wrong_in_every_route_is_told_once():
    model, _ = twins()
    one = Routed([*model.parameters()][:-1], routes(), model=model)
    assert one.decay_report().remark.count("is in no group") == 1


def test_an_interrupt_leaves_one_policy_or_the_other():
    model, _ = twins()
    one, number = routed(model), 0
    old = decays(one)
    # The last lines are those at which decisions change hands.
    while Lines(number).run(lambda: setattr(one, "wd_policy", "all")):
        new = repr(one.wd_policy) == "only(everything)"
        assert decays(one) == (dict.fromkeys(old, True) if new else old), number
        one.wd_policy = "no_bias_norm"
        number += 490 if number < 1400 else 37
    assert all(decays(one).values())


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_an_interrupted_step_without_gradients_is_done_again(cls):
    given = {"lr": 0.1, "momentum": 0.9} if cls is SGD else ADAMW
    for number in range(60, 240, 3):
        model, _ = twins()
        optimizer = cls(model.parameters(), **given)
        for each in range(2):
            loss_of(model, each).backward()
            optimizer.step()
        assert optimizer.state  # from now on it may be edited
        optimizer.zero_grad()
        Lines(number).run(optimizer.step)
        optimizer.step()
        loss_of(model, 2).backward()
        optimizer.step()
