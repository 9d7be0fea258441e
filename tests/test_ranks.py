"""Ranks that decide differently, and policies that answer otherwise the next time."""

from __future__ import annotations

import copy
import itertools
import random
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from selective_optim import SGD, AdamW, Routed, _torch, selective
from selective_optim.policies import (
    exclude,
    fixed,
    is_bias,
    is_norm,
    only,
    scale,
    towards,
)
from tests.support.distributed import Ranks

NAdam = selective(torch.optim.NAdam)
each_class = pytest.mark.parametrize("cls", [SGD, AdamW, NAdam])


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def net(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))


def stepped(cls, policy, model, steps=2):
    optimizer = cls(model, lr=0.01, weight_decay=0.1, wd_policy=policy)
    for _ in range(steps):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return optimizer


def told(run, *args):
    """Return what was warned of while it ran, on this rank."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*args)
    # torch warns of the process group, of NumPy and of itself.
    return [str(w.message) for w in caught if "wd_policy" in str(w.message)]


# Ranks.


def step_with_own_policy(rank, cls, policies):
    return told(stepped, cls, policies[rank], net())


OTHER = {
    "exempt": ("no_bias", "no_bias_norm", "1.weight", "Decay(1)", "Decay(0)"),
    "multiplier": ("all", scale("2.*", by=0.5), "2.bias", "Decay(1)", "Decay(0.5)"),
    "fixed": (None, fixed(0.2, "0.bias"), "0.bias", "Decay(1)", "Decay(1, fixed=0.2)"),
    "target": (
        *(towards(2, is_bias), towards(1, is_bias), "0.bias"),
        *("Decay(1, target=2)", "Decay(1, target=1)"),
    ),
}


@pytest.mark.distributed
@each_class
@pytest.mark.parametrize("case", OTHER.values(), ids=OTHER)
def test_rank_that_decides_otherwise_warns_once_and_names_itself(ranks, cls, case):
    one, other, name, *decays = case
    policies = (one, other)
    said = ranks(step_with_own_policy, cls, policies)
    assert sorted(map(len, said)) == [0, 1]
    late = said.index(max(said, key=len))
    here, there = decays[late], decays[1 - late]
    assert re.fullmatch(
        rf"rank {late} decided otherwise than the rank that stepped first: '{name}' is "
        rf"{re.escape(here)} here and {re.escape(there)} there( \(and \d more\))?\. "
        r"Pass the same `wd_policy` and routes on every rank, as texts or mappings "
        r"from names\. Ranks that train apart on purpose may ignore this\.",
        said[late][0],
    )


def step_under_ddp(rank, policies):
    model = DistributedDataParallel(net())
    said = told(stepped, AdamW, policies[rank], model)
    return said, [param.detach().clone() for param in model.parameters()]


@pytest.mark.distributed
def test_drift_under_ddp_is_told_and_ends_with_the_advice(ranks):
    (one, first), (other, second) = ranks(step_under_ddp, ("no_bias", "all"))
    assert len(one + other) == 1
    assert any(not torch.equal(a, b) for a, b in zip(first, second))
    (one, first), (other, second) = ranks(step_under_ddp, ("no_bias", {"*.bias": 0}))
    assert not one + other
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def step_several(rank, cls):
    """A sweep, a second model, a stage of a pipeline, and a copy on one rank."""

    def run():
        for policy in ("no_bias", "all", "no_bias_norm"):
            stepped(cls, policy, net())
        stepped(cls, {"1.*": 0}, net(width=5))
        stepped(cls, ("no_bias", "all")[rank], net(width=6 + rank))
        optimizer = stepped(cls, "matrices", net(), steps=0)
        if rank == 0:
            copy.deepcopy(optimizer).step()
            copy.deepcopy(stepped(cls, "all", net(width=9))).step()
        optimizer.step()
        stepped(cls, "layer_weights", net())

    return told(run)


@pytest.mark.distributed
@each_class
def test_ranks_that_decide_alike_and_different_models_are_silent(ranks, cls):
    assert ranks(step_several, cls) == [[], []]


def step_without_names(rank):
    params = [param.detach() for param in net().parameters()][rank : rank + 1]
    return told(lambda: AdamW(params, wd_policy=("matrices", "none")[rank]).step())


@pytest.mark.distributed
def test_parameters_that_others_do_not_hold_are_silent(ranks):
    assert ranks(step_without_names) == [[], []]


ROUTES = {"a": (is_bias, SGD, {"lr": 0.1}), "b": ("*", SGD, {"lr": 0.1})}


def bare(model):
    return [param.detach() for param in model.parameters()]


def thawed(rank, model):
    """Add a group when training has begun, as those who unfreeze layers do."""
    policy = exclude(is_bias, is_norm) if rank else exclude(is_bias)
    optimizer = AdamW(model[0].parameters(), model=model, wd_policy=policy)
    optimizer.step()
    optimizer.add_param_group({"params": model[1].parameters()})
    return optimizer


def assigned(rank, model):
    optimizer = AdamW(model, wd_policy="no_bias")
    optimizer.step()
    optimizer.wd_policy = ("no_bias", "all")[rank]
    return optimizer


def routes_assigned(rank, model):
    optimizer = Routed(model, ROUTES, weight_decay=0.1)
    optimizer.step()
    optimizer.wd_policy = ("no_bias", "all")[rank]
    return optimizer


def flattened(rank, model):
    """FSDP1 leaves pieces of other shapes on every rank, whose names decide."""
    model = FullyShardedDataParallel(
        model, use_orig_params=True, device_id=torch.device("cpu")
    )
    named = list(model.named_parameters())
    return AdamW(named, wd_policy=("no_bias", "all")[rank])


def other_routes(rank, model):
    selector = (is_bias, "*.weight")[rank]
    return Routed(model, {**ROUTES, "a": (selector, SGD, {"lr": 0.1})})


def policy_of_a_route(rank, model):
    arguments = {"lr": 0.1, "wd_policy": (None, "none")[rank]}
    return Routed(model, {**ROUTES, "b": ("*", SGD, arguments)}, weight_decay=0.1)


def policy_of_a_group(rank, model):
    group = {"params": model.parameters(), "wd_policy": ("no_bias", "all")[rank]}
    return AdamW([group])


OTHERWISE = {
    "bare": lambda rank, model: AdamW(bare(model), wd_policy=("matrices", "all")[rank]),
    "callable": lambda rank, model: AdamW(model, wd_policy=lambda info: rank + 1),
    "init": lambda rank, model: AdamW(model, wd_policy=(None, towards("init"))[rank]),
    "group": policy_of_a_group,
    "routes": other_routes,
    "route": policy_of_a_route,
    "added": thawed,
    "assigned": assigned,
    "assigned-routes": routes_assigned,
    "flattened": flattened,
}


def step_made(rank, case):
    def run():
        width = 30 + list(OTHERWISE).index(case)  # as each is compared once
        optimizer = OTHERWISE[case](rank, net(width))
        optimizer.step()
        optimizer.step()

    return told(run)


@pytest.mark.distributed
@pytest.mark.parametrize("case", OTHERWISE)
def test_every_way_to_decide_otherwise_is_told_once(ranks, case):
    assert sorted(map(len, ranks(step_made, case))) == [0, 1]


def step_one_of_four(rank):
    policies = ("no_bias", "all", "no_bias", {"*": 0.5})
    dist.new_group([0, 1])  # ranks of a subgroup ask the same store
    return told(stepped, AdamW, policies[rank], net())


@pytest.mark.distributed
def test_each_late_rank_of_four_compares_with_the_first():
    with Ranks(world_size=4) as ranks:
        said = ranks(step_one_of_four)
    counts = list(map(len, said))
    assert max(counts) == 1
    # The first is silent, and so is one that decides as it does.
    assert counts in ([0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0])


def step_with_nothing(rank):
    params = [] if rank else net(width=50).parameters()
    policy = ("no_bias", "all")[rank]
    return told(lambda: AdamW([{"params": params}], wd_policy=policy).step())


@pytest.mark.distributed
def test_rank_without_parameters_is_silent(ranks):
    assert ranks(step_with_nothing) == [[], []]


def step_alone(rank):
    if rank == 0:
        stepped(AdamW, "no_bias", net(width=20))
    dist.barrier()
    return told(stepped, AdamW, "all", net(width=20)) if rank else None


@pytest.mark.distributed
def test_no_rank_waits_for_another(ranks):
    """One that has not stepped keeps nobody waiting, and compares when it does."""
    _, said = ranks(step_alone)
    assert len(said) == 1
    assert said[0].startswith("rank 1 decided otherwise")


def step_at_rate_0(rank):
    optimizer = AdamW(net(width=21), lr=0.0, wd_policy=("no_bias", "all")[rank])
    first = told(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.1
    return first, told(optimizer.step)


@pytest.mark.distributed
def test_steps_that_move_nothing_do_not_compare(ranks):
    """With them torch.distributed.checkpoint makes state, on one rank alone."""
    (first, then), (second, later) = ranks(step_at_rate_0)
    assert (first, second, len(then + later)) == ([], [], 1)


def step_inside_another(rank, given):
    """Step the same model on both ranks, which one of them holds in another module."""
    model = nn.ModuleDict({"stem": nn.Linear(3, 4), "body": net(width=22)})
    around = nn.ModuleDict({"body": model}) if rank == 0 else None

    def run():
        where = {"model": model} if given else {}
        policy = scale("body.*", by=0.5)
        AdamW(list(model.parameters()), wd_policy=policy, **where).step()

    said = told(run)
    assert around is None or around["body"] is model
    return said


def step_one_module(rank, names):
    """Step the parameters of one module, which is another on each rank."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 21), "head": nn.Linear(21, 5)})
    params = [model.get_parameter(names[rank])]
    return told(lambda: AdamW(params, wd_policy="no_bias_norm_embedding").step())


