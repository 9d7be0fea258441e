"""Flattened, sharded, stacked, resized and cloned tensors in place of parameters."""

import re

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, deciding_for, param_groups, selective
from selective_optim.policies import parse

CLASSES = [SGD, AdamW, selective(torch.optim.NAdam)]
each_class = pytest.mark.parametrize("cls", CLASSES)
WD = 0.5


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def flat(params):
    return torch.cat([p.detach().flatten() for p in params]).requires_grad_()


def replace_all(optimizer, change):
    """Put other tensors in the places of all parameters, as engines do."""
    for group in optimizer.param_groups:
        group["params"] = list(change(group["params"]))


def step(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()


def multipliers(optimizer):
    return [row.weight_decay / WD for row in optimizer.decay_report()]


# One tensor for many, as in DeepSpeed's ZeRO 1 to 3.

POLICIES = ["matrices", "no_bias_norm", "huggingface", lambda info: info.ndim > 1]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@each_class
@each_policy
def test_flat_tensor_of_an_engine_is_refused(cls, policy):
    model = net()
    optimizer = cls(model.parameters(), lr=0.1, weight_decay=WD, wd_policy=policy)
    replace_all(optimizer, lambda params: [flat(params)])
    for _ in range(2):
        with pytest.raises(ValueError, match="no single decay") as caught:
            step(optimizer)
    assert "matrices" not in str(caught.value).replace("exclude(is_vector)", "")


@each_class
@each_policy
def test_flat_tensors_in_another_order_are_refused(cls, policy):
    """As of Megatron's distributed optimizer, which puts those in float32 first."""
    optimizer = cls(net().parameters(), lr=0.1, weight_decay=WD, wd_policy=policy)
    replace_all(
        optimizer,
        lambda params: [flat([p]) for p in sorted(params, key=lambda p: p.ndim)],
    )
    with pytest.raises(ValueError, match="no single decay"):
        step(optimizer)


def test_refusal_of_a_flat_tensor_reads_so():
    optimizer = AdamW(net(), weight_decay=WD, wd_policy="no_bias_norm")
    replace_all(optimizer, lambda params: [flat(params)])
    with pytest.raises(ValueError, match="no single decay") as caught:
        optimizer.step()
    assert str(caught.value) == (
        "`wd_policy` exclude(is_bias, is_norm) decided for 6 parameters of group 0, in "
        "whose places an engine put 1 (shape 83): no single decay is right for those. "
        "Split the groups by hand, which is exact there: AdamW(param_groups(model, "
        '"exclude(is_bias, is_norm)", weight_decay=...)).'
    )


@each_policy
def test_hand_split_groups_that_the_refusal_names_are_exact(policy):
    model, twin = net(), net()
    optimizer = AdamW(model.parameters(), weight_decay=WD, wd_policy=policy)
    replace_all(optimizer, lambda params: [flat(params)])
    with pytest.raises(ValueError, match="no single decay") as caught:
        optimizer.step()
    text = re.search(r"AdamW\(param_groups\(model, (.*), weight", str(caught.value))[1]
    typed = parse(text.strip('"')) if text.startswith('"') else policy

    ours = AdamW(param_groups(model, typed, weight_decay=WD))
    theirs = torch.optim.AdamW(param_groups(twin, policy, weight_decay=WD), fused=True)
    for each in (ours, theirs):
        replace_all(each, lambda params: [flat(params)])
        for _ in range(7):
            step(each)
    for group, other in zip(ours.param_groups, theirs.param_groups):
        assert torch.equal(group["params"][0], other["params"][0])


@pytest.mark.parametrize("policy", [None, "all", "none"])
def test_flat_tensor_decays_where_nothing_depends_on_what_it_was(policy):
    optimizer = AdamW(net().parameters(), weight_decay=WD)
    if policy:
        optimizer.wd_policy = "all"
    replace_all(optimizer, lambda params: [flat(params)])
    step(optimizer)
    assert multipliers(optimizer) == [1]


# As many tensors as before.

OLD = [1, 0, 0, 0, 1, 0]
REPLACED = {
    "shards of each": lambda p: flat([p])[: p.numel() // 2 + 1],
    "padded": lambda p: torch.ones(40),
    "of no elements": lambda p: flat([p])[:0],
    "master copies": lambda p: p.detach().double(),
    "stacks": lambda p: torch.stack([p.detach()] * 5),
    "more rows": lambda p: torch.cat([p.detach()] * 2),
    "fewer rows": lambda p: p.detach()[:2].clone(),
}


@each_class
@pytest.mark.parametrize("policy", ["matrices", "no_bias_norm"])
@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_tensors_one_to_one_in_the_places_of_others_inherit(change, policy, cls):
    model = net()
    optimizer = cls(model.parameters(), lr=0.1, weight_decay=WD, wd_policy=policy)
    for _ in range(2):
        new = [nn.Parameter(change(p).detach()) for p in model.parameters()]
        replace_all(optimizer, lambda _, new=new: new)
        step(optimizer)
        assert multipliers(optimizer) == OLD


def test_tensors_of_other_dimensions_are_decided_by_what_they_are():
    optimizer = AdamW(net(), weight_decay=WD, wd_policy="matrices")
    new = [torch.ones(*size, requires_grad=True) for size in [(8,), (8, 4)] * 3]
    replace_all(optimizer, lambda params: new)
    step(optimizer)
    assert multipliers(optimizer) == [0, 1] * 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((4,), [(2, 2)], [1]),
        ((4,), [(2, 2), (3,)], [1, 0]),
        ((2, 2), [(3,)] * 2, [0, 0]),
    ],
)
def test_what_is_neither_flat_nor_a_stack_is_decided_by_its_shape(old, new, expected):
    params = [nn.Parameter(torch.ones(old)), nn.Parameter(torch.ones(2, 2))]
    groups = [{"params": [param]} for param in params]
    optimizer = SGD(groups, lr=0.1, weight_decay=WD, wd_policy="matrices")
    sizes = [torch.ones(size, requires_grad=True) for size in new]
    optimizer.param_groups[0]["params"] = sizes
    step(optimizer)
    assert multipliers(optimizer) == [*expected, 1]


