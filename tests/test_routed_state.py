"""What `Routed` loads: its own state dicts, and those of other optimizers."""

import copy
import io
import re
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import selective_optim
from selective_optim import AdamW, Routed, checkpoint
from selective_optim.policies import is_hidden_matrix
from tests.support.compare import assert_same
from tests.support.routes import (
    ADAMW,
    HALVES,
    MUON,
    Body,
    Net,
    loss_of,
    routed,
    routes,
    separate,
    split,
    twins,
)

BODY = ("blocks.0.0.weight", "blocks.1.0.weight")


def train(model, *optimizers, steps=5):
    for number in range(steps):
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def trained(**arguments):
    """Train a model with its optimizer, and return a twin of the model too."""
    model, _ = twins()
    one = routed(model, **arguments)
    train(model, one)
    return model, one


def state_by_name(model, optimizer):
    return {
        name: optimizer.state[param]
        for name, param in model.named_parameters()
        if param in optimizer.state
    }


def test_a_state_dict_is_plain_and_records_routes_by_name():
    _, one = trained()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    routes_of = [group["route"] for group in saved["param_groups"]]
    assert routes_of == ["muon", "adamw"]
    names = [[entry[2]["name"] for entry in group] for group in saved["decay"]]
    assert tuple(names[0]) == BODY
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    assert keys == list(range(11)) == sorted(saved["state"])


def test_groups_in_another_order_are_found_by_name():
    model, one = trained()
    saved = copy.deepcopy(one.state_dict())
    twin = copy.deepcopy(model)
    params = dict(reversed(list(twin.named_parameters())))
    again = Routed(
        list(params.items()),
        routes(),
        weight_decay=0.1,
        wd_policy="no_bias_norm",
        model=twin,
    )
    again.load_state_dict(saved)
    assert_same(state_by_name(twin, again), state_by_name(model, one))


def test_what_another_route_steps_now_begins_anew_and_is_told():
    model, one = trained()
    moved = routes(muon=("blocks.0.0.weight", Body, MUON))
    twin = copy.deepcopy(model)
    again = routed(twin, routes=moved)
    with pytest.warns(UserWarning, match="nothing was saved") as caught:
        again.load_state_dict(one.state_dict())
    assert "'blocks.1.0.weight'" in str(caught[0].message)
    kept = state_by_name(model, one)
    del kept[BODY[1]]
    assert_same(state_by_name(twin, again), kept)
    train(twin, again)


@pytest.mark.parametrize("how", ["whole", "list"])
def test_state_of_a_layer_that_is_gone_is_told_and_renamed_by_what_the_warning_says(
    how,
):
    model, one = trained()
    saved = one.state_dict()
    if how == "list":
        saved = list(checkpoint.split_routes(saved).values())
    twin = copy.deepcopy(model)
    twin.blocks = nn.ModuleDict({"0": twin.blocks[0], "last": twin.blocks[1]})
    here = Net()
    del here.blocks[1]
    again = routed(here)
    with pytest.warns(UserWarning, match=r"^no route steps 'blocks\.1\.0") as caught:
        again.load_state_dict(saved)
    assert len(caught) == 1
    assert len(again.state) == 7

    call = re.search(
        r"selective_optim\.checkpoint\.fit\(.*\)\.state_dict", str(caught[0].message)
    )
    again = routed(twin)
    names = [
        [n.replace("blocks.1", "blocks.last") for n in group]
        for group in checkpoint.group_names(one.param_groups, model)
    ]
    known = {"selective_optim": selective_optim, "optimizer": again}
    if how == "whole":
        fitted = eval(call[0], {**known, "state_dict": saved, "names": names})
    else:
        fitted = [
            eval(call[0], {**known, "state_dict": part, "names": own, "route": route})
            for part, own, route in zip(saved, names, again.optimizers)
        ]
    again.load_state_dict(fitted)
    mine = {n.replace("last", "1"): s for n, s in state_by_name(twin, again).items()}
    assert_same(mine, state_by_name(model, one))


def test_layer_that_is_gone_without_state_is_not_told():
    model, _ = twins()
    saved = routed(model).state_dict()
    del model.blocks[1]
    routed(model).load_state_dict(saved)


