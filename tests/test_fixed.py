"""Decay that a policy fixes is that number, whatever the group says."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from selective_optim import (
    SGD,
    AdamW,
    Decay,
    WeightDecay,
    checkpoint,
    decay_report,
    param_groups,
    proportional_to_lr,
    selective,
)
from selective_optim.fused import stepper
from selective_optim.policies import (
    as_policy,
    diff,
    exclude,
    fixed,
    form,
    is_bias,
    is_norm,
    layerwise,
    parse,
    scale,
    towards,
)
from tests.support.compare import assert_same
from tests.support.problems import (
    HYPER,
    IMPLEMENTATIONS,
    HandSplit,
    assert_trains_alike,
    clone_params,
    each_chosen,
    make_params,
    ours,
    set_grads,
)

LR, WD = HYPER["lr"], HYPER["weight_decay"]
# What is decided, beside the number that torch is given by hand in a group of its own.
DECIDED = [
    (Decay(fixed=0.03), 0.03),
    (Decay(), WD),
    (Decay(fixed=0), 0.0),
    (Decay(0.5, fixed=0.03), 0.5 * 0.03),
    (Decay(0, fixed=0.03), 0.0),
    (Decay(1, "l2", fixed=0.2), 0.2),
    (Decay(1, "decoupled", fixed=0.2), 0.2),
    (Decay(0.5), 0.5 * WD),
]
BY_HAND = [Decay(number, decay.form) for decay, number in DECIDED]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def decays(policy, weight_decay=WD, cls=AdamW):
    optimizer = cls(net(), weight_decay=weight_decay, wd_policy=policy)
    return {row.name: row.weight_decay for row in optimizer.decay_report()}


# Bits.


@pytest.mark.parametrize("planning", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight_decay", [WD, 0.0])
@each_chosen
def test_bits_are_torchs_with_that_number(
    case, kind, planning, weight_decay, device, monkeypatch
):
    monkeypatch.setattr(stepper, "PLANNING", planning and stepper.PLANNING)
    numbers = [n if d.fixed is not None or weight_decay else 0 for d, n in DECIDED]
    by_hand = [Decay(n, d.form) for n, (d, _) in zip(numbers, DECIDED)]
    arguments = {"lr": LR, **IMPLEMENTATIONS[kind]}
    actual, expected = make_params(device=device), make_params(device=device)
    decided = [decay for decay, _ in DECIDED]
    optimizer = ours(case, actual, decided, weight_decay=weight_decay, **arguments)
    oracle = HandSplit(case, expected, by_hand, weight_decay=1.0, **arguments)
    assert_trains_alike(actual, optimizer, expected, oracle)


@pytest.mark.parametrize("kind", ["for-loop", "foreach"])
def test_bits_of_another_class_are_its_own_with_that_number(kind):
    actual = make_params()[:6]
    expected = clone_params(actual)
    table = {f"p{i}": decay.multiplier for i, decay in enumerate(BY_HAND)}
    numbers = {f"p{i}": decay for i, (decay, _) in enumerate(DECIDED)}
    numbers = {name: Decay(d.multiplier, fixed=d.fixed) for name, d in numbers.items()}
    arguments = {"foreach": kind == "foreach", "lr": LR}
    optimizer = selective(torch.optim.NAdam)(
        [(f"p{i}", param) for i, param in enumerate(actual)],
        weight_decay=WD,
        wd_policy=lambda info: numbers[info.name],
        **arguments,
    )
    groups = [
        {"params": [param], "weight_decay": wd}
        for param, wd in zip(expected, table.values())
    ]
    oracle = torch.optim.NAdam(groups, **arguments)
    assert_trains_alike(actual, optimizer, expected, oracle)


@pytest.mark.parametrize("kind", ["independent", "corrected", "cautious"])
@pytest.mark.parametrize("target", [0, 1, "init"])
def test_every_form_and_target_is_that_of_a_group_with_this_number(kind, target):
    runs = []
    policy = form(kind) * towards(target)
    for wd, decided in ((0.5, policy * fixed(0.03)), (0.03, policy)):
        params = make_params()
        optimizer = AdamW(params, lr=LR, weight_decay=wd, wd_policy=decided)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = LR / (1 + step)
            set_grads(params, step)
            optimizer.step()
        runs.append(params)
    assert_same(*runs)


@pytest.mark.parametrize("cls", [AdamW, selective(torch.optim.NAdam)])
def test_schedules_and_edits_of_the_group_leave_it_alone(cls):
    params = make_params()
    policy = {"0": Decay(fixed=0.03)}
    named = [(str(i), param) for i, param in enumerate(params)]
    optimizer = cls(named, lr=LR, weight_decay=0.1, wd_policy=policy)
    step_size = torch.optim.lr_scheduler.StepLR(WeightDecay(optimizer), 1, 0.5)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
        step_size.step()
    first, second, *_ = optimizer.decay_report()
    assert (first.weight_decay, second.weight_decay) == (0.03, 0.1 / 8)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert optimizer.decay_report()[0].weight_decay == 0.03
    # And the step does what the report says.
    params[0].grad, before = torch.zeros_like(params[0]), params[0].detach().clone()
    fresh = SGD(params[:1], lr=LR, weight_decay=0.0, wd_policy=fixed(0.03))
    fresh.step()
    assert_same([params[0]], [before - LR * (0.03 * before)])


def test_fixed_decay_that_is_corrected_may_stand_beside_a_tie_to_the_rate():
    optimizer = AdamW(net(), weight_decay=WD, wd_policy=form("corrected") * fixed(0.1))
    proportional_to_lr(optimizer)


# Products, text, reports.


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (fixed(0.05), 0.05),
        (exclude("0.weight") * fixed(0.05), 0.0),
        (fixed(0.05) * exclude("0.weight"), 0.0),
        (scale("0.weight", by=0.1) * fixed(0.05), 0.1 * 0.05),
        (fixed(0.05) * scale("0.weight", by=0.1), 0.1 * 0.05),
        (fixed(0.05) * fixed(0.02, "0.*"), 0.02),
        (fixed(0, "0.*") * fixed(0.02), 0.0),
        (fixed(0.02) * fixed(0, "0.*"), 0.0),
        ({"0.*": Decay(fixed=1e-5)}, 1e-5),
        (lambda info: Decay(0.5, fixed=0.05), 0.025),
        (layerwise(0.5, "*") * fixed(0.05), 0.25 * 0.05),
        ("fixed(0.05, '0.*')", 0.05),
    ],
    ids=str,
)
def test_products_multiply_what_is_fixed(policy, expected):
    assert decays(policy)["0.weight"] == expected


@pytest.mark.parametrize(
    "text",
    [
        "fixed(0.05, '*.bias', is_norm)",
        "fixed(1e-05, missing_ok=True) * exclude(is_bias)",
        "first_match({'*.bias': Decay(1, fixed=1e-05), 'a': Decay(0.001), 'b': 0.5})",
        "first_match({'a': Decay(0.5, 'l2', target=1, fixed=0.05)})",
    ],
)
def test_policy_prints_as_it_is_read(text):
    assert repr(parse(text)) == text
    assert parse(repr(parse(text))) == parse(text)


def test_report_shows_it_with_its_timescale_and_reason():
    policy = exclude(is_bias) * fixed(0.5, is_norm)
    optimizer = AdamW(net(), lr=0.1, weight_decay=0.2, wd_policy=policy)
    row = optimizer.decay_report()["1.weight"]
    assert (row.weight_decay, row.fixed, row.timescale) == (0.5, 0.5, 1 / (0.1 * 0.5))
    assert row.reason == "fixed is_norm"
    assert optimizer.decay_report()["0.weight"].fixed is None


@pytest.mark.parametrize(
    "make", [SGD, AdamW, selective(torch.optim.NAdam), selective(torch.optim.RMSprop)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_report_measures_it(make, weight_decay):
    model = net()
    policy = fixed(0.05, "0.weight") * fixed(0, "2.weight")
    optimizer = make(model, lr=0.1, weight_decay=weight_decay, wd_policy=policy)
    report = decay_report(optimizer, model, measure=True)
    applied = {row.name: row.applied for row in report}
    assert applied["0.weight"] is True
    assert applied["2.weight"] is False
    assert applied["0.bias"] is bool(weight_decay)
    assert report["0.weight"].measured in (0.05, None)
    assert "no step" not in report.remark
    assert report.agrees or "decay" not in report.remark
    assert {p.name for p in optimizer.decay_report() if p.fixed} == {"0.weight"}


def test_difference_and_groups_split_by_hand_tell_the_number():
    told = str(diff(net(), "all", exclude(is_bias) * fixed(0.05, "0.*")))
    assert (
        "0.weight  4 x 3  decayed  only everything  decayed by 0.05  fixed '0.*'"
        in (told)
    )
    groups = param_groups(net(), fixed(0.05, "0.*"), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.1]


# State dicts.


def trained(policy, model, weight_decay=WD, cls=AdamW):
    optimizer = cls(model, lr=LR, weight_decay=weight_decay, wd_policy=policy)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def test_record_says_it_and_changes_are_told():
    saved = trained(fixed(0.05, "0.*"), net()).state_dict()
    assert saved["decay"][0][0] == [
        *(1.0, "decoupled", {"name": "0.weight", "fixed": 0.05}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(fixed(0.05, "0.*"), net()).load_state_dict(saved)
    told = re.escape("'0.weight' decayed by 0.05 (decoupled) and now decays by 0.1 (")
    with pytest.warns(UserWarning, match=told):
        trained(fixed(0.1, "0.*"), net()).load_state_dict(saved)
    told = re.escape("'0.weight' decayed by 0.05 (decoupled) and now decays in full (")
    with pytest.warns(UserWarning, match=told):
        trained("all", net()).load_state_dict(saved)
    told = decay_report(saved)
    assert [row.weight_decay for row in told][:3] == [0.05, 0.05, WD]


def test_checkpoint_without_decay_of_groups_takes_nothing_from_what_is_fixed():
    """What is told of lost decay is told of parameters that follow their group."""
    saved = torch.optim.AdamW(net().parameters(), weight_decay=0.0).state_dict()
    policy = fixed(0.05, "0.weight", "2.weight") * exclude(is_bias, is_norm)
    trained(policy, net()).load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: each])
def test_split_and_merged_state_dicts_keep_it(copied):
    model = net()
    policy = exclude(is_bias, is_norm) * fixed(0.05, "2.*")
    saved = copied(trained(policy, model, weight_decay=0.02).state_dict())
    names = [[name for name, _ in model.named_parameters()]]
    rest = [name for name in names[0] if name not in ("0.weight", "2.weight")]
    groups = [{"params": ["0.weight"]}, {"params": ["2.weight"]}, {"params": rest}]
    split = checkpoint.split_groups(saved, groups, names=names)
    assert [group["weight_decay"] for group in split["param_groups"]] == [0.02, 0.05, 0]
    merged = checkpoint.merge_groups(saved, names)
    assert merged["decay"] == saved["decay"]
    merged = checkpoint.merge_groups(
        split, [g["params"] for g in groups], order=names[0]
    )
    share = {name: entry[0] for name, entry in zip(names[0], merged["decay"][0])}
    assert (merged["param_groups"][0]["weight_decay"], share["0.weight"]) == (0.05, 0.4)


def test_merging_groups_of_several_decays_keeps_what_is_fixed():
    model = net()
    groups = [
        {"params": model[:2].named_parameters(), "weight_decay": 0.1},
        {"params": [("2.weight", model[2].weight)], "weight_decay": 0.2},
        {"params": [("2.bias", model[2].bias)], "weight_decay": 0.2},
    ]
    saved = AdamW(groups, wd_policy={"0.weight": Decay(fixed=0.05)}).state_dict()
    merged = checkpoint.merge_groups(
        saved, order=[n for n, _ in model.named_parameters()]
    )
    first, second, *_ = merged["decay"][0]
    assert (first[0], first[2]["fixed"], second[0]) == (1.0, 0.05, 0.5)


def test_fit_keeps_it():
    saved = trained(fixed(0.05, "0.*"), net()).state_dict()
    grown = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    fitted = checkpoint.fit(saved, grown).state_dict
    trained(fixed(0.05, "0.*"), grown).load_state_dict(fitted)
    assert fitted["decay"][0][0][2]["fixed"] == 0.05


@pytest.mark.parametrize("cls", [AdamW, selective(torch.optim.NAdam)])
def test_resumed_training_goes_on(cls):
    runs = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = net()
        optimizer = trained(fixed(0.05, "0.*"), model, cls=cls)
        if interrupted:
            saved = optimizer.state_dict()
            optimizer = cls(
                model, lr=1.0, weight_decay=WD, wd_policy="fixed(0.05,'0.*')"
            )
            optimizer.load_state_dict(saved)
        optimizer.step()
        runs.append(list(model.parameters()))
    assert_same(*runs)


# What is told.


@pytest.mark.parametrize("cls", [SGD, AdamW, selective(torch.optim.NAdam)])
def test_no_decay_of_groups_beside_a_fixed_one_is_silent(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = trained(fixed(0.05, "0.*"), net(), weight_decay=0.0, cls=cls)
        optimizer.step()
        optimizer.step()
    with pytest.warns(UserWarning, match="has no effect"):
        cls(net(), lr=LR, weight_decay=0.0, wd_policy=fixed(0, "0.*"))


def test_groups_whose_decay_goes_beside_a_fixed_one_are_silent():
    model = net()
    optimizer = AdamW(model, lr=LR, weight_decay=WD, wd_policy=fixed(0.05, "0.*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.param_groups[0]["weight_decay"] = 0.0
            optimizer.step()


def test_rate_above_that_of_the_beginning_is_told_of_a_fixed_decay():
    policy = form("independent") * fixed(0.05)
    optimizer = AdamW(net(), lr=LR, weight_decay=0.0, wd_policy=policy)
    optimizer.param_groups[0]["max_lr"] = 2 * LR
    with pytest.warns(UserWarning, match="its rate rises"):
        optimizer.step()


def test_step_of_another_class_is_refused_where_decay_is_fixed():
    optimizer = AdamW(net(), weight_decay=0.0, wd_policy=fixed(0.05))
    with pytest.raises(RuntimeError, match="step of another class"):
        torch.optim.AdamW.step(optimizer)


def test_half_precision_is_told_of_a_fixed_decay():
    model = net().bfloat16()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    policy = exclude(is_norm) * fixed(1e-4, "0.weight")
    optimizer = AdamW(
        model, lr=1e-3, weight_decay=0.0, wd_policy=policy, foreach=False, fused=False
    )
    with pytest.warns(UserWarning, match=r"'0\.weight' hardly decays"):
        optimizer.step()


SMALL = {
    "mapping": (
        {"*.bias": 1e-5},
        "Decay(fixed=1e-05) if that is the decay itself, or Decay(1e-05) ",
    ),
    "scale": (
        scale("*.bias", is_norm, by=0.005),
        "fixed(0.005, '*.bias', is_norm) if that is the decay itself, or "
        "first_match({'*.bias': Decay(0.005), is_norm: Decay(0.005)}) ",
    ),
    "product": (
        exclude(is_norm) * as_policy({"*.bias": 1e-5}),
        "Decay(fixed=1e-05) if that is the decay itself, or Decay(1e-05) ",
    ),
}


@pytest.mark.parametrize(
    "cls", [SGD, AdamW, selective(torch.optim.NAdam), param_groups]
)
@pytest.mark.parametrize(("policy", "instead"), SMALL.values(), ids=SMALL)
def test_multiplier_that_reads_like_a_decay_warns_once(cls, policy, instead):
    with pytest.warns(UserWarning, match="multiplies weight_decay") as caught:
        cls(net(), weight_decay=0.1, wd_policy=policy)
    (warning,) = caught
    number = 0.005 if "0.005" in instead else 1e-5
    assert str(warning.message) == (
        f"`wd_policy` multiplies weight_decay by {number:g}, which comes to a decay of "
        f"{number / 10:g}. Write {instead}if a multiplier is meant."
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("policy", "weight_decay"),
    [
        ({"*.bias": Decay(fixed=1e-5)}, 1e-5),
        ({"*.bias": Decay(1e-5)}, 0.1 * 1e-5),
        ("fixed(0.005, '*.bias', is_norm)", 0.005),
        ("first_match({'*.bias': Decay(0.005), is_norm: Decay(0.005)})", 0.1 * 0.005),
    ],
    ids=str,
)
def test_what_the_warning_says_to_type_is_silent_and_leads_there(policy, weight_decay):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decays(policy)["0.bias"] == weight_decay
        # Also as it is printed into a state dict or a configuration.
        assert decays(repr(as_policy(policy)))["0.bias"] == weight_decay


def test_assigned_multiplier_and_that_of_a_group_are_told():
    optimizer = AdamW(net(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="comes to a decay of 1e-06"):
        optimizer.wd_policy = {"*.bias": 1e-5}
    group = {"params": net(), "wd_policy": {"*.bias": 1e-5}, "weight_decay": 0.2}
    with pytest.warns(UserWarning, match="comes to a decay of 2e-06"):
        AdamW([group], weight_decay=0.1)


@pytest.mark.parametrize(
    "policy", [{"*.bias": 0.01}, {"*.bias": 0}, layerwise(0.01, "*"), lambda info: 1e-5]
)
def test_other_multipliers_are_silent(policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decays(policy)


def test_way_out_of_what_is_no_decay_is_one():
    assert Decay(fixed=0.05) == fixed(0.05, "head.*").inside
