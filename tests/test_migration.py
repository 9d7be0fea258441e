"""The first hour: checkpoints of hand-split groups, and the messages they meet."""

import copy
import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import selective_optim
from selective_optim import selective
from selective_optim.checkpoint import group_names, merge_groups, split_groups
from tests.support.compare import assert_same
from tests.support.resuming import assert_same_run
from tests.test_errors import whole

WD = 0.9
CLASSES = ("SGD", "Adam", "AdamW")
CALLS = {
    "merge_groups": merge_groups,
    "split_groups": split_groups,
    "group_names": group_names,
}


def net(width=4, norm_first=True):
    """Blocks that begin with a norm; with width 1 all shapes of a kind are equal."""
    torch.manual_seed(0)
    block = [nn.LayerNorm(width), nn.Linear(width, width)]
    block = block if norm_first else block[::-1]
    return nn.Sequential(*block, nn.Linear(width, width))


def decayed(name, param):
    return param.ndim > 1


def hand_split(model, named=False, exempt_first=False, trained=False):
    pairs = list(model.named_parameters())
    pairs = [(n, p) for n, p in pairs if p.requires_grad or not trained]
    parts = [
        [pair for pair in pairs if decayed(*pair) is which] for which in (True, False)
    ]
    groups = [
        {"params": part if named else [p for _, p in part], "weight_decay": wd}
        for part, wd in zip(parts, (WD, 0.0))
    ]
    return groups[::-1] if exempt_first else groups


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad if param.requires_grad else None
        optimizer.step()
    optimizer.zero_grad()


def typed(message, **known):
    """Evaluate the call that a message says to type."""
    [call] = re.findall(r"((?:merge|split)_groups\(.*\)) of selective_optim", message)
    return eval(call, {**CALLS, "zip": zip, **known})


@dataclass
class Route:
    named: bool = False
    stepped: bool = True
    width: int = 4


ROUTES = {
    "stepped": Route(),
    "stepped, names": Route(named=True),
    "new": Route(stepped=False),
    "new, names": Route(named=True, stepped=False),
    "equal shapes": Route(width=1),
    "equal shapes, new": Route(width=1, stepped=False),
}
SPLIT = (
    "the loaded state dict has 2 groups, split by hand by weight_decay (0.9 and 0), "
    "and this optimizer has 1 group. Load merge_groups(state_dict, {}order=[n for n, "
    "_ in model.named_parameters()]) of selective_optim.checkpoint instead{}."
)
UNNAMED = (
    "group_names(groups, model), ",
    "; groups are the param_groups of your old optimizer",
)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_hand_split_state_dict_is_answered_with_a_call_that_works(name, route):
    models = net(route.width), net(route.width)
    groups = hand_split(models[0], route.named)
    split = getattr(torch.optim, name)([dict(g) for g in groups], lr=0.01, fused=True)
    train(models[0], split, range(3 * route.stepped))
    ours = getattr(selective_optim, name)(
        models[1].named_parameters() if route.named else models[1].parameters(),
        lr=0.01,
        weight_decay=WD,
        wd_policy="no_bias_norm",
    )
    with pytest.raises(ValueError, match="split by hand") as caught:
        ours.load_state_dict(split.state_dict())
    message = str(caught.value)
    assert message == SPLIT.format(*(("", "") if route.named else UNNAMED))

    known = {"model": models[0], "groups": groups, "optimizer": ours}
    merged = typed(message, state_dict=copy.deepcopy(split.state_dict()), **known)
    models[1].load_state_dict(models[0].state_dict())
    ours.load_state_dict(merged)
    for model, optimizer in zip(models, (split, ours)):
        train(model, optimizer, range(3, 6))
    assert_same_run(models[1], ours, models[0], split)


def two_rates(model, **changes):
    parts = [model[:2], model[2:]]
    return [
        {"params": list(part.parameters()), "lr": lr, **changes}
        for part, lr in zip(parts, (0.01, 0.02))
    ]


def split_with_rates(model):
    return [
        {**own, "params": part["params"], "lr": rates["lr"]}
        for rates in two_rates(model)
        for own, part in zip(
            ({"weight_decay": WD}, {"weight_decay": 0.0}),
            (
                {"params": [p for p in rates["params"] if p.ndim > 1]},
                {"params": [p for p in rates["params"] if p.ndim < 2]},
            ),
        )
    ]


