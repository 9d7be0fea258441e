"""`Muon` on whole models: matrices of the body to Muon, all else to AdamW."""

import copy
import logging
import re
import warnings

import pytest
import torch
from torch import nn

from selective_optim import Muon, param_groups, selective
from selective_optim.policies import is_hidden_matrix
from tests import zoo
from tests.support.compare import assert_same
from tests.support.routes import HALVES, Net, loss_of, needs_muon, split, twins

pytestmark = needs_muon
NAMES = ("blocks.0.0.weight", "blocks.1.0.weight")


def routes_of(optimizer):
    return {row.name: row.route for row in optimizer.decay_report()}


def to_muon(optimizer):
    return [name for name, route in routes_of(optimizer).items() if route == "muon"]


def train(model, *optimizers, steps=20):
    for number in range(steps):
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_it_is_torchs_muon_on_the_body_and_adamw_on_the_rest():
    model, twin = twins()
    rest = {"lr": 3e-3, "betas": (0.9, 0.95)}
    one = Muon(model.parameters(), 0.02, 0.2, 0.9, wd_policy="no_bias_norm", rest=rest)
    body, decayed, exempt = split(twin)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    others = [
        torch.optim.Muon(body, 0.02, 0.2, 0.9),
        torch.optim.AdamW(groups, **rest, weight_decay=0.2, fused=True),
    ]
    train(model, one)
    train(twin, *others)
    assert_same(model, twin)
    assert not isinstance(one, torch.optim.Muon)


def test_every_argument_of_torchs_reaches_it():
    model, _ = twins()
    given = {
        "lr": 0.5,
        "weight_decay": 0.25,
        "momentum": 0.8,
        "nesterov": False,
        "ns_coefficients": (3.0, -4.0, 2.0),
        "eps": 1e-6,
        "ns_steps": 3,
        "adjust_lr_fn": "match_rms_adamw",
    }
    muon, rest = Muon(model, **given).param_groups
    assert {key: muon[key] for key in given} == given
    assert (rest["lr"], rest["weight_decay"]) == (1e-3, 0.25)


def test_a_weight_decay_of_the_rest_is_its_own():
    model, _ = twins()
    one = Muon(model, weight_decay=0.25, rest={"weight_decay": 0.5})
    assert [group["weight_decay"] for group in one.param_groups] == [0.25, 0.5]


def test_a_tied_embedding_is_an_embedding():
    model = Net(tied=True)
    assert {
        name for name, route in routes_of(Muon(model)).items() if route == "muon"
    } == {*NAMES}
    # Whatever is called the output.
    one = Muon(model, output="blocks.1.0.*")
    assert to_muon(one) == [NAMES[0]]


def unsure():
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))


def test_where_the_output_is_not_sure_no_candidate_goes_to_muon():
    model = unsure()
    with pytest.warns(UserWarning, match="not certain") as caught:
        one = Muon(model)
    assert to_muon(one) == ["1.weight"]
    [told] = caught
    line = re.search(r"pass Muon (output='[^']*')\.$", str(told.message))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = eval(f"Muon(model, {line})", {"Muon": Muon, "model": model})
    assert routes_of(again) == routes_of(one)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 2)
    )


def test_the_share_of_convolutions_is_told():
    with pytest.warns(UserWarning, match="only matrices") as caught:
        one = Muon(convolutions(), output="3.*")
    [told] = caught
    assert "1 weight of more than two dimensions, 69% of all elements" in str(
        told.message
    )
    assert routes_of(one)["0.weight"] == "adamw"


def test_a_model_without_hidden_matrices_is_stepped_by_adamw_and_told():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="route 'muon' takes none of 2 parameters"):
        one = Muon(model, output="0.*")
    model(torch.ones(1, 3)).sum().backward()
    one.step()
    assert list(one.optimizers) == ["adamw"]
    layer = nn.Linear(3, 3)
    one.add_param_group({"params": layer.weight, "model": layer, "route": "muon"})
    layer(torch.ones(1, 3)).sum().backward()
    one.step()
    assert [group["route"] for group in one.param_groups] == ["adamw", "muon"]
    again = copy.deepcopy(one)
    assert [group["route"] for group in again.param_groups] == ["adamw", "muon"]


def test_without_torchs_muon_it_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"has no Muon; 2\.9 has"):
        Muon(Net())


def test_selective_muon_stays_the_class_over_matrices():
    model, _ = twins()
    cls = selective(torch.optim.Muon)
    assert issubclass(cls, torch.optim.Muon)
    with pytest.raises(ValueError, match="only supports 2D"):
        cls(model.parameters())


@pytest.mark.parametrize("key", HALVES)
def test_groups_for_one_object_optimizers_of_others(key):
    model, _ = twins()
    rates = {"muon": 0.02, "adamw": 3e-4}
    groups = param_groups(
        *(model, "no_bias_norm", 0.1, rates),
        routes={"muon": is_hidden_matrix, "adamw": "*"},
        key=key,
    )
    body, decayed, exempt = split(model)
    muon, adamw = HALVES[key]
    assert list(groups) == [
        {"params": body, "weight_decay": 0.1, "lr": 0.02, key: muon},
        {"params": decayed, "weight_decay": 0.1, "lr": 3e-4, key: adamw},
        {"params": exempt, "weight_decay": 0.0, "lr": 3e-4, key: adamw},
    ]
    assert {row.route for row in groups.rows} == {"muon", "adamw"}
    assert "route" in str(groups).splitlines()[0]


def test_groups_have_what_another_key_holds():
    model, _ = twins()
    groups = param_groups(
        *(model, "all", 0.1),
        routes={"a": "embed.*", "b": "*"},
        key="optim",
        values={"a": 1, "b": 2},
    )
    assert [group["optim"] for group in groups] == [1, 2]


# Every library once in so many models; all of 235 were seen to construct.
SAMPLES = {"torchvision": 30, "timm": 200, "transformers": 60}


def is_embedding_or_output(model, name):
    """Judge by what the model says itself, and by torch's own classes."""
    owner = model.get_submodule(name.rpartition(".")[0])
    said = [
        getattr(model, each, None)
        for each in ("get_output_embeddings", "get_classifier")
    ]
    outputs = []
    for accessor in filter(None, said):
        try:
            outputs.append(accessor())
        except Exception:  # one that the model inherits and does not serve
            continue
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    tied = any(owner.weight is table for table in tables)
    return tied or isinstance(owner, nn.Embedding) or any(owner is o for o in outputs)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", SAMPLES)
def test_models_as_they_come(library, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setattr(logging.Logger, "handle", lambda *args: None)
    count = 0
    for name in zoo.names(library, SAMPLES[library]):
        try:
            model = zoo.build(library, name)
        except Exception:  # it needs what is not installed
            continue
        if next(model.parameters(), None) is None:
            continue
        one = Muon(model.parameters(), wd_policy="no_bias_norm")
        rows = [row for row in one.decay_report() if row.route == "muon"]
        assert all(row.role == "weight" and len(row.shape) == 2 for row in rows), name
        wrong = [
            row.name
            for row in rows
            if row.name.endswith(".weight") and is_embedding_or_output(model, row.name)
        ]
        assert not wrong, name
        Muon(model.parameters(), wd_policy="no_bias_norm").load_state_dict(
            one.state_dict()
        )
        count += 1
    assert count > 2
