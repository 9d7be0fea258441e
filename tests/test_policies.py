"""What policies decide, and that they are values: equal, picklable, printed as made."""

import copy
import dataclasses
import functools
import math
import pickle
import re

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, Decay
from selective_optim.decay import Answer
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import (
    Policy,
    as_policy,
    exclude,
    first_match,
    form,
    is_bias,
    is_norm,
    layerwise,
    marked,
    named,
    only,
    scale,
)
from selective_optim.policies.named import NAMED


def make_net():
    body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((2, 4)))
    parts = {"embed": nn.Embedding(5, 4), "body": body, "head": nn.Linear(4, 2)}
    return nn.ModuleDict(parts)


MODEL = make_net()
INFOS = ModuleIndex(MODEL).everyone()
NAMES = [info.name for info in INFOS]
# embed.weight, body.0.weight, body.0.bias, body.1.weight, body.1.bias, head.*
FULL, L2, DECOUPLED = Decay(), Decay(1, "l2"), Decay(1, "decoupled")


def half_of_matrices(info):
    return 0.5 if info.ndim == 2 else False


def decays(policy):
    return [as_policy(policy)(info) for info in INFOS]


MULTIPLIERS = {
    "all": ("all", [1, 1, 1, 1, 1, 1, 1]),
    "none": ("none", [0, 0, 0, 0, 0, 0, 0]),
    "no_bias": ("no_bias", [1, 1, 0, 1, 0, 1, 0]),
    "no_norm": ("no_norm", [1, 1, 1, 0, 0, 1, 1]),
    "no_bias_norm": ("no_bias_norm", [1, 1, 0, 0, 0, 1, 0]),
    "no_bias_norm_embedding": ("no_bias_norm_embedding", [0, 1, 0, 0, 0, 1, 0]),
    "matrices": ("matrices", [1, 1, 0, 1, 1, 1, 0]),
    "layer_weights": ("layer_weights", [1, 1, 0, 0, 0, 1, 0]),
    "exclude": (exclude("*.bias", nn.Embedding), [0, 1, 0, 1, 0, 1, 0]),
    "only": (only("head.*"), [0, 0, 0, 0, 0, 1, 1]),
    "scale": (scale("head.*", by=0.25), [1, 1, 1, 1, 1, 0.25, 0.25]),
    "mapping": (
        {"head.*": 0.1, "*.bias": False, nn.LayerNorm: Decay(0.5)},
        [1, 1, 0, 0.5, 0, 0.1, 0.1],
    ),
    "mapping the other way": ({"*.bias": 0, "head.*": 0.1}, [1, 1, 0, 1, 0, 0.1, 0]),
    "mapping of objects": (
        {MODEL.embed: 0, MODEL.head.bias: 2, re.compile("body"): True},
        [0, 1, 1, 1, 1, 1, 2],
    ),
    "callable": (half_of_matrices, [0.5, 0.5, 0, 0.5, 0.5, 0.5, 0]),
    "callable of Decay": (lambda i: Decay(0.5, "l2"), [0.5] * 7),
    "product": (
        exclude("*.bias") * scale("head.*", by=0.5),
        [1, 1, 0, 1, 0, 0.5, 0],
    ),
    "product of three": (
        scale("head.*", by=0.5) * scale("*", by=0.5) * only("head.weight"),
        [0, 0, 0, 0, 0, 0.25, 0],
    ),
}


@pytest.mark.parametrize(("policy", "expected"), MULTIPLIERS.values(), ids=MULTIPLIERS)
def test_policy_gives_each_parameter_its_multiplier(policy, expected):
    assert [decay.multiplier for decay in decays(policy)] == expected


FORMS = {
    "form of all": (form("l2"), [L2] * 7),
    "form of some": (form("decoupled", "head.*"), [FULL] * 5 + [DECOUPLED] * 2),
    "right-hand form wins": (form("l2") * form("decoupled"), [DECOUPLED] * 7),
    "right-hand form is not stated": (
        form("l2") * scale("head.*", by=0.5),
        [L2] * 5 + [Decay(0.5, "l2")] * 2,
    ),
    "right-hand form where it applies": (
        form("l2") * form("decoupled", "head.*"),
        [L2] * 5 + [DECOUPLED] * 2,
    ),
    "mapping": ({"head.*": Decay(0.5, "l2")}, [FULL] * 5 + [Decay(0.5, "l2")] * 2),
}


@pytest.mark.parametrize(("policy", "expected"), FORMS.values(), ids=FORMS)
def test_policy_gives_each_parameter_its_form(policy, expected):
    assert decays(policy) == expected


