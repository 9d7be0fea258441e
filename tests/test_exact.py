"""Bit for bit what torch gives with the groups split by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import Decay
from tests.support.compare import assert_same
from tests.support.devices import MARKS
from tests.support.kernels import kernel_is_right
from tests.support.problems import (
    CASES,
    DTYPES,
    HYPER,
    IMPLEMENTATIONS,
    STEPS,
    VERDICTS,
    Case,
    HandSplit,
    assert_same_training,
    assert_trains_alike,
    clone_params,
    each_case,
    each_chosen,
    each_kind,
    in_dtype,
    make_params,
    ours,
    set_grads,
    train,
)
from tests.support.reference import AdamReference, SGDReference

# In half precision some of these decays are below the resolution, and said to be.
rounding = pytest.mark.filterwarnings("ignore:.*hardly decays:UserWarning")
LRS = {"one": None, "each": [0.05 * (i + 1) for i in range(8)]}
TABLE = [
    pytest.param(
        *(device, in_dtype(case, dtype), kind, dtype, VERDICTS[verdicts], LRS[lrs]),
        marks=MARKS[device],
        id=f"{device}-{case.id}-{kind}-{dtype}-{verdicts}-{lrs}",
    )
    for device, case, kind, dtype, verdicts, lrs in product(
        MARKS, CASES, IMPLEMENTATIONS, DTYPES, VERDICTS, LRS
    )
    if kernel_is_right(case.name, kind, dtype, device)
]


@rounding
@pytest.mark.parametrize(("device", "case", "kind", "dtype", "verdicts", "lrs"), TABLE)
def test_step_equals_hand_split_torch(device, case, kind, dtype, verdicts, lrs):
    actual, expected = make_params(dtype, device), make_params(dtype, device)
    arguments = {**HYPER, **IMPLEMENTATIONS[kind]}
    optimizer = ours(case, actual, verdicts, lrs, **arguments)
    oracle = HandSplit(case, expected, verdicts, lrs, **arguments)
    assert_trains_alike(actual, optimizer, expected, oracle)


@pytest.mark.parametrize("lrs", LRS.values(), ids=LRS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_automatic_choice_is_the_fused_kernel_where_that_is_right(
    case, dtype, lrs, device
):
    right = kernel_is_right(case.name, "fused", dtype, device)
    kind = IMPLEMENTATIONS["fused" if right else "for-loop"]
    case, verdicts = in_dtype(case, dtype), VERDICTS["scale"]
    actual, expected = make_params(dtype, device), make_params(dtype, device)
    optimizer = ours(case, actual, verdicts, lrs, **HYPER)
    oracle = HandSplit(case, expected, verdicts, lrs, **HYPER, **kind)
    assert_trains_alike(actual, optimizer, expected, oracle)


@pytest.mark.parametrize("kind", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES[:5], ids=lambda case: case.id)
def test_decoupled_sgd_is_the_multiply_and_then_torch_sgd(case, kind, device):
    actual, expected = make_params(device=device), make_params(device=device)
    decoupled = Case(case.id, "SGD", {**case.arguments, "decoupled_weight_decay": True})
    arguments = {**HYPER, **IMPLEMENTATIONS[kind]}
    optimizer = ours(decoupled, actual, VERDICTS["scale"], **arguments)
    oracle = HandSplit(decoupled, expected, VERDICTS["scale"], **arguments)
    assert_trains_alike(actual, optimizer, expected, oracle)


@rounding
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_chosen
def test_half_precision_stays_near_double(case, dtype, device):
    lists = make_params(dtype, device), make_params(torch.float64, device)
    for params in lists:
        optimizer = ours(in_dtype(case, dtype), params, VERDICTS["scale"], **HYPER)
        train(optimizer, params, range(5))
    low, double = ([p.detach().double() for p in params] for params in lists)
    # bfloat16 has 8 bits; a wrong kernel is off by the size of the parameter.
    torch.testing.assert_close(low, double, rtol=0.05, atol=0.05)


REFERENCES = [
    (Case("sgd", "SGD"), SGDReference, {}),
    (Case("momentum", "SGD", {"momentum": 0.9}), SGDReference, {"momentum": 0.9}),
    (
        Case("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}),
        SGDReference,
        {"momentum": 0.9, "nesterov": True},
    ),
    (
        Case("dampening", "SGD", {"momentum": 0.9, "dampening": 0.3}),
        SGDReference,
        {"momentum": 0.9, "dampening": 0.3},
    ),
    (Case("maximize", "SGD", {"maximize": True}), SGDReference, {"maximize": True}),
    (Case("adam", "Adam"), AdamReference, {}),
    (Case("amsgrad", "Adam", {"amsgrad": True}), AdamReference, {"amsgrad": True}),
    (Case("adamw", "AdamW", {"maximize": True}), AdamReference, {"maximize": True}),
]


@each_kind
@pytest.mark.parametrize("form", ["l2", "decoupled"])
@pytest.mark.parametrize(
    ("case", "reference", "arguments"),
    REFERENCES,
    ids=lambda value: getattr(value, "id", ""),
)
def test_step_agrees_with_the_formulas_in_float64(
    case, reference, arguments, form, kind, device
):
    verdicts = [Decay(m, form) for m in (1, 0, 0.5, 2, 1, 0.25, 1, 1)]
    params = make_params(torch.float64, device)
    expected = [
        reference(p.detach(), 0.05, 0.1 * v.multiplier, form, **arguments)
        for p, v in zip(make_params(torch.float64), verdicts)
    ]
    optimizer = ours(case, params, verdicts, **HYPER, **kind)
    for step in range(STEPS):
        set_grads(params, step)
        for param, ref in zip(params, expected):
            if param.grad is not None:
                ref.step(param.grad.cpu())
        optimizer.step()
    # Seven steps of a few roundings each, in float64.
    actual = [p.detach().cpu() for p in params]
    torch.testing.assert_close(actual, [r.p for r in expected], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("wd", "row"),
    [
        (0.0, [0.2489, -0.1300, 0.2084, 0.5483, -0.0072]),
        (1.0, [0.2050, -0.1360, 0.1686, 0.4745, -0.0254]),
    ],
)
@each_kind
def test_sgd_gives_the_seed_numbers(wd, row, kind):
    reason = "the numbers were drawn by numpy"
    numpy = pytest.importorskip("numpy", reason=reason)
    rng = numpy.random.RandomState(123)
    x = torch.tensor(rng.uniform(size=(3, 4)))
    w = nn.Parameter(torch.tensor(rng.uniform(size=(4, 5))))
    optimizer = selective_optim.SGD([w], lr=0.1, weight_decay=wd, **kind)
    (x @ w).sum().backward()
    optimizer.step()
    expected = torch.tensor(row, dtype=torch.float64)
    # The numbers are given to four decimals.
    torch.testing.assert_close(w[0].detach(), expected, rtol=0, atol=5e-5)


@each_case
def test_late_first_gradient_equals_a_late_start(case, device):
    actual, expected = (make_params(device=device)[:2] for _ in range(2))
    optimizer = ours(case, actual, [Decay()] * 2, **HYPER)
    oracles = [HandSplit(case, [p], [Decay()], **HYPER, fused=True) for p in expected]
    for step in range(5):
        for params in (actual, expected):
            set_grads(params, step)
            if step < 2:
                params[1].grad = None
        optimizer.step()
        for oracle in oracles:
            oracle.step()
    for p, q, oracle in zip(actual, expected, oracles):
        assert_same_training([p], optimizer, [q], oracle)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_learning_rate_zero_changes_nothing(name):
    params = make_params()
    before = clone_params(params)
    optimizer = getattr(selective_optim, name)(params, lr=0.0, weight_decay=0.5)
    set_grads(params, 0)
    optimizer.step()
    assert_same(params, before)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_parameter_without_gradient_does_not_decay(name):
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = getattr(selective_optim, name)([param], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert_same([param], [torch.ones(3, 3)])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_automatic_choice_leaves_the_neighbors_of_a_view_alone(name):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    before = base.clone()
    param = base[:, ::2].requires_grad_()
    plain = nn.Parameter(before[:, ::2].clone())
    optimizer = getattr(selective_optim, name)([param], lr=0.1, weight_decay=0.1)
    oracle = getattr(torch.optim, name)([plain], lr=0.1, weight_decay=0.1)
    for step in range(3):
        set_grads([param], step)
        set_grads([plain], step)
        optimizer.step()
        oracle.step()
    assert_same(param, plain, strides=False)
    assert_same(base[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_automatic_choice_reads_a_transposed_gradient_right(name):
    actual, expected = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    optimizer = getattr(selective_optim, name)([actual], lr=0.1, weight_decay=0.1)
    oracle = getattr(torch.optim, name)([expected], lr=0.1, weight_decay=0.1)
    for step in range(4):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).t()
        actual.grad = grad if step % 2 else grad.contiguous()
        expected.grad = grad
        optimizer.step()
        oracle.step()
    # Fused and for-loop round differently in the last bits of float32.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
