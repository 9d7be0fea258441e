"""Under torch.compile the step is torch's own: its bits, its graphs, its breaks."""

from __future__ import annotations

import copy
import gc
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import selective_optim
from selective_optim import Decay
from tests.support.compare import assert_same
from tests.support.devices import MARKS
from tests.support.problems import (
    Case,
    HandSplit,
    assert_same_training,
    ours,
)

pytestmark = [
    # torch says so of its own optimizers, once per process.
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HYPER = {"lr": 0.05, "weight_decay": 0.1}
LOOP = {"foreach": False, "fused": False}
CASES = [
    Case("sgd", "SGD"),
    Case("momentum", "SGD", {"momentum": 0.9, "nesterov": True}),
    Case("adam", "Adam", {"amsgrad": True}),
    Case("adamw", "AdamW"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
KINDS: dict[str, dict[str, bool]] = {
    "automatic": {},
    "for-loop": LOOP,
    "foreach": {"foreach": True},
}
SHAPES = [(3, 4), (4,), (), (2, 3, 2)]
VERDICTS = [Decay(1), Decay(0), Decay(0.5), Decay(1)]
FORMS = [Decay(1, "l2"), Decay(1, "decoupled"), Decay(0), Decay(0.5)]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _no_collection() -> Iterator[None]:
    """Compilers make garbage so fast that all that is alive is walked at every test."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch times the guards of every graph for its log, on emptied caches of the CPU.
    name = "torch._dynamo.guards.profile_guard_manager"
    monkeypatch.setattr(name, lambda *args: 0.0, raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_params(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(value.to(device, dtype)) for value in values]
    for param in params:  # kept: compiled code is made for these very tensors
        param.grad = torch.zeros_like(param)
    return params


def set_grads(params: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad.copy_(torch.randn(param.shape, generator=generator))


class Compiled:
    """A compiled step, and how many graphs it took."""

    def __init__(self, optimizer: Any, backend: str = "eager") -> None:
        counters.clear()
        self.backend = CompileCounterWithBackend(backend)
        self.step = torch.compile(optimizer.step, backend=self.backend)

    @property
    def graphs(self) -> int:
        return self.backend.frame_count

    @property
    def break_reasons(self) -> set[str]:
        return set(counters["graph_break"])


def train(step: Any, params: Sequence[Tensor], steps: Sequence[int]) -> None:
    for index in steps:
        set_grads(params, index)
        step()


def pair(
    case: Case, verdicts: Sequence[Decay], device: str = "cpu", **arguments: Any
) -> tuple[tuple[list[nn.Parameter], Any], tuple[list[nn.Parameter], HandSplit]]:
    actual, expected = make_params(device=device), make_params(device=device)
    arguments = {**HYPER, **arguments}
    optimizer = ours(case, actual, verdicts, **arguments)
    return (actual, optimizer), (
        expected,
        HandSplit(case, expected, verdicts, **arguments),
    )


# Backends are given the same graphs by the automatic choice as by the for-loop, which
# it is on a CPU.
COMPILED = [
    *[("cpu", "eager", kind) for kind in KINDS],
    *[("cpu", "aot_eager", kind) for kind in ("automatic", "foreach")],
    *[pytest.param("cuda", "eager", kind, marks=MARKS["cuda"]) for kind in KINDS],
]


@each_case
@pytest.mark.parametrize(("device", "backend", "kind"), COMPILED)
def test_compiled_step_equals_hand_split_torch_compiled(case, device, backend, kind):
    chosen = KINDS[kind]
    (actual, optimizer), (expected, oracle) = pair(case, VERDICTS, device, **chosen)
    (torchs,) = oracle.optimizers
    compiled = Compiled(optimizer, backend)
    train(compiled.step, actual, range(STEPS))
    graphs, reasons = compiled.graphs, compiled.break_reasons
    reference = Compiled(torchs, backend)
    train(reference.step, expected, range(STEPS))
    assert_same_training(actual, optimizer, expected, oracle)
    assert graphs == reference.graphs
    # One more than torch's own: ours runs as it is, and the class's step compiled.
    assert all("_step" in reason for reason in reasons - reference.break_reasons)


def compiled_oracle(oracle: HandSplit) -> Any:
    """Compile the step of every optimizer of a hand split."""
    steps = [torch.compile(o.step, backend="eager") for o in oracle.optimizers]

    def step() -> None:
        for each in steps:
            each()

    return step


# Automatic is the for-loop here, too: once will do.
MIXED = [(case, kind) for case in CASES for kind in ("for-loop", "foreach")]
MIXED += [(case, "automatic") for case in CASES if case.id == "adam"]


@pytest.mark.parametrize(
    ("case", "kind"), MIXED, ids=lambda value: getattr(value, "id", value)
)
def test_compiled_step_mixes_forms_as_hand_split_optimizers_do(case, kind):
    (actual, optimizer), (expected, oracle) = pair(case, FORMS, **KINDS[kind])
    train(Compiled(optimizer).step, actual, range(STEPS))
    train(compiled_oracle(oracle), expected, range(STEPS))
    assert_same(actual, expected)


@each_case
def test_changing_tensor_lr_compiles_once(case):
    actual, expected = make_params(), make_params()
    lrs = torch.tensor(0.05), torch.tensor(0.05)
    optimizer = ours(case, actual, VERDICTS, lr=lrs[0], weight_decay=0.1)
    oracle = HandSplit(case, expected, VERDICTS, lr=lrs[1], weight_decay=0.1)
    compiled, reference = Compiled(optimizer), Compiled(oracle.optimizers[0])
    graphs = []
    for index in range(6):
        train(compiled.step, actual, [index])
        train(reference.step, expected, [index])
        graphs.append((compiled.graphs, reference.graphs))
        for lr in lrs:
            lr.mul_(0.8)
    assert_same(actual, expected)
    # SGD's second step is another one: the momentum buffers are there.
    assert graphs[-1] == graphs[1]
    assert all(own <= torchs for own, torchs in graphs)


@each_case
def test_compiled_and_eager_steps_take_turns(case):
    (actual, optimizer), (expected, _) = pair(case, VERDICTS)
    twin = ours(case, expected, VERDICTS, **HYPER)
    compiled = Compiled(optimizer)
    for index in range(6):
        train(compiled.step if index // 2 % 2 else optimizer.step, actual, [index])
        train(twin.step, expected, [index])
    # The compiled step is the for-loop, the eager one is fused.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@each_case
def test_compiled_step_reads_group_values_anew(case):
    lrs = [0.02, 0.05, 0.05, 0.1]
    actual, expected = make_params(), make_params()
    optimizer = ours(case, actual, VERDICTS, lrs, **HYPER)
    compiled = Compiled(optimizer)
    oracle = HandSplit(case, expected, VERDICTS, lrs, **HYPER)
    (torchs,) = oracle.optimizers
    reference = Compiled(torchs)
    for index in range(3):  # compiled for a value, for any value, and not again
        train(compiled.step, actual, [index])
        train(reference.step, expected, [index])
        for group in (*optimizer.param_groups, *torchs.param_groups):
            group["weight_decay"] *= 2
            group["lr"] *= 0.5
    assert_same(actual, expected)


@each_case
def test_parameters_without_gradients_stay_out_of_the_compiled_step(case):
    (actual, optimizer), (expected, oracle) = pair(case, VERDICTS)
    for params in (actual, expected):
        params[0].grad = params[2].grad = None
    train(Compiled(optimizer).step, [actual[1], actual[3]], range(3))
    train(compiled_oracle(oracle), [expected[1], expected[3]], range(3))
    assert_same(actual, expected)
    assert_same([actual[0], actual[2]], [make_params()[0], make_params()[2]])
    assert not any(optimizer.state.get(actual[position]) for position in (0, 2))


@each_case
def test_compiled_step_continues_from_a_loaded_state(case):
    (actual, optimizer), (expected, oracle) = pair(case, VERDICTS, **LOOP)
    (torchs,) = oracle.optimizers
    for params, own in ((actual, optimizer), (expected, torchs)):
        train(own.step, params, range(2))
        own.load_state_dict(copy.deepcopy(own.state_dict()))
        train(Compiled(own).step, params, range(2, 4))
    assert_same(actual, expected)


def test_policies_of_two_optimizers_stay_apart():
    runs = []
    for leaf in ("weight", "bias"):
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer = selective_optim.AdamW(
            model.parameters(), lr=0.5, weight_decay=0.5, wd_policy={leaf: 0}
        )
        torch.compile(optimizer.step, backend="eager")()
        runs.append([float(p.detach().mean()) for p in model.parameters()])
    # Without a gradient to follow, a parameter only decays: 1 - 0.5 * 0.5.
    assert runs == [[1.0, 0.75], [0.75, 1.0]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor_is_as_near_to_eager_as_for_torch():
    case = CASES[-1]
    (actual, optimizer), (expected, oracle) = pair(case, VERDICTS, **LOOP)
    (torchs,) = oracle.optimizers
    eager_params = make_params()
    eager = HandSplit(case, eager_params, VERDICTS, **HYPER, **LOOP)
    train(torch.compile(optimizer.step), actual, range(3))
    train(torch.compile(torchs.step), expected, range(3))
    train(eager.step, eager_params, range(3))
    assert gap(actual, eager_params) <= max(gap(expected, eager_params), 1e-7)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b))


# Differentiable steps: what follows can be differentiated by what went in.
# torch's own steps cannot be differentiated twice over with amsgrad, nor with plain
# momentum: both overwrite what the backward pass needs.
DIFFERENTIABLE = [
    (Case("sgd", "SGD"), VERDICTS),
    (Case("nesterov", "SGD", {"momentum": 0.9, "nesterov": True}), VERDICTS),
    (Case("adam", "Adam"), VERDICTS),
    (Case("adam-forms", "Adam"), FORMS),
    (Case("adam-maximize", "Adam", {"maximize": True}), VERDICTS),
    (Case("adamw", "AdamW"), VERDICTS),
    (Case("adamw-forms", "AdamW"), FORMS),
]


def hypergradients(build: Any, steps: int, tensor_lr: bool) -> list[Tensor]:
    """Differentiate the norm after some steps by rate, starting point and gradients."""
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    starts = [p.detach().requires_grad_() for p in make_params(torch.float64)]
    params = [start.clone() for start in starts]
    optimizer = build(params=params, lr=rate if tensor_lr else 0.05)
    scales = [torch.tensor(1.0 + i, requires_grad=True) for i in range(steps)]
    for index, scale in enumerate(scales):
        generator = torch.Generator().manual_seed(index)
        for param in params:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = scale.double() * grad
        optimizer.step()
    loss = sum((param**2).sum() for param in params) + 0 * rate
    return [loss.detach(), *torch.autograd.grad(loss, [rate, *starts, *scales])]


@pytest.mark.parametrize(
    ("case", "verdicts"), DIFFERENTIABLE, ids=lambda value: getattr(value, "id", "")
)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_gradients_flow_through_the_step_as_in_torch(case, verdicts, tensor_lr):
    arguments = {"weight_decay": 0.1, "differentiable": True}
    actual, expected = (
        hypergradients(
            partial(build, case, verdicts=verdicts, **arguments), 3, tensor_lr
        )
        for build in (ours, HandSplit)
    )
    # Autograd adds up the same terms in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    assert all(gradient.abs().max() > 0 for gradient in actual[2:])
    assert bool(actual[1] != 0) == tensor_lr


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_gradients_flow_through_decoupled_sgd(tensor_lr):
    case = Case("decoupled", "SGD", {"decoupled_weight_decay": True})
    arguments = {"weight_decay": 0.1, "differentiable": True}
    actual, expected = (
        hypergradients(
            partial(build, case, verdicts=VERDICTS, **arguments), 3, tensor_lr
        )
        for build in (ours, DecoupledFormula)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


class DecoupledFormula:
    """``param = param * (1 - lr * wd) - lr * grad`` in plain operators."""

    def __init__(
        self,
        case: Case,
        params: Sequence[Tensor],
        verdicts: Sequence[Decay],
        *,
        lr: float | Tensor,
        weight_decay: float,
        differentiable: bool,
    ) -> None:
        self.params, self.lr = params, lr
        self.decays = [weight_decay * verdict.multiplier for verdict in verdicts]

    def step(self) -> None:
        for param, wd in zip(self.params, self.decays):
            param.copy_(param.clone() * (1 - self.lr * wd) - self.lr * param.grad)
