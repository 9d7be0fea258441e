"""Converting between hand-split groups and one group, by name."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from selective_optim import policies
from selective_optim.checkpoint import group_names, merge_groups, split_groups
from tests.support.compare import assert_same
from tests.support.problems import IMPLEMENTATIONS
from tests.support.resuming import (
    CLASSES,
    OPTIMIZERS,
    assert_same_run,
    hand_split,
    make_net,
    names_by_decay,
    through_file,
    train,
)

FIRST, SECOND = range(1, 5), range(5, 9)
POLICY = "no_bias_norm"

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def make_split(optimizer, implementation="for-loop", named=False, **overrides):
    """Build torch's optimizer with two groups, as users write them."""
    model = make_net()
    groups = hand_split(model)
    if named:
        for group, names in zip(groups, names_by_decay(model)):
            group["params"] = list(zip(names, group["params"]))
    name, arguments = OPTIMIZERS[optimizer]
    choice = IMPLEMENTATIONS[implementation]
    return model, CLASSES[name]["torch"](groups, **{**arguments, **choice, **overrides})


def make_merged(optimizer, implementation="for-loop", wd_policy=POLICY, **overrides):
    """Build ours with one group and the policy that decides the same."""
    model = make_net()
    name, arguments = OPTIMIZERS[optimizer]
    arguments = {**arguments, **IMPLEMENTATIONS[implementation], **overrides}
    optimizer = CLASSES[name]["ours"](
        model.parameters(), weight_decay=0.1, wd_policy=wd_policy, **arguments
    )
    return model, optimizer


def resume(saved, target, state_dict):
    target[0].load_state_dict(saved[0].state_dict())
    target[1].load_state_dict(through_file(state_dict))
    return target


def saved_split(optimizer="adamw", named=True, **overrides):
    run = make_split(optimizer, named=named, **overrides)
    train(*run, FIRST)
    return run[1].state_dict()


def layout_of(model):
    return [
        {"params": names, "weight_decay": wd}
        for names, wd in zip(names_by_decay(model), (0.1, 0.0))
    ]


# Training goes on


@each_optimizer
@each_implementation
def test_training_continues_from_hand_split_to_one_group(optimizer, implementation):
    saved = make_split(optimizer, implementation)
    train(*saved, FIRST)
    merged = merge_groups(
        saved[1].state_dict(),
        group_names(saved[1].param_groups, saved[0]),
        order=names_of(saved[0]),
    )
    resumed = resume(saved, make_merged(optimizer, implementation), merged)
    whole = make_split(optimizer, implementation)
    train(*resumed, SECOND)
    train(*whole, [*FIRST, *SECOND])
    assert_same_run(*resumed, *whole)


@each_optimizer
@each_implementation
def test_training_continues_from_one_group_to_hand_split(optimizer, implementation):
    saved = make_merged(optimizer, implementation)
    train(*saved, FIRST)
    split = split_groups(
        saved[1].state_dict(), layout_of(saved[0]), names=[names_of(saved[0])]
    )
    resumed = resume(saved, make_split(optimizer, implementation), split)
    whole = make_merged(optimizer, implementation)
    train(*resumed, SECOND)
    train(*whole, [*FIRST, *SECOND])
    assert_same_run(*resumed, *whole)


# Round trips


@each_optimizer
@pytest.mark.parametrize("order", [list, reversed, sorted])
@pytest.mark.parametrize("named", [True, False])
def test_merged_and_split_again_is_the_same(optimizer, order, named):
    model, saved = make_split(optimizer, named=named)
    train(model, saved, FIRST)
    original = saved.state_dict()
    names = None if named else names_by_decay(model)
    ordered = list(order(names_of(model)))
    merged = merge_groups(original, names, order=ordered)
    again = split_groups(merged, layout_of(model), names=None if named else [ordered])
    assert_same(again, original)
    assert again["state"].keys() == original["state"].keys()


