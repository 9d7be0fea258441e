"""What is paid per parameter does not grow with their number, by counted work."""

import copy
import gc

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW
from selective_optim.step import parts
from tests.support.calls import calls_of

FEW, MORE = 10, 40  # layers of two parameters, of which one decays
SLACK = 1.05  # what is paid once counts for less among more


def made(layers, cls=AdamW):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    return net, cls(net.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias")


def construction(layers):
    return calls_of(lambda: made(layers))


def first_step(layers):
    return calls_of(made(layers)[1].step)


def steady_step(layers):
    _, optimizer = made(layers)
    optimizer.step()
    optimizer.step()
    return calls_of(optimizer.step)


def saving(layers):
    _, optimizer = made(layers)
    optimizer.step()
    return calls_of(optimizer.state_dict)


def loading(layers):
    _, optimizer = made(layers)
    optimizer.step()
    saved = optimizer.state_dict()
    resumed = made(layers)[1]
    return calls_of(lambda: resumed.load_state_dict(saved))


def step_after_loading(layers):
    _, optimizer = made(layers)
    optimizer.step()
    resumed = made(layers)[1]
    resumed.load_state_dict(optimizer.state_dict())
    return calls_of(resumed.step)


def report(layers):
    return calls_of(made(layers)[1].decay_report)


WORK = (construction, first_step, steady_step, saving, loading, step_after_loading)


@pytest.mark.parametrize("work", [*WORK, report])
def test_four_times_the_parameters_take_four_times_the_calls_at_most(work):
    work(FEW)  # nothing is imported or asked for the first time later
    few, more = work(FEW), work(MORE)
    assert 0 < few <= more <= SLACK * MORE / FEW * few


def objects_kept(layers):
    """Count what an optimizer adds to the objects that Python's collector walks."""
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
    gc.collect()
    before = len(gc.get_objects())
    optimizer = AdamW(net.parameters(), weight_decay=0.5, wd_policy="no_bias")
    gc.collect()
    after = len(gc.get_objects())
    del optimizer
    return after - before


def test_an_optimizer_keeps_two_objects_per_parameter_that_the_collector_walks():
    objects_kept(FEW)  # torch imports more with the first optimizer
    few, more = objects_kept(FEW), objects_kept(MORE)
    assert 0 < (more - few) / (2 * (MORE - FEW)) <= 2


class Number(int):
    """The number of a parameter in a state dict, that counts its comparisons."""

    asked = 0

    def __eq__(self, other):
        Number.asked += 1
        return int(self) == other

    __hash__ = int.__hash__


def comparisons_of_loading(layers):
    _, optimizer = made(layers)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] = {Number(key): own for key, own in saved["state"].items()}
    saved["param_groups"][0]["params"] = [Number(i) for i in range(2 * layers)]
    Number.asked = 0
    made(layers)[1].load_state_dict(saved)
    return Number.asked


def test_loading_compares_each_number_with_few_others():
    few, more = comparisons_of_loading(FEW), comparisons_of_loading(MORE)
    assert 0 < few < more <= SLACK * MORE / FEW * few


UNLIKE = {
    "absent": None,
    "transposed": torch.ones(3, 2).t(),
    "another shape": torch.ones(3, 2),
    "another dtype": torch.ones(2, 3, dtype=torch.float64),
    "another device": torch.ones(2, 3, device="meta"),
    "sparse": torch.ones(2, 3).to_sparse(),
    "negated": torch._neg_view(torch.ones(2, 3)),
    "subclass": torch.ones(2, 3).as_subclass(type("Own", (torch.Tensor,), {})),
}


def all_fused(optimizer):
    """Ask of an optimizer with one group, left open, at one look."""
    optimizer._stepper.expose(optimizer.state)
    decided, groups = optimizer.decided_params(), optimizer.param_groups
    return parts._all_fused(optimizer._kernel, groups, {None}, decided, optimizer.state)


@pytest.mark.parametrize(
    ("entry", "case"),
    [
        *(("exp_avg_sq", case) for case in UNLIKE),
        # torch takes no gradient that is otherwise unlike its parameter.
        *(("grad", case) for case in ("absent", "transposed", "sparse", "negated")),
    ],
)
def test_one_look_at_many_says_nothing_where_a_tensor_is_unlike_the_others(entry, case):
    params = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(2, 3)
    optimizer = AdamW(params)
    optimizer.step()
    assert all_fused(optimizer)
    if entry == "grad":
        params[1].grad = UNLIKE[case]
    else:
        optimizer.state[params[1]][entry] = UNLIKE[case]
    assert not all_fused(optimizer)


@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_one_look_at_many_and_a_look_at_each_step_alike(cls, monkeypatch):
    torch.manual_seed(0)
    (net, quick), looks = made(3, cls), []
    twin = copy.deepcopy(net)
    slow = cls(twin.parameters(), lr=0.1, weight_decay=0.5, wd_policy="no_bias")
    for optimizer, params in ((quick, net.parameters()), (slow, twin.parameters())):
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        for _ in range(3):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())  # then it plans anew
        # The second is asked tensor by tensor.
        monkeypatch.setattr(parts, "_all_fused", lambda *asked: looks.append(asked))
    assert looks
    for actual, expected in zip(twin.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert slow._stepper.plans == quick._stepper.plans == 3
