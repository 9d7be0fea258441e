"""capturable, graphs, and what a step may not cost on a device.

What only a device can do, the CPU stands in for where it can, so that a machine
without one finds the mistakes of these tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selective_optim import Decay
from tests.support.compare import assert_same
from tests.support.devices import MARKS, on_cuda
from tests.support.graphs import captured, side_stream, static_grads
from tests.support.problems import (
    CHOSEN,
    COUNTING,
    HYPER,
    KINDS,
    STEPS,
    VERDICTS,
    Case,
    HandSplit,
    assert_same_training,
    assert_trains_alike,
    each_chosen,
    each_counting,
    explicit,
    make_params,
    ours,
)

# The CPU takes capturable in its fused kernels alone.
CAPTURABLE = [
    pytest.param(device, kind, marks=MARKS[device], id=f"{device}-{name}")
    for device, (name, kind) in product(MARKS, KINDS.items())
    if device == "cuda" or explicit(kind).get("fused")
]


@pytest.mark.parametrize(("device", "kind"), CAPTURABLE)
@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["number", "tensor"])
@each_counting
def test_capturable_steps_as_in_torch(case, device, kind, make_lr):
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {"weight_decay": 0.1, "capturable": True}
    oracle = HandSplit(
        case, expected, VERDICTS["scale"], lr=make_lr(0.05), **rest, **explicit(kind)
    )
    optimizer = ours(case, actual, VERDICTS["scale"], lr=make_lr(0.05), **rest, **kind)
    assert_trains_alike(actual, optimizer, expected, oracle)
    assert optimizer.state[actual[0]]["step"].device.type == device


GRAPHS = [(c, kind, {}) for c, kind in product(CHOSEN[:3], ({}, {"fused": True}))] + [
    (c, kind, {"capturable": True})
    for c, kind in product(COUNTING, ({}, {"fused": True}))
]


@pytest.mark.parametrize(("case", "kind", "capturable"), GRAPHS, ids=str)
def test_replayed_graph_equals_eager_steps(case, kind, capturable, device):
    actual, expected = make_params(device=device), make_params(device=device)
    lrs = [torch.tensor(0.05, device=device) for _ in range(2)]
    rest = {"weight_decay": 0.1, **capturable}
    optimizer = ours(case, actual, VERDICTS["scale"], lr=lrs[0], **rest, **kind)
    oracle = HandSplit(case, expected, VERDICTS["scale"], lr=lrs[1], **rest, fused=True)
    with side_stream(device):
        for step in range(3):
            static_grads(actual, step)
            optimizer.step()
    replay = captured(device, optimizer.step)
    for step in range(3, STEPS):
        static_grads(actual, step)
        replay()
        lrs[0].mul_(0.7)
    for step in range(STEPS):
        static_grads(expected, step)
        oracle.step()
        lrs[1].mul_({True: 0.7, False: 1.0}[step >= 3])
    assert_same_training(actual, optimizer, expected, oracle)


@each_counting
def test_eager_steps_continue_after_a_graph(case, device):
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {**HYPER, "capturable": True}
    optimizer = ours(case, actual, VERDICTS["scale"], **rest)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **rest, fused=True)
    with side_stream(device):
        for step in range(2):
            static_grads(actual, step)
            optimizer.step()
    replay = captured(device, optimizer.step)
    for step, run in enumerate([replay, replay, optimizer.step, replay], start=2):
        static_grads(actual, step)
        run()
    for step in range(6):
        static_grads(expected, step)
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


@each_chosen
def test_whole_training_step_is_captured(case, device):
    """Forward, backward and step in one graph, gradients made inside it."""
    capturable = {"SGD": {}}.get(case.name, {"capturable": True})
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {**HYPER, **capturable}
    optimizer = ours(case, actual, VERDICTS["scale"], **rest)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **rest, fused=True)

    def train(params: Sequence[Tensor], step: Callable[[], object]) -> None:
        sum(((param - 1) ** 2).sum() for param in params[:-1]).backward()
        step()

    with side_stream(device):
        for _ in range(3):
            optimizer.zero_grad()
            train(actual, optimizer.step)
    optimizer.zero_grad()
    replay = captured(device, lambda: train(actual, optimizer.step))
    for _ in range(3):
        optimizer.zero_grad(set_to_none=device == "cpu")  # a graph keeps its own
        replay()
    for _ in range(6):
        for param in expected:
            param.grad = None
        train(expected, oracle.step)
    assert_same(actual, expected)


SCALE = 1024.0  # a power of two: the gradients come back with the same bits
DROPPED = [False, True, False, False, True, False]


@each_chosen
def test_scaler_inside_a_graph_drops_replayed_steps(case, device):
    """What a ``GradScaler`` hands over are tensors, filled before each replay."""
    capturable = {"SGD": {}}.get(case.name, {"capturable": True})
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICTS["scale"], **HYPER, **capturable)
    oracle = HandSplit(
        case, expected, VERDICTS["scale"], **HYPER, **capturable, fused=True
    )
    optimizer.grad_scale = torch.full((), SCALE, device=device)
    optimizer.found_inf = torch.zeros((), device=device)

    def scaled_grads(step: int) -> None:
        static_grads(actual, step)
        for param in actual[:-1]:
            param.grad.mul_(SCALE)

    with side_stream(device):
        for step in range(2):
            scaled_grads(step)
            optimizer.step()
    replay = captured(device, optimizer.step)
    for step, dropped in enumerate(DROPPED, start=2):
        scaled_grads(step)
        optimizer.found_inf.fill_(float(dropped))
        replay()
    kept = [step for step, dropped in enumerate(DROPPED, start=2) if not dropped]
    for step in [0, 1, *kept]:
        static_grads(expected, step)
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


# The CPU's foreach cannot be told that it may be captured.
FOREACH = {"cpu": {}, "cuda": {"capturable": True}}


@each_chosen
def test_captured_foreach_equals_eager_steps(case, device):
    capturable = {"SGD": {}}.get(case.name, FOREACH[device])
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {**HYPER, **capturable, "foreach": True}
    optimizer = ours(case, actual, VERDICTS["scale"], **rest)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **rest)
    with side_stream(device):
        for step in range(2):
            static_grads(actual, step)
            optimizer.step()
    replay = captured(device, optimizer.step)
    for step in range(2, STEPS):
        static_grads(actual, step)
        replay()
    for step in range(STEPS):
        static_grads(expected, step)
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


@each_chosen
def test_graphs_with_and_without_some_gradients_take_turns(case, device):
    """As with layers that are frozen for a while, or experts that are not chosen."""
    capturable = {"SGD": {}}.get(case.name, {"capturable": True})
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {**HYPER, **capturable}
    optimizer = ours(case, actual, VERDICTS["scale"], **rest)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **rest, fused=True)
    absent: list[set[int]] = [set(), {1, 4}, {0, 5, 6}]
    grads: dict[int, list[Tensor]] = {}

    def choose(params: Sequence[Tensor], step: int, without: set[int]) -> None:
        made = grads.setdefault(id(params), [])
        if not made:
            static_grads(params, step)
            made += [param.grad for param in params[:-1]]
        for param, grad in zip(params, made):
            param.grad = grad
        static_grads(params, step)
        for position in without:
            params[position].grad = None

    with side_stream(device):
        for step in range(2):
            choose(actual, step, set())
            optimizer.step()
    replays = []
    for without in absent:
        choose(actual, 0, without)
        replays.append(captured(device, optimizer.step))
    turns = [0, 1, 1, 2, 0, 2, 1]
    for step, turn in enumerate(turns, start=2):
        choose(actual, step, absent[turn])
        replays[turn]()
    for step, turn in enumerate([0, 0, *turns]):
        choose(expected, step, absent[turn])
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


@on_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@each_counting
def test_capture_without_capturable_is_refused_with_torchs_words(case, device):
    params = make_params(device=device)
    optimizer = ours(case, params, VERDICTS["all"], **HYPER)
    for step in range(2):
        static_grads(params, step)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="capturable is False"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()


def peak_of_a_step(case: Case, size: int, **arguments: Any) -> int:
    """Measure the bytes that a step takes for a while beyond what was there."""
    params = [nn.Parameter(torch.zeros(size // 4, device="cuda")) for _ in range(4)]
    verdicts = [Decay(m) for m in (1, 0, 0.5, 1)]
    optimizer = ours(case, params, verdicts, **HYPER, **arguments)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(3):  # made, planned, proved
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@on_cuda
@each_chosen
def test_fused_step_takes_no_memory_that_grows_with_the_model(case, device):
    small, large = 1 << 12, 1 << 24
    assert peak_of_a_step(case, large) <= peak_of_a_step(case, small)


@on_cuda
def test_foreach_step_shows_that_growth_would_be_seen(device):
    size = 1 << 24
    assert peak_of_a_step(CHOSEN[4], size, foreach=True) >= size


@contextmanager
def without_synchronizing(device: str) -> Iterator[None]:
    """Raise where the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@each_chosen