def test_conversion_leaves_its_input():
    original = saved_split()
    before = copy.deepcopy(original)
    merged = merge_groups(original)
    kept = copy.deepcopy(merged)
    merged["state"][0]["step"] = torch.tensor(99.0)
    merged["param_groups"][0]["lr"] = 99.0
    assert_same(original, before)
    split_groups(kept, layout_of(make_net()))["param_groups"][0]["lr"] = 99.0
    assert_same(kept["param_groups"][0]["lr"], before["param_groups"][0]["lr"])


# What the merged state dict says


def test_merged_group_has_the_largest_weight_decay_and_all_else_unchanged():
    original = saved_split(betas=(0.8, 0.95))
    [group] = merge_groups(original)["param_groups"]
    own = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    assert own == {key: original["param_groups"][0][key] for key in own}
    assert own["weight_decay"] == 0.1
    assert own["betas"] == (0.8, 0.95)


def test_merged_names_follow_the_order_given():
    order = names_of(make_net())
    [group] = merge_groups(saved_split(), order=order)["param_groups"]
    assert group["param_names"] == order
    assert group["params"] == list(range(len(order)))


def test_merged_state_dict_without_names_adds_none():
    model = make_net()
    [group] = merge_groups(saved_split(named=False), names_by_decay(model))[
        "param_groups"
    ]
    assert "param_names" not in group


def test_merged_record_makes_another_policy_warn():
    merged = merge_groups(saved_split(), order=names_of(make_net()))
    _, optimizer = make_merged("adamw", wd_policy="no_bias")
    with pytest.warns(
        UserWarning, match=r"'body\.1\.weight' was exempt and now decays in full"
    ):
        optimizer.load_state_dict(merged)


def test_record_whose_numbers_became_tensors_makes_another_policy_warn():
    merged = merge_groups(saved_split(), order=names_of(make_net()))
    for entry in merged["decay"][0]:
        entry[0] = torch.tensor(entry[0])
    _, optimizer = make_merged("adamw", wd_policy="no_bias")
    with pytest.warns(UserWarning, match="was exempt and now decays in full"):
        optimizer.load_state_dict(merged)


def test_merged_record_keeps_proportions():
    original = saved_split()
    original["param_groups"][1]["weight_decay"] = 0.01
    [record] = merge_groups(original)["decay"]
    assert {tuple(entry) for entry in record} == {
        (1.0, "decoupled"),
        (0.1, "decoupled"),
    }


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("sgd", {"weight_decay": 0.0}),  # nothing decayed: a policy is not refuted
        ("adam", {"decoupled_weight_decay": None}),
    ],
)
def test_merge_records_nothing_where_nothing_is_known(optimizer, changes):
    original = saved_split(optimizer)
    for group in original["param_groups"]:
        group.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del group[key]
    assert "decay" not in merge_groups(original)


def test_record_of_ours_survives_merging_and_sets_weight_decay_on_splitting():
    wd_policy = policies.scale("head.*", by=0.5) * policies.exclude("*.bias")
    model, optimizer = make_merged("adamw", wd_policy=wd_policy)
    state_dict = optimizer.state_dict()
    names = [names_of(model)]
    assert merge_groups(state_dict, names)["decay"] == state_dict["decay"]
    layout = [
        {"params": ["head.weight"]},
        {"params": [n for n in names[0] if n.endswith(".bias")]},
        {"params": [n for n in names[0] if not n.endswith((".bias", "head.weight"))]},
    ]
    split = split_groups(state_dict, layout, names=names)
    assert [g["weight_decay"] for g in split["param_groups"]] == [0.05, 0.0, 0.1]
    assert "decay" not in split


def test_names_are_matched_without_what_wrappers_add():
    original = saved_split()
    for group in original["param_groups"]:
        group["param_names"] = [f"module._orig_mod.{n}" for n in group["param_names"]]
    order = names_of(make_net())
    plain = merge_groups(saved_split(), order=order)
    wrapped = merge_groups(original, order=[f"_orig_mod.{n}" for n in order])
    assert_same(wrapped["state"], plain["state"])


