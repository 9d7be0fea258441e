"""A decision follows its parameter through every edit, and never a position alone."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import SGD, AdamW, Decay, selective
from selective_optim.decay import Answer
from selective_optim.policies.selectors import Policy
from tests.support import twins
from tests.support.calls import calls_of

COPIES = {
    "none": lambda things: things,
    "deepcopy": copy.deepcopy,
    "copy": lambda things: (things[0], copy.copy(things[1])),
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
}
each_copy = pytest.mark.parametrize("copied", COPIES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4)


def reverse(groups):
    groups[0]["params"].reverse()


def replace_by_permutation(groups):
    groups[0]["params"] = groups[0]["params"][::-1]


def pop(groups):
    groups[0]["params"].pop(1)


def move_to_another_group(groups):
    groups[1]["params"].append(groups[0]["params"].pop(0))


def merge_groups(groups):
    groups[0]["params"].extend(groups[1]["params"])
    del groups[1]


def exchange_groups(groups):
    groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]


def split_a_group(groups):
    half = groups[0]["params"][2:]
    del groups[0]["params"][2:]
    groups.append({**groups[0], "params": half})


def rebuild(groups):
    groups[:] = [dict(group) for group in reversed(groups)]


def as_deque(groups):
    groups[0]["params"] = deque(groups[0]["params"])


EDITS = [
    reverse,
    replace_by_permutation,
    pop,
    move_to_another_group,
    merge_groups,
    exchange_groups,
    split_a_group,
    rebuild,
    as_deque,
]
HOW = {
    "typed": lambda net: {"wd_policy": "no_bias_norm", "model": net},
    "shapes": lambda net: {"wd_policy": "matrices"},
}


def decaying(optimizer):
    """Find out what decays: with a gradient of 0, that alone moves a parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return [
        param
        for param, old in zip(params, before, strict=True)
        if not torch.equal(param, old)
    ]


@each_copy
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("stepped", [False, True])
def test_decision_goes_where_its_parameter_goes(copied, edit, how, stepped):
    net = Net()
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    params = list(net.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.2}]
    optimizer = SGD(groups, lr=0.1, weight_decay=0.5, **HOW[how](net))
    if stepped:
        decaying(optimizer)
    edit(optimizer.param_groups)
    net, optimizer = COPIES[copied]((net, optimizer))
    standing = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = [p for p in net.parameters() if p.ndim > 1 and id(p) in standing]
    for _ in range(2):
        assert {id(p) for p in decaying(optimizer)} == {id(p) for p in expected}


@each_copy
def test_new_tensor_beside_known_ones_leaves_theirs_alone(copied):
    params = twins.make_params()
    optimizer = SGD(params, lr=0.1, weight_decay=0.5, wd_policy="matrices")
    group = optimizer.param_groups[0]["params"]
    group.pop(0)
    group.append(nn.Parameter(torch.ones(3)))
    _, optimizer = COPIES[copied]((params, optimizer))
    kept = optimizer.param_groups[0]["params"]
    assert [p.ndim for p in kept] == [1, 2, 1, 1]
    assert [id(p) for p in decaying(optimizer)] == [id(kept[1])]


def test_norm_in_the_place_of_a_linear_is_decided_as_the_norm_it_is():
    net = Net()
    optimizer = SGD(
        [{"params": net.embed.parameters()}, {"params": net.head.parameters()}],
        lr=0.1,
        weight_decay=0.5,
        wd_policy="no_bias_norm",
        model=net,
    )
    optimizer.param_groups[0]["params"] = list(net.norm.parameters())
    assert [id(p) for p in decaying(optimizer)] == [id(net.head.weight)]


def replace_by_linear(net):
    net.norm = nn.Linear(4, 4)


def replace_by_another_size(net):
    net.head = nn.Linear(4, 7)


def replace_by_norm(net):
    net.head = nn.LayerNorm(4)