@pytest.mark.distributed
def test_modules_of_which_each_rank_trains_one_are_not_compared(ranks):
    assert ranks(step_one_module, ("embed.weight", "head.weight")) == [[], []]


def step_some_tensors(rank, exempt):
    params = [nn.Parameter(torch.ones(31)) for _ in range(3)]
    mine = [id(params[place]) for place in exempt[rank]]

    def policy(info):
        return id(info.parameter) not in mine

    return told(lambda: AdamW(params, wd_policy=policy).step())


@pytest.mark.distributed
def test_bare_tensors_that_a_callable_tells_apart_are_not_compared(ranks):
    """As master copies are: at the same place is another tensor on each rank."""
    assert ranks(step_some_tensors, ([0], [1])) == [[], []]


@pytest.mark.distributed
def test_module_around_the_model_on_one_rank_is_told(ranks):
    """Both pass the same policy, and its pattern is one for the names of either."""
    first, second = ranks(step_inside_another, False)
    (said,) = first + second
    assert "'body.stem.bias' is" in said or "'stem.bias' is" in said
    assert "Pass model=model and the same `wd_policy` and routes on every rank" in said
    assert ranks(step_inside_another, True) == [[], []]


def step_stage(rank):
    stages = nn.Sequential(net(width=23), net(width=23))
    stage = list(stages[rank].parameters())
    return told(lambda: AdamW(stage, wd_policy={f"{rank}.*": 0.5 + rank}).step())


