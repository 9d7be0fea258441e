"""Parameters, rates and checkpoints on several devices and in several dtypes."""

from __future__ import annotations

import io
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from tests.support.compare import assert_same
from tests.support.devices import MARKS
from tests.support.kernels import kernel_is_right
from tests.support.problems import (
    CHOSEN,
    COUNTING,
    DTYPES,
    HYPER,
    IMPLEMENTATIONS,
    KINDS,
    STEPS,
    VERDICTS,
    Case,
    HandSplit,
    assert_same_training,
    assert_trains_alike,
    each_chosen,
    each_kind,
    explicit,
    in_dtype,
    make_params,
    ours,
    set_grads,
    train,
)

# Half precision rounds small decay away outside the fused kernels, in torch, too.
pytestmark = pytest.mark.filterwarnings(r"ignore:1 - lr \* weight_decay rounds")

# Dtypes on the device, and places of further parameters in float32.
MIXES = {"dtypes": (DTYPES, []), "devices": (DTYPES[:2], ["cpu"])}


def torch_is_right(case: Case, kind: Any, dtypes: Any, device: str) -> bool:
    """Tell whether the kernel that torch is asked for is right in every dtype."""
    asked = [name for name, own in IMPLEMENTATIONS.items() if own == explicit(kind)]
    return all(kernel_is_right(case.name, *asked, dtype, device) for dtype in dtypes)


MIXED = [
    pytest.param(
        *(device, in_dtype(case, dtypes[-1]), kind, dtypes, others),
        marks=MARKS[device],
        id=f"{device}-{case.id}-{name}-{mix}",
    )
    for device, case, (name, kind), (mix, (dtypes, others)) in product(
        MARKS, CHOSEN, KINDS.items(), MIXES.items()
    )
    if torch_is_right(case, kind, dtypes, device)
]