def test_groups_split_by_decay_and_rate_are_merged_by_rate():
    models = net(), net()
    groups = split_with_rates(models[0])
    split = torch.optim.AdamW([dict(g) for g in groups], fused=True)
    train(models[0], split, range(3))
    ours = selective_optim.AdamW(
        two_rates(models[1]), weight_decay=WD, wd_policy="no_bias_norm", model=models[1]
    )
    with pytest.raises(ValueError, match=r'by="lr"\) of') as caught:
        ours.load_state_dict(split.state_dict())
    assert str(caught.value) == (
        "the loaded state dict has 4 groups, split by hand by weight_decay (0.9 and "
        "0), and this optimizer has 2 groups. Load merge_groups(state_dict, "
        "group_names(groups, model), order=[n for n, _ in model.named_parameters()], "
        'by="lr") of selective_optim.checkpoint instead; groups are the '
        "param_groups of your old optimizer."
    )
    known = {"model": models[0], "groups": groups, "state_dict": split.state_dict()}
    ours.load_state_dict(copy.deepcopy(typed(str(caught.value), **known)))
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, (split, ours)):
        train(model, optimizer, range(3, 6))
    assert_same_run(models[1], ours, models[0], split)


def test_groups_split_by_decay_alone_are_laid_out_by_rate():
    models = net(), net()
    groups = hand_split(models[0])
    split = torch.optim.AdamW([dict(g) for g in groups])
    train(models[0], split, range(3))
    ours = selective_optim.AdamW(
        two_rates(models[1]), weight_decay=WD, wd_policy="no_bias_norm", model=models[1]
    )
    with pytest.raises(ValueError, match="Load split_groups") as caught:
        ours.load_state_dict(split.state_dict())
    assert str(caught.value) == (
        "the loaded state dict has 2 groups, split by hand by weight_decay (0.9 and "
        "0), and this optimizer has 2 groups. Load split_groups(state_dict, [{**g, "
        "'params': own} for g, own in zip(optimizer.param_groups, group_names("
        "optimizer.param_groups, model))], names=group_names(groups, model)) of "
        "selective_optim.checkpoint instead; groups are the "
        "param_groups of your old optimizer."
    )
    state_dict = split.state_dict()
    # One call names two models: here each name means what the optimizer was made of.
    names = group_names(groups, models[0])
    layout = group_names(ours.param_groups, models[1])
    wanted = [{**g, "params": own} for g, own in zip(ours.param_groups, layout)]
    ours.load_state_dict(split_groups(state_dict, wanted, names=names))
    assert [g["lr"] for g in ours.param_groups] == [0.01, 0.02]
    for (_, one), (name, two) in zip(
        models[0].named_parameters(), models[1].named_parameters()
    ):
        expected, actual = split.state[one]["exp_avg"], ours.state[two]["exp_avg"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=name)


def test_groups_of_as_many_parameters_that_hold_others_are_told():
    models = net(), net()
    groups = hand_split(models[0])
    split = torch.optim.AdamW([dict(g) for g in groups])
    train(models[0], split, range(2))
    params = list(models[1].parameters())
    ours = selective_optim.AdamW(
        [{"params": params[:2]}, {"params": params[2:]}],
        weight_decay=WD,
        wd_policy="no_bias_norm",
        model=models[1],
    )
    with pytest.raises(ValueError, match="split by hand") as caught:
        ours.load_state_dict(split.state_dict())
    assert str(caught.value) == (
        "'exp_avg' of '0.weight' in the loaded state dict has shape 4 x 4, and must "
        "have shape 4. It has 2 groups, split by hand by weight_decay (0.9 and 0). "
        "Load split_groups(state_dict, [{**g, 'params': own} for g, own in zip("
        "optimizer.param_groups, group_names(optimizer.param_groups, model))], "
        "names=group_names(groups, model)) of selective_optim.checkpoint instead; "
        "groups are the param_groups of your old optimizer."
    )