def weight_normed():
    torch.manual_seed(0)
    layers = [weight_norm(nn.Linear(3, 3)), weight_norm(nn.Linear(3, 3, bias=False))]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("path", "prefix"), [("module", ""), ("body", "body.")])
def test_parameters_that_share_a_canonical_name_keep_their_own(path, prefix):
    model = nn.ModuleDict({path: weight_normed()})
    params = list(model.parameters())
    saved = torch.optim.SGD([{"params": params[::-2]}, {"params": params[-2::-2]}])
    for number, param in enumerate(params):
        saved.state[param]["momentum_buffer"] = torch.tensor(float(number))
    names = group_names(saved.param_groups, model)

    merged = merge_groups(saved.state_dict(), names, order=names_of(model))
    layout = [{"params": own, "weight_decay": 0.0} for own in names]

    original = "parametrizations.weight.original"
    assert names == [
        [f"{prefix}1.{original}1", f"{prefix}0.{original}1", f"{prefix}0.bias"],
        [f"{prefix}1.{original}0", f"{prefix}0.{original}0"],
    ]
    actual = [s["momentum_buffer"].item() for _, s in sorted(merged["state"].items())]
    assert actual == [0, 1, 2, 3, 4]
    again = split_groups(merged, layout, names=[names_of(model)])
    assert_same(again["state"], saved.state_dict()["state"])


def test_canonical_name_that_two_parameters_share_names_neither():
    model = weight_normed()
    state_dict = torch.optim.SGD(model.named_parameters()).state_dict()
    order = ["0.weight", *names_of(model)[1:]]

    with pytest.raises(ValueError, match=r"'0\.weight' in `order` names no parameter"):
        merge_groups(state_dict, order=order)


def test_state_entries_are_carried_over_whatever_they_are():
    original = saved_split()
    original["state"][0]["do_wd"] = False
    original["state"]["note"] = "kept"
    name = original["param_groups"][0]["param_names"][0]
    order = sorted(names_of(make_net()))
    merged = merge_groups(original, order=order)
    assert merged["state"][order.index(name)]["do_wd"] is False
    assert merged["state"]["note"] == "kept"


# Layouts with several learning rates


def layered(model, factor=0.5):
    """Groups per part and decay, as for layer-wise learning rates."""
    params = dict(model.named_parameters())
    decayed = names_by_decay(model)[0]
    parts = {0: [n for n in params if n.startswith("body")]}
    parts[1] = [n for n in params if n not in parts[0]]
    return [
        {
            "params": [(n, params[n]) for n in part if (n in decayed) is decays],
            "lr": 0.01 * factor ** (1 - depth),
            "weight_decay": 0.1 if decays else 0.0,
        }
        for depth, part in parts.items()
        for decays in (True, False)
    ]


def merged_layers(model):
    groups = layered(model)
    return [
        {"params": a["params"] + b["params"], "lr": a["lr"]}
        for a, b in (groups[:2], groups[2:])
    ]


@each_implementation
def test_groups_with_several_rates_merge_to_one_per_rate(implementation):
    choice = IMPLEMENTATIONS[implementation]
    model, whole_model = make_net(), make_net()
    saved = torch.optim.AdamW(layered(model), weight_decay=0.1, **choice)
    whole = torch.optim.AdamW(layered(whole_model), weight_decay=0.1, **choice)
    train(model, saved, FIRST)
    merged = merge_groups(saved.state_dict(), by="lr")
    resumed = make_net()
    ours = CLASSES["AdamW"]["ours"](
        merged_layers(resumed),
        weight_decay=0.1,
        wd_policy=POLICY,
        model=resumed,
        **choice,
    )
    resume((model, saved), (resumed, ours), merged)
    train(resumed, ours, SECOND)
    train(whole_model, whole, [*FIRST, *SECOND])
    assert_same_run(resumed, ours, whole_model, whole)
    layout = [
        {"params": [n for n, _ in g["params"]], "weight_decay": g["weight_decay"]}
        for g in layered(model)
    ]
    expected = whole.state_dict()
    assert_same(split_groups(ours.state_dict(), layout), expected)