@pytest.mark.distributed
def test_stages_that_are_alike_are_not_compared(ranks):
    assert ranks(step_stage) == [[], []]


class Gone:
    def add(self, key, amount):
        raise dist.DistNetworkError("closed")


class Fake:
    """As torch's FakeStore, which keeps nothing."""

    def add(self, key, amount):
        return 0

    def compare_set(self, key, expected, desired):
        return b""


@pytest.mark.parametrize("store", [None, Gone(), Fake()])
def test_without_a_store_nothing_happens(store, monkeypatch):
    monkeypatch.setattr(_torch, "store_of_ranks", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    assert told(stepped, AdamW, "no_bias", net()) == []


def test_decisions_are_compared_once(monkeypatch):
    asked = []
    monkeypatch.setattr(_torch, "store_of_ranks", lambda: asked.append(1))
    optimizer = stepped(AdamW, "no_bias", net(), steps=4)
    assert len(asked) == 1
    assert optimizer._watch is None  # a steady step looks at nothing


# Policies that answer otherwise.


def numbers():
    """Answer with another number each time, as a counter does."""
    counter = itertools.count(1)
    return lambda info: next(counter)


def ending():
    answers = iter([1, 0, 1, 0, 1, 0])
    return lambda info: next(answers)


def once():
    seen = set()
    return lambda info: info.name not in seen and not seen.add(info.name)


UNSTEADY = {
    "counter": (numbers, r"'0\.weight' is Decay\(1\) and then Decay\(7\)"),
    "iterator": (ending, r"'0\.weight' is Decay\(1\) and then an error"),
    "memory": (once, r"'0\.weight' is Decay\(1\) and then Decay\(0\)"),
    "selector": (
        lambda: exclude(is_bias & once()),
        r"'0\.bias' is Decay\(0\) and then Decay\(1\)",
    ),
    "mapping": (
        lambda: {once(): 0.5},
        r"'0\.weight' is Decay\(0\.5\) and then Decay\(1\)",
    ),
    "product": (
        lambda: only("*") * exclude(~is_bias & once()),
        r"'0\.weight' is Decay\(0\) and then Decay\(1\)",
    ),
}


@each_class
@pytest.mark.parametrize(("make", "said"), UNSTEADY.values(), ids=UNSTEADY)
def test_policy_that_answers_otherwise_the_next_time_warns_once(cls, make, said):
    with pytest.warns(UserWarning, match="at a second call") as caught:
        optimizer = cls(net(), weight_decay=0.1, wd_policy=make())
    (warning,) = caught
    assert re.search(
        rf"call: {said}, so ranks and resumed runs may differ\. Let it depend only "
        r"on `info`, or pass a mapping from names to numbers\.$",
        str(warning.message),
    )
    assert warning.filename == __file__
    # What it decided first holds, and the advice keeps that.
    decided = {r.name: r.weight_decay / 0.1 for r in optimizer.decay_report()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(net(), weight_decay=0.1, wd_policy=decided)


def test_assigned_policy_and_that_of_a_group_are_asked_again():
    optimizer = AdamW(net(), weight_decay=0.1)
    with pytest.warns(UserWarning, match="at a second call"):
        optimizer.wd_policy = once()
    with pytest.warns(UserWarning, match="at a second call"):
        optimizer.add_param_group({"params": net(), "wd_policy": once()})


def test_drawn_answers_are_told():
    random.seed(0)
    with pytest.warns(UserWarning, match="at a second call"):
        AdamW(net(), wd_policy=lambda info: random.random())


def test_policies_without_functions_are_asked_once(monkeypatch):
    asked = []
    decide = type(exclude("*")).decide
    note = lambda policy, info: (asked.append(info), decide(policy, info))[1]  # noqa: E731
    monkeypatch.setattr(type(exclude("*")), "decide", note)
    AdamW(net(), wd_policy=exclude(is_bias))
    assert len(asked) == 6
