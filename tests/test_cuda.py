"""On a CUDA device: torch's own bits, graphs, scalers, moves, and no extra memory.

Every body that the CPU can run is run there, too, so that a machine without a device
finds its mistakes; run the rest with ``pytest -m cuda``.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selective_optim
from selective_optim import Decay
from tests.support.compare import assert_same
from tests.support.kernels import kernel_is_right
from tests.support.problems import (
    CASES,
    DTYPES,
    IMPLEMENTATIONS,
    STEPS,
    VERDICTS,
    Case,
    HandSplit,
    assert_same_training,
    frozen,
    make_params,
    ours,
    set_grads,
)
from tests.support.reference import AdamReference, SGDReference

# Half precision rounds small decay away outside the fused kernels, in torch, too.
pytestmark = pytest.mark.filterwarnings(r"ignore:1 - lr \* weight_decay rounds")

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = pytest.param("cuda", marks=needs_cuda)
each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
KINDS = {"automatic": {}, **IMPLEMENTATIONS}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
HYPER = {"lr": 0.05, "weight_decay": 0.1}
SCALE = 1024.0  # a power of two: scaling changes no bit of a gradient
SHAPES = 8  # parameters that make_params makes


def case(name: str, *parts: str, **arguments: Any) -> Case:
    """Make a case; Adam's eps is one that float16 has."""
    eps = {"SGD": {}}.get(name, {"eps": 1e-3})
    return Case("-".join((name.lower(), *parts)), name, {**eps, **arguments})


EXACT = [case(c.name, c.id, **c.arguments) for c in CASES]
CHOSEN = [
    case("SGD"),
    case("SGD", "nesterov", momentum=0.9, nesterov=True),
    case("SGD", "decoupled", momentum=0.9, decoupled_weight_decay=True),
    case("Adam", "amsgrad", amsgrad=True),
    case("AdamW"),
]
COUNTING = CHOSEN[3:]
each_case = pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
counting = pytest.mark.parametrize("case", COUNTING, ids=lambda case: case.id)


def explicit(kind: dict[str, Any]) -> dict[str, Any]:
    """Say what the automatic choice takes for plain parameters on CPU and CUDA."""
    return kind or {"fused": True}


# Bits


TABLE = [
    pytest.param("cuda", *row, marks=needs_cuda, id="-".join(map(str, ids)))
    for ids, row in (
        ((c.id, kind, dtype, v), (c, kind, dtype, VERDICTS[v]))
        for c, kind, dtype, v in product(
            EXACT, IMPLEMENTATIONS, [*DTYPES, torch.float16], ("scale", "forms")
        )
    )
] + [
    pytest.param("cpu", c, kind, dtype, VERDICTS["scale"], id=f"cpu-{c.id}-{kind}")
    for c, kind, dtype in product(
        [*CHOSEN[:2], *COUNTING], IMPLEMENTATIONS, [torch.float16]
    )
    if kernel_is_right(c.name, kind, dtype)
]


@pytest.mark.parametrize(("device", "case", "kind", "dtype", "verdicts"), TABLE)
def test_step_equals_hand_split_torch(device, case, kind, dtype, verdicts):
    actual, expected = make_params(dtype, device), make_params(dtype, device)
    arguments = {**HYPER, **IMPLEMENTATIONS[kind]}
    optimizer = ours(case, actual, verdicts, **arguments)
    oracle = HandSplit(case, expected, verdicts, **arguments)
    for step in range(STEPS):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


AUTOMATIC = [
    *product(["cpu"], [torch.float32, torch.float64]),
    *product(["cuda"], [*DTYPES, torch.float16]),
]


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param(*row, marks={"cpu": []}.get(row[0], needs_cuda), id=str(row))
        for row in AUTOMATIC
    ],
)
@pytest.mark.parametrize("lrs", [None, [0.01 * (i + 1) for i in range(SHAPES)]])
@each_case
def test_automatic_choice_is_fused(case, device, dtype, lrs):
    actual, expected = make_params(dtype, device), make_params(dtype, device)
    optimizer = ours(case, actual, VERDICTS["scale"], lrs, **HYPER)
    oracle = HandSplit(case, expected, VERDICTS["scale"], lrs, **HYPER, fused=True)
    for step in range(STEPS):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


REFERENCES = [
    (case("SGD", momentum=0.9), SGDReference, {"momentum": 0.9}),
    (case("Adam"), AdamReference, {"eps": 1e-3}),
    (case("AdamW", amsgrad=True), AdamReference, {"eps": 1e-3, "amsgrad": True}),
]


