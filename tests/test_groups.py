"""Groups by pattern and by width; layerwise ones have their own file."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, rate_groups, width_groups
from selective_optim.policies import form, is_bias, is_norm
from tests.support.compare import assert_same


class Model(nn.Module):
    def __init__(self, width=4, depth=2, out=2):
        super().__init__()
        self.embed = nn.Embedding(9, width)
        self.blocks = nn.ModuleList(WideBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, out)


class WideBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)


def names_in(groups):
    return [group["param_names"] for group in groups]


def chosen(model, keep):
    return [name for name, _ in model.named_parameters() if keep(name)]


def is_normed(name):
    return "norm" in name


# By pattern


KEYS = {
    "glob": ("blocks.*", lambda name: name.startswith("blocks.")),
    "expression": (re.compile(r"up|down"), lambda n: "up" in n or "down" in n),
    "class": (nn.LayerNorm, is_normed),
    "predicate": (is_bias, lambda name: name.endswith("bias")),
    "joined": (is_norm & ~is_bias, lambda n: is_normed(n) and n.endswith("weight")),
    "name": ("head.weight", lambda name: name == "head.weight"),
    "predicate as text": ("is_bias", lambda name: name.endswith("bias")),
    "class as text": ("nn.LayerNorm", is_normed),
    "own class as text": ("WideBlock", lambda name: name.startswith("blocks.")),
    "expression as text": ("re.compile('up|down')", lambda n: "up" in n or "down" in n),
    "joined as text": (
        "'blocks.*' & ~(is_bias | nn.LayerNorm)",
        lambda n: n.startswith("blocks.") and not is_normed(n) and "bias" not in n,
    ),
}


@pytest.mark.parametrize(("key", "keep"), KEYS.values(), ids=KEYS)
def test_keys_select_as_in_policies_and_as_text(key, keep):
    model = Model()
    groups = rate_groups(model, {key: 1e-5, "*": {"lr": 1e-3, "betas": (0.9, 0.95)}})

    rest = chosen(model, lambda name: not keep(name))
    assert names_in(groups) == [chosen(model, keep), rest]
    hypers = [{k: v for k, v in g.items() if "param" not in k} for g in groups]
    assert hypers == [{"lr": 1e-5}, {"lr": 1e-3, "betas": (0.9, 0.95)}]
    params = dict(model.named_parameters())
    expected = [[params[name] for name in own] for own in names_in(groups)]
    assert all(map(same_objects, [g["params"] for g in groups], expected))


def same_objects(actual, expected):
    return list(map(id, actual)) == list(map(id, expected))


def test_first_key_that_matches_takes_a_parameter():
    groups = rate_groups(Model(), {"*.bias": 1.0, "head.*": 2.0, "*": 3.0})
    assert names_in(groups)[1] == ["head.weight"]
    assert [group["lr"] for group in groups] == [1.0, 2.0, 3.0]


def test_parameter_that_is_tied_is_in_the_first_group_of_any_of_its_names():
    model = Model(out=9)
    model.head.weight = model.embed.weight
    groups = rate_groups(model, {"head.*": 1.0, "*": 2.0})
    assert names_in(groups)[0] == ["embed.weight", "head.bias"]


def test_modules_that_share_parameters_give_each_once():
    model = Model()
    groups = rate_groups([model, model.head], {"head.*": 1.0, "*": 2.0})
    assert sum(map(len, names_in(groups))) == len(list(model.parameters()))


def test_schedulers_scale_every_rate():
    optimizer = SGD(rate_groups(Model(), {"head.*": 0.1, "*": torch.tensor(0.5)}))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.05, 0.25]


def test_policy_decides_over_groups_by_their_names():
    model = Model()
    groups = rate_groups(model, {"head.*": 0.1, "*": 0.4})
    optimizer = AdamW(groups, weight_decay=0.1, wd_policy="no_bias_norm", model=model)
    decayed = {r.name for r in optimizer.decay_report().rows if r.weight_decay}
    keep = chosen(model, lambda n: not is_normed(n) and "bias" not in n)
    assert decayed == set(keep)


def test_groups_print_and_copy():
    groups = rate_groups(Model(), {"is_bias": {"eps": 1e-6}, "*": torch.tensor(0.5)})
    assert str(groups).splitlines() == [
        "selector   lr  tensors  elements  parameters",
        " is_bias    -        8        54  blocks.0.norm.bias, blocks.0.up.bias, "
        "blocks.0.down.bias, blocks.1.norm.bias, blocks.1.up.bias, blocks.1.down.bias, "
        "norm.bias, head.bias",
        "     '*'  0.5        9       312  embed, blocks.0.norm.weight, "
        "blocks.0.up.weight, blocks.0.down.weight, blocks.1.norm.weight, "
        "blocks.1.up.weight, blocks.1.down.weight, norm.weight, 1 more",
    ]
    assert str(copy.deepcopy(groups)) == str(pickle.loads(pickle.dumps(groups)))


RATE_ERRORS = {
    "matches nothing": (
        {"haed.*": 1.0, "*": 2.0},
        ValueError,
        r"'haed\.\*' in `rates` selects none of 17 parameters; the closest names are "
        r"'head\.bias', .*\. Correct it, or leave it out\.",
    ),
    "taken before": (
        {"*": 1.0, "head.*": 2.0},
        ValueError,
        r"entries of `rates` before 'head\.\*' take all that it selects\. "
        r"Put it before them\.",
    ),
    "in no group": (
        {"head.*": 1.0},
        ValueError,
        r"'embed\.weight' \(shape 9 x 4\) is selected by no key of `rates`\. Add "
        r'a last entry for the rest: "\*": 1e-3\.',
    ),
    "text of YAML": (
        {"*": "1e-3"},
        TypeError,
        r"`rates` at '\*' must be a learning rate or a dict of hyperparameters, not "
        r"'1e-3' \(str\)\. Write a number, in YAML with a point: 1\.0e-5\.",
    ),
    "no selector": (
        {3: 1.0},
        TypeError,
        r"a selector must be a glob, .*, not 3 \(int\)\.",
    ),
}


@pytest.mark.parametrize(
    ("rates", "kind", "words"), RATE_ERRORS.values(), ids=RATE_ERRORS
)
def test_rate_groups_refuse_what_they_cannot_place(rates, kind, words):
    with pytest.raises(kind, match=words):
        rate_groups(Model(), rates)


TYPED = {
    "matches nothing": {"head.*": 1.0, "*": 2.0},
    "or left out": {"*": 2.0},
    "taken before": {"head.*": 2.0, "*": 1.0},
    "in no group": {"head.*": 1.0, "*": 1e-3},
    "text of YAML": {"*": 1.0e-5},
}


@pytest.mark.parametrize("rates", TYPED.values(), ids=TYPED)
def test_lines_that_rate_errors_give_lead_there(rates):
    groups = rate_groups(Model(), rates)
    assert [group["lr"] for group in groups] == list(rates.values())


# By width


def test_matrices_of_two_widths_learn_at_the_rate_over_the_ratio():
    groups = width_groups(Model(16), Model(4), lr=0.1)
    matrices = chosen(Model(), lambda n: ("up" in n or "down" in n) and "bias" not in n)
    assert [group["lr"] for group in groups] == [0.1, 0.1 / 4]
    assert names_in(groups)[1] == matrices
    assert str(groups).splitlines()[2] == (
        "    4  0.025        4     4,096  blocks.0.up.weight, blocks.0.down.weight, "
        "blocks.1.up.weight, blocks.1.down.weight"
    )


def test_ratio_is_that_of_the_fan_in():
    def mlp(width):
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2 * width + 1))

    groups = width_groups(mlp(12), mlp(4), lr=0.3)
    assert [group["lr"] for group in groups] == [0.3, 0.3 / 3]


def test_base_of_fewer_layers_and_without_values():
    with torch.device("meta"):
        base = Model(4, depth=2)
    groups = width_groups(Model(8, depth=5), base, lr=torch.tensor(0.1))
    assert len(names_in(groups)[1]) == 10
    assert [group["lr"].item() for group in groups] == pytest.approx([0.1, 0.05])


def test_the_base_itself_is_one_group():
    [group] = width_groups(Model(), Model(), lr=0.1)
    assert group["lr"] == 0.1


@pytest.mark.parametrize(("width", "base_width", "depth"), [(16, 4, 2), (8, 4, 6)])
def test_rates_are_those_of_complete_p(width, base_width, depth):
    """Of alpha 1: hidden weights over the width, norms and biases over depth ** 0."""
    groups = width_groups(Model(width, depth), Model(base_width, 2), lr=0.1)
    m_n, m_l, alpha = width / base_width, depth / 2, 1
    rates = {
        **dict.fromkeys(("embed.weight", "head.weight", "head.bias"), 0.1),
        **dict.fromkeys(("norm.weight", "norm.bias"), 0.1),
    }
    for name in chosen(Model(width, depth), lambda n: n.startswith("blocks")):
        hidden = name.endswith(("up.weight", "down.weight"))
        rates[name] = 0.1 * (m_n**-1 if hidden else 1) * m_l ** (alpha - 1)
    actual = {n: group["lr"] for group in groups for n in group["param_names"]}
    assert actual == pytest.approx(rates, rel=1e-15)


class Other(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.embed = nn.Parameter(torch.ones(shape))


NO_BASE = (
    r"'embed' \(shape {}\) has no counterpart in `base_model` of which at most two "
    r"dimensions differ\. Make that of the same class, with another width\."
)
WIDTH_ERRORS = {
    "another model": (Other(2, 2), nn.Linear(2, 2), NO_BASE.format("2 x 2")),
    "another rank": (Other(2, 2), Other(2), NO_BASE.format("2 x 2")),
    "three dimensions": (Other(4, 4, 4), Other(2, 2, 2), NO_BASE.format("4 x 4 x 4")),
}


@pytest.mark.parametrize(
    ("model", "base", "words"), WIDTH_ERRORS.values(), ids=WIDTH_ERRORS
)
def test_width_groups_refuse_a_base_that_is_none(model, base, words):
    with pytest.raises(ValueError, match=words):
        width_groups(model, base, 0.1)
    assert width_groups(Other(4, 4), Other(2, 2), 0.1)[0]["lr"] == 0.05


# Against the package mup, on the models of its own tests


def mup_mlp(mup, width, batchnorm):
    mods = [nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    mods.append(mup.MuReadout(width, 10, readout_zero_init=False))
    if batchnorm:
        mods.insert(1, nn.BatchNorm1d(width))
        mods.insert(4, nn.BatchNorm1d(width))
    return nn.Sequential(*mods)


def mup_cnn(mup, width, batchnorm):
    mods = [nn.Conv2d(3, width, 5), nn.ReLU(), nn.Conv2d(width, 2 * width, 5)]
    mods += [nn.Flatten(), nn.Linear(2 * width * 25, 16 * width), nn.ReLU()]
    mods += [nn.Linear(width * 16, width * 10), nn.ReLU()]
    mods.append(mup.MuReadout(width * 10, 10, readout_zero_init=False))
    if batchnorm:
        mods.insert(1, nn.BatchNorm2d(width))
        mods.insert(5, nn.BatchNorm1d(50 * width))
    return nn.Sequential(*mods)


def mup_transformer(mup, width, tied):
    layers = {
        "encoder": nn.Embedding(11, width),
        "layer": nn.TransformerEncoderLayer(width, 2, 3 * width),
        "norm": nn.LayerNorm(width),
    }
    layers["decoder"] = mup.MuReadout(width, 11, bias=False, readout_zero_init=False)
    if tied:
        layers["decoder"] = mup.MuSharedReadout(layers["encoder"].weight, bias=False)
    return nn.ModuleDict(layers)


@pytest.mark.integration
@pytest.mark.parametrize("switch", [False, True])
@pytest.mark.parametrize("make", [mup_mlp, mup_cnn, mup_transformer])
def test_groups_are_those_of_mup_decay_included(make, switch):
    mup = pytest.importorskip("mup")
    torch.manual_seed(0)
    theirs, base = (make(mup, width, switch).double() for width in (8, 4))
    mup.set_base_shapes(theirs, base)
    ours = make(mup, 8, switch).double()
    ours.load_state_dict(theirs.state_dict())
    lr, wd = 1e-2, 0.1

    mu_adamw = mup.MuAdamW(theirs.parameters(), lr=lr, weight_decay=wd)
    groups = width_groups(ours, base, lr)
    # mup's decay is the group's rate by the group's decay, lr / w * wd * w.
    optimizer = AdamW(
        groups, weight_decay=lr * wd, wd_policy=form("independent"), fused=False,
        foreach=False,
    )  # fmt: skip
    expected = {id(p): g["lr"] for g in mu_adamw.param_groups for p in g["params"]}
    actual = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [actual[id(p)] for p, _ in pairs] == [expected[id(q)] for _, q in pairs]

    both = (mu_adamw, optimizer)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR
    schedulers = [annealing(each, 50) for each in both]
    for step in range(50):
        torch.manual_seed(step)
        for one, other in pairs:
            one.grad = torch.randn(one.shape, dtype=torch.float64)
            other.grad = one.grad.clone()
        for each in (*both, *schedulers):
            each.step()
    assert_same([p for p, _ in pairs], [q for _, q in pairs])
