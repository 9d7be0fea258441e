"""State that survives a changed model: what goes on is what torch would have done."""

import copy
import zlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import selective_optim
from selective_optim import AdamW, Routed, checkpoint, policies, selective
from selective_optim.checkpoint import fit, group_names
from selective_optim.step.setting import without
from tests.support.compare import assert_same
from tests.support.resuming import through_file
from tests.test_any_class import Counting

FIRST, SECOND = range(1, 4), range(4, 8)
POLICY = "no_bias_norm"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class ViT(nn.Module):
    def __init__(self, classes=3, depth=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.patch_embed = nn.Conv2d(3, 8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)


class LanguageModel(nn.Module):
    def __init__(self, tokens=11):
        super().__init__()
        self.embed = nn.Embedding(tokens, 8)
        self.blocks = nn.ModuleList([Block()])
        self.lm_head = nn.Linear(8, tokens, bias=False)
        self.lm_head.weight = self.embed.weight


# Surgeries change a model in place, and tell the old names of renamed parameters.


def resized(layer, **sizes):
    """Make a layer of another size that begins with the old weights."""
    arguments = {"bias": layer.bias is not None} if hasattr(layer, "bias") else {}
    names = {nn.Linear: ("in_features", "out_features")}
    default = names.get(type(layer), ("num_embeddings", "embedding_dim"))
    wanted = {name: sizes.get(name, getattr(layer, name)) for name in default}
    new = type(layer)(**wanted, **arguments)
    with torch.no_grad():
        for name, param in new.named_parameters():
            old = getattr(layer, name)
            leading(param, old.shape).copy_(leading(old, param.shape))
    return new


def leading(tensor, shape):
    return tensor[tuple(slice(0, size) for size in shape)]


def more_classes(model):
    model.head = resized(model.head, out_features=5)
    return {}


def fewer_classes(model):
    model.head = resized(model.head, out_features=2)
    return {}


def more_tokens(model):
    model.embed = resized(model.embed, num_embeddings=14)
    model.lm_head = nn.Linear(8, 14, bias=False)
    model.lm_head.weight = model.embed.weight
    return {}


def layer_pruned(model):
    del model.blocks[1]
    return {
        name: name.replace("blocks.1", "blocks.2")
        for name, _ in model.named_parameters()
        if name.startswith("blocks.1")
    }


def layer_added(model):
    model.blocks.append(Block())
    return {}


def reordered(model):
    for name in ("blocks", "patch_embed"):
        module = getattr(model, name)
        delattr(model, name)
        setattr(model, name, module)
    return {}


SURGERIES = {
    "more classes": (ViT, more_classes, ("head.weight", "head.bias"), 0),
    "fewer classes": (ViT, fewer_classes, ("head.weight", "head.bias"), 0),
    "more tokens": (LanguageModel, more_tokens, ("embed.weight",), 0),
    "layer pruned": (ViT, layer_pruned, (), 0),
    "layer added": (ViT, layer_added, (), 8),
    "reordered": (ViT, reordered, (), 0),
}
# torch's default on the CPU, in which an element's bits are those of any shape.
PLAIN = {"foreach": False, "fused": False}
ARGUMENTS = {
    "sgd": ("SGD", {"lr": 0.1, "momentum": 0.9, **PLAIN}),
    "adam": ("Adam", {"lr": 0.01, "amsgrad": True, **PLAIN}),
    "adamw": ("AdamW", {"lr": 0.01, **PLAIN}),
}


def torch_s(kind, params, **more):
    name, arguments = ARGUMENTS[kind]
    return getattr(torch.optim, name)(params, **arguments, **more)


def ours(kind, params, **more):
    name, arguments = ARGUMENTS[kind]
    more = {"weight_decay": 0.1, "wd_policy": POLICY, **more}
    return getattr(selective_optim, name)(params, **arguments, **more)


def hand_split(model, named=False):
    """Groups as users write them: vectors are exempt."""
    pairs = list(model.named_parameters())
    parts = [
        [pair for pair in pairs if (pair[1].ndim > 1) is big] for big in (True, False)
    ]
    return [
        {"params": own if named else [p for _, p in own], "weight_decay": wd}
        for own, wd in zip(parts, (0.1, 0.0))
    ]


def train(model, optimizer, steps, old_names=None, shapes=None):
    """Step on gradients of name and step; of what was resized the leading part."""
    for step in steps:
        for name, param in model.named_parameters():
            old = (old_names or {}).get(name, name)
            torch.manual_seed(zlib.crc32(f"{old} {step}".encode()))
            shape = (shapes or {}).get(old, param.shape)
            grad = torch.randn(shape)
            param.grad = torch.randn(param.shape)
            leading(param.grad, shape).copy_(leading(grad, param.shape))
        optimizer.step()


def state_of(optimizer, param):
    return dict(optimizer.state[param]) if optimizer.state.get(param) else {}


def assert_goes_on(model, optimizer, whole, whole_optimizer, old_names):
    """Compare with the model that nothing was done to, as far as both reach."""
    params = dict(whole.named_parameters())
    compared = 0
    for name, param in model.named_parameters():
        other = params.get(old_names.get(name, name))
        if other is None:
            continue
        mine, theirs = state_of(optimizer, param), state_of(whole_optimizer, other)
        assert mine.keys() == theirs.keys()
        pairs = [(param, other), *((mine[key], theirs[key]) for key in theirs)]
        for actual, expected in pairs:
            shape = [min(each) for each in zip(actual.shape, expected.shape)]
            alike = leading(actual, shape), leading(expected, shape)
            assert_same(*alike, strides=False, where=name)
        compared += 1
    return compared


def old_run(case, made):
    torch.manual_seed(0)
    model = SURGERIES[case][0]()
    optimizer = made(model)
    train(model, optimizer, FIRST)
    return model, optimizer


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("case", SURGERIES)
def test_training_goes_on_as_without_the_surgery(case, kind):
    _, surgery, changed, fresh = SURGERIES[case]
    model, old = old_run(case, lambda model: torch_s(kind, hand_split(model)))
    whole, whole_optimizer = copy.deepcopy((model, old))
    shapes = {name: param.shape for name, param in model.named_parameters()}
    names = group_names(old.param_groups, model)
    old_names = surgery(model)
    if old_names:
        names = group_names(old.param_groups, model, missing_ok=True)

    fitted = fit(through_file(old.state_dict()), model, names)
    new = ours(kind, model.parameters())
    new.load_state_dict(fitted.state_dict)

    train(whole, whole_optimizer, SECOND)
    train(model, new, SECOND, old_names, shapes)
    count = assert_goes_on(model, new, whole, whole_optimizer, old_names)
    assert fitted.resized == list(changed)
    assert len(fitted.new) == fresh
    assert count == len(fitted.kept) + len(fitted.resized)
    assert count + fresh == len(list(model.parameters()))


def head_only(model):
    return [(n, p) for n, p in model.named_parameters() if n.startswith("head")]


def test_unfrozen_backbone_begins_anew_beside_a_head_that_goes_on():
    torch.manual_seed(0)
    model = ViT()
    old = torch_s("adamw", head_only(model), weight_decay=0.1)
    train(model, old, FIRST)
    whole, head = copy.deepcopy((model, old))

    new = ours("adamw", model.parameters(), wd_policy=None)
    fitted = fit(old.state_dict(), new)
    new.load_state_dict(fitted.state_dict)

    backbone = [p for n, p in whole.named_parameters() if not n.startswith("head")]
    fresh = torch_s("adamw", backbone, weight_decay=0.1)
    train(model, new, SECOND)
    for step in SECOND:
        train(whole, head, [step])
        fresh.step()
    assert fitted.kept == ["head.weight", "head.bias"]
    assert fitted.new == [n for n, _ in model.named_parameters() if "head" not in n]
    assert_same(model, whole)
    states = [*fresh.state.values(), *head.state.values()]
    assert_same([state_of(new, p) for p in model.parameters()], states)


def test_frozen_backbone_leaves_the_head_what_it_had():
    model, old = old_run("more classes", lambda m: ours("adamw", m.named_parameters()))
    whole, whole_optimizer = copy.deepcopy((model, old))
    for param in model.parameters():
        param.requires_grad_(False)
    model.head.requires_grad_()
    new = torch_s(
        "adamw",
        [
            {"params": [pair], "weight_decay": wd}
            for pair, wd in zip(head_only(model), (0.1, 0.0))
        ],
    )

    fitted = fit(old.state_dict(), new)
    new.load_state_dict(fitted.state_dict)

    train(whole, whole_optimizer, SECOND)
    train(model, new, SECOND)
    assert_same(model.head, whole.head)
    assert fitted.kept == ["head.weight", "head.bias"]
    assert len(fitted.dropped) == len(list(model.parameters())) - 2


# Where state dicts come from, and where they go


def by_torch_unnamed(model):
    return torch_s("adamw", hand_split(model))


def by_torch(model):
    return torch_s("adamw", hand_split(model, named=True))


def by_torch_in_one(model):
    return torch_s("adamw", model.parameters(), weight_decay=0.1)


def by_us(model):
    return ours("adamw", model.named_parameters())


def by_us_unnamed(model):
    return ours("adamw", model.parameters())


def by_layers(model):
    return ours(
        "adamw", selective_optim.layerwise_groups(model, 0.01, 1.0), model=model
    )


def through_dcp(model, optimizer):
    return get_optimizer_state_dict(model, optimizer)


SOURCES = {
    "torch, hand-split": (
        by_torch_unnamed,
        lambda m, o: group_names(o.param_groups, m),
    ),
    "torch, named": (by_torch, lambda m, o: None),
    "torch, one group": (
        by_torch_in_one,
        lambda m, o: [n for n, _ in m.named_parameters()],
    ),
    "ours": (by_us, lambda m, o: None),
    "ours, unnamed": (by_us_unnamed, lambda m, o: (n for n, _ in m.named_parameters())),
    "ours, by its record": (by_us_unnamed, lambda m, o: None),
    "ours, by layers": (by_layers, lambda m, o: group_names(o.param_groups, m)),
}
TARGETS = [by_torch, by_us, by_us_unnamed, by_layers]


# One group of torch's decayed everything, which is another policy.
@pytest.mark.filterwarnings("ignore:the loaded checkpoint was made with another")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_any_groups_fit_those_of_the_new_optimizer(source, target):
    made, names_of = SOURCES[source]
    model, old = old_run("more classes", made)
    names = names_of(model, old)
    moments = {n: state_of(old, p) for n, p in model.named_parameters()}
    more_classes(model)
    new = target(model)
    groups = copy.deepcopy(new.state_dict()["param_groups"])

    fitted = fit(through_file(old.state_dict()), new, names)
    new.load_state_dict(fitted.state_dict)

    for name, param in model.named_parameters():
        for key, value in state_of(new, param).items():
            saved = moments[name][key]
            assert_same(leading(value, saved.shape), saved, strides=False)
            assert value.abs().sum() == saved.abs().sum()  # what was added is 0
    assert_same(without_names(new.state_dict()["param_groups"]), without_names(groups))


def without_names(groups):
    return [{k: v for k, v in g.items() if k != "param_names"} for g in groups]


@pytest.mark.skipif(
    torch.__version__.startswith("2.7."), reason="DCP of 2.7 takes no new parameter"
)
def test_state_dict_by_name_stays_one_by_name():
    model, old = old_run("layer added", by_us)
    saved = through_dcp(model, old)
    layer_added(model)

    fitted = fit(saved, model)
    new = ours("adamw", model.parameters())
    # torch asks for that where a parameter is new.
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(model, new, fitted.state_dict, options=options)

    names = [name for name, _ in model.named_parameters()]
    assert fitted.state_dict["param_groups"][0]["params"] == names
    for name in fitted.kept:
        actual = state_of(new, model.get_parameter(name))
        assert_same(actual, saved["state"][name], strides=False)
    assert not any(state_of(new, model.get_parameter(name)) for name in fitted.new)


# Classes that keep values of their own in groups


def counting(model):
    return selective(Counting)(model.named_parameters(), 0.1, 0.1, wd_policy=POLICY)


def kept_by_parts(optimizer):
    """Name what each part keeps for itself, by the parameters in it."""
    saved = optimizer.state_dict()
    [group], [parts] = saved["param_groups"], saved["parts"]
    return {
        frozenset(group["param_names"][i] for i in part["positions"]): [
            (group | part)[key] for key in ("gamma", "pair")
        ]
        for part in parts
    }


@pytest.mark.parametrize("target", ["model", "optimizer"])
def test_what_a_class_keeps_for_each_decay_goes_on(target):
    model, old = old_run("reordered", counting)
    parts, saved = kept_by_parts(old), old.state_dict()
    reordered(model)

    new = counting(model)
    fitted = fit(through_file(saved), {"model": model, "optimizer": new}[target])
    new.load_state_dict(fitted.state_dict)

    assert len(parts) == 2
    assert kept_by_parts(new) == parts
    [group], [before] = new.param_groups, saved["param_groups"]
    assert [group[key] for key in ("k", "step", "span")] == [
        before[key] for key in ("k", "step", "span")
    ]
    train(model, new, [9])
    assert new.param_groups[0]["k"] == len(FIRST) + 1


def test_new_parameters_join_the_part_of_their_decay():
    model, old = old_run("layer added", counting)
    gammas = sorted(kept_by_parts(old).values())
    layer_added(model)
    new = counting(model)
    new.load_state_dict(fit(old.state_dict(), new).state_dict)

    assert sorted(kept_by_parts(new).values()) == gammas


def test_values_of_the_new_optimizer_stay_but_for_what_the_class_counts():
    model, old = old_run("reordered", lambda m: Counting(m.named_parameters(), 0.1))
    old.param_groups[0] |= {"initial_lr": 0.5, "max_lr": 0.5, "tag": "theirs"}
    new = Counting(model.named_parameters(), 0.01, 0.3)
    new.param_groups[0] |= {"tag": "mine", "initial_lr": 0.01}

    [group] = fit(old.state_dict(), new).state_dict["param_groups"]

    counted = {key: old.param_groups[0][key] for key in ("k", "step", "gamma", "span")}
    own = {"lr": 0.01, "weight_decay": 0.3, "tag": "mine", "initial_lr": 0.01}
    assert {key: group[key] for key in (counted | own)} == counted | own
    assert "max_lr" not in group


class Eager(torch.optim.Optimizer):
    """Makes its state when it is constructed, as Adagrad did."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for param in self.param_groups[0]["params"]:
            self.state[param]["sum"] = torch.full_like(param, 0.5)

    @torch.no_grad()
    def step(self):
        for param in self.param_groups[0]["params"]:
            param -= 0.1 * self.state[param]["sum"].add_(param.grad.square())


def test_state_that_the_new_optimizer_has_made_stays_for_new_parameters():
    model, old = old_run("layer added", lambda m: Eager(m.named_parameters()))
    layer_added(model)
    new = Eager(model.named_parameters())
    fitted = fit(old.state_dict(), new)
    new.load_state_dict(fitted.state_dict)
    states = [new.state[model.get_parameter(n)]["sum"] for n in fitted.new]
    assert all((state == 0.5).all() for state in states)
    train(model, new, SECOND)


class Wrapping(torch.optim.Optimizer):
    """Stands before an optimizer, as that of Accelerate does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults

    def state_dict(self):
        return self.optimizer.state_dict()


def test_wrapped_optimizer_keeps_its_hyperparameters():
    model, old = old_run("reordered", lambda m: Counting(m.named_parameters(), 0.1))
    new = Wrapping(Counting(model.named_parameters(), 0.01))
    [group] = fit(old.state_dict(), new).state_dict["param_groups"]
    assert (group["lr"], group["k"]) == (0.01, len(FIRST))


# Another class than the one that saved


def test_state_of_another_class_than_that_of_the_route_is_not_kept():
    model, old = old_run("reordered", by_us)
    body = {"body": ("blocks.*", torch.optim.RMSprop), "rest": ("*", AdamW)}
    new = Routed(model, body, weight_decay=0.1, wd_policy=POLICY)
    hyper = [without(group, ("params",)) for group in new.param_groups]
    fitted = fit(old.state_dict(), new)
    names = [name for name, _ in model.named_parameters()]
    assert fitted.new == [name for name in names if name.startswith("blocks")]
    assert fitted.kept == [name for name in names if not name.startswith("blocks")]
    new.load_state_dict(fitted.state_dict)
    now = [without(group, ("params", "param_names")) for group in new.param_groups]
    assert now == hyper
    for name, param in model.named_parameters():
        assert state_of(new, param).keys() == (
            set() if name in fitted.new else old.state[param].keys()
        )
    train(model, new, SECOND)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Adagrad", "Adadelta"])
def test_state_of_which_nothing_is_for_the_new_class_is_refused(name):
    model, old = old_run("reordered", lambda model: torch_s("sgd", model.parameters()))
    new = selective(getattr(torch.optim, name))(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="is of another class, or of other shapes"):
        fit(old.state_dict(), new, names)


def test_state_of_a_class_with_the_same_numbers_is_kept():
    model, old = old_run("reordered", by_us)
    new = selective_optim.Adam(model.parameters(), lr=0.01)
    assert fit(old.state_dict(), new).new == []


def test_name_of_two_parameters_brings_state_to_the_first():
    model, old = old_run("reordered", by_us)
    other = copy.deepcopy(model)
    pairs = [*model.named_parameters(), *other.named_parameters()]
    fitted = fit(old.state_dict(), torch.optim.AdamW(pairs))
    assert fitted.kept == fitted.new == [name for name, _ in model.named_parameters()]
    assert list(fitted.state_dict["state"]) == list(range(len(fitted.kept)))


# Shapes that say more or less than the first dimension


def state_dict_of(name, **entries):
    group = {"params": [0], "param_names": [name], "lr": 0.1, "weight_decay": 0.1}
    return {
        "state": {0: {"step": torch.tensor(5.0), **entries}},
        "param_groups": [group],
    }


def zeros(*shape):
    return torch.ones(shape)


SHAPES = {
    "the same": ({"exp_avg": (4, 3)}, "kept"),
    "more columns": ({"exp_avg": (4, 2)}, "resized"),
    "both dimensions": ({"exp_avg": (2, 2)}, "new"),
    "another rank": ({"exp_avg": (12,)}, "new"),
    "a scalar before": ({"exp_avg": ()}, "new"),
    "nothing but a counter": ({}, "kept"),
    "rows and columns, as torch's Adafactor": (
        {"row_var": (4, 1), "col_var": (1, 3)},
        "kept",
    ),
    "other columns": ({"row_var": (4, 1), "col_var": (1, 2)}, "new"),
    "sums, as transformers' Adafactor": (
        {"exp_avg_sq_row": (4,), "exp_avg_sq_col": (3,)},
        "kept",
    ),
    "other sums": ({"exp_avg_sq_row": (2,), "exp_avg_sq_col": (3,)}, "new"),
    "blocks beside it, as bitsandbytes": ({"state1": (4, 3), "absmax1": (7,)}, "kept"),
    "other blocks": ({"state1": (2, 3), "absmax1": (7,)}, "new"),
    "moments and a table": ({"exp_avg": (2, 3), "qmap": (256,)}, "new"),
    "an average of weights": ({"z": (2, 3), "exp_avg": (2, 3)}, "new"),
    "one number for the tensor": ({"exp_avg": (2, 3), "mu_product": ()}, "resized"),
}


@pytest.mark.parametrize(("entries", "fate"), SHAPES.values(), ids=SHAPES)
def test_state_fits_by_its_shapes(entries, fate):
    model = nn.Module()
    model.weight, model.other = nn.Parameter(zeros(4, 3)), nn.Parameter(zeros(2))
    saved = state_dict_of(
        "weight", **{k: zeros(*shape) for k, shape in entries.items()}
    )
    saved["param_groups"][0]["params"].append(1)
    saved["param_groups"][0]["param_names"].append("other")
    saved["state"][1] = {"exp_avg": zeros(2)}

    fitted = fit(saved, model)

    assert "weight" in getattr(fitted, fate)
    assert fitted.dropped == ["weight"] * (fate == "new")
    state = fitted.state_dict["state"]
    assert (0 in state) is (fate != "new")
    assert all(state[0]["step"] == 5 for _ in range(fate != "new"))


def test_vector_fits_beside_a_table_that_is_longer():
    model = nn.ParameterDict({"bias": nn.Parameter(zeros(4))})
    saved = state_dict_of("bias", state1=zeros(4), qmap1=zeros(256))
    assert fit(saved, model).kept == ["bias"]


# What was decided before the surgery


def test_policy_that_changed_with_the_model_warns():
    model, old = old_run("layer added", by_us)
    layer_added(model)
    new = ours("adamw", model.named_parameters(), wd_policy="no_bias")

    fitted = fit(old.state_dict(), model)
    with pytest.warns(UserWarning, match=r"'blocks\.0\.norm\.weight' was exempt"):
        new.load_state_dict(fitted.state_dict)


@pytest.mark.parametrize("target", [by_us, by_layers])
def test_decay_that_changed_with_the_model_is_no_other_policy(target):
    model, old = old_run("layer added", by_torch)
    layer_added(model)
    new = target(model)
    for group in new.param_groups:
        group["weight_decay"] = 0.3

    new.load_state_dict(fit(old.state_dict(), new).state_dict)  # warnings are errors
    assert {group["weight_decay"] for group in new.param_groups} == {0.3}


def l2_sp(model):
    return ours("adamw", model.named_parameters(), wd_policy=policies.towards("init"))


def test_new_rows_decay_towards_what_they_are_when_they_come():
    model, old = old_run("more classes", l2_sp)
    begun = {
        entry[2]["init"].shape: entry[2]["init"]
        for entry in old.state_dict()["decay"][0]
    }
    more_classes(model)
    new = l2_sp(model)
    now = model.head.weight.detach().clone()

    new.load_state_dict(fit(old.state_dict(), new).state_dict)

    record = new.state_dict()["decay"][0]
    init = record[-2][2]["init"]
    assert_same(init, torch.cat([begun[(3, 8)], now[3:]]))


@pytest.mark.parametrize("given", ["model", "optimizer"])
def test_what_training_began_with_follows_layers_that_are_renumbered(given):
    model, old = old_run("layer pruned", l2_sp)
    saved = old.state_dict()
    inits = {id(p): e[2]["init"] for p, e in zip(model.parameters(), saved["decay"][0])}
    layer_pruned(model)
    names = group_names(old.param_groups, model, missing_ok=True)
    new = l2_sp(model)

    fitted = fit(saved, {"model": model, "optimizer": new}[given], names)
    new.load_state_dict(fitted.state_dict)  # warnings are errors

    [record] = new.state_dict()["decay"]
    actual = [entry[2]["init"] for entry in record]
    assert_same(actual, [inits[id(param)] for param in model.parameters()])


def independent(model, lr):
    policy = policies.form("independent")
    return AdamW(model.named_parameters(), lr, weight_decay=0.1, wd_policy=policy)


@pytest.mark.parametrize(("given", "lr"), [("model", 0.1), ("optimizer", 0.02)])
def test_rate_of_the_beginning_is_that_of_whose_rate_counts(given, lr):
    model, old = old_run("layer added", lambda model: independent(model, 0.1))
    layer_added(model)
    new = independent(model, lr)

    new.load_state_dict(
        fit(old.state_dict(), {"model": model, "optimizer": new}[given]).state_dict
    )

    [record] = new.state_dict()["decay"]
    assert {entry[2]["lr0"] for entry in record} == {lr}


# What it tells


def test_fit_prints_the_four_in_sum():
    model, old = old_run("layer added", by_us)
    layer_added(model)
    model.head = resized(model.head, out_features=5)
    del model.norm, model.cls_token

    assert str(fit(old.state_dict(), model)).splitlines() == [
        "kept     26",
        "resized   2  head.weight, head.bias; what was added has moments of 0 and "
        "shares the step counter",
        "new       8  blocks.3.norm.weight, blocks.3.norm.bias, blocks.3.qkv.weight, "
        "blocks.3.qkv.bias, blocks.3.mlp.0.weight, ...",
        "dropped   3  cls_token, norm.weight, norm.bias",
    ]


def test_fit_leaves_its_input():
    model, old = old_run("more classes", by_us)
    saved = copy.deepcopy(old.state_dict())
    before = copy.deepcopy(saved)
    more_classes(model)
    fitted = fit(saved, model).state_dict
    fitted["state"][0]["step"] = torch.tensor(99.0)
    fitted["param_groups"][0]["lr"] = 99.0
    assert_same(saved, before)


# Errors, each with its line to type


def wrapped(model):
    return nn.ModuleDict({"backbone": model})


def two_rates(model):
    groups = hand_split(model, named=True)
    return torch_s("adamw", [groups[0], {**groups[1], "lr": 0.5}])


ERRORS = {
    "no names": (
        by_torch_in_one,
        lambda saved, model: fit(saved, model),
        ValueError,
        r"parameter 0 of group 0 of the state dict has no name\. Pass "
        r"names=\[n for n, _ in old_model\.named_parameters\(\)\]\.",
    ),
    "no names of several groups": (
        by_torch_unnamed,
        lambda saved, model: fit(saved, model),
        ValueError,
        r"Pass names=group_names\(old_optimizer\.param_groups, old_model\)\.",
    ),
    "one list of names for several groups": (
        by_torch_unnamed,
        lambda saved, model: fit(
            saved, model, [n for n, _ in model.named_parameters()]
        ),
        TypeError,
        r"`names` must be one list of names per group.* Pass names=group_names\(old_",
    ),
    "other names": (
        by_us,
        lambda saved, model: fit(saved, wrapped(model)),
        ValueError,
        r"none of the 31 parameters of the state dict, 'cls_token' among them, is in "
        r"the model\. Pass names=\[\.\.\.\] .*, as 'backbone\.cls_token'\.",
    ),
    "an optimizer without names": (
        by_us,
        lambda saved, model: fit(saved, by_torch_in_one(model)),
        ValueError,
        r"the new AdamW knows no names of its 31 parameters\. Make it of "
        r"model\.named_parameters\(\), or pass the model\.",
    ),
    "two rates in one group": (
        two_rates,
        lambda saved, model: fit(saved, model),
        ValueError,
        r"'lr' is 0\.01 for .* and 0\.5 for .*\. Pass the new optimizer, whose "
        r"'lr' counts: fit\(state_dict, optimizer\)\.",
    ),
    "what a class counts differs": (
        lambda model: apart(Counting(hand_split(model, named=True))),
        lambda saved, model: fit(saved, Counting(model.named_parameters())),
        ValueError,
        r"'k' is 7 for .* and 0 for .*\. Make it two groups of the new optimizer\.",
    ),
    "no state dict": (
        by_us,
        lambda saved, model: fit(model, saved),
        TypeError,
        r"`state_dict` must be a dict, not ViT\. Pass what optimizer\.state_dict\(\)",
    ),
    "no model": (
        by_us,
        lambda saved, model: fit(saved, "model"),
        TypeError,
        r"`model` must be a module or a sequence of modules.*Pass model=model\.",
    ),
}


def apart(optimizer):
    optimizer.param_groups[0]["k"] = 7
    optimizer.step = lambda: None
    return optimizer


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_fitted_is_refused(case):
    made, call, kind, words = ERRORS[case]
    model, old = old_run("reordered", made)
    with pytest.raises(kind, match=words):
        call(old.state_dict(), model)


ADVICE = {
    "no names": (
        by_torch_in_one,
        lambda o, model: fit(
            o.state_dict(), model, names=[n for n, _ in model.named_parameters()]
        ),
    ),
    "no names of several groups": (
        by_torch_unnamed,
        lambda o, model: fit(
            o.state_dict(), model, names=group_names(o.param_groups, model)
        ),
    ),
    "other names": (
        by_us,
        lambda o, model: fit(
            o.state_dict(),
            wrapped(model),
            names=[f"backbone.{n}" for n, _ in model.named_parameters()],
        ),
    ),
    "an optimizer without names": (
        by_us,
        lambda o, model: fit(
            o.state_dict(), torch_s("adamw", model.named_parameters())
        ),
    ),
    "or the model": (by_us, lambda o, model: fit(o.state_dict(), model)),
    "two rates in one group": (
        two_rates,
        lambda o, model: fit(
            o.state_dict(), torch_s("adamw", model.named_parameters())
        ),
    ),
    "what a class counts differs": (
        lambda model: apart(Counting(hand_split(model, named=True))),
        lambda o, model: fit(o.state_dict(), Counting(hand_split(model, named=True))),
    ),
    "no model": (by_us, lambda o, model: fit(o.state_dict(), model=model)),
}


@pytest.mark.parametrize("case", ADVICE)
def test_line_that_an_error_gives_leads_there(case):
    made, typed = ADVICE[case]
    model, old = old_run("reordered", made)
    fitted = typed(old, model)
    assert len(fitted.kept) == len(list(model.parameters()))


# Conversions carry it, too


def by_decay(model):
    exempt = [n for n, _ in model.named_parameters() if "bias" in n or "norm" in n]
    rest = [n for n, _ in model.named_parameters() if n not in exempt]
    return [{"params": rest}, {"params": exempt}]


def with_tensors(model, groups):
    params = dict(model.named_parameters())
    return [{**g, "params": [(n, params[n]) for n in g["params"]]} for g in groups]


def test_class_with_values_for_each_decay_goes_on_split_by_hand():
    model, old = old_run("reordered", counting)
    twin = copy.deepcopy(model)
    groups = with_tensors(twin, by_decay(twin))
    by_hand = Counting([{**g, "weight_decay": wd} for g, wd in zip(groups, (0.1, 0.0))])

    split = checkpoint.split_groups(old.state_dict(), by_decay(model))
    by_hand.load_state_dict(split)
    assert split.keys() == {"state", "param_groups"}
    train(model, old, SECOND)
    train(twin, by_hand, SECOND)

    assert_same(model, twin)
    assert [group["k"] for group in by_hand.param_groups] == [7, 7]


def test_what_a_class_keeps_for_each_decay_follows_its_parameters_in_one_group():
    groups = [
        {"params": own, "param_names": names, "lr": 0.1, "weight_decay": 0.1}
        for own, names in (([0, 1], ["a", "b"]), ([2], ["c"]))
    ]
    kept = [{"positions": [0], "gamma": 5.0}, {"positions": [1], "gamma": 7.0}]
    saved = {"state": {}, "param_groups": groups, "parts": [kept, []]}

    [parts] = checkpoint.merge_groups(saved, order=["b", "c", "a"])["parts"]

    assert parts == [{"positions": [0], "gamma": 7.0}, {"positions": [2], "gamma": 5.0}]


# Every class of torch


OTHERS = (
    *("Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam"),
    *("RMSprop", "Rprop"),
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_of_torch_go_on(name):
    cls = partial(getattr(torch.optim, name), lr=0.01, foreach=False)
    model, old = old_run("layer added", lambda m: cls(m.named_parameters()))
    whole, whole_optimizer = copy.deepcopy((model, old))
    shapes = {name: param.shape for name, param in model.named_parameters()}
    layer_added(model)
    more_classes(model)

    new = cls(model.named_parameters())
    fitted = fit(through_file(old.state_dict()), new)
    new.load_state_dict(fitted.state_dict)

    train(whole, whole_optimizer, SECOND)
    train(model, new, SECOND, shapes=shapes)
    goes_on = [name for name in fitted.kept if "head" not in name]
    assert len(goes_on) == len(shapes) - 2
    for each in goes_on:
        assert_same(model.get_parameter(each), whole.get_parameter(each))
    assert {*fitted.resized, *fitted.new} >= {"head.weight", "head.bias"}


# Surgeries of libraries


def timm_vit():
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 2}
    model = timm.models.VisionTransformer(**sizes, num_classes=3)
    return model, lambda: model.reset_classifier(5), {"head.weight", "head.bias"}


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 8, "vocab_size": 11}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    more = {"new_num_tokens": 14, "mean_resizing": False}
    return (
        model,
        lambda: model.resize_token_embeddings(**more),
        {"transformer.wte.weight"},
    )


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [timm_vit, gpt2])
def test_state_survives_surgeries_of_libraries(make):
    torch.manual_seed(0)
    model, surgery, changed = make()
    old = torch_s("adamw", hand_split(model))
    train(model, old, FIRST)
    moments = {n: state_of(old, p) for n, p in model.named_parameters()}
    names = group_names(old.param_groups, model)
    surgery()

    new = ours("adamw", model)
    fitted = fit(old.state_dict(), new, names)
    new.load_state_dict(fitted.state_dict)

    assert set(fitted.resized) == changed
    assert (fitted.new, fitted.dropped) == ([], [])
    for name, param in model.named_parameters():
        for key, value in state_of(new, param).items():
            saved = moments[name][key]
            assert_same(leading(value, saved.shape), saved, strides=False)
            assert value.abs().sum() == saved.abs().sum()  # what was added is 0
    train(model, new, SECOND)


def test_state_is_found_where_one_half_of_weight_norm_is_frozen():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    model.parametrizations.weight.original0.requires_grad_(False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    fitted = fit(optimizer.state_dict(), model)
    assert fitted.kept == ["bias", "parametrizations.weight.original1"]
    assert fitted.new == ["parametrizations.weight.original0"]