@each_device
@each_kind
@pytest.mark.parametrize("form", ["l2", "decoupled"])
@pytest.mark.parametrize(
    ("case", "reference", "arguments"), REFERENCES, ids=lambda v: getattr(v, "id", "")
)
def test_step_agrees_with_the_formulas(case, reference, arguments, form, kind, device):
    verdicts = [Decay(m, form) for m in (1, 0, 0.5, 2, 1, 0.25, 1, 1)]
    params = make_params(torch.float64, device)
    expected = [
        reference(p.detach().cpu(), 0.05, 0.1 * v.multiplier, form, **arguments)
        for p, v in zip(make_params(torch.float64), verdicts)
    ]
    optimizer = ours(case, params, verdicts, **HYPER, **kind)
    for step in range(STEPS):
        set_grads(params, step)
        for param, own in zip(params, expected):
            steps = () if param.grad is None else (param.grad.cpu(),)
            for grad in steps:
                own.step(grad)
        optimizer.step()
    # Seven steps of a few roundings each, in float64.
    torch.testing.assert_close(
        [p.detach().cpu() for p in params],
        [own.p for own in expected],
        rtol=1e-12,
        atol=1e-13,
    )


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_case
def test_half_precision_stays_near_double(case, dtype, device):
    lists = make_params(dtype, device), make_params(torch.float64, device)
    for params in lists:
        optimizer = ours(case, params, VERDICTS["scale"], **HYPER)
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
    low, double = ([p.detach().double() for p in params] for params in lists)
    # bfloat16 has 8 bits; a wrong kernel is off by the size of the parameter.
    torch.testing.assert_close(low, double, rtol=0.05, atol=0.05)


# One group over several devices and dtypes


@each_device
@each_kind
@each_case
def test_devices_and_dtypes_mix_in_one_group(case, kind, device):
    def make() -> list[nn.Parameter]:
        mix = [("cpu", torch.float32), (device, torch.float64), (device, torch.float32)]
        return [p for place, dtype in mix for p in make_params(dtype, place)]

    actual, expected = make(), make()
    verdicts = VERDICTS["scale"] * 3
    optimizer = ours(case, actual, verdicts, **HYPER, **kind)
    oracle = HandSplit(case, expected, verdicts, **HYPER, **explicit(kind))
    for step in range(5):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


@each_device
@each_kind
@counting
def test_low_precision_mixes_with_single_in_one_group(case, kind, device):
    def make() -> list[nn.Parameter]:
        mix = [torch.bfloat16, torch.float32, torch.float16]
        return [p for dtype in mix for p in make_params(dtype, device)]

    actual, expected = make(), make()
    verdicts = VERDICTS["scale"] * 3
    optimizer = ours(case, actual, verdicts, **HYPER, **kind)
    oracle = HandSplit(case, expected, verdicts, **HYPER, **explicit(kind))
    for step in range(5):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)


# Rates that are tensors, capturable, graphs

# The CPU takes capturable in its fused kernels alone.
CAPTURABLE = [
    *(pytest.param("cpu", KINDS[k], id=f"cpu-{k}") for k in ("automatic", "fused")),
    *(
        pytest.param("cuda", kind, marks=needs_cuda, id=f"cuda-{name}")
        for name, kind in KINDS.items()
    ),
]


@pytest.mark.parametrize(("device", "kind"), CAPTURABLE)
@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["number", "tensor"])
@counting
def test_capturable_steps_as_in_torch(case, device, kind, make_lr):
    actual, expected = make_params(device=device), make_params(device=device)
    rest = {"weight_decay": 0.1, "capturable": True}
    oracle = HandSplit(
        case, expected, VERDICTS["scale"], lr=make_lr(0.05), **rest, **explicit(kind)
    )
    optimizer = ours(case, actual, VERDICTS["scale"], lr=make_lr(0.05), **rest, **kind)
    for step in range(STEPS):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
    assert_same_training(actual, optimizer, expected, oracle)
    assert optimizer.state[actual[0]]["step"].device.type == device


@each_device
@pytest.mark.parametrize("lr_device", ["cpu", "device"])
@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=["automatic", "fused"])
@each_case
def test_tensor_lr_steps_as_in_torch(case, kind, lr_device, device):
    actual, expected = make_params(device=device), make_params(device=device)
    where = {"device": device}.get(lr_device, "cpu")
    lrs = [torch.tensor(0.05, device=where) for _ in range(2)]
    rest = {"weight_decay": 0.1}
    optimizer = ours(case, actual, VERDICTS["scale"], lr=lrs[0], **rest, **kind)
    oracle = HandSplit(
        case, expected, VERDICTS["scale"], lr=lrs[1], **rest, **explicit(kind)
    )
    for step in range(STEPS):
        set_grads(actual, step)
        set_grads(expected, step)
        optimizer.step()
        oracle.step()
        for lr in lrs:
            lr.mul_(0.7)
    assert_same_training(actual, optimizer, expected, oracle)