@pytest.mark.parametrize(("device", "case", "kind", "dtypes", "others"), MIXED)
def test_devices_and_dtypes_mix_in_one_group(device, case, kind, dtypes, others):
    def make() -> list[nn.Parameter]:
        mix = [*product(dtypes, [device]), *product([torch.float32], others)]
        return [p for dtype, place in mix for p in make_params(dtype, place)]

    actual, expected = make(), make()
    verdicts = VERDICTS["scale"] * (len(actual) // 8)
    optimizer = ours(case, actual, verdicts, **HYPER, **kind)
    oracle = HandSplit(case, expected, verdicts, **HYPER, **explicit(kind))
    assert_trains_alike(actual, optimizer, expected, oracle, range(5))


# torch's Adam takes no tensor as its rate with foreach. A rate of one element, not of
# none, broadcasts: torch 2.7 takes it in fused kernels alone, no multiply takes it.
RATES = [
    pytest.param(
        *(device, case, KINDS[kind], where, shape),
        marks=MARKS[device],
        id=f"{device}-{case.id}-{kind}-{where}-{len(shape)}",
    )
    for device, case, kind, where, shape in product(
        MARKS, CHOSEN, KINDS, dict.fromkeys(MARKS), [(), (1,)]
    )
    if where in ("cpu", device)
    and (case.name == "SGD" or kind != "foreach")
    and (kind in ("automatic", "fused") or (device, shape) == ("cpu", ()))
    and (device, shape) != ("cuda", (1,))
    and (case.id, shape) != ("sgd-decoupled", (1,))
]


@pytest.mark.parametrize(("device", "case", "kind", "where", "shape"), RATES)
def test_tensor_lr_steps_as_in_torch(device, case, kind, where, shape):
    actual, expected = make_params(device=device), make_params(device=device)
    lrs = [torch.full(shape, 0.05, device=where) for _ in range(2)]
    verdicts, rest = VERDICTS["scale"], {"weight_decay": 0.1}
    optimizer = ours(case, actual, verdicts, lr=lrs[0], **rest, **kind)
    oracle = HandSplit(case, expected, verdicts, lr=lrs[1], **rest, **explicit(kind))
    for step in range(STEPS):
        train(optimizer, actual, [step])
        train(oracle, expected, [step])
        for lr in lrs:
            lr.mul_(0.7)  # as a scheduler does
    assert_same_training(actual, optimizer, expected, oracle)
    assert optimizer.param_groups[0]["lr"] is lrs[0]


@each_chosen
def test_tensor_lr_serves_parameters_of_several_devices(case, device):
    actual, expected = ([*make_params(device=device), *make_params()] for _ in range(2))
    lrs = [torch.tensor(0.05, device=device) for _ in range(2)]
    verdicts = VERDICTS["scale"] * 2
    optimizer = ours(case, actual, verdicts, lr=lrs[0], weight_decay=0.1)
    # torch's SGD hands a CUDA rate to CPU kernels as it is: one oracle per device.
    halves = slice(0, 8), slice(8, None)
    oracles = [
        HandSplit(
            case,
            expected[half],
            verdicts[half],
            lr=lrs[1].to(expected[half][0].device),
            weight_decay=0.1,
            fused=True,
        )
        for half in halves
    ]
    for step in range(3):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        for oracle in oracles:
            oracle.step()
    assert_same(actual, expected)


def delay(device: str) -> None:
    """Keep the device busy, so that what is asked of it next comes late."""
    if device == "cuda":
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second


@pytest.mark.parametrize(("found", "rate"), [(1.0, 1.0), (0.0, 0.0), (0.0, 0.25)])
def test_parameters_on_the_cpu_wait_for_values_of_the_device(found, rate, device):
    params = [nn.Parameter(torch.ones(3, device=place)) for place in (device, "cpu")]
    lr = torch.ones((), device=device)
    optimizer = selective_optim.SGD(params, lr=lr)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.grad_scale = None
    delay(device)
    optimizer.found_inf = torch.full((), found, device=device)
    lr.fill_(rate)
    optimizer.step()
    expected = 1 - rate * (1 - found)
    assert [p.tolist() for p in params] == [[expected] * 3] * 2


PLACES = [
    pytest.param(*pair, marks=MARKS[max(pair)], id="-".join(pair))
    for pair in product(MARKS, MARKS)
]


@pytest.mark.parametrize(("saver", "loader"), PLACES)
@pytest.mark.parametrize("map_location", [None, "cpu"])
@each_kind
@pytest.mark.parametrize("case", [CHOSEN[1], *COUNTING], ids=lambda case: case.id)
def test_checkpoint_continues_on_another_device(
    case, kind, saver, loader, map_location
):
    params = make_params(device=saver)
    optimizer = ours(case, params, VERDICTS["all"], **HYPER, **kind)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    actual, expected = (
        [nn.Parameter(p.detach().to(loader, copy=True)) for p in params]
        for _ in range(2)
    )
    resumed = ours(case, actual, VERDICTS["all"], **HYPER, **kind)
    resumed.load_state_dict(load(file, map_location))
    oracle = HandSplit(case, expected, VERDICTS["all"], **HYPER, **explicit(kind))
    (torchs,) = oracle.optimizers
    saved = load(file, map_location)
    # What ours leaves open, torch is told; it then places the step counters.
    saved["param_groups"][0].update(explicit(kind), params=list(range(8)))
    torchs.load_state_dict(saved)
    assert_trains_alike(actual, resumed, expected, oracle, range(3, 6))


def load(file: io.BytesIO, map_location: str | None) -> Any:
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_module_on_the_device_decides_by_its_types(name, device):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).to(device)
    optimizer = getattr(selective_optim, name)(
        model.parameters(), lr=0.5, weight_decay=0.5, wd_policy="no_bias_norm"
    )
    for param in model.parameters():
        nn.init.ones_(param)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    moved = [bool((p != 1).any()) for p in model.parameters()]
    assert moved == [True, False, False, False]