@pytest.mark.parametrize("cls", [selective_optim.AdamW, selective(torch.optim.NAdam)])
def test_names_in_another_order_are_told(cls):
    """By position, as torch goes, moments of one shape would change places unseen."""
    model = net(width=1)
    pairs = list(model.named_parameters())
    swapped = [pairs[i] for i in (0, 3, 2, 1, 4, 5)]
    make = {"weight_decay": WD, "wd_policy": "no_bias_norm", "model": model}
    saver, ours = cls(swapped, **make), cls(pairs, **make)
    train(model, saver, range(2))
    with pytest.raises(ValueError, match="stands there") as caught:
        ours.load_state_dict(saver.state_dict())
    assert str(caught.value) == (
        "parameter 1 of the loaded state dict is '1.bias', and here '0.bias' stands "
        "there. Order it with selective_optim.checkpoint.merge_groups(state_dict, "
        "order=[n for n, _ in model.named_parameters()])."
    )
    order = [name for name, _ in pairs]
    ours.load_state_dict(merge_groups(saver.state_dict(), order=order))
    expected = {name: saver.state[param] for name, param in pairs}
    assert_same({name: ours.state[param] for name, param in pairs}, expected)


class Attention(nn.Module):
    """Holds layers of one shape in the order in which they are listed."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(4, 4))


@pytest.mark.parametrize(
    "cls", [selective_optim.SGD, selective_optim.AdamW, selective(torch.optim.NAdam)]
)
@pytest.mark.parametrize("groups", [1, 3])
def test_layers_in_another_order_are_told_by_the_names_of_the_record(cls, groups):
    """The model loads by name, and torch's optimizers by position."""
    models = Attention("qkv"), Attention("kqv")
    models[1].load_state_dict(models[0].state_dict())

    def make(model):
        params = [{"params": child.parameters()} for child in model.children()]
        params = model.parameters() if groups == 1 else params
        more = {"momentum": 0.9} if cls is selective_optim.SGD else {}
        return cls(params, weight_decay=WD, wd_policy="no_bias", model=model, **more)

    saver, ours = map(make, models)
    train(models[0], saver, range(2))
    saved = saver.state_dict()
    with pytest.raises(ValueError, match=r"is 'q.weight', and here 'k.weight'") as told:
        ours.load_state_dict(saved)
    assert not ours.state
    call = re.search(r"checkpoint\.(.*)\. If they were only", str(told.value))[1]
    names = {"state_dict": saved, "optimizer": ours, "model": models[1]}
    ours.load_state_dict(eval(call, CALLS | names))
    states = [
        {name: dict(optimizer.state[param]) for name, param in model.named_parameters()}
        for model, optimizer in zip(models, (saver, ours))
    ]
    assert_same(*states)
    del saved["decay"]  # layers that were only renamed
    ours.load_state_dict(saved)
    first = [next(iter(optimizer.state.values())) for optimizer in (saver, ours)]
    assert_same(*first)


def test_state_of_the_class_itself_is_not_asked_for_its_truth():
    class Drawing(torch.optim.NAdam):
        def step(self, closure=None):
            self.state["drawn"] = torch.ones(3)
            return super().step(closure)

    model = Attention("qk")
    make = {"weight_decay": WD, "wd_policy": "no_bias"}
    saver, ours = (selective(Drawing)(model.parameters(), **make) for _ in range(2))
    train(model, saver, range(1))
    ours.load_state_dict(saver.state_dict())
    assert_same(dict(ours.state), dict(saver.state))


def test_state_dict_without_state_loads_in_any_order():
    saver, ours = (
        selective_optim.AdamW(
            Attention(order).parameters(), weight_decay=WD, wd_policy="no_bias"
        )
        for order in ("qkv", "kqv")
    )
    ours.load_state_dict(saver.state_dict())


def test_frozen_parameters_that_the_split_left_out_are_told():
    models = net(), net()
    for model in models:
        model[0].requires_grad_(False)
    groups = hand_split(models[0], trained=True)
    split = torch.optim.AdamW([dict(g) for g in groups])
    train(models[0], split, range(2))
    make = {"weight_decay": WD, "wd_policy": "no_bias_norm"}
    ours = selective_optim.AdamW(models[1].parameters(), **make)
    with pytest.raises(ValueError, match="split by hand") as caught:
        ours.load_state_dict(split.state_dict())
    assert str(caught.value) == (
        "the loaded state dict has 2 groups, split by hand by weight_decay (0.9 and "
        "0) of 4 parameters, and this optimizer has 1 group of 6. Make it of "
        "filter(lambda p: p.requires_grad, model.parameters()), since frozen "
        "parameters were left out, and load merge_groups(state_dict, group_names("
        "groups, model), order=[n for n, p in model.named_parameters() if "
        "p.requires_grad]) of selective_optim.checkpoint instead; groups are the "
        "param_groups of your old optimizer."
    )
    merged = typed(
        str(caught.value), state_dict=split.state_dict(), model=models[0], groups=groups
    )
    trained = filter(lambda p: p.requires_grad, models[1].parameters())
    ours = selective_optim.AdamW(trained, **make)
    ours.load_state_dict(merged)
    assert len(ours.state) == 4