@pytest.mark.parametrize(
    ("replace", "decay"),
    [
        (replace_by_linear, ["embed.weight", "norm.weight", "head.weight"]),
        (replace_by_another_size, ["embed.weight", "head.weight"]),
        (replace_by_norm, ["embed.weight"]),
    ],
)
@pytest.mark.parametrize("stepped", [False, True])
def test_module_replaced_under_its_name_is_decided_anew(replace, decay, stepped):
    net = Net()
    optimizer = SGD(
        net.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm"
    )
    if stepped:
        decaying(optimizer)
    replace(net)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    moved = {id(p) for p in decaying(optimizer)}
    assert [n for n, p in net.named_parameters() if id(p) in moved] == decay
    rows = {row.name: row for row in optimizer.decay_report().rows}
    for name, param in net.named_parameters():
        assert tuple(rows[name].shape) == tuple(param.shape)
        assert (rows[name].weight_decay > 0) == (name in decay)


@pytest.mark.parametrize("layers", [1, 2])
def test_module_of_another_class_and_the_same_shape_is_decided_anew(layers):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers)))
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_norm")
    model[0] = nn.LayerNorm((4, 4), bias=False)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    expected = [id(layer.weight) for layer in model[1:]]
    assert [id(p) for p in decaying(optimizer)] == expected


# Frameworks that rebuild groups.


def rebuild_like_lightning(optimizer, saved):
    """Assign groups of the optimizer that was saved, then load."""
    groups = saved["param_groups"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.param_groups = [
        {**group, "params": [params[i] for i in group["params"]]} for group in groups
    ]
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("policy", [None, "no_bias_norm", "matrices"])
@pytest.mark.parametrize("kind", twins.KINDS)
def test_rebuilt_groups_resume_as_in_torch(policy, kind):
    left = []
    for cls in (AdamW, torch.optim.AdamW):
        net, again = Net(), Net()
        net.load_state_dict(
            {k: torch.ones_like(v) for k, v in net.state_dict().items()}
        )
        chosen = twins.KINDS[kind] or ({} if cls is AdamW else {"fused": True})
        hyper = {"lr": 0.1, "weight_decay": 0.0 if policy else 0.5, **chosen}
        ours = {"wd_policy": policy, "model": net} if cls is AdamW else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a policy and no decay
            optimizer = cls(net.embed.parameters(), **hyper, **ours)
        optimizer.add_param_group({"params": list(net.head.parameters()), "lr": 0.2})
        twins.step(list(net.parameters()), optimizer, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        again.load_state_dict(net.state_dict())
        ours = {"wd_policy": policy, "model": again} if cls is AdamW else {}
        params = [*again.embed.parameters(), *again.head.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resumed = cls(params, **hyper, **ours)
            rebuild_like_lightning(resumed, saved)
        for number in range(3):
            twins.step(list(again.parameters()), resumed, number)
        left.append((list(again.parameters()), resumed))
    (mine, ours), (theirs, judge) = left
    twins.assert_twins(mine, theirs, ours, judge)


def append_a_group(optimizer, params):
    like = optimizer.param_groups[0]
    optimizer.param_groups.append({**like, "params": params})


def extend_a_group(optimizer, params):
    optimizer.param_groups[0]["params"].extend(params)


@pytest.mark.parametrize("add", [append_a_group, extend_a_group])
@pytest.mark.parametrize("policy", [None, "matrices", "no_bias_norm"])
def test_parameters_added_by_hand_are_decided_on_the_spot(add, policy):
    net = Net()
    ours = {"wd_policy": policy, "model": net}
    optimizer = SGD(net.embed.parameters(), lr=0.1, weight_decay=0.5, **ours)
    add(optimizer, list(net.head.parameters()))
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    own = [*net.embed.parameters(), *net.head.parameters()]
    expected = [p for p in own if policy is None or p.ndim > 1]
    assert [id(p) for p in decaying(optimizer)] == [id(p) for p in expected]


def test_tensor_that_cannot_be_decided_is_named_and_nothing_moves():
    net = Net()
    optimizer = SGD(
        net.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm"
    )
    decaying(optimizer)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, 2)))
    before = [param.detach().clone() for param in net.parameters()]
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"parameter 6 of group 0 \(shape 2 x 2\)"):
        optimizer.step()
    assert all(map(torch.equal, before, net.parameters()))


