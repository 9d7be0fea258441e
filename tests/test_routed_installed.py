"""Classes of other libraries as routes, and their own optimizers of two halves."""

import copy
import re
from importlib import import_module

import pytest
import torch
from torch import nn

from selective_optim import AdamW, Muon, Routed, param_groups
from selective_optim.policies import is_hidden_matrix, is_hidden_weight
from tests.support.compare import assert_same
from tests.support.routes import ADAMW, MUON, Body, Net, loss_of, routed, split, twins

pytestmark = [
    pytest.mark.integration,
    # What other packages say of themselves.
    pytest.mark.filterwarnings("ignore"),
]
CLASSES = {
    "timm-Muon": ("timm.optim", {"lr": 0.02}),
    "timm-Lion": ("timm.optim", {"lr": 1e-3}),
    "timm-Lamb": ("timm.optim", {"lr": 1e-2}),
    "timm-NAdamW": ("timm.optim", {"lr": 1e-2}),
    "pytorch_optimizer-Lion": ("pytorch_optimizer", {"lr": 1e-3}),
    "pytorch_optimizer-Adan": ("pytorch_optimizer", {"lr": 1e-3}),
    "bitsandbytes-AdamW8bit": ("bitsandbytes.optim", {"lr": 1e-3}),
    "bitsandbytes-Lion": ("bitsandbytes.optim", {"lr": 1e-3}),
    "schedulefree-AdamWScheduleFree": ("schedulefree", {"lr": 1e-2}),
    "optimi-StableAdamW": ("optimi", {"lr": 1e-2, "triton": False}),
    "torchao-AdamW8bit": ("torchao.optim", {"lr": 1e-3}),
    "prodigyopt-Prodigy": ("prodigyopt", {}),
}


def installed(package, name):
    pytest.importorskip(package)
    return getattr(import_module(package), name)


def train(model, *optimizers, steps=range(10)):
    for number in steps:
        loss_of(model, number).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def begin_training(optimizer):
    """Schedule-free classes ask for it; in a Routed, of their route's optimizer."""
    getattr(optimizer, "train", list)()


@pytest.mark.parametrize("case", CLASSES)
def test_a_class_as_a_route_has_its_own_bits(case):
    package, arguments = CLASSES[case]
    cls = installed(package, case.partition("-")[2])
    (model, twin), rest = twins(), {"rest": ("*", cls, arguments)}
    routes = {"body": (is_hidden_matrix, Body, MUON), **rest}
    one, again = routed(model, routes=routes), routed(model, routes=routes)
    body, decayed, exempt = split(twin)
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    others = [
        Body(body, **MUON, weight_decay=0.1),
        cls(groups, **arguments, weight_decay=0.1),
    ]
    for optimizer in (one.optimizers["rest"], others[1]):
        begin_training(optimizer)
    train(model, one)
    again.load_state_dict(copy.deepcopy(one.state_dict()))
    train(model, again, steps=range(10, 20))
    train(twin, *others, steps=range(20))
    assert_same(model, twin)


