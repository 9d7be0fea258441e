"""`param_groups` splits by hand what a policy decides, for any optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selective_optim import AdamW, layerwise_groups, param_groups, policies, selective
from tests.support.compare import assert_same
from tests.support.problems import set_grads


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)


def test_groups_have_names_decay_and_hyperparameters():
    model = make_model()
    groups = param_groups(
        model, "no_bias_norm", weight_decay=0.1, lr=0.01, betas=(0.8, 0.9)
    )
    assert [group["param_names"] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model[0].weight, model[2].weight]
    assert [(g["lr"], g["betas"]) for g in groups] == [(0.01, (0.8, 0.9))] * 2


TAKERS = [torch.optim.AdamW, torch.optim.NAdam, torch.optim.SGD, torch.optim.Adagrad]


@pytest.mark.parametrize("cls", TAKERS)
def test_torch_takes_them_and_steps_as_selective_does(cls):
    actual, expected = make_model(), make_model()
    arguments = {"fused": False} if cls in (torch.optim.AdamW, torch.optim.SGD) else {}
    policy = {"*.bias": 0, nn.LayerNorm: 0, "2.weight": 0.3}
    hand = cls(param_groups(actual, policy, weight_decay=0.1, lr=0.05), **arguments)
    optimizer = selective(cls)(
        expected, lr=0.05, weight_decay=0.1, wd_policy=policy, **arguments
    )
    for step in range(5):
        for model, each in ((actual, hand), (expected, optimizer)):
            set_grads(list(model.parameters()), step)
            each.step()
    assert_same(list(actual.parameters()), list(expected.parameters()))


def test_layerwise_groups_come_out_split_and_stay_as_they_were():
    model = Blocks()
    layers = layerwise_groups(model, lr=0.1, rate=0.5, layers="blocks.*")
    before = [dict(group) for group in layers]
    groups = param_groups(layers, "no_bias", weight_decay=0.1, lr=9.0, model=model)
    rates = [0.1, 0.05, 0.025, 0.0125]
    assert [group["lr"] for group in groups[::2]] == rates
    assert [group["lr"] for group in groups[1::2]] == rates
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] * 4
    assert [dict(group) for group in layers] == before
    torch.optim.AdamW(groups)


def test_what_a_group_brings_goes_before_the_arguments():
    model = make_model()
    given = [
        {"params": model[0].parameters(), "weight_decay": 1.0, "wd_policy": "none"},
        {"params": model[2].parameters(), "lr": 0.5},
    ]
    groups = param_groups(given, "matrices", weight_decay=0.1, lr=0.01)
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [
        *((0.0, 0.01), (0.1, 0.5), (0.0, 0.5))
    ]
    assert all("wd_policy" not in group for group in groups)


def test_tensors_without_names_serve_a_policy_of_shapes():
    params = list(make_model().parameters())
    groups = param_groups(params, "matrices", weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [2, 4]
    assert not any("param_names" in group or "lr" in group for group in groups)


def test_table_names_rate_decay_and_reason():
    groups = param_groups(make_model(), "no_bias_norm", weight_decay=0.1, lr=0.01)
    assert str(groups).splitlines() == [
        "group    lr  decay  tensors  elements  reason",
        "    0  0.01    0.1        2        18  decays in full",
        "    1  0.01      0        4        11  exclude is_bias, exclude is_norm",
        "decayed: 2 tensors, 18 elements; exempt: 4 tensors, 11 elements",
    ]
    assert str(param_groups(make_model(), "all", 0.1)).splitlines()[1].split()[1] == "-"


def split(policy, **arguments):
    return param_groups(make_model(), policy, **arguments)


REFUSALS = [
    (lambda: split("all"), ValueError, "Pass weight_decay=0.1"),
    (
        lambda: split(policies.form("l2"), weight_decay=0.1),
        ValueError,
        "states the form 'l2'",
    ),
    (
        lambda: split(policies.towards("init"), weight_decay=0.1),
        ValueError,
        "states the target 'init'",
    ),
    (lambda: split({"*.bais": 0}, weight_decay=0.1), ValueError, r"'\*.bais'"),
    (lambda: param_groups([], "all", 0.1), ValueError, "empty parameter list"),
    (
        lambda: param_groups([torch.ones(2)], "no_norm", 0.1),
        ValueError,
        "Pass model=model",
    ),
]


@pytest.mark.parametrize(("act", "kind", "message"), REFUSALS)
def test_what_cannot_be_split_is_refused(act, kind, message):
    with pytest.raises(kind, match=message):
        act()


def test_zero_decay_with_a_policy_is_told():
    with pytest.warns(UserWarning, match="is 0 in every group"):
        split("no_bias", weight_decay=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has Muon")
def test_muon_and_adamw_share_a_model_with_tied_embeddings_by_policy():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "body": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 6)
    model["head"].weight = model["embed"].weight
    hidden = policies.exclude(policies.is_embedding, policies.is_vector, "head.*")
    sides = {g["weight_decay"]: g for g in param_groups(model, hidden, 1.0)}
    assert sides[1.0]["param_names"] == ["body.weight"]
    assert sides[0.0]["param_names"] == ["embed.weight", "body.bias", "head.bias"]
    muon = selective(torch.optim.Muon)(
        sides[1.0]["params"],
        lr=0.02,
        weight_decay=0.1,
        wd_policy={"body.*": 0.5},
        model=model,
    )
    adamw = AdamW(
        sides[0.0]["params"],
        weight_decay=0.1,
        wd_policy={"embed.*": 1, "*": 0},
        model=model,
    )
    rows = [*muon.decay_report().rows, *adamw.decay_report().rows]
    assert {row.name: row.weight_decay for row in rows} == {
        "body.weight": 0.05,
        "embed.weight": 0.1,
        "body.bias": 0.0,
        "head.bias": 0.0,
    }