def test_replayed_step_does_not_wait_for_the_device(case, make_lr, found, device):
    params = make_params(device=device)
    lr = torch.as_tensor(make_lr(0.05)).to(device) if make_lr is not float else 0.05
    optimizer = ours(case, params, VERDICTS["scale"], lr=lr, weight_decay=0.1)
    optimizer.grad_scale = None
    optimizer.found_inf = None if found is None else torch.zeros((), device=device)
    for step in range(3):
        static_grads(params, step)
        optimizer.step()
    before = params[0].detach().clone()
    if found is not None:
        optimizer.found_inf.fill_(found)
    with without_synchronizing(device):
        optimizer.step()
    assert torch.equal(params[0].detach(), before) == bool(found)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("found", [None, 0.0])
@each_chosen
def test_gradients_that_come_and_go_do_not_wait_for_the_device(case, found, device):
    params = make_params(device=device)
    optimizer = ours(case, params, VERDICTS["scale"], **HYPER)
    optimizer.grad_scale = None
    optimizer.found_inf = None if found is None else torch.zeros((), device=device)
    for step in range(2):
        static_grads(params, step)
        optimizer.step()
    kept = [param.grad for param in params]
    for without in ({1, 4}, {1, 4}, set(), {0}):
        for position, (param, grad) in enumerate(zip(params, kept)):
            param.grad = None if position in without else grad
        with without_synchronizing(device):
            optimizer.step()


@on_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_waiting_for_the_device_would_be_seen(device):
    value = torch.ones((), device=device)
    with (
        without_synchronizing(device),
        pytest.raises(RuntimeError, match="synchronizing CUDA operation"),
    ):
        value.item()