def test_state_of_another_class_under_the_same_route_is_told_and_begins_anew():
    model, one = trained(routes=routes(muon=(is_hidden_matrix, torch.optim.NAdam)))
    twin = copy.deepcopy(model)
    again = routed(twin)
    with pytest.warns(UserWarning, match="nothing was saved for 'blocks.0.0.weight'"):
        again.load_state_dict(one.state_dict())
    group = again.param_groups[0]
    assert group.keys() == routed(twin).param_groups[0].keys()
    assert (group["lr"], group["momentum"]) == (0.02, 0.9)
    theirs = state_by_name(model, one)
    mine = state_by_name(twin, again)
    assert_same(mine, {n: s for n, s in theirs.items() if n not in BODY})
    train(twin, again)


def test_decay_is_that_of_the_checkpoint_where_a_route_steps_others_now():
    _, one = trained()
    model, _ = twins()
    moved = routes(muon=("blocks.0.0.weight", Body, MUON))
    again = routed(model, routes=moved, weight_decay=0.3)
    with pytest.warns(UserWarning, match=r"nothing was saved for 'blocks\.1\.0"):
        again.load_state_dict(one.state_dict())
    assert [group["weight_decay"] for group in again.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("how", ["list", "mapping"])
@pytest.mark.parametrize("named", [True, False])
def test_state_dicts_of_separate_optimizers_load(how, named):
    model, twin = twins()
    others = separate(twin)
    if named:
        body, decayed, exempt = split(twin)
        names = {id(p): name for name, p in twin.named_parameters()}
        pairs = [[(names[id(p)], p) for p in own] for own in (body, decayed, exempt)]
        groups = [{"params": pairs[1]}, {"params": pairs[2], "weight_decay": 0.0}]
        others = [
            Body(pairs[0], **MUON, weight_decay=0.1),
            torch.optim.AdamW(groups, **ADAMW, weight_decay=0.1),
        ]
    train(twin, *others)
    saved = copy.deepcopy([other.state_dict() for other in others])
    if not named:
        names = checkpoint.group_names(others[1].param_groups, twin)
        order = [n for n, _ in twin.named_parameters() if n not in BODY]
        saved[1] = checkpoint.merge_groups(saved[1], names, order=order)
    one = routed(model)
    one.load_state_dict(saved if how == "list" else dict(zip(("muon", "adamw"), saved)))
    model.load_state_dict(twin.state_dict())
    theirs = state_by_name(twin, others[0]) | state_by_name(twin, others[1])
    mine = state_by_name(model, one)
    assert_same({name: mine[name] for name in theirs}, theirs)
    train(model, one)
    train(twin, *others)
    assert_same(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


def test_without_names_the_line_to_type_leads_there():
    model, twin = twins()
    others = separate(twin)
    train(twin, *others)
    saved = [other.state_dict() for other in others]
    one = routed(model)
    with pytest.raises(ValueError, match="has no name") as caught:
        one.load_state_dict(saved)
    line = re.search(r"(for group.*): (group.*), where", str(caught.value))
    known = {
        "selective_optim": selective_optim,
        "state_dict": saved[1],
        "groups": others[1].param_groups,
        "model": twin,
    }
    exec(f"{line[1]}:\n    {line[2]}", known)
    one.load_state_dict(saved)
    theirs = state_by_name(twin, others[0]) | state_by_name(twin, others[1])
    assert_same(state_by_name(model, one), theirs)


@pytest.mark.parametrize("key", HALVES)
def test_one_object_optimizers_of_others_load(key):
    """Their layout: groups with a flag, strict keys, counters that are numbers."""
    model, twin = twins()
    others = separate(twin)
    train(twin, *others)
    body, decayed, exempt = split(twin)
    names = {id(p): name for name, p in twin.named_parameters()}
    state, groups = {}, []
    for half, params, wd in ((0, body, 0.1), (1, decayed, 0.1), (1, exempt, 0.0)):
        first = len(state)
        for param in params:
            own = dict(others[half].state[param])
            if "step" in own:
                own["step"] = int(own["step"])
            state[len(state)] = own
        keys = list(range(first, len(state)))
        rates = {"lr": 0.02, "momentum": 0.9} if half == 0 else dict(ADAMW, eps=1e-8)
        told = {"param_names": [names[id(p)] for p in params], key: HALVES[key][half]}
        groups.append({"params": keys, "weight_decay": wd, **rates, **told})
    one = routed(model)
    one.load_state_dict({"state": state, "param_groups": groups})
    theirs = state_by_name(twin, others[0]) | state_by_name(twin, others[1])
    assert_same(state_by_name(model, one), theirs)
    assert not any(key in group for group in one.param_groups)


def test_routes_become_the_state_dicts_of_separate_optimizers():
    model, one = trained()
    saved = checkpoint.split_routes(one.state_dict())
    assert list(saved) == ["muon", "adamw"]
    twin = copy.deepcopy(model)
    body, _decayed, _exempt = split(twin)
    muon = Body(body, **MUON, weight_decay=0.1)
    muon.load_state_dict(saved["muon"])
    rest = [p for n, p in twin.named_parameters() if n not in BODY]
    adamw = torch.optim.AdamW(rest, **ADAMW)
    adamw.load_state_dict(saved["adamw"])
    theirs = state_by_name(twin, muon) | state_by_name(twin, adamw)
    assert_same(theirs, state_by_name(model, one))
    with pytest.raises(ValueError, match="none of a Routed"):
        checkpoint.split_routes(adamw.state_dict())


class Total(torch.optim.Optimizer):
    """Keeps what it counts in the state, and under no parameter, as some classes do."""

    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["total"] = self.state.get("total", 0) + 1
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=group["lr"] / self.state["total"])


@pytest.mark.parametrize("by_name", [False, True])
def test_state_under_no_parameter_goes_on_in_its_route(by_name):
    one_class = routes(muon=("blocks.*", Total), adamw=("*", Total))
    model, one = trained(routes=one_class)
    one.optimizers["adamw"].state["total"] = 7
    saved = copy.deepcopy(one.state_dict())
    params = [*reversed(list(model.named_parameters()))] if by_name else model
    again = Routed(params, one_class, weight_decay=0.1, wd_policy="no_bias_norm")
    again.load_state_dict(saved)
    parts = checkpoint.split_routes(saved)
    for route, total in {"muon": 5, "adamw": 7}.items():
        assert again.optimizers[route].state["total"] == total
        assert parts[route]["state"]["total"] == total
    assert_same(again.state_dict()["routes"], saved["routes"])


def renamed(saved):
    groups = [
        {**g, "route": g["route"].replace("muon", "lion")}
        for g in saved["param_groups"]
    ]
    return {**saved, "param_groups": groups}


def spoiled(saved):
    state = {key: dict(own) for key, own in saved["state"].items()}
    state[3]["exp_avg"] = torch.ones(1, 2, 3)
    return {**saved, "state": state}


def flagged(saved):
    groups = [
        {"params": g["params"], "use_muon": g["route"] == "muon"}
        for g in saved["param_groups"]
    ]
    return {"state": saved["state"], "param_groups": groups}


REFUSED = {
    "two halves without names": (
        flagged,
        "parameter 0 of group 0 of the state dict has no name. Write names into it: "
        "for group, names in zip(state_dict['param_groups'], "
        "selective_optim.checkpoint.group_names(groups, model)): "
        "group['param_names'] = names, where groups are those that saved.",
    ),
    "unknown route": (
        renamed,
        "the loaded state dict has the route 'lion', and the routes here are 'muon', "
        "'adamw'. Load a mapping from these names to the values of "
        "selective_optim.checkpoint.split_routes(state_dict).",
    ),
    "one too few": (
        lambda saved: [saved],
        "1 state dicts were given, and this optimizer has the routes 'muon', 'adamw'. "
        "Pass one for each, in this order, or {route: state_dict}.",
    ),
    "of one class": (
        lambda saved: checkpoint.split_routes(saved)["adamw"],
        "group 0 of the loaded state dict has no 'route': which of 'muon', 'adamw' "
        "saved it is not known. Load {'adamw': state_dict}, or one for each route.",
    ),
    "another shape": (
        spoiled,
        "'exp_avg' of 'blocks.0.0.bias' in the loaded state dict has shape 1 x 2 x 3, "
        "and must have shape 6. Load a state dict of the same class, made for the same "
        "model.",
    ),
    "no state": (
        lambda saved: {"param_groups": saved["param_groups"]},
        "`state_dict` has no 'state', so it is none of an optimizer. Pass what "
        "optimizer.state_dict() returned.",
    ),
}


@pytest.mark.parametrize(("change", "told"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(change, told):
    _model, one = trained()
    before = copy.deepcopy(one.state_dict())
    rates = [group["lr"] for group in one.param_groups]
    with pytest.raises(ValueError, match=re.escape(told) + "$"):
        one.load_state_dict(change(copy.deepcopy(before)))
    assert_same(one.state_dict(), before)
    assert [group["lr"] for group in one.param_groups] == rates


def test_advice_for_an_unknown_route_works():
    model, one = trained()
    saved = renamed(one.state_dict())
    parts = checkpoint.split_routes(saved)
    again = routed(copy.deepcopy(model))
    again.load_state_dict(dict(zip(("muon", "adamw"), parts.values())))
    assert len(again.state) == 11


def test_one_route_alone_loads_and_the_other_is_told():
    model, one = trained()
    part = checkpoint.split_routes(one.state_dict())["adamw"]
    again = routed(copy.deepcopy(model))
    with pytest.warns(UserWarning, match="nothing was saved for 'blocks.0.0.weight'"):
        again.load_state_dict({"adamw": part})
    assert len(again.state) == 9


def test_an_optimizer_that_has_not_stepped_saves_and_loads():
    model, twin = twins()
    saved = routed(model).state_dict()
    one = routed(twin)
    one.load_state_dict(saved)
    train(twin, one, steps=1)


def test_a_changed_policy_is_told():
    model, one = trained()
    again = routed(copy.deepcopy(model), wd_policy="no_bias")
    with pytest.warns(UserWarning, match="norm") as caught:
        again.load_state_dict(one.state_dict())
    assert "pass wd_policy='exclude(is_bias, is_norm)'" in str(caught[0].message)


def test_hooks_see_the_whole_state_dict():
    model, one = trained()
    seen = []
    one.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    one.register_state_dict_post_hook(lambda o, saved: {"inside": saved})
    saved = one.state_dict()
    assert seen == ["pre"]
    assert len(saved["inside"]["param_groups"]) == 2
    again = routed(copy.deepcopy(model))
    again.register_load_state_dict_pre_hook(lambda o, saved: saved["inside"])
    again.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    again.load_state_dict(saved)
    assert seen == ["pre", "loaded"]
    assert len(again.state) == 11


def test_forms_and_schedules_of_a_route_are_resumed():
    forms = {
        "muon": (is_hidden_matrix, Body, MUON),
        "adamw": ("*", AdamW, {**ADAMW, "wd_policy": "form('independent')"}),
    }
    model, one = trained(routes=forms)
    for group in one.param_groups:
        group["lr"] *= 0.5
    twin = copy.deepcopy(model)
    again = routed(twin, routes=forms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(copy.deepcopy(one.state_dict()))
    train(model, one)
    train(twin, again)
    assert_same(twin, model)


def test_a_model_whose_embedding_is_tied_keeps_it_from_muon():
    torch.manual_seed(0)
    model = Net(tied=True)
    one = routed(model)
    table = {row.name: row.route for row in one.decay_report()}
    assert table["embed.weight"] == "adamw"
    assert isinstance(model.head, nn.Linear)


def test_a_scheduler_that_was_made_before_loading_needs_no_names():
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    two = {
        "muon": (lambda info: info.ndim == 2, Body, MUON),
        "adamw": (lambda info: True, AdamW, ADAMW),
    }
    saved = Routed(params, two).state_dict()
    one = Routed(params, two)
    LambdaLR(one, lambda epoch: 0.5)
    one.load_state_dict(saved)
    assert [group["lr"] for group in one.param_groups] == [0.02, 3e-3]
