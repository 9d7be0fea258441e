"""What people do to an optimizer's groups and state by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import SGD, AdamW
from tests.support.compare import assert_same


def pair() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(5))]


def one_group(params):
    return SGD(params, lr=0.1, weight_decay=1.0, wd_policy="matrices")


def group_each(params):
    groups = [{"params": [param]} for param in params]
    return SGD(groups, lr=0.1, weight_decay=1.0, wd_policy="matrices")


def zero_step(optimizer, params):
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()


def reverse_parameters(optimizer):
    optimizer.param_groups[0]["params"].reverse()


def reverse_groups(optimizer):
    optimizer.param_groups.reverse()


def add_groups_again_in_another_order(optimizer):
    groups = optimizer.param_groups[::-1]
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (one_group, reverse_parameters),
        (group_each, reverse_groups),
        (group_each, add_groups_again_in_another_order),
    ],
    ids=lambda value: value.__name__,
)
@pytest.mark.parametrize("copied", [False, True])
def test_reordered_tensors_keep_their_decisions(build, change, copied):
    params = pair()
    optimizer = build(params)
    if copied:
        optimizer, params = copy.deepcopy((optimizer, params))
    change(optimizer)
    zero_step(optimizer, params)
    assert_same(params, [torch.full((4, 5), 0.9), torch.ones(5)])


def test_removed_group_leaves_the_others_their_decisions():
    params = [*pair(), nn.Parameter(torch.ones(3, 3))]
    optimizer = group_each(params)
    del optimizer.param_groups[0]
    zero_step(optimizer, params)
    expected = [torch.ones(4, 5), torch.ones(5), torch.full((3, 3), 0.9)]
    assert_same(params, expected)


def test_emptied_group_steps_nothing():
    params = pair()
    optimizer = one_group(params)
    optimizer.param_groups[0]["params"].clear()
    zero_step(optimizer, params)
    assert_same(params, pair())


def test_group_with_its_own_policy_is_decided_anew_after_one_was_removed():
    heads = [nn.Linear(3, 2) for _ in range(3)]
    groups = [{"params": list(head.parameters())} for head in heads[:2]]
    optimizer = SGD(groups, lr=0.1, weight_decay=1.0)
    optimizer.param_groups.pop()
    optimizer.add_param_group(
        {"params": list(heads[2].parameters()), "wd_policy": "none"}
    )
    rows = optimizer.decay_report().rows
    assert [row.weight_decay for row in rows] == [1.0, 1.0, 0.0, 0.0]


def test_exchanged_states_keep_their_step_counts():
    actual, expected = pair(), pair()
    optimizers = [
        AdamW(actual, fused=True),
        torch.optim.AdamW(expected, fused=True),
    ]
    for step in range(3):
        for params, optimizer in zip((actual, expected), optimizers):
            zero_step(optimizer, params[: 1 if step else 2])
            params[1].grad = None
    for params, optimizer in zip((actual, expected), optimizers):
        a, b = params
        state = optimizer.state
        steps = state[a]["step"], state[b]["step"]
        state[a]["step"], state[b]["step"] = steps[1], steps[0]
        zero_step(optimizer, params)
    for p, q in zip(actual, expected):
        own, torchs = (o.state[x]["step"] for o, x in zip(optimizers, (p, q)))
        assert own.item() == torchs.item()


def test_edit_through_an_object_that_shares_the_dict_is_seen():
    params = pair()
    optimizer = AdamW(params, lr=0.1, fused=True)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    wrapper = object.__new__(AdamW)
    wrapper.__dict__ = dict(optimizer.__dict__)
    for param in params:
        wrapper.state[param]["exp_avg"] = torch.full_like(param, 7.0)
    zero_step(optimizer, params)
    assert optimizer.state[params[0]]["exp_avg"][0, 0] == pytest.approx(6.3)


VALUES = [
    ("betas", [0.9, 0.99], lambda group: group["betas"].__setitem__(0, 0.5)),
    ("lr", 0.1, lambda group: group.update(lr=torch.tensor(0.1))),
    ("lr", torch.tensor(0.1), lambda group: group.update(lr=0.1)),
    ("weight_decay", 0.1, lambda group: group.update(weight_decay=0.1 + 2**-55)),
]


@pytest.mark.parametrize(("name", "value", "change"), VALUES)
def test_changed_hyperparameter_reaches_the_kernel(name, value, change):
    runs = []
    for module in (selective_optim, torch.optim):
        params = [nn.Parameter(p.detach().double()) for p in pair()]
        optimizer = module.AdamW(params, lr=0.1, fused=True)
        optimizer.param_groups[0][name] = copy.copy(value)
        for step in range(4):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            if step == 1:
                change(optimizer.param_groups[0])
        runs.append(params)
    assert_same(*runs)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_one_odd_gradient_does_not_keep_a_parameter_off_the_fused_path(name):
    actual, expected = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    optimizer = getattr(selective_optim, name)([actual], lr=0.1, weight_decay=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(5, 3, generator=generator).t()
        if step == 3:  # from here on as a run that was resumed
            oracle = getattr(torch.optim, name)(
                [expected], lr=0.1, weight_decay=0.1, fused=True
            )
            expected.data.copy_(actual.data)
            oracle.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            oracle.param_groups[0]["fused"] = True
        actual.grad = grad if step == 1 else grad.contiguous()
        optimizer.step()
        if step >= 3:
            expected.grad = grad.contiguous()
            oracle.step()
    assert_same([actual], [expected])


def test_error_of_one_path_leaves_the_other_unstepped():
    params = pair()
    groups = [
        {"params": params[:1], "foreach": True},
        {"params": params[1:], "fused": True},
    ]
    optimizer = AdamW(groups, lr=0.1)
    for _ in range(2):
        zero_step(optimizer, params)
    before = [param.detach().clone() for param in params]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.2)
    with pytest.raises(RuntimeError, match="lr as a Tensor is not supported"):
        zero_step(optimizer, params)
    assert_same(params, before)
    assert optimizer.state[params[1]]["step"] == 2


def test_tensor_weight_decay_is_read_at_every_step():
    param = nn.Parameter(torch.ones(2, 2))
    wd = torch.tensor(0.1)
    optimizer = SGD([("p", param)], lr=1.0, weight_decay=wd, wd_policy={"p": 0.5})
    zero_step(optimizer, [param])
    wd.fill_(0.0)
    for _ in range(2):
        zero_step(optimizer, [param])
    assert_same([param], [torch.full((2, 2), 0.95)])


def test_one_element_step_counters_are_taken_over():
    params = pair()
    optimizer = AdamW(params, lr=0.1)
    zero_step(optimizer, params)
    for state in optimizer.state.values():
        state["step"] = torch.ones(1)
    zero_step(optimizer, params)
    assert optimizer.state[params[0]]["step"].item() == 2


KEYS = [
    (name, key)
    for name in ("SGD", "Adam", "AdamW")
    for key in getattr(torch.optim, name)(pair()).param_groups[0]
]


@pytest.mark.parametrize(("name", "key"), KEYS)
@pytest.mark.parametrize("stepped", [False, True])
def test_key_that_a_group_lacks_is_missed_where_torch_misses_it(name, key, stepped):
    said = []
    for cls in (getattr(selective_optim, name), getattr(torch.optim, name)):
        params = pair()
        optimizer = cls(params, lr=0.1, weight_decay=0.1)
        if stepped:
            zero_step(optimizer, params)
        del optimizer.param_groups[0][key]
        try:
            zero_step(optimizer, params)
        except KeyError as error:
            said.append(error.args)
        else:
            said.append([param.tolist() for param in params])
    assert said[0] == said[1]