def test_rates_that_are_tensors_are_compared_by_value():
    groups = layered(make_net())
    for group in groups:
        group["lr"] = torch.tensor(group["lr"])
    state_dict = torch.optim.AdamW(groups, fused=True).state_dict()
    merged = merge_groups(state_dict, by="lr")
    assert [g["lr"].item() for g in merged["param_groups"]] == pytest.approx(
        [0.005, 0.01]
    )


def test_named_parameters_of_distributed_checkpoints_stay_named():
    original = saved_split()
    names = [n for g in original["param_groups"] for n in g.pop("param_names")]
    original["state"] = {names[k]: v for k, v in original["state"].items()}
    for group in original["param_groups"]:
        group["params"] = [names[key] for key in group["params"]]
    order = names_of(make_net())
    merged = merge_groups(original, order=order)
    assert merged["param_groups"][0]["params"] == order
    assert merged["state"].keys() == original["state"].keys()
    assert_same(split_groups(merged, layout_of(make_net())), original)


# Errors


def changed(argument, change):
    def arguments():
        values = {"names": names_by_decay(make_net()), "order": names_of(make_net())}
        change(values[argument])
        return values

    return arguments


MERGE_ERRORS = {
    "no names": (dict, "parameter 0 of group 0 of the state dict has no name"),
    "too few": (
        changed("names", lambda names: names[1].pop()),
        "parameter 3 of group 1 of the state dict has no name",
    ),
    "too many": (
        changed("names", lambda names: names[1].append("tail.bias")),
        "'tail.bias' is one name too many for group 1",
    ),
    "doubled": (
        changed("names", lambda names: names[1].__setitem__(0, "module.head.weight")),
        "'module.head.weight' names two parameters of the state dict",
    ),
    "missing in order": (
        changed("order", lambda order: order.remove("scale")),
        r"'scale' \(group 0\) is missing in `order`\. Add its name\.",
    ),
    "several missing in order": (
        changed("order", lambda order: order.clear()),
        r"is missing in `order`, and so are 10 more",
    ),
    "doubled in order": (
        changed("order", lambda order: order.append("scale")),
        "'scale' stands in `order` twice",
    ),
    "unknown in order": (
        changed("order", lambda order: order.append("tail.bias")),
        "'tail.bias' in `order` names no parameter",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "message"), MERGE_ERRORS.values(), ids=MERGE_ERRORS
)
def test_merging_refuses_wrong_names(arguments, message):
    original = saved_split(named=False)
    before = copy.deepcopy(original)
    with pytest.raises(ValueError, match=message):
        merge_groups(original, **arguments())
    assert_same(original, before)


def relisted(change):
    layout = [dict(g, params=list(g["params"])) for g in layout_of(make_net())]
    change(layout)
    return layout


SPLIT_ERRORS = {
    "missing": (
        lambda layout: layout[0]["params"].remove("scale"),
        r"'scale' \(group 0\) is missing in `groups`",
    ),
    "doubled": (
        lambda layout: layout[1]["params"].append("scale"),
        "'scale' stands in `groups` twice",
    ),
    "unknown": (
        lambda layout: layout[1]["params"].append("tail.bias"),
        "'tail.bias' in `groups` names no parameter",
    ),
    "differing decay": (
        lambda layout: (
            [g.pop("weight_decay") for g in layout]
            + [layout[0]["params"].append(layout[1]["params"].pop())]
        ),
        r"'weight_decay' is 0\.1 for 'scale' .* and 0\.0 for 'head\.bias'",
    ),
}


@pytest.mark.parametrize(("change", "message"), SPLIT_ERRORS.values(), ids=SPLIT_ERRORS)
def test_splitting_refuses_wrong_names(change, message):
    merged = merge_groups(saved_split(), order=names_of(make_net()))
    before = copy.deepcopy(merged)
    with pytest.raises(ValueError, match=message):
        split_groups(merged, relisted(change))
    assert_same(merged, before)


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "fused", "lr_scale"])
def test_merging_refuses_groups_that_differ_in_more_than_weight_decay(key):
    original = saved_split()
    original["param_groups"][1][key] = 0.5
    message = rf"'{key}' is .* for 'scale' \(group 0\) and 0.5 for .* \(group 1\)"
    with pytest.raises(ValueError, match=message + rf".*by=\['{key}'\]"):
        merge_groups(original)
    assert len(merge_groups(original, by=key)["param_groups"]) == 2