def test_hand_split_state_dict_of_another_model_is_no_migration():
    split = torch.optim.AdamW(hand_split(net()))
    ours = selective_optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(
        ValueError, match=r"of 6 parameters, and .* 1 group of 2\. Load a state dict of"
    ):
        ours.load_state_dict(split.state_dict())


def test_hand_split_state_dict_that_names_a_part_has_to_be_named():
    split = torch.optim.AdamW(hand_split(net(), named=True))
    state_dict = split.state_dict()
    del state_dict["param_groups"][1]["param_names"]
    ours = selective_optim.AdamW(net().parameters(), wd_policy="no_bias_norm")
    with pytest.raises(ValueError, match="split by hand") as caught:
        ours.load_state_dict(state_dict)
    assert str(caught.value) == SPLIT.format(*UNNAMED)


def test_state_dict_of_another_width_is_told():
    models = net(5), net(4)
    wide, ours = [selective_optim.AdamW(model.parameters()) for model in models]
    train(models[0], wide, range(1))
    with pytest.raises(ValueError, match="must have shape") as caught:
        ours.load_state_dict(wide.state_dict())
    assert str(caught.value) == (
        "'exp_avg' of '0.weight' in the loaded state dict has shape 5, and "
        "must have shape 4. Load a state dict of the same class, made for the same "
        "model."
    )


def test_merged_in_the_order_of_the_groups_is_told():
    model = net()
    groups = hand_split(model)
    split = torch.optim.AdamW([dict(g) for g in groups])
    train(model, split, range(2))
    merged = merge_groups(split.state_dict(), group_names(groups, model))
    ours = selective_optim.AdamW(model.parameters(), wd_policy="no_bias_norm")
    with pytest.raises(ValueError, match="another order") as caught:
        ours.load_state_dict(merged)
    assert str(caught.value) == (
        "'exp_avg' of '0.weight' in the loaded state dict has shape 4 x 4, and must "
        "have shape 4. Its shapes are those of this model in another order: load "
        "merge_groups(state_dict, names, order=[n for n, _ in "
        "model.named_parameters()]) of selective_optim.checkpoint, where names are in "
        "the order that was saved."
    )


def test_state_dict_that_lists_a_parameter_twice_is_refused():
    """Of two moments of one shape torch would load one, and lose the other unseen."""
    model = net()
    ours = selective_optim.AdamW(model.parameters(), wd_policy="no_bias_norm")
    train(model, ours, range(1))
    saved = copy.deepcopy(ours.state_dict())
    saved["param_groups"][0]["params"][1] = 0
    with pytest.raises(ValueError, match="lists a parameter twice") as caught:
        ours.load_state_dict(saved)
    assert str(caught.value) == (
        "group 0 of the loaded state dict lists a parameter twice. Load a state dict "
        "of the same class, made for the same model."
    )


def test_same_split_here_and_there_loads_as_in_torch():
    models = net(), net()
    split = torch.optim.AdamW(hand_split(models[0]))
    train(models[0], split, range(2))
    ours = selective_optim.AdamW(
        hand_split(models[1]), wd_policy="no_bias_norm", model=models[1]
    )
    ours.load_state_dict(split.state_dict())
    assert len(ours.state) == 6


# torch.distributed.checkpoint lays groups out anew before they come here.

FORMS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
LOST = (
    "the loaded checkpoint sets weight_decay to 0 for '1.weight', '2.weight', which "
    "the policy decays: a group takes it from one of its parameters, and groups that "
    "were split by hand had exempt ones. Convert the state dict (not flattened) with "
    "selective_optim.checkpoint.merge_groups before loading, or set weight_decay in "
    "optimizer.param_groups."
)


