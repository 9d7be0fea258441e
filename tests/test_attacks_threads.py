"""Two threads at one optimizer leave its groups whole, and find them whole."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from selective_optim import AdamW, selective
from tests.support import attacks
from tests.support.attacks import (
    LR,
    RIGHT,
    SERVED,
    WD,
    Own,
    assert_right,
    assert_whole,
    built,
    net,
)

each_name = pytest.mark.parametrize("name", SERVED)


class Waits(Own):
    """Waits inside a step for what another thread does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inside, self.go = None, None

    def step(self, closure=None):
        if self.inside is not None:
            inside, go = self.inside, self.go
            self.inside = None
            inside.set()
            assert go.wait(20)
        return super().step(closure)


def while_stepping(act):
    """Call a function in this thread while another is inside a step."""
    model = net()
    optimizer = selective(Waits)(
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm"
    )
    attacks.zero_grads([*model.parameters()])
    optimizer.inside, optimizer.go = threading.Event(), threading.Event()
    inside, go, failed = optimizer.inside, optimizer.go, []

    def step():
        try:
            optimizer.step()
        except BaseException as error:
            failed.append(error)

    other = threading.Thread(target=step)
    other.start()
    assert inside.wait(20)
    try:
        act(model, optimizer)
    finally:
        go.set()
        other.join(20)
    assert not failed
    return model, optimizer


def looks(model, optimizer):
    assert_whole(optimizer)
    assert len(optimizer.state_dict()["param_groups"]) == 1
    assert attacks.reported(optimizer) == RIGHT


def loads(model, optimizer):
    assert_whole(optimizer)
    state_dict = optimizer.state_dict()
    assert [len(group["params"]) for group in state_dict["param_groups"]] == [6]


def steps(model, optimizer):
    assert attacks.decays(model, optimizer) == RIGHT


def adds(model, optimizer):
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(1))], "wd_policy": "none"}
    )
    del optimizer.param_groups[1:]


def writes(model, optimizer):
    optimizer.param_groups[0]["weight_decay"] = WD


def iterates(model, optimizer):
    groups = [g for g in optimizer.param_groups for _ in range(2)]
    assert groups[0] is groups[1] is optimizer.param_groups[0]


@pytest.mark.parametrize("act", [looks, loads, steps, adds, writes, iterates])
def test_other_thread_finds_the_groups_whole_while_one_steps(act):
    model, optimizer = while_stepping(act)
    assert_right(model, optimizer)


@contextmanager
def often():
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@each_name
def test_two_threads_that_step_leave_one_group(name):
    model, optimizer = built(name)
    attacks.zero_grads([*model.parameters()])
    start, failed = threading.Barrier(2), []

    def run():
        start.wait()
        try:
            for _ in range(100):
                optimizer.step()
                assert len(optimizer.param_groups) == 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    with often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert_right(model, optimizer)


@pytest.mark.parametrize("save", ["state_dict", "decay_report", "__getstate__"])
@each_name
def test_one_thread_saves_while_another_steps(name, save):
    model, optimizer = built(name)
    attacks.zero_grads([*model.parameters()])
    failed, going = [], [True]

    def run():
        try:
            while going:
                getattr(optimizer, save)()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    with often():
        thread.start()
        try:
            for _ in range(100):
                optimizer.step()
        finally:
            going.clear()
            thread.join()
    assert not failed
    assert_right(model, optimizer)


def test_other_thread_ends_the_look_at_steps_while_one_looks():
    model = net()
    attacks.zero_grads([*model.parameters()])
    optimizer = AdamW(model.parameters(), weight_decay=WD, wd_policy="no_bias_norm")

    def trace(frame, event, arg):
        if frame.f_code.co_name == "_look":  # as the other thread does, at any line
            optimizer._watch = None
        return trace

    assert optimizer._watch is not None
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        optimizer.step()
    finally:
        sys.settrace(before)