@pytest.mark.parametrize(
    ("optimizer", "arguments", "wd_policy"),
    [
        ("sgd", {"decoupled_weight_decay": True}, None),
        ("sgd", {}, policies.form("decoupled", "*")),
        ("adamw", {}, policies.form("l2", "*")),
    ],
)
def test_splitting_refuses_a_form_that_torch_lacks(optimizer, arguments, wd_policy):
    model, optimizer = make_merged(optimizer, wd_policy=wd_policy, **arguments)
    state_dict = optimizer.state_dict()
    convert = partial(split_groups, groups=layout_of(model), names=[names_of(model)])
    with pytest.raises(ValueError, match=r"decays in form .*del state_dict\['decay'\]"):
        convert(state_dict)
    del state_dict["decay"]
    assert len(convert(state_dict)["param_groups"]) == 2


@pytest.mark.parametrize("wrong", [{}, {"state": {}}, {"weight": torch.ones(1)}])
def test_conversion_refuses_what_is_no_state_dict(wrong):
    with pytest.raises(ValueError, match="so it is none of an optimizer"):
        merge_groups(wrong)


def test_group_names_refuses_a_parameter_outside_the_model():
    stranger = {"params": [nn.Parameter(torch.ones(2, 3))]}
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \(shape 2 x 3\)"):
        group_names([stranger], nn.Linear(1, 1))


OTHER_OBJECTS = {
    "optimizer to merge": (
        lambda optimizer, model: merge_groups(optimizer),
        r"`state_dict` must be a dict, not SGD\. Pass .*optimizer\.state_dict\(\)",
    ),
    "flat names": (
        lambda optimizer, model: merge_groups(optimizer.state_dict(), names_of(model)),
        r"`names` must be one list of names per group, not \['scale'.*=group_names\(",
    ),
    "dict of names": (
        lambda optimizer, model: merge_groups(optimizer.state_dict(), {"a": ["b"]}),
        r"`names` must be one list of names per group, not \{'a': \['b'\]\} \(dict\)",
    ),
    "number for names": (
        lambda optimizer, model: merge_groups(optimizer.state_dict(), 3),
        r"`names` must be one list of names per group, not 3 \(int\)\. Pass names=",
    ),
    "optimizer to name": (
        lambda optimizer, model: group_names(optimizer, model),
        r"`param_groups` must be a list of dicts, .* \(SGD\)\. Pass .*param_groups\.",
    ),
    "groups for a model": (
        lambda optimizer, model: group_names(model, optimizer.param_groups),
        r"`model` must be a module or a sequence of modules, not .{,70} \(list\)\.",
    ),
    "dict of modules": (
        lambda optimizer, model: group_names(optimizer.param_groups, {"a": model}),
        r"`model` must be .*, not \{'a': .{,70} \(dict\)\. Pass model=model\.",
    ),
}


@pytest.mark.parametrize("case", OTHER_OBJECTS)
def test_conversion_refuses_other_objects_in_one_line(case):
    call, words = OTHER_OBJECTS[case]
    model = make_net()

    with pytest.raises(TypeError, match=words):
        call(torch.optim.SGD(model.parameters()), model)


def test_group_of_one_parameter_stays_one():
    named = list(nn.Linear(2, 1).named_parameters())
    groups = [{"params": named[:1], "lr": 0.1}, {"params": named[1:], "lr": 0.2}]
    saved = torch.optim.SGD(groups, weight_decay=0.5).state_dict()
    merged = merge_groups(saved, by="lr")
    told = [(g["param_names"], g["lr"]) for g in merged["param_groups"]]
    assert told == [(["weight"], 0.1), (["bias"], 0.2)]