@each_device
@each_case
def test_tensor_lr_serves_parameters_of_several_devices(case, device):
    actual, expected = ([*make_params(device=device), *make_params()] for _ in range(2))
    lrs = [torch.tensor(0.05, device=device) for _ in range(2)]
    verdicts = VERDICTS["scale"] * 2
    optimizer = ours(case, actual, verdicts, lr=lrs[0], weight_decay=0.1)
    # torch's SGD hands a CUDA rate to CPU kernels as it is: one oracle per device.
    halves = slice(0, SHAPES), slice(SHAPES, None)
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


def static_grads(params: Sequence[Tensor], step: int) -> None:
    """Fill the gradients in place, as a captured step reads them; the last has none."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params[:-1]:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        param.grad.copy_(torch.randn(param.shape, generator=generator))


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run on another stream, as warming up for a capture must."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(device: str, step: Callable[[], object]) -> Callable[[], object]:
    """Record a step, without running it; the CPU, which cannot, runs it each time."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


GRAPHS = [(c, kind, {}) for c, kind in product(CHOSEN[:3], ({}, {"fused": True}))] + [
    (c, kind, {"capturable": True})
    for c, kind in product(COUNTING, ({}, {"fused": True}))
]


@each_device
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


@each_device
@counting
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


@each_device
@each_case
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


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@counting
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


# Scalers


def scaled_step(
    scaler: torch.amp.GradScaler, optimizer: Any, params: Any, step: int, bad: bool
) -> None:
    set_grads(params, step)
    for param in params:
        if param.grad is not None:
            param.grad.mul_(SCALE)
    for position in (0, -SHAPES) * bad:  # with two devices, one on each
        params[position].grad.view(-1)[1] = float("inf")
    scaler.scale(torch.ones((), device=params[0].device))
    scaler.step(optimizer)
    scaler.update(SCALE)


def make_scaler(device: str) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=SCALE, growth_interval=1000)


BAD = [False, False, True, False, True, True, False]


@each_device
@each_kind
@each_case
def test_dropped_step_changes_nothing(case, kind, device):
    params = make_params(device=device)
    optimizer = ours(case, params, VERDICTS["scale"], **HYPER, **kind)
    scaler = make_scaler(device)
    for step in range(3):
        scaled_step(scaler, optimizer, params, step, bad=False)
    before = frozen(optimizer, params)
    scaled_step(scaler, optimizer, params, 4, bad=True)
    assert_same(frozen(optimizer, params), before)


@each_device
@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=["automatic", "fused"])
@pytest.mark.parametrize(
    "case", [CHOSEN[0], CHOSEN[1], *COUNTING], ids=lambda case: case.id
)
def test_scaled_training_equals_torch_under_the_same_scaler(case, kind, device):
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICTS["scale"], **HYPER, **kind)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **HYPER, fused=True)
    (torchs,) = oracle.optimizers
    own, other = make_scaler(device), make_scaler(device)
    for step, bad in enumerate(BAD):
        scaled_step(own, optimizer, actual, step, bad)
        scaled_step(other, torchs, expected, step, bad)
    assert_same_training(actual, optimizer, expected, oracle)


@each_device
@each_kind
@each_case
def test_infinities_on_two_devices_drop_the_step(case, kind, device):
    params = [*make_params(device=device), *make_params()]
    optimizer = ours(case, params, VERDICTS["scale"] * 2, **HYPER, **kind)
    scaler = make_scaler(device)
    for step in range(2):
        scaled_step(scaler, optimizer, params, step, bad=False)
    before = frozen(optimizer, params)
    scaled_step(scaler, optimizer, params, 2, bad=True)
    assert_same(frozen(optimizer, params), before)


def delay(device: str) -> None:
    """Keep the device busy, so that what is asked of it next comes late."""
    if device == "cuda":
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second


@each_device
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


# Checkpoints and moves

PAIRS = [
    pytest.param(*pair, marks=marks, id="-".join(pair))
    for pair, marks in [
        (("cpu", "cpu"), []),
        (("cpu", "cuda"), needs_cuda),
        (("cuda", "cpu"), needs_cuda),
        (("cuda", "cuda"), needs_cuda),
    ]
]


