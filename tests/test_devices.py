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
from tests.support.devices import MARKS, on_cuda
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


def offload(optimizer: Any, device: str) -> None:
    """Move all state, as is done while a model is evaluated, or another is trained."""
    for own in optimizer.state.values():
        for entry, value in own.items():
            own[entry] = value.to(device, copy=True)


@each_kind
@each_chosen
def test_state_that_was_offloaded_and_came_back_continues(case, kind, device):
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICTS["scale"], **HYPER, **kind)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **HYPER, **explicit(kind))
    train(optimizer, actual, range(3))
    counters = {p: own.get("step") for p, own in optimizer.state.items()}
    offload(optimizer, "cpu")
    for param, own in optimizer.state.items():
        for entry, value in own.items():
            # Not the counters of the for-loop and of foreach, which live on the CPU.
            place = counters[param].device if entry == "step" else param.device
            own[entry] = value.to(place, copy=True)
    train(optimizer, actual, range(3, 6))
    train(oracle, expected, range(6))
    assert_same_training(actual, optimizer, expected, oracle)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("lr", ["number", "tensor"])
@each_chosen
def test_two_devices_share_a_group(case, lr):
    places = ["cuda:0", "cuda:1"]
    actual, expected = (
        [p for place in places for p in make_params(device=place)] for _ in range(2)
    )
    rate = 0.05 if lr == "number" else torch.tensor(0.05, device=places[0])
    verdicts = VERDICTS["scale"] * 2
    optimizer = ours(case, actual, verdicts, lr=rate, weight_decay=0.1)
    halves = slice(0, 8), slice(8, None)
    oracles = [
        HandSplit(
            case, expected[half], verdicts[half], lr=0.05, weight_decay=0.1, fused=True
        )
        for half in halves
    ]
    train(optimizer, actual, range(5))
    for step in range(5):
        set_grads(expected, step)
        for oracle in oracles:
            oracle.step()
    assert_same(actual, expected)


RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))


@on_cuda
@pytest.mark.skipif(RELEASE < (2, 12), reason="torch has no such kernel before 2.12")
@pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.id)
def test_moments_in_bfloat16_beside_float32_step_in_the_fused_kernel(case, device):
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICTS["scale"], **HYPER)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **HYPER, fused=True)

    def lower(each: Any) -> None:
        for own in each.state.values():
            for entry in own.keys() - {"step"}:
                own[entry] = own[entry].bfloat16()

    train(optimizer, actual, [0])
    train(oracle, expected, [0])
    for each in (optimizer, *oracle.optimizers):
        lower(each)
    train(optimizer, actual, range(1, 5))
    train(oracle, expected, range(1, 5))
    assert_same_training(actual, optimizer, expected, oracle)
    assert optimizer.state[actual[0]]["exp_avg"].dtype == torch.bfloat16