def test_placeholders_between_two_steps_decide_nothing():
    model = net()
    optimizer = AdamW(model.parameters(), weight_decay=WD, wd_policy="no_bias_norm")
    params = optimizer.param_groups[0]["params"][:]
    replace_all(optimizer, lambda params: [torch.empty(1) for _ in params])
    optimizer.decay_report()
    optimizer.state_dict()
    replace_all(optimizer, lambda _: [nn.Parameter(p.detach()) for p in params])
    assert multipliers(optimizer) == OLD


# A group for each tensor, as in Gaussian splatting.


def splats():
    shapes = {"xyz": (10, 3), "features": (10, 15, 3), "opacity": (10, 1)}
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("policy", ["matrices", {"opacity": 0}])
@pytest.mark.parametrize("rows", [4, 25])
def test_densified_and_pruned_tensors_keep_decaying(policy, rows):
    groups = [{"params": [(name, p)]} for name, p in splats().items()]
    optimizer = SGD(groups, lr=0.1, weight_decay=WD, wd_policy=policy)
    before = multipliers(optimizer)
    replace_all(
        optimizer, lambda own: [nn.Parameter(torch.ones(rows, *own[0].shape[1:]))]
    )
    step(optimizer)
    assert multipliers(optimizer) == before


@pytest.mark.parametrize("rows", [50, 7])
def test_resized_embedding_in_a_group_of_its_own_stays_one(rows):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 2)})
    groups = [{"params": model[name].parameters()} for name in model]
    optimizer = SGD(groups, lr=0.1, weight_decay=WD, wd_policy="no_bias_norm_embedding")
    model["embed"] = nn.Embedding(rows, 4)
    optimizer.param_groups[0]["params"] = list(model["embed"].parameters())
    step(optimizer)
    assert multipliers(optimizer) == [0, 1, 0]


# Given to the constructor beside a model.


def stacks(model):
    return {n: torch.stack([p.detach()] * 5) for n, p in model.named_parameters()}


def clones(model):
    return {n: p.detach().double() for n, p in model.named_parameters()}


@pytest.mark.parametrize("make", [stacks, clones])
@pytest.mark.parametrize("policy", ["no_bias_norm", "matrices"])
def test_copies_of_a_models_parameters_are_split_by_its_names(make, policy):
    model, twin = net(), net()
    copies = {name: p.requires_grad_() for name, p in make(model).items()}
    with pytest.raises(ValueError, match="in none of the modules") as caught:
        AdamW(copies.values(), model=model, weight_decay=WD, wd_policy=policy)
    text = re.search(r'param_groups\(model, "(.*)", weight', str(caught.value))[1]

    groups = param_groups(model, parse(text), weight_decay=WD)
    for group in groups:
        group["params"] = [copies[name] for name in group["param_names"]]
    step(AdamW(groups))
    others = {name: p.requires_grad_() for name, p in make(twin).items()}
    split = param_groups(twin, policy, weight_decay=WD)
    for group in split:
        group["params"] = [others[name] for name in group["param_names"]]
    step(torch.optim.AdamW([dict(group) for group in split], fused=True))
    assert all(torch.equal(copies[name], others[name]) for name in copies)


def test_refusal_of_copies_reads_so():
    model = net()
    params = [p.requires_grad_() for p in stacks(model).values()]
    with pytest.raises(ValueError, match="none") as caught:
        AdamW(params, model=model, wd_policy="no_bias_norm")
    assert str(caught.value) == (
        "parameter 0 of group 0 (shape 5 x 8 x 4), at position 0 of group 0, is in "
        "none of the modules given as `model`, nor in any other that lives. Split the "
        "groups by hand, which is exact there: AdamW(param_groups(model, "
        '"exclude(is_bias, is_norm)", weight_decay=...)), with copies in the places of '
        'the parameters that each group names in "param_names".'
    )


def test_stacks_are_refused_where_a_block_gives_the_model():
    model = net()
    params = [p.requires_grad_() for p in stacks(model).values()]
    with (
        deciding_for(model, wd_policy="matrices"),
        pytest.raises(ValueError, match=r"param_groups\(model"),
    ):
        AdamW(params, weight_decay=WD)


def test_parameters_of_another_model_are_to_be_given_with_it():
    model, other = net(), net()
    with pytest.raises(ValueError, match=r"Pass every module .* model=\[model, "):
        AdamW(other.parameters(), model=model, wd_policy="no_bias_norm")
    AdamW(other.parameters(), model=[model, other], wd_policy="no_bias_norm")


def test_bare_vectors_are_not_led_to_matrices():
    with pytest.raises(ValueError, match="only the tensor is known") as caught:
        AdamW([flat(net().parameters())], wd_policy="no_bias_norm")
    assert "matrices" not in str(caught.value)
