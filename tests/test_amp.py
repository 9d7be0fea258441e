"""Mixed precision: a step that GradScaler drops changes nothing at all."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from tests.support.compare import assert_same
from tests.support.problems import (
    CASES,
    CHOSEN,
    HYPER,
    VERDICTS,
    HandSplit,
    assert_same_training,
    each_kind,
    explicit,
    frozen,
    make_params,
    ours,
    set_grads,
)

VERDICT = VERDICTS["scale"]
# A power of two: multiplying by its inverse, as the scaler does, and dividing by it,
# as the fused kernel does, give the same bits.
SCALE = 1024.0
# Parameters that make_params makes.
COUNT = 8
each_case = pytest.mark.parametrize("case", [*CASES, CHOSEN[2]], ids=lambda c: c.id)


def make_scaler(device: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=1000)


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: Any, params: Any, step: int, bad: bool
) -> None:
    set_grads(params, step)
    for param in params:
        if param.grad is not None:
            param.grad.mul_(SCALE)
    for position in (0, -COUNT) * bad:  # with two devices, one on each
        params[position].grad.view(-1)[1] = float("inf")
    # A scaler is initialized by its first scale.
    scaler.scale(torch.ones((), device=params[0].device))
    scaler.step(optimizer)
    scaler.update(SCALE)  # the same scale, whatever was found


@pytest.mark.parametrize("others", [[], ["cpu"]], ids=["alone", "and the cpu"])
@each_kind
@each_case
def test_dropped_step_changes_nothing(case, kind, others, device):
    params = [p for place in (device, *others) for p in make_params(device=place)]
    verdicts = VERDICT * (1 + len(others))
    optimizer = ours(case, params, verdicts, **HYPER, **kind)
    scaler = make_scaler(device)
    for step in range(3):
        scaled_step(scaler, optimizer, params, step, bad=False)
    before = frozen(optimizer, params)
    scaled_step(scaler, optimizer, params, 4, bad=True)
    assert_same(frozen(optimizer, params), before)


@each_kind
@each_case
@pytest.mark.parametrize("seed", range(3))
def test_scaled_training_with_infinities_equals_the_clean_steps_alone(case, kind, seed):
    rng = random.Random(seed)
    bad = [rng.random() < 0.4 for _ in range(10)]
    actual, expected = make_params(), make_params()
    optimizer = ours(case, actual, VERDICT, **HYPER, **kind)
    # One optimizer each: torch's fused SGD cannot start parameters one by one.
    arguments = {**HYPER, **explicit(kind)}
    oracles = [
        HandSplit(case, [p], [v], **arguments) for p, v in zip(expected, VERDICT)
    ]
    scaler = make_scaler("cpu")
    for step, dropped in enumerate(bad):
        scaled_step(scaler, optimizer, actual, step, dropped)
        set_grads(expected, step)
        for oracle in oracles * (not dropped):
            oracle.step()
    assert_same(actual, expected)
    for p, q, oracle in zip(actual, expected, oracles):
        assert_state_follows(dict(optimizer.state.get(p, {})), oracle.state(q))


def assert_state_follows(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare state, where a parameter that never stepped may have zeros or nothing."""
    if expected:
        assert_same(actual, expected)
    assert all(not value.any() for value in actual.values() if not expected)


BAD = [False, False, True, False, True, True, False]


@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=["automatic", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_scaled_training_equals_torch_under_the_same_scaler(case, kind, device):
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICT, **HYPER, **kind)
    oracle = HandSplit(case, expected, VERDICT, **HYPER, fused=True)
    (torchs,) = oracle.optimizers
    own, other = make_scaler(device), make_scaler(device)
    for step, bad in enumerate(BAD):
        scaled_step(own, optimizer, actual, step, bad)
        scaled_step(other, torchs, expected, step, bad)
    assert_same_training(actual, optimizer, expected, oracle)


@each_kind
def test_gradients_unscaled_by_hand_are_not_unscaled_again(kind, device):
    case = CHOSEN[-1]
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICT, **HYPER, **kind)
    oracle = HandSplit(case, expected, VERDICT, **HYPER, **explicit(kind))
    scaler = make_scaler(device)
    for step in range(4):
        set_grads(actual, step)
        set_grads(expected, step)
        scaler.scale(torch.ones((), device=device))
        for param in actual:
            if param.grad is not None:
                param.grad.mul_(SCALE)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(SCALE)
        oracle.step()
    assert_same(actual, expected)


def test_mixed_paths_under_a_scaler_drop_the_step_together():
    dense = nn.Parameter(torch.ones(4, 3))
    sparse = nn.Parameter(torch.ones(4, 3))
    params = [("dense", dense), ("sparse", sparse)]
    optimizer = selective_optim.SGD(
        params, lr=0.1, weight_decay=0.1, wd_policy={"sparse": 0}
    )
    grad_scaler = make_scaler("cpu")
    grad_scaler.scale(torch.ones(()))
    dense.grad = torch.full((4, 3), float("inf"))
    sparse.grad = torch.ones(4, 3).mul(SCALE).to_sparse()
    grad_scaler.step(optimizer)
    grad_scaler.update(SCALE)
    assert_same([dense, sparse], [torch.ones(4, 3)] * 2)
    dense.grad = torch.ones(4, 3).mul(SCALE)
    sparse.grad = torch.ones(4, 3).mul(SCALE).to_sparse()
    grad_scaler.step(optimizer)
    # 1 * (1 - 0.1 * 0.1) - 0.1 and 1 - 0.1, to the rounding of float32.
    expected = [torch.full((4, 3), 0.89), torch.full((4, 3), 0.9)]
    torch.testing.assert_close([dense.detach(), sparse.detach()], expected)


@each_case
def test_transposed_gradients_are_unscaled_for_a_fused_step(case):
    runs = []
    # A disabled scaler, and one that leaves the division to the step.
    for scale in (1.0, SCALE):
        param = nn.Parameter(torch.ones(3, 5))
        optimizer = ours(case, [param], VERDICT[1:], **HYPER, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(4):
            set_grads([param], step)
            # In another order than the parameter, which fused kernels misread.
            param.grad = param.grad.mul_(scale).t().contiguous().t()
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update(scale)
        runs.append(frozen(optimizer, [param]))
    assert_same(*runs)


@pytest.mark.parametrize("kind", [{}, {"fused": True}])
def test_dampening_that_comes_after_a_dropped_first_step_is_torchs(kind):
    """torch has no momentum then: the buffer begins as the gradient, undampened."""
    left = []
    for cls, chosen in (
        (selective_optim.SGD, kind),
        (torch.optim.SGD, {"fused": True}),
    ):
        param = nn.Parameter(torch.arange(4.0))
        optimizer = cls([param], lr=0.1, momentum=0.9, **chosen)
        if (
            cls is selective_optim.SGD
        ):  # torch's is not told of the step that is dropped
            param.grad = torch.full((4,), float("inf"))
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
            optimizer.step()
            optimizer.grad_scale = optimizer.found_inf = None
        optimizer.param_groups[0]["dampening"] = 0.5
        for step in range(3):
            param.grad = torch.full((4,), 1.0 + step)
            optimizer.step()
        left.append(param)
    assert torch.equal(*left)