def test_report_tells_of_known_tensors_beside_one_that_cannot_be_decided():
    net = Net()
    optimizer = SGD(net, lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm")
    expected = optimizer.decay_report().rows[::-1]
    optimizer.param_groups[0]["params"].reverse()
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2, 2)))
    *known, last = optimizer.decay_report().rows
    assert known == list(expected)
    assert (last.reason, last.weight_decay, last.name) == ("not decided yet", 0.5, None)


def test_tensors_that_stand_in_for_others_until_they_are_decided_report_as_these():
    """Frameworks that shard put such in the place of all parameters."""
    net = Net()
    optimizer = SGD(net, lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm")
    expected = [row.weight_decay for row in optimizer.decay_report().rows]
    stand_ins = [nn.Parameter(torch.ones(0)) for _ in expected]
    optimizer.param_groups[0]["params"][:] = stand_ins
    assert [row.weight_decay for row in optimizer.decay_report().rows] == expected


def test_what_is_known_of_tensors_long_gone_is_forgotten():
    """Whoever rebuilds parameters at every step would fill the memory with it."""
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = SGD([param], lr=0.1, weight_decay=0.5, wd_policy="matrices")
    known = []
    for _ in range(150):
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2, 2))
        optimizer.step()
        known.append(len(optimizer._decider._rows))
    assert max(known) == 2 * 1 + 64
    assert len(decaying(optimizer)) == 1


# Copies of model and optimizer.


def test_copied_optimizer_finds_the_modules_of_the_copied_model():
    net = Net()
    optimizer = SGD(
        net.embed.parameters(),
        lr=0.1,
        weight_decay=0.5,
        wd_policy="no_bias_norm",
        model=net,
    )
    net, optimizer = copy.deepcopy((net, optimizer))
    net.late = nn.LayerNorm(4)
    optimizer.add_param_group({"params": net.late.parameters()})
    optimizer.add_param_group({"params": list(net.head.parameters())})
    reasons = {row.name: row.reason for row in optimizer.decay_report().rows}
    assert reasons["late.weight"] == "exclude is_norm"
    assert reasons["head.weight"] == "decays in full"


@each_copy
def test_model_of_a_group_is_read(copied):
    net = Net()
    optimizer = SGD(
        net.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm"
    )
    net, optimizer = COPIES[copied]((net, optimizer))
    late = nn.ModuleDict({"late": nn.LayerNorm(4)})
    group = {"params": list(late.parameters()), "model": late}
    optimizer.add_param_group(group)
    rows = {row.name: row.reason for row in optimizer.decay_report().rows}
    assert rows["late.weight"] == "exclude is_norm"
    assert "model" not in optimizer.param_groups[-1]


# Many small optimizers.


def deep(layers):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))


def cost_of_an_optimizer(net, params, ours):
    kept = [SGD([param], **ours) for param in params[:10]]
    return calls_of(lambda: kept.append(SGD([params[20]], **ours)))


def cost_of_a_group(net, params, ours):
    optimizer = SGD(params[:1], **ours)
    for param in params[1:10]:
        optimizer.add_param_group({"params": [param]})
    return calls_of(lambda: optimizer.add_param_group({"params": [params[20]]}))


@pytest.mark.parametrize("cost", [cost_of_an_optimizer, cost_of_a_group])
def test_one_more_costs_the_same_in_a_large_model(cost):
    costs = []
    for layers in (20, 200):
        net = deep(layers)
        ours = {"lr": 0.1, "weight_decay": 0.5, "wd_policy": "no_bias", "model": net}
        costs.append(cost(net, list(net.parameters()), ours))
    assert costs[1] < costs[0] * 1.2


def test_one_exempt_parameter_does_not_warn_that_nothing_decays():
    net = Net()
    for param in net.parameters():
        SGD([param], lr=0.1, weight_decay=0.5, wd_policy="no_bias_norm", model=net)


