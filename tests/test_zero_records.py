"""Resuming with ``ZeroRedundancyOptimizer``, which drops what is recorded of decay.

It keeps state and groups, and writes them into the optimizer that it holds without
calling its ``load_state_dict``.
"""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW, Muon
from selective_optim.policies import exclude, form, is_bias, is_norm, towards
from tests.support.compare import assert_same
from tests.support.distributed import Ranks, gathers_objects
from tests.test_distributed import zero

pytestmark = [pytest.mark.distributed, gathers_objects]
USUAL = exclude(is_bias, is_norm)
LR = 0.1


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


class Run:
    """A model, its sharded optimizer, and a schedule if one is asked for."""

    def __init__(self, cls, policy, lr=LR, scheduled=False, **group):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        momentum = {"momentum": 0.9} if cls is SGD else {}
        self.optimizer = zero(
            [{"params": list(self.model.parameters()), **group}],
            optimizer_class=partial(cls, model=self.model, wd_policy=policy),
            lr=lr,
            weight_decay=0.5,
            **momentum,
        )
        self.schedule = scheduled and torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 / (1 + step)
        )

    def train(self, *steps):
        for step in steps:
            torch.manual_seed(step)
            for param in self.model.parameters():
                param.grad = torch.randn_like(param)
            self.optimizer.step()
            if self.schedule:
                self.schedule.step()

    def save(self):
        whole = {}
        for rank in range(2):  # consolidating for one drops what another has
            self.optimizer.consolidate_state_dict(to=rank)
            if rank == self.optimizer.rank:
                whole = copy.deepcopy(self.optimizer.state_dict())
        own = {
            "model": self.model.state_dict(),
            "schedule": self.schedule and self.schedule.state_dict(),
            "own": self.optimizer.optim.state_dict(),
        }
        return {**copy.deepcopy(own), "optimizer": whole}

    def load(self, saved, own=False):
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if own:
            self.optimizer.optim.load_state_dict(saved["own"])
        if self.schedule:
            self.schedule.load_state_dict(saved["schedule"])

    @property
    def values(self):
        return [param.detach().clone() for param in self.model.parameters()]


def resume(rank, cls, policies, begin, again, own=False):
    """Train on, and in a resumed run; return both ends and what was warned of."""
    first = Run(cls, policies[0], **begin)
    first.train(0, 1)
    saved = first.save()
    first.train(2, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = Run(cls, policies[-1], **again)
        resumed.load(saved, own)
        resumed.train(2, 3)
    said = [str(w.message) for w in caught if "checkpoint" in str(w.message)]
    return first.values, resumed.values, said


each_class = pytest.mark.parametrize("cls", [SGD, Adam, AdamW])
each_form = pytest.mark.parametrize("kind", ["independent", "corrected"])


@each_class
@each_form
def test_first_rate_that_a_scheduler_saved_comes_back(ranks, cls, kind):
    policy = (USUAL * form(kind),)
    begin, again = {"scheduled": True}, {"scheduled": True, "lr": 0.7}
    for expected, actual, said in ranks(resume, cls, policy, begin, again):
        assert_same(actual, expected)
        assert said == []


@each_class
@each_form
def test_first_rate_that_nobody_saved_is_told_and_the_advice_brings_it(
    ranks, cls, kind
):
    policy = (USUAL * form(kind),)
    said = [s for *_, s in ranks(resume, cls, policy, {}, {"lr": 0.7})]
    assert sum(map(len, said)) in (1, 2)  # a rank may hold exempt parameters alone
    (text,) = max(said, key=len)
    assert re.fullmatch(
        r"the loaded checkpoint does not record the rate that training began with, by "
        r"which the decay of '\d\.weight' \(here 0\.7\).* is divided, and its own rate "
        r"is another\. Load what optimizer\.optim\.state_dict\(\) returned, or make "
        r"groups with the rate of the beginning: dict\(params=\.\.\., "
        r"initial_lr=\.\.\.\)\.",
        text,
    )
    for again, own in (({"lr": 0.7, "initial_lr": LR}, False), ({"lr": 0.7}, True)):
        for expected, actual, said in ranks(resume, cls, policy, {}, again, own):
            assert_same(actual, expected)
            assert said == []


@each_class
def test_start_that_is_lost_is_told_and_the_advice_brings_it(ranks, cls):
    policy = (USUAL * towards("init"),)
    said = [s for *_, s in ranks(resume, cls, policy, {}, {})]
    (text,) = max(said, key=len)
    assert re.fullmatch(
        r"the loaded checkpoint does not record what '\d\.weight'.* decay towards, so "
        r"they decay towards their values when training continues\. Save "
        r"optimizer\.optim\.state_dict\(\) under the same policy, and load that with "
        r"optimizer\.optim\.load_state_dict\.",
        text,
    )
    for expected, actual, said in ranks(resume, cls, policy, {}, {}, True):
        assert_same(actual, expected)
        assert said == []


def test_changed_policy_is_told_where_each_rank_loads_its_own(ranks):
    policies = (USUAL, exclude(is_norm) * form("l2"))
    said = [s for *_, s in ranks(resume, AdamW, policies, {}, {}, True)]
    assert any("another weight decay policy" in text for s in said for text in s)


@each_class
def test_what_needs_no_record_resumes_in_silence(ranks, cls):
    for expected, actual, said in ranks(resume, cls, (USUAL,), {}, {"lr": 0.7}):
        assert_same(actual, expected)
        assert said == []


# Routes


MUON = {"lr": 0.1, "rest": {"lr": 0.03}, "weight_decay": 0.5, "wd_policy": USUAL}


def routed_layers(hidden):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(hidden)]
    return nn.Sequential(nn.Embedding(9, 4), *layers, nn.LayerNorm(4), nn.Linear(4, 9))


def sharded_muon(model):
    """Each group names its route, so that as many come of them on every rank."""
    groups = Muon(model.parameters(), **MUON).param_groups
    return zero(groups, optimizer_class=partial(Muon, model=model, **MUON))


def step_by_drawn(optimizer, model, *steps):
    for step in steps:
        torch.manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def beside_muon(rank, hidden):
    model, whole = routed_layers(hidden), routed_layers(hidden)
    optimizer, muon = sharded_muon(model), Muon(whole.parameters(), **MUON)
    step_by_drawn(optimizer, model, 0, 1)
    saved = {}
    for receiver in range(2):
        optimizer.consolidate_state_dict(to=receiver)
        if receiver == rank:
            saved = copy.deepcopy(optimizer.state_dict())
    resumed = sharded_muon(model)
    resumed.load_state_dict(saved)
    step_by_drawn(resumed, model, 2, 3)
    step_by_drawn(muon, whole, 0, 1, 2, 3)
    assert_same(model, whole)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
@pytest.mark.parametrize("hidden", [1, 2], ids=["none-on-one-rank", "one-on-each"])
def test_groups_that_name_their_route_shard_muon(ranks, hidden):
    ranks(beside_muon, hidden)