@pytest.mark.parametrize(("saver", "loader"), PAIRS)
@pytest.mark.parametrize("map_location", [None, "cpu"])
@each_kind
@pytest.mark.parametrize("case", [CHOSEN[1], *COUNTING], ids=lambda case: case.id)
def test_checkpoint_continues_on_another_device(
    case, kind, saver, loader, map_location
):
    params = make_params(device=saver)
    optimizer = ours(case, params, VERDICTS["all"], **HYPER, **kind)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
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
    saved["param_groups"][0].update(explicit(kind), params=list(range(SHAPES)))
    torchs.load_state_dict(saved)
    for step in range(3, 6):
        set_grads(actual, step)
        set_grads(expected, step)
        resumed.step()
        oracle.step()
    assert_same_training(actual, resumed, expected, oracle)


def load(file: io.BytesIO, map_location: str | None) -> Any:
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True)


@each_device
@each_kind
@each_case
@pytest.mark.parametrize("steps_before", [0, 2])
def test_model_moved_after_construction_takes_its_state_along(
    case, kind, steps_before, device
):
    model = nn.ParameterList(make_params())
    params = [*model]
    optimizer = ours(case, params, VERDICTS["scale"], **HYPER, **kind)
    for step in range(steps_before):
        set_grads(params, step)
        optimizer.step()
    model.to(device)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    oracle = HandSplit(case, twins, VERDICTS["scale"], **HYPER, **explicit(kind))
    for optimizer_of_form in oracle.optimizers:
        owner = getattr(optimizer_of_form, "sgd", optimizer_of_form)
        for twin in (p for group in owner.param_groups for p in group["params"]):
            own = optimizer.state.get(params[position_of(twin, twins)], {})
            for key, value in own.items():
                counter = key == "step" and not explicit(kind).get("fused")
                owner.state[twin][key] = value.to(
                    "cpu" if counter else device, copy=True
                )
    for step in range(2, 5):
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        oracle.step()
    assert_same_training(params, optimizer, twins, oracle)
    assert all(p.device.type == device for p in params)


def position_of(param: Tensor, params: Sequence[Tensor]) -> int:
    return next(i for i, other in enumerate(params) if other is param)


@each_device
@each_case
def test_copy_continues_on_its_own(case, device):
    params = make_params(device=device)
    optimizer = ours(case, params, VERDICTS["scale"], **HYPER)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    twin, twins = copy.deepcopy((optimizer, params))
    for step in range(2, 4):
        set_grads(params, step)
        optimizer.step()
    for step in range(2, 4):
        set_grads(twins, step)
        twin.step()
    assert_same(frozen(twin, twins), frozen(optimizer, params))


# torch.compile


@each_device
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's of itself
@pytest.mark.parametrize("case", [CHOSEN[1], CHOSEN[4]], ids=lambda case: case.id)
def test_compiled_step_equals_torch_compiled(case, device):
    actual, expected = make_params(device=device), make_params(device=device)
    optimizer = ours(case, actual, VERDICTS["scale"], **HYPER)
    oracle = HandSplit(case, expected, VERDICTS["scale"], **HYPER)
    (torchs,) = oracle.optimizers
    for params, own in ((actual, optimizer), (expected, torchs)):
        torch._dynamo.reset()
        step = torch.compile(own.step, backend="eager")
        for index in range(4):
            static_grads(params, index)
            step()
    torch._dynamo.reset()
    assert_same_training(actual, optimizer, expected, oracle)


# What a step costs


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


@pytest.mark.parametrize("device", [CUDA])
@each_case
def test_fused_step_takes_no_memory_that_grows_with_the_model(case, device):
    small, large = 1 << 12, 1 << 24
    assert peak_of_a_step(case, large) <= peak_of_a_step(case, small)


@pytest.mark.parametrize("device", [CUDA])
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


@each_device
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("found", [None, 0.0, 1.0])
@pytest.mark.parametrize(
    "case", [CHOSEN[0], CHOSEN[1], *COUNTING], ids=lambda case: case.id
)
def test_replayed_step_does_not_wait_for_the_device(case, make_lr, found, device):
    params = make_params(device=device)
    lr = torch.as_tensor(make_lr(0.05)).to(device) if make_lr is not float else 0.05
    optimizer = ours(case, params, VERDICTS["scale"], lr=lr, weight_decay=0.1)
    for step in range(3):
        static_grads(params, step)
        optimizer.step()
    before = params[0].detach().clone()
    optimizer.grad_scale = None
    optimizer.found_inf = None if found is None else torch.tensor(found, device=device)
    with without_synchronizing(device):
        optimizer.step()
    assert torch.equal(params[0].detach(), before) == bool(found)


@each_device
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