REASONS = {
    "exclude": (exclude("*.bias"), "body.0.bias", "exclude '*.bias'"),
    "decays in full": (exclude("*.bias"), "embed.weight", "decays in full"),
    "name": ("no_bias_norm", "body.1.weight", "exclude is_norm"),
    "only": (only("head.*"), "head.bias", "only 'head.*'"),
    "not in only": (only("head.*"), "embed.weight", "not in only('head.*')"),
    "mapping": ({nn.Embedding: 0}, "embed.weight", "nn.Embedding"),
    "callable": (half_of_matrices, "embed.weight", "half_of_matrices"),
    "product": (
        exclude("*.bias") * scale("head.*", by=0.5),
        "head.bias",
        "exclude '*.bias', scale 'head.*'",
    ),
}


@pytest.mark.parametrize(("policy", "name", "reason"), REASONS.values(), ids=REASONS)
def test_reason_names_the_selector_that_decided(policy, name, reason):
    answer = as_policy(policy).decide(INFOS[NAMES.index(name)])
    assert isinstance(answer, Answer)
    assert answer.reason == reason


WRITTEN = [
    "exclude('*.bias', is_norm)",
    "exclude(nn.LayerNorm, missing_ok=True)",
    "only(re.compile('head'))",
    "scale('head.*', by=0.1)",
    "scale('head.*', is_bias, by=0.123456789)",
    "form('l2')",
    "form('decoupled', 'head.*')",
    "first_match({'head.*': 0.1, '*.bias': 0, nn.LayerNorm: Decay(0.5, 'l2')})",
    "first_match({'head.*': 1}, missing_ok=True)",
    "exclude('*.bias') * scale('head.*', by=0.1)",
    "exclude('*.bias') * (form('l2') * scale('head.*', by=0.1))",
    "exclude(is_bias) * form('l2') * only('*')",
]


def evaluated(text):
    return eval(text)


@pytest.mark.parametrize("text", WRITTEN)
def test_policy_prints_as_the_expression_that_made_it(text):
    assert repr(evaluated(text)) == text


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_policy_survives_copies_equal_and_hashable(text, twin):
    policy = evaluated(text)
    assert twin(policy) == policy == evaluated(text)
    assert hash(twin(policy)) == hash(policy)
    assert decays(twin(policy)) == decays(policy)


@pytest.mark.parametrize("name", NAMED)
def test_named_policy_survives_pickling(name):
    assert pickle.loads(pickle.dumps(named(name))) == named(name)


def test_different_policies_differ():
    policies = [evaluated(text) for text in WRITTEN]
    assert len(set(policies)) == len(policies)
    assert exclude("*.bias") != only("*.bias")


FROZEN = [*map(evaluated, WRITTEN), as_policy(len), as_policy("timm"), layerwise(0.5)]


@pytest.mark.parametrize("policy", [*FROZEN, marked()], ids=repr)
def test_policy_is_frozen(policy):
    field, *_ = dataclasses.fields(policy)
    with pytest.raises(AttributeError):
        setattr(policy, field.name, None)
    assert hash(policy) == hash(copy.copy(policy))


DECAYS = [(1.0, "Decay(1)"), (0.1, "Decay(0.1)"), (1 / 3, f"Decay({1 / 3!r})")]


@pytest.mark.parametrize(("multiplier", "text"), DECAYS)
def test_decay_prints_a_number_that_reads_back(multiplier, text):
    assert repr(Decay(multiplier)) == text
    assert evaluated(text) == Decay(multiplier)


def test_decay_takes_bools_as_one_and_zero():
    assert (Decay(True), Decay(False)) == (Decay(1), Decay(0))
    assert repr(Decay(True, "l2")) == "Decay(1, 'l2')"
    assert math.isclose((Decay(0.5) * Decay(0.5, "l2")).multiplier, 0.25)
    with pytest.raises(TypeError):
        Decay(1) * 2


def own(model, head_policy):
    return [
        {"params": model.body.parameters()},
        {"params": model.head.parameters(), "wd_policy": head_policy},
    ]