@dataclass(frozen=True)
class Listed(Policy):
    """A policy of a user's own, which holds a list and so has no hash."""

    names: list[str]

    def decide(self, info):
        return Answer(Decay(float(info.name in self.names)), "listed")


def answers_biases(info):
    return {"bias": 0}[info.leaf]


def answers_biases_alone(info):
    return {"bias": 0}.get(info.leaf)


@pytest.mark.parametrize("policy", [answers_biases, answers_biases_alone, Listed([])])
def test_exempt_parameters_of_a_model_that_cannot_be_asked_about_warn(policy):
    """The others of the model are no concern of an optimizer that lacks them."""
    net = Net()
    biases = [net.embed.bias, net.head.bias]
    with pytest.warns(UserWarning, match="exempts all 2 parameters"):
        SGD(biases, lr=0.1, weight_decay=0.5, wd_policy=policy, model=net)


def test_exempt_parameters_of_a_model_that_decays_elsewhere_do_not_warn():
    net = Net()
    biases = [net.embed.bias, net.head.bias]
    policy = Listed(["embed.weight"])
    SGD(biases, lr=0.1, weight_decay=0.5, wd_policy=policy, model=net)


def test_optimizers_per_parameter_decay_what_one_would():
    net = Net()
    with torch.no_grad():
        for param in net.parameters():
            param.fill_(1.0)
    for name, param in net.named_parameters():
        own = selective_optim.AdamW(
            [param], weight_decay=0.5, wd_policy="no_bias_norm", model=net
        )
        moved = [id(p) for p in decaying(own)]
        assert moved == (
            [id(param)] if name.endswith("d.weight") and param.ndim > 1 else []
        )


# Groups that are passed on to another optimizer.

PASSED = {
    "as they are": lambda groups: groups,
    "one of them": lambda groups: groups[-1:],
    "copied": lambda groups: [dict(group) for group in groups],
    "filtered": lambda groups: [
        {**group, "params": [p for p in group["params"] if p.ndim < 2]}
        for group in groups
    ],
}


@pytest.mark.parametrize("name", twins.CLASSES)
@pytest.mark.parametrize("how", PASSED)
@pytest.mark.parametrize("cls", [selective_optim.SGD, selective_optim.AdamW])
def test_groups_of_another_optimizer_do_not_lose_their_policy_unseen(name, how, cls):
    source = twins.ours(name, "automatic", twins.make_params())
    with pytest.warns(UserWarning, match=r"Pass wd_policy=exclude\(is_vector\)"):
        cls(PASSED[how](source.param_groups))
    added = cls([nn.Parameter(torch.ones(1))])
    with pytest.warns(UserWarning, match="come from an optimizer"):
        added.add_param_group(PASSED[how](source.param_groups)[0])


@pytest.mark.parametrize("cls", [selective_optim.AdamW, selective(torch.optim.NAdam)])
def test_warning_that_is_an_error_leaves_groups_as_they_were(cls):
    """A warning is an error in these tests."""
    source = twins.ours("AdamW", "automatic", twins.make_params())
    given, numbers = {"params": twins.make_params(), "lr": 0.01}, dict(source.defaults)
    del numbers["decoupled_weight_decay"]
    with pytest.raises(UserWarning, match="come from an optimizer"):
        selective_optim.AdamW([given], **numbers)
    assert given.keys() == {"params", "lr"}
    added = cls([nn.Parameter(torch.ones(1))])
    for group in (dict(source.param_groups[0]), source.param_groups[0]):
        with pytest.raises(UserWarning, match="come from an optimizer"):
            added.add_param_group(group)
        assert len(added.param_groups) == 1
    with pytest.warns(UserWarning, match="come from an optimizer"):
        added.add_param_group(group)
    added.step()