def dcp_state_of_hand_split(form, **layout):
    model = net(norm_first=layout.pop("norm_first", True))
    split = torch.optim.AdamW(hand_split(model, **layout), lr=0.01)
    train(model, split, range(2))
    return copy.deepcopy(get_optimizer_state_dict(model, split, options=form))


def loaded(state_dict, form, params=nn.Module.parameters, norm_first=True, **changes):
    model = net(norm_first=norm_first)
    arguments = {"weight_decay": WD, "wd_policy": "no_bias_norm", **changes}
    ours = selective_optim.AdamW(params(model), model=model, **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        set_optimizer_state_dict(model, ours, state_dict, options=form)
    told = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    return ours, told


@each_form
def test_dcp_names_the_parameters_that_lose_their_decay(form):
    ours, told = loaded(dcp_state_of_hand_split(form), form)
    assert ours.param_groups[0]["weight_decay"] == 0
    assert told == [LOST]


def test_flattened_dcp_tells_of_every_group_that_loses_its_decay():
    form = FORMS["flat"]
    ours, told = loaded(dcp_state_of_hand_split(form), form, two_rates)
    assert [g["weight_decay"] for g in ours.param_groups] == [0.0, 0.9]
    assert told == [LOST.replace(", '2.weight'", "")]


def test_plain_dcp_state_dict_in_other_groups_is_refused_with_the_call():
    form = FORMS["plain"]
    state_dict = dcp_state_of_hand_split(form)
    with pytest.raises(ValueError, match="split by hand") as caught:
        loaded(state_dict, form, two_rates)
    assert str(caught.value) == (
        "torch.distributed.checkpoint found no hyperparameters for one of the 2 "
        "groups here: those of the checkpoint hold other parameters, as when they "
        "were split by hand. Before set_optimizer_state_dict, convert the state dict "
        "with split_groups(state_dict, [{**g, 'params': own} for g, own in zip("
        "optimizer.param_groups, group_names(optimizer.param_groups, model))]) of "
        "selective_optim.checkpoint."
    )
    model = net()
    optimizer = selective_optim.AdamW(two_rates(model), weight_decay=WD)
    known = {"model": model, "optimizer": optimizer}
    regrouped = typed(str(caught.value), state_dict=state_dict, **known)
    ours, told = loaded(regrouped, form, two_rates)
    assert told == []
    assert [(g["lr"], g["weight_decay"]) for g in ours.param_groups] == [
        (0.01, WD),
        (0.02, WD),
    ]


@each_form
@pytest.mark.parametrize("policy", ["no_bias_norm", "all", None])
def test_dcp_that_takes_no_decay_away_is_silent(form, policy):
    state_dict = dcp_state_of_hand_split(form, norm_first=False, exempt_first=True)
    ours, told = loaded(state_dict, form, norm_first=False, wd_policy=policy)
    assert ours.param_groups[0]["weight_decay"] == WD
    assert told == []


def test_decay_of_zero_here_and_there_is_silent():
    state_dict = dcp_state_of_hand_split(FORMS["flat"])
    with pytest.warns(UserWarning, match="has no effect"):
        _, told = loaded(state_dict, FORMS["flat"], weight_decay=0.0)
    assert told == []


# What a checkpoint of ours was made with.


def test_another_policy_on_resume_is_told_in_plain_words():
    model = net()
    arguments = {"params": list(model.parameters()), "weight_decay": WD, "model": model}
    saver = selective_optim.SGD(**arguments, wd_policy={"2.*": 0.5, "*.bias": 0})
    loader = selective_optim.SGD(
        **arguments, wd_policy="no_norm", decoupled_weight_decay=True
    )
    with pytest.warns(UserWarning, match="another weight decay policy") as caught:
        loader.load_state_dict(saver.state_dict())
    [warning] = caught
    assert re.fullmatch(
        whole(
            "the loaded checkpoint was made with another weight decay policy: "
            "'0.weight' decayed in full (l2) and now is exempt; '1.weight' decayed in "
            "full (l2) and now decays in full (decoupled); '1.bias' was exempt and now "
            "decays in full (decoupled) and 2 more. The policy of the constructor is "
            "kept; pass wd_policy=\"first_match({'2.*': 0.5, '*.bias': 0})\" to "
            "continue as before."
        ),
        str(warning.message),
    )