class ConvNet(nn.Module):
    """Convolutions and a matrix between stem and head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.body = nn.Sequential(nn.Conv1d(8, 8, 3), nn.GroupNorm(2, 8))
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.body(self.stem(x).mT).mean(-1)
        return self.head(self.mix(x).relu())


def test_convolutions_go_to_the_muon_of_timm():
    muon = installed("timm.optim", "Muon")
    torch.manual_seed(0)
    model = ConvNet()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="convolutions") as caught:
        Muon(model)
    told = re.search(r"'muon': (\(.*\))\.$", str(caught[-1].message))[1]
    known = {"is_hidden_weight": is_hidden_weight, "timm": import_module("timm")}

    routes = {"muon": eval(told, known), "adamw": ("*", AdamW, ADAMW)}
    one = Routed(model, routes, weight_decay=0.1)
    named = dict(twin.named_parameters())
    names = [row.name for row in one.decay_report() if row.route == "muon"]
    assert {"body.0.weight", "mix.weight"} <= set(names)
    assert "head.weight" not in names
    body = [named.pop(name) for name in names]
    others = [
        muon(body, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(named.values(), **ADAMW, weight_decay=0.1, fused=True),
    ]
    for net, optimizers in ((model, [one]), (twin, others)):
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            net(torch.randn(3, 6, 4, generator=generator)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_same(model, twin)


# Optimizers of two halves

RATES = {"muon": 0.02, "adamw": 3e-3}
BODY = ("blocks.0.0.weight", "blocks.1.0.weight")


def by_flag(model, package, key):
    groups = param_groups(
        *(model, "no_bias_norm", 0.1, RATES),
        routes={"muon": is_hidden_matrix, "adamw": "*"},
        key=key,
    )
    return installed(package, "Muon")(groups)


def by_shape(model):
    """timm's own groups: what ``fallback_list`` names, and all that is no matrix."""
    optim = pytest.importorskip("timm.optim")
    names = ["embed.weight", "head.weight"]
    return optim.create_optimizer_v2(
        *(model, "muon"), lr=0.02, weight_decay=0.1, fallback_list=names,
        fallback_lr_scale=0.15,
    )  # fmt: skip


SAVERS = {
    "timm-use_fallback": lambda m: by_flag(m, "timm.optim", "use_fallback"),
    "timm-use_muon": lambda m: by_flag(m, "timm.optim", "use_muon"),
    "timm-by-shape": by_shape,
    "pytorch_optimizer": lambda m: by_flag(m, "pytorch_optimizer", "use_muon"),
}
ROUTES = {
    "muon": (is_hidden_matrix, Body, {"lr": 0.5}),
    "adamw": ("*", AdamW, {"lr": 0.5}),
}


@pytest.mark.parametrize("make", SAVERS.values(), ids=SAVERS)
def test_what_an_optimizer_of_two_halves_saved_is_loaded_by_name(make):
    model, twin = twins()
    theirs = make(twin)
    train(twin, theirs)
    saved = copy.deepcopy(theirs.state_dict())
    one = routed(model, routes=ROUTES)
    with pytest.raises(ValueError, match="has no name") as caught:
        one.load_state_dict(saved)
    line = re.search(r"(for group.*): (group.*), where", str(caught.value))
    known = {
        "groups": theirs.param_groups,
        "model": twin,
        "state_dict": saved,
        "selective_optim": import_module("selective_optim"),
    }
    exec(f"{line[1]}:\n    {line[2]}", known)
    one.load_state_dict(saved)
    model.load_state_dict(twin.state_dict())
    for mine, its in zip(model.parameters(), twin.parameters()):
        for key, value in one.state[mine].items():
            if key == "step":
                assert value == 10
            else:
                assert_same(value, theirs.state[its][key])
        assert "use_muon" not in one.state[mine]
    rates = [(group["lr"], group["weight_decay"]) for group in one.param_groups]
    assert rates == [(0.02, 0.1), (pytest.approx(3e-3), 0.1)]
    assert one.param_groups[0].keys() == {
        *Body([nn.Parameter(torch.ones(2, 2))]).defaults,
        *("params", "route", "param_names"),
    }
    train(model, one)


def test_a_third_partys_one_object_class_is_no_route_but_takes_groups():
    muon = installed("pytorch_optimizer", "Muon")
    with pytest.raises(ValueError, match="`use_muon` must be set"):
        routed(Net(), routes={"muon": ("*", muon, {})})
    model, twin = twins()
    named = dict(twin.named_parameters())
    body = [named.pop(name) for name in BODY]
    both = {"use_muon": False, "lr": 3e-3}
    _, decayed, exempt = split(twin)
    by_hand = muon(
        [
            {"params": body, "lr": 0.02, "weight_decay": 0.1, "use_muon": True},
            {"params": decayed, "weight_decay": 0.1, **both},
            {"params": exempt, "weight_decay": 0.0, **both},
        ]
    )
    train(model, by_flag(model, "pytorch_optimizer", "use_muon"))
    train(twin, by_hand)
    assert_same(model, twin)
