"""Every class of `torch.optim` that decays, with torch's own inputs for it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

from selective_optim import selective
from tests.support.compare import assert_same
from tests.support.problems import STEPS, make_params, set_grads
from tests.test_torch_database import database

OURS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # see there
MULTIPLIERS = [1, 0, 0.5, 1, 2, 0, 1, 0.5]
IMPLEMENTATIONS = [{"foreach": False}, {"foreach": True}]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def decays(info: Any) -> bool:
    made = info.optim_cls([torch.ones(2, 2, requires_grad=True)])
    return "weight_decay" in made.param_groups[0] and info.optim_cls not in OURS


INFOS = [info for info in database.optim_db if decays(info)]


def inputs() -> list[Any]:
    return [
        pytest.param(
            info.optim_cls,
            {**given.kwargs, **how},
            dtype,
            id=f"{info.optim_cls.__name__}-{given.desc}-{[*how.values()]}-{dtype}",
        )
        for info in INFOS
        for dtype in DTYPES
        for given in info.optim_inputs_func("cpu", dtype=dtype)
        for how in (IMPLEMENTATIONS if "foreach" in info.supported_impls else [{}])
        if not (how.get("foreach") and isinstance(given.kwargs.get("lr"), torch.Tensor))
    ]


def served(cls: Any) -> list[int]:
    """List the positions of what torch's class takes of `make_params`."""
    if cls.__name__ == "Muon":
        return [0, 4]  # matrices
    return [i for i in range(8) if i != 3 or cls.__name__ != "Adafactor"]  # not empty


def build(cls: Any, params: Any, arguments: dict[str, Any]) -> Any:
    named = [(f"p{i}", params[i]) for i in served(cls)]
    return selective(cls)(
        [{"params": named[: len(named) // 2]}, {"params": named[len(named) // 2 :]}],
        wd_policy=lambda info: MULTIPLIERS[int(info.name[1:])],
        **copy.deepcopy(arguments),
    )


def build_by_hand(cls: Any, params: Any, arguments: dict[str, Any]) -> Any:
    positions = served(cls)
    split: dict[tuple[bool, float], list[Any]] = {}
    for count, i in enumerate(positions):
        second = count >= len(positions) // 2
        split.setdefault((second, MULTIPLIERS[i]), []).append(params[i])
    wd = arguments["weight_decay"]
    return cls(
        [
            {"params": held, "weight_decay": wd * multiplier}
            for (_, multiplier), held in split.items()
        ],
        **copy.deepcopy(arguments),
    )


def step(optimizer: Any, params: Any, number: int) -> None:
    set_grads(params, number)
    for group in optimizer.param_groups:
        rate = group["lr"] * (0.5 if number % 2 else 1.5)
        group["lr"] = rate
    optimizer.step()


def reloaded(optimizer: Any, again: Any) -> Any:
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    again.load_state_dict(torch.load(saved, weights_only=True))
    return again


@pytest.mark.parametrize(("cls", "arguments", "dtype"), inputs())
def test_input_of_torch_equals_hand_split_and_resumes(cls, arguments, dtype):
    arguments = {"weight_decay": 0.1, **arguments}
    actual, expected = make_params(dtype), make_params(dtype)
    optimizer = build(cls, actual, arguments)
    oracle = build_by_hand(cls, expected, arguments)
    for number in range(STEPS + 1):
        if number == 4:
            optimizer = reloaded(optimizer, build(cls, actual, arguments))
            oracle = reloaded(oracle, build_by_hand(cls, expected, arguments))
        step(optimizer, actual, number)
        step(oracle, expected, number)
    assert_same(actual, expected)
    for p, q in zip(actual, expected):
        assert_same(optimizer.state.get(p, {}), oracle.state.get(q, {}))