GROUP_POLICIES = {
    "name": ("none", [1, 0, 0, 0, 0, 0]),
    "mapping": ({"bias": 0.5}, [1, 0, 0, 0, 1, 0.5]),
    "callable": (lambda info: info.group, [1, 0, 0, 0, 1, 1]),
    "object": (only("weight"), [1, 0, 0, 0, 1, 0]),
    "None decays all": (None, [1, 0, 0, 0, 1, 1]),
}


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
@pytest.mark.parametrize(
    ("policy", "expected"), GROUP_POLICIES.values(), ids=GROUP_POLICIES
)
def test_policy_of_a_group_overrides_the_constructors(optimizer, policy, expected):
    groups = own(make_net(), policy)
    made = optimizer(groups, lr=0.1, weight_decay=1.0, wd_policy="no_bias_norm")
    assert [row.weight_decay for row in made.decay_report().rows] == expected
    assert all("wd_policy" not in group for group in made.param_groups)
    assert "wd_policy" in groups[1]  # the caller's dict serves a second optimizer


def test_policy_of_an_added_group_overrides_the_constructors():
    model = make_net()
    optimizer = SGD(
        model.body.parameters(), lr=0.1, weight_decay=1.0, wd_policy="no_bias_norm"
    )
    optimizer.add_param_group({"params": model.head.parameters(), "wd_policy": "all"})
    assert [row.weight_decay for row in optimizer.decay_report().rows[-2:]] == [1, 1]


MISSING = {
    "exclude": exclude("*.gone", missing_ok=True),
    "only": only("*.weight", "*.gone", missing_ok=True),
    "scale": scale(re.compile("gone"), by=0.5, missing_ok=True),
    "form": form("l2", "*.gone", missing_ok=True),
    "mapping": first_match({"*.gone": 0}, missing_ok=True),
    "module": exclude(nn.Linear(2, 2), missing_ok=True),
    "product": exclude("*.bias") * exclude("*.gone", missing_ok=True),
}


@pytest.mark.parametrize("policy", MISSING.values(), ids=MISSING)
def test_missing_ok_accepts_what_matches_nothing(policy):
    AdamW(make_net(), wd_policy=policy)


def test_glob_may_match_a_frozen_part_of_the_model():
    model = make_net()
    model.embed.requires_grad_(False)
    trained = filter(lambda p: p.requires_grad, model.parameters())
    AdamW(trained, wd_policy=exclude("embed.*", "*.bias"))


def test_is_norm_exempts_all_of_a_tied_pair_through_any_place():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    model["norm"].weight = model["linear"].bias
    (row,) = [
        row
        for row in SGD(model, lr=0.1, weight_decay=1.0, wd_policy=exclude(is_norm))
        .decay_report()
        .rows
        if row.name == "linear.bias"
    ]
    assert row.weight_decay == 0


def test_shapes_alone_suffice_for_matrices():
    params = [torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = SGD(params, lr=0.1, weight_decay=1.0, wd_policy="matrices")
    assert [row.weight_decay for row in optimizer.decay_report().rows] == [1, 0]


def test_multiplier_follows_the_group_and_never_undoes_an_exemption():
    optimizer = SGD(make_net(), lr=0.1, weight_decay=1.0, wd_policy=exclude(is_bias))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    rows = optimizer.decay_report().rows
    assert {row.weight_decay for row in rows if row.name.endswith("bias")} == {0}
    assert {row.weight_decay for row in rows if row.name.endswith("weight")} == {0.5}


def test_callable_may_print_what_it_is_asked_about():
    told = []
    params = [nn.Parameter(torch.ones(2))]
    AdamW(params, wd_policy=lambda info: told.append(repr(info)) or True)
    known = "name=None, names=(), leaf=None, owner=None, path=(), parameter=Parameter"
    assert told[0].startswith(f"ParameterInfo({known}")
    assert told[0].endswith("shape=torch.Size([2]), ndim=1, group=0, own_name=None)")


def test_policy_looks_at_the_model_once_for_all_groups():
    looks = []

    class Looking(Policy):
        def bind(self, roots):
            looks.append(roots)
            return self

        def decide(self, info):
            return Answer(Decay(1.0), "looked")

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": [param]} for param in model.parameters()]
    AdamW(groups, weight_decay=0.1, wd_policy=Looking(), model=model)
    assert looks == [[model]]


def test_bias_is_asked_of_in_a_function_where_names_alone_are_known():
    params = [(name, nn.Parameter(torch.ones(2))) for name in ("a.bias", "b.weight")]
    optimizer = AdamW(
        params, wd_policy=lambda info: info.leaf == "weight" or not is_bias(info)
    )
    assert [bool(row.weight_decay) for row in optimizer.decay_report().rows] == [0, 1]


def test_partial_prints_with_its_arguments_whatever_it_is_called():
    def called(argument, info):
        return True

    wrapped = functools.update_wrapper(functools.partial(called, 3), called)
    assert repr(wrapped) in repr(exclude(wrapped))
