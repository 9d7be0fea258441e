"""Every input that torch tests its own three classes with, through ours."""

from __future__ import annotations

import copy
import inspect
import sys
from itertools import product
from typing import Any

import pytest
import torch

import selective_optim
from tests.support.compare import assert_same
from tests.support.kernels import kernel_is_right
from tests.support.problems import (
    IMPLEMENTATIONS,
    STEPS,
    VERDICTS,
    Case,
    HandSplit,
    assert_trains_alike,
    make_params,
    ours,
    set_grads,
)


def torch_database() -> Any:
    """Import torch's table without what the import does to the whole process."""
    pytest.importorskip("expecttest", reason="torch's test helpers import expecttest")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        name = "torch.testing._internal.common_optimizers"
        return pytest.importorskip(name, exc_type=ImportError)


database = torch_database()
INFOS = {
    info.optim_cls.__name__: info
    for info in database.optim_db
    if info.optim_cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
}
KINDS: dict[str, dict[str, Any]] = {
    **IMPLEMENTATIONS,
    "automatic": {},
    "differentiable": {"differentiable": True, "foreach": False, "fused": False},
}
# Default rates and decays round away in half precision.
rounding = pytest.mark.filterwarnings("ignore:.*hardly decays:UserWarning")
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def fused_is_right(case: Case, dtype: torch.dtype) -> bool:
    return kernel_is_right(case.name, "fused", dtype) and not dtype.is_complex


def rival_of(case: Case, kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Name for torch what ours chooses by itself."""
    chosen = "fused" if fused_is_right(case, dtype) else "for-loop"
    return KINDS[chosen if kind == "automatic" else kind]


def inputs() -> list[Any]:
    table = []
    for (name, info), dtype, kind in product(
        INFOS.items(), [*REAL, torch.complex64], KINDS
    ):
        for given in info.optim_inputs_func("cpu", dtype=dtype):
            case = Case(given.desc, name, given.kwargs)
            if kind == "fused" and not fused_is_right(case, dtype):
                continue
            label = f"{name}-{given.desc}-{kind}-{dtype}"
            table.append(pytest.param(case, kind, dtype, id=label))
    return table


def params_for(kind: str, dtype: torch.dtype) -> list[Any]:
    """Make parameters; a differentiable step takes no leaf that requires gradients."""
    if dtype.is_complex:
        real, imaginary = make_params(torch.float64), make_params(torch.float64)
        params = [
            torch.complex(a.detach(), b.detach().flip(0) if b.ndim else b.detach())
            for a, b in zip(real, imaginary)
        ]
        params = [p.to(dtype) for p in params]
    else:
        params = [p.detach() for p in make_params(dtype)]
    return [p.requires_grad_(kind != "differentiable") for p in params]


@rounding
@pytest.mark.parametrize(("case", "kind", "dtype"), inputs())
def test_input_of_torch_gives_the_bits_of_torch(case, kind, dtype):
    actual, expected = params_for(kind, dtype), params_for(kind, dtype)
    arguments = {**copy.deepcopy(case.arguments), **KINDS[kind]}
    optimizer = getattr(selective_optim, case.name)(actual, **arguments)
    arguments = {**copy.deepcopy(case.arguments), **rival_of(case, kind, dtype)}
    rival = getattr(torch.optim, case.name)(expected, **arguments)
    assert_trains_alike(actual, optimizer, expected, rival)


@rounding
@pytest.mark.parametrize("verdicts", [VERDICTS["scale"], VERDICTS["forms"]])
@pytest.mark.parametrize(("case", "kind", "dtype"), inputs())
def test_input_of_torch_with_a_policy_equals_hand_split(case, kind, dtype, verdicts):
    own = dict(case.arguments)
    cls = getattr(torch.optim, case.name)
    lr = own.pop("lr", inspect.signature(cls).parameters["lr"].default)
    hyper = {"lr": lr, "weight_decay": own.pop("weight_decay", 0.1)}
    case = Case(case.id, case.name, own)
    actual, expected = params_for(kind, dtype), params_for(kind, dtype)
    optimizer = ours(case, actual, verdicts, **hyper, **KINDS[kind])
    rival = rival_of(case, kind, dtype)
    oracle = HandSplit(case, expected, verdicts, **hyper, **rival)
    assert_trains_alike(actual, optimizer, expected, oracle)


def advance(schedulers: list[Any]) -> None:
    for scheduler in schedulers:
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[torch.ones(())] * plateau)


SCHEDULED = [
    pytest.param(name, makers, id=f"{name}-{i}")
    for name, info in INFOS.items()
    for i, makers in enumerate(info.scheduler_inputs)
]


@pytest.mark.parametrize(("name", "makers"), SCHEDULED)
def test_schedulers_of_torch_drive_ours_alike(name, makers):
    actual, expected = make_params(), make_params()
    optimizer = getattr(selective_optim, name)(actual, lr=0.05, weight_decay=0.1)
    rival = getattr(torch.optim, name)(expected, lr=0.05, weight_decay=0.1, fused=True)
    schedulers = [[make(each) for make in makers] for each in (optimizer, rival)]
    for step in range(STEPS):
        for params, each, own in (
            (actual, optimizer, schedulers[0]),
            (expected, rival, schedulers[1]),
        ):
            set_grads(params, step)
            each.step()
            advance(own)
    assert optimizer.param_groups[0]["lr"] == rival.param_groups[0]["lr"]
    assert_same(actual, expected)


SPARSE = [name for name, info in INFOS.items() if info.supports_sparse]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kind", ["automatic", "for-loop", "foreach"])
def test_sparse_gradients_step_as_in_torch(name, kind):
    arguments, makers = INFOS[name].metadata_for_sparse
    pairs = []
    for module, chosen in (
        (selective_optim, KINDS[kind]),
        (torch.optim, IMPLEMENTATIONS.get(kind, IMPLEMENTATIONS["for-loop"])),
    ):
        params = make_params()[:2]
        optimizer = getattr(module, name)(params, **arguments, **chosen)
        pairs.append((params, optimizer, [make(optimizer) for make in makers]))
    for step in range(STEPS):
        for params, optimizer, schedulers in pairs:
            set_grads(params, step)
            params[0].grad = params[0].grad.to_sparse()
            optimizer.step()
            advance(schedulers)
    assert_same(pairs[0][0], pairs[1][0])


ERRORS = [
    pytest.param(name, error, id=f"{name}-{i}-{error.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for i, error in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize("arguments", [{}, {"wd_policy": "matrices"}], ids=str)
@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_error_of_torch_is_raised_alike(name, error, arguments):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [torch.ones(1, 1)]
    arguments = {"weight_decay": 0.1, **given.kwargs, **arguments}
    with pytest.raises(error.error_type, match=error.error_regex):
        # Warnings are errors here, so what torch warns of is raised, too.
        getattr(selective_optim, name)(params, **arguments)