@pytest.mark.parametrize("name", twins.CLASSES)
def test_groups_of_another_optimizer_with_a_policy_are_not_warned_of(name):
    """Nor groups written by hand, those that decay nothing, and where nothing is lost.

    A warning is an error in these tests.
    """
    params = twins.make_params()
    source = twins.ours(name, "automatic", params)
    plain = twins.ours(name, "automatic", twins.make_params(), wd_policy=None)
    type(source)(source.param_groups, wd_policy="matrices")
    type(source)(source.param_groups, wd_policy="all")
    type(source)([{"params": params, "lr": 0.1, "weight_decay": 0.1}])
    type(source)([{**source.param_groups[0], "weight_decay": 0.0}])
    type(source)(plain.param_groups)
    copy.deepcopy(source)


# torch.utils.swap_tensors.


def swap_among(groups, params):
    torch.utils.swap_tensors(params[0], params[1])


def swap_and_reverse(groups, params):
    torch.utils.swap_tensors(params[0], params[1])
    groups[0]["params"].reverse()


def swap_in_turn(groups, params):
    torch.utils.swap_tensors(params[0], params[1])
    torch.utils.swap_tensors(params[1], params[2])


@pytest.mark.parametrize("name", twins.CLASSES)
@pytest.mark.parametrize("kind", twins.KINDS)
@pytest.mark.parametrize("swap", [swap_among, swap_and_reverse, swap_in_turn])
@pytest.mark.parametrize("lent", [True, False])
def test_swapped_tensors_keep_state_and_decision_of_the_object(name, kind, swap, lent):
    """As in torch, whose groups and state hold the object: its contents are new."""
    left = []
    for make in (twins.ours, twins.torchs):
        params = twins.make_params([(3, 3)] * 4)
        arguments = {**twins.CLASSES[name], **twins.KINDS[kind], "weight_decay": 0.3}
        if make is twins.ours:
            exempt = selective_optim.policies.exclude("a", "c")
            names = list(zip("abcd", params, strict=True))
            optimizer = getattr(selective_optim, name)(
                names, wd_policy=exempt, **arguments
            )
        else:
            arguments |= {} if twins.KINDS[kind] else {"fused": True}
            groups = [
                {"params": params[1::2]},
                {"params": params[::2], "weight_decay": 0.0},
            ]
            optimizer = getattr(torch.optim, name)(groups, **arguments)
        for number in range(2):
            twins.step(params, optimizer, number)
        if lent:
            optimizer.state_dict()
        optimizer.zero_grad()
        swap(optimizer.param_groups, params)
        for number in range(2, 6):
            twins.step(params, optimizer, number)
            if number == 3:  # which makes a new plan
                optimizer.load_state_dict(optimizer.state_dict())
        left.append((params, optimizer))
    (mine, own), (theirs, judge) = left
    twins.assert_twins(mine, theirs, own, judge)


def tensors(*shapes):
    return [nn.Parameter(torch.ones(shape)) for shape in shapes]


@pytest.mark.parametrize("name", twins.CLASSES)
def test_fewer_new_tensors_are_decided_by_their_shapes(name):
    """As where a user prunes layers; engines that flatten leave no matrix."""
    optimizer = twins.ours(name, "automatic", tensors((2,), (2, 2), (3,), (3, 2)))
    new = optimizer.param_groups[0]["params"] = tensors((4, 2), (5,))
    for param in new:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    decays = [row.weight_decay > 0 for row in optimizer.decay_report()]
    assert decays == [True, False]


def test_group_that_is_refused_among_cleared_ones_is_added_again_with_its_decisions():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    groups = [{"params": list(module.parameters())} for module in model]
    optimizer = AdamW(groups, weight_decay=0.1, wd_policy="no_bias_norm")
    del model, groups
    gc.collect()
    shapes = [(2, 2), (2,), (2,), (2,)]
    new = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": new[:2]})
    with pytest.raises(ValueError, match="needs module types"):
        optimizer.add_param_group({"params": new[2:3]})  # one too few
    optimizer.add_param_group({"params": new[2:]})
    decays = [row.weight_decay for row in optimizer.decay_report().rows]
    assert decays == [0.1, 0, 0, 0]
