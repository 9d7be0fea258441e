"""One launch for many settings of AdamW, run by Triton's interpreter on the CPU.

That its bits are those of torch's kernel is left to CUDA: torch's powers and its
kernel on the CPU are others.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selective_optim
from selective_optim import _torch
from selective_optim.step import triton_adamw
from selective_optim.step.triton_adamw import SWITCH, OneLaunch, join
from tests.support.compare import assert_same
from tests.support.devices import on_cuda

RATES = [0.05 * (i + 1) for i in range(12)]
SHAPES = [(5, 4), (4,), (1,), (1023,), (1024,), (1025,), (50, 41), (7, 3)]
BETAS, EPS = (0.9, 0.999), 1e-8
needs_triton = pytest.mark.skipif(
    not triton_adamw.find_spec("triton") or not triton_adamw.find_spec("numpy"),
    reason="Triton interprets with numpy",
)


@pytest.fixture
def interpreted(monkeypatch):
    """Have the CPU run the kernels, and let its tensors pass."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    triton_adamw.kernels()  # gives them their language
    made = [
        interpreter.InterpretedFunction(kernel)
        for kernel in (triton_adamw.gather, triton_adamw.adamw)
    ]
    monkeypatch.setattr(triton_adamw, "kernels", lambda: made)
    monkeypatch.setattr(triton_adamw, "updated", triton_adamw.updated.fn)
    monkeypatch.setattr(triton_adamw, "DEVICES", {"cpu"})
    monkeypatch.setattr(_torch, "FUSED_IN_FLOAT32", True)
    monkeypatch.setenv(SWITCH, "1")


def drawn(shapes: Any, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def bound(lr: float, wd: float, shapes: Any, step: int, **rest: Any) -> partial[Any]:
    """Bind torch's kernel to tensors, as the step does."""
    params, grads, exp_avgs = (drawn(shapes, step + i) for i in range(3))
    exp_avg_sqs = [square.square() for square in drawn(shapes, step + 3)]
    steps = [torch.tensor(float(step + i)) for i in range(len(shapes))]
    lists = params, grads, exp_avgs, exp_avg_sqs, [], steps
    own = {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    own |= {"weight_decay": wd, "amsgrad": False, "maximize": False}
    own |= {"grad_scale": None, "found_inf": None, **rest}
    return partial(_torch.fused_adamw_, *lists, **own)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Round once, as far as the interpreter does, which it does since Triton 3.9."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if hasattr(interpreter._interpreter, "fma_fp32"):
        return (a.double() * b.double() + c.double()).float()
    return a * b + c


def root(a: Tensor) -> Tensor:
    """Round the root right, which torch does not on every CPU."""
    return a.double().sqrt().float()


def powers_of(calls: list[Any]) -> Any:
    """Return the betas to the power of the counters, call by call, for each tensor."""
    steps = [step for call in calls for step in call.args[5]]
    betas = torch.tensor([[beta] * len(steps) for beta in BETAS])
    # All at once, as the library does: torch computes a lone power otherwise.
    return iter(torch.pow(betas, torch.stack(steps)).unbind(1))


def restated(call: partial[Any], powers: Any) -> list[list[Tensor]]:
    """Compute what a call makes of its tensors, each operation rounded to float32."""
    own = call.keywords
    names = ("lr", "weight_decay", "beta1", "beta2", "eps")
    lr, wd, beta1, beta2, eps = (torch.tensor(own[name]) for name in names)
    made = []
    for p, g, m, v in zip(*(call.args[i] for i in (0, 1, 2, 3))):
        power1, power2 = next(powers)
        g = -g if own["maximize"] else g
        p = fma(p, -(lr * wd), p) if own["weight_decay"] else p
        m = fma(m, beta1, fma(g, -beta1, g))
        v = fma(v, beta2, fma(g * g, -beta2, g * g))
        step_size = lr / (1 - power1)
        denom = root(v) / root(1 - power2) + eps
        made.append([p - (m * step_size) / denom, m, v])
    return made


@needs_triton
@pytest.mark.parametrize("maximize", [False, True])
def test_kernel_equals_its_formulas(interpreted, maximize):
    settings = [(0.01, 0.1), (0.02, 0.0), (0.03, 0.5)]
    calls = [
        bound(lr, wd, SHAPES[i:], 3 * i + 1, maximize=maximize)
        for i, (lr, wd) in enumerate(settings)
    ]
    powers = powers_of(calls)
    expected = [restated(call, powers) for call in calls]
    grads = [[grad.clone() for grad in call.args[1]] for call in calls]
    OneLaunch(calls)()
    for call, rows, own in zip(calls, expected, grads):
        actual = [list(row) for row in zip(*(call.args[i] for i in (0, 2, 3)))]
        assert_same(actual, rows)
        assert_same(call.args[1], own)


@needs_triton
def test_kernel_agrees_with_torchs(interpreted):
    ours, theirs = (
        [bound(lr, 0.1, SHAPES, i) for i, lr in enumerate(RATES, start=1)]
        for _ in range(2)
    )
    OneLaunch(ours)()
    for call in theirs:
        call()
    for one, other in zip(ours, theirs):
        for i in (0, 2, 3):
            # torch's on the CPU is another; steps of up to 0.6 over small moments.
            torch.testing.assert_close(one.args[i], other.args[i], rtol=2e-3, atol=5e-5)


@needs_triton
def test_neighbors_in_memory_are_left_alone(interpreted):
    block = torch.zeros(3000)
    call = bound(0.1, 0.1, [(1030,)], 1)
    call.args[0][0] = block[1000:2030]  # not aligned for wide loads
    OneLaunch([call])()
    assert block[1000:2030].all()
    assert not block[:1000].any()
    assert not block[2030:].any()


@needs_triton
def test_addresses_are_read_at_every_step(interpreted):
    call, other = bound(0.1, 0.1, SHAPES, 1), bound(0.1, 0.1, SHAPES, 1)
    one = OneLaunch([call])
    one()
    one_of_other = OneLaunch([other])
    one_of_other()
    for each in (call, other):
        each.args[1][:] = drawn(SHAPES, 99)  # as new gradients come
    call.args[0][0].set_(call.args[0][0].clone())
    one()
    one_of_other()
    assert_same(call.args[0], other.args[0])


def make(name: str, device: str = "cpu", **arguments: Any) -> tuple[list[Any], Any]:
    """Make parameters in groups of a rate each, and an optimizer of them."""
    params = [nn.Parameter(t.to(device)) for t in drawn([(5, 4), (4,)] * len(RATES), 0)]
    groups = [
        {"params": params[2 * i : 2 * i + 2], "lr": lr} for i, lr in enumerate(RATES)
    ]
    own = {"weight_decay": 0.1, "wd_policy": "matrices", **arguments}
    return params, getattr(selective_optim, name)(groups, **own)


def train(params: list[Any], optimizer: Any, steps: int, without: int = -1) -> None:
    for step in range(steps):
        grads = drawn([param.shape for param in params], 100 + step)
        for position, (param, grad) in enumerate(zip(params, grads)):
            absent = position == without and step == 2
            param.grad = None if absent else grad.to(param.device)
        optimizer.step()


def calls_of(optimizer: Any) -> list[Any]:
    return optimizer._stepper._plan._program.calls


@needs_triton
def test_step_of_many_rates_is_one_call(interpreted, monkeypatch):
    actual, optimizer = make("AdamW")
    train(actual, optimizer, 5, without=3)
    assert [type(call) for call in calls_of(optimizer)] == [OneLaunch]
    monkeypatch.delenv(SWITCH)
    expected, plain = make("AdamW")
    train(expected, plain, 5, without=3)
    assert len(calls_of(plain)) == 2 * len(RATES)
    # As above, over five steps of up to 0.6.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    counters = [[o.state[p]["step"] for p in o.state] for o in (optimizer, plain)]
    assert_same(*counters)


@needs_triton
def test_counters_of_a_call_that_fails_stand_as_before(interpreted, monkeypatch):
    params, optimizer = make("AdamW")
    train(params, optimizer, 3)
    monkeypatch.setattr(OneLaunch, "_launch", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(params, optimizer, 1)
    assert {own["step"].item() for own in optimizer.state.values()} == {3.0}


LEFT = {
    "amsgrad": {"amsgrad": True},
    "scaler": {"grad_scale": torch.ones(())},
    "tensor rate": {"lr": torch.ones(())},
}


@pytest.mark.parametrize("rest", LEFT.values(), ids=LEFT)
def test_what_the_kernel_does_not_take_is_left_to_torch(monkeypatch, rest):
    monkeypatch.setattr(triton_adamw, "DEVICES", {"cpu"})
    calls = [bound(**{"lr": lr, **rest}, wd=0.1, shapes=[(2,)], step=1) for lr in RATES]
    assert join(calls, range(1, 13), pytest.fail) == (calls, [*range(1, 13)])


@pytest.mark.parametrize(("name", "own"), [("Adam", {}), ("SGD", {"momentum": 0.9})])
def test_other_kernels_are_left_to_torch(monkeypatch, name, own):
    monkeypatch.setattr(triton_adamw, "DEVICES", {"cpu"})
    monkeypatch.setattr(triton_adamw, "switched_on", lambda: True)
    params, optimizer = make(name, **own)
    train(params, optimizer, 3)
    assert len(calls_of(optimizer)) == 2 * len(RATES)


def test_calls_in_a_row_are_joined_and_their_ends_follow(monkeypatch):
    kinds = ["x", "x", *"aaaaaaaa", "y", *"bbbbbbbbb", "c", "c"]
    calls = list(map("{}{}".format, kinds, range(len(kinds))))
    known = {"a", "b", "c"}
    monkeypatch.setattr(
        triton_adamw, "_kind", lambda call: call[0] if call[0] in known else None
    )
    ends = list(accumulate([1] * len(kinds)))
    joined, their_ends = join(calls, ends, lambda run: f"{len(run)}{run[0][0]}")
    assert joined == ["x0", "x1", "8a", "y10", "9b", "c20", "c21"]
    assert their_ends == [1, 2, *[3] * 8, 4, *[5] * 9, 6, 7]


def test_it_is_off_by_default(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert not triton_adamw.switched_on()


@needs_triton
@pytest.mark.skipif(not _torch.FUSED_IN_FLOAT32, reason="comes with an older Triton")
def test_compiled_for_a_device_it_rounds_where_torchs_kernel_does():
    """Compiled without a device; torch's machine code has these for every element."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    _, kernel = triton_adamw.kernels()
    types = {"pointers": "*i64", "numbers": "*fp32", "powers": "*fp32"}
    types |= {"chunks": "*i64", "count": "i32"}
    fixed = {"maximize": False, "wide": triton_adamw.WIDE, "size": triton_adamw.SIZE}
    signature = {**types, **dict.fromkeys(fixed, "constexpr")}
    source = compiler.ASTSource(kernel, signature, constexprs=fixed)
    target = backends.GPUTarget("cuda", 90, 32)
    options = {"enable_fp_fusion": False, "num_warps": 4}
    ptx = compiler.compile(source, target=target, options=options).asm["ptx"]
    each = triton_adamw.SIZE // (4 * 32)  # elements of a thread
    for operation, count in {
        "fma.rn.f32": 5 * each,  # decay, and two for each moment
        "sqrt.rn.f32": each + 1,  # and one for the correction
        "div.rn.f32": 2 * each + 1,
        "mul.rn.f32": 2 * each + 1,  # grad * grad, exp_avg * step_size; lr * decay
    }.items():
        assert len(re.findall(re.escape(operation), ptx)) == count, operation
    assert ".approx" not in ptx
    assert "ld.global.v4" in ptx


@on_cuda
@pytest.mark.skipif(not triton_adamw.find_spec("triton"), reason="compiles with Triton")
@pytest.mark.skipif(not _torch.FUSED_IN_FLOAT32, reason="torch computes otherwise")
@pytest.mark.parametrize("maximize", [False, True])
def test_bits_are_those_of_torchs_kernel(monkeypatch, device, maximize):
    expected, plain = make("AdamW", device, maximize=maximize)
    train(expected, plain, 30, without=3)
    monkeypatch.setenv(SWITCH, "1")
    actual, optimizer = make("AdamW", device, maximize=maximize)
    train(actual, optimizer, 30, without=3)
    assert [type(call) for call in calls_of(optimizer)] == [OneLaunch]
    assert_same(actual, expected)
    states = [[o.state[p] for p in o.state] for o in (optimizer, plain)]
    assert_same(*states)


@on_cuda
@pytest.mark.skipif(not triton_adamw.find_spec("triton"), reason="compiles with Triton")
@pytest.mark.skipif(not _torch.FUSED_IN_FLOAT32, reason="torch computes otherwise")
def test_powers_are_those_of_torchs_kernel(device):
    """Over a long training; Triton's own power differs in the last bit."""
    betas = [(0.9, 0.999), (0.8, 0.95), (0.95, 0.9999)]
    ours, theirs = (
        [
            bound(0.01 * (i + 1), 0.1, SHAPES, 10 ** (i % 6), beta1=b1, beta2=b2)
            for i, (b1, b2) in enumerate(betas * 6)
        ]
        for _ in range(2)
    )
    moved = [
        [
            partial(
                call.func,
                *([t.to(device) for t in each] for each in call.args),
                **call.keywords,
            )
            for call in calls
        ]
        for calls in (ours, theirs)
    ]
    OneLaunch(moved[0])()
    for call in moved[1]:
        call()
    for one, other in zip(*moved):
        assert_same(list(one.args), list(other.args))


@needs_triton
def test_chunks_are_those_of_the_sizes(interpreted):
    shapes = [(0, 3), (1,), (1023,), (1024,), (0,), (1025,), (3, 1000), (0,)]
    call = bound(0.1, 0.1, shapes, 1)
    one = OneLaunch([call])
    one()
    sizes = [param.numel() for param in call.args[0]]
    expected = [
        [tensor, chunk, size - 1024 * chunk]
        for tensor, size in enumerate(sizes)
        for chunk in range((size + 1023) // 1024)
    ]
    assert one._chunks.tolist() == expected
    assert one._grid == (len(expected),)


@needs_triton
def test_call_of_empty_tensors_launches_nothing(interpreted, monkeypatch):
    monkeypatch.setattr(OneLaunch, "_launch", lambda self: pytest.fail("launches"))
    OneLaunch([bound(0.1, 0.1, [(0, 3), (0,)], 1)])()


@needs_triton
def test_tables_are_not_made_while_a_graph_is_captured(interpreted, monkeypatch):
    """What is copied then is recorded and not done; an eager step would read it."""
    capturing = True
    monkeypatch.setattr(_torch, "is_capturing", lambda device: capturing)
    made = []
    on_device = OneLaunch._on_device

    def noted(self, *args):
        made.append(capturing)
        return on_device(self, *args)

    monkeypatch.setattr(OneLaunch, "_on_device", noted)
    captured, eager = bound(0.1, 0.1, SHAPES, 1), bound(0.1, 0.1, SHAPES, 1)
    one, torchs = OneLaunch([captured]), partial(eager)
    one()
    torchs()
    assert_same(captured.args[0], eager.args[0])
    capturing = False
    one()
    assert made == [False] * 3
    powers = powers_of([eager])
    (expected,) = [restated(eager, powers)]
    actual = [list(row) for row in zip(*(captured.args[i] for i in (0, 2, 3)))]
    assert_same(actual, expected)


@needs_triton
def test_zeros_keep_the_sign_that_torch_gives_them(interpreted):
    """As at the first step of a warm-up, with a rate of 0; betas of 0 are rare."""
    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    calls = [
        bound(0.0, 0.1, [(4,)], 1, maximize=maximize, beta1=beta)
        for maximize, beta in [(False, 0.9), (True, 0.9), (False, 0.0), (True, 0.0)]
    ]
    for call in calls:
        call.args[0][0].copy_(zeros)
        call.args[1][0].copy_(zeros.flip(0))
        call.args[2][0].copy_(-zeros)
    steps = torch.stack([call.args[5][0] for call in calls])
    betas = torch.tensor(
        [[call.keywords[b] for call in calls] for b in ("beta1", "beta2")]
    )
    powers = iter(torch.pow(betas, steps).unbind(1))
    for call in calls:
        (expected,) = restated(call, powers)
        OneLaunch([call])()
        for i, value in zip((0, 2, 3), expected):
            assert torch.equal(call.args[i][0].signbit(), value.signbit()), i


@pytest.mark.parametrize("which", [0, 2, 3], ids=["params", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_left_to_torch(monkeypatch, which, dtype):
    monkeypatch.setattr(triton_adamw, "DEVICES", {"cpu"})
    calls = [bound(lr, 0.1, [(2,)], 1) for lr in RATES]
    assert [*map(type, join(calls, range(1, 13), lambda run: "one")[0])] == [str]
    for call in calls:
        call.args[which][:] = [tensor.to(dtype) for tensor in call.args[which]]
    assert join(calls, range(1, 13), pytest.fail) == (calls, [*range(1, 13)])


@needs_triton
def test_rates_that_change_are_read(interpreted, monkeypatch):
    """As a schedule has them, and as `torch.optim.lr_scheduler` sets them."""
    outcomes = []
    for switch in ("1", "0"):
        monkeypatch.setenv(SWITCH, switch)
        params, optimizer = make("AdamW")
        for _ in range(3):
            train(params, optimizer, 1)
            for group in optimizer.param_groups:
                group["lr"] *= 0.3
        outcomes.append(params)
        joined = [type(call) for call in calls_of(optimizer)] == [OneLaunch]
        assert joined is (switch == "1")
    # As above, over three steps of up to 0.6.
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-5)


@on_cuda
@pytest.mark.skipif(not triton_adamw.find_spec("triton"), reason="compiles with Triton")
@pytest.mark.skipif(not _torch.FUSED_IN_FLOAT32, reason="torch computes otherwise")
@pytest.mark.parametrize("maximize", [False, True])
def test_zeros_have_the_sign_that_torchs_kernel_gives_them(device, maximize):
    def made() -> list[Any]:
        calls = [
            bound(lr, wd, [(4,)], 1, maximize=maximize, beta1=beta)
            for lr in (0.0, 0.1)
            for wd in (0.0, 0.1)
            for beta in (0.0, 0.9)
        ]
        for call in calls:
            for i, signs in ((0, [-1, 1, -1, 1]), (1, [1, 1, -1, -1])):
                call.args[i][0].copy_(torch.tensor(signs) * 0.0)
            call.args[2][0].zero_()
            for tensors in call.args:
                tensors[:] = [tensor.to(device) for tensor in tensors]
        return calls

    ours, theirs = made(), made()
    OneLaunch(ours)()
    for one, other in zip(ours, theirs):
        other()
        for i in (0, 2, 3):
            assert torch.equal(one.args[i][0].signbit(), other.args[i][0].signbit())


@needs_triton
@pytest.mark.skipif(not _torch.FUSED_IN_FLOAT32, reason="comes with an older Triton")
@pytest.mark.parametrize("wide", [1, triton_adamw.WIDE])
def test_tensors_may_have_more_elements_than_32_bits_count(wide):
    """Compiled without a device: every address of an element is reckoned in 64."""
    compiler = pytest.importorskip("triton.compiler")
    backends = pytest.importorskip("triton.backends.compiler")
    _, kernel = triton_adamw.kernels()
    fixed = {"maximize": True, "wide": wide, "size": triton_adamw.SIZE}
    types = {"pointers": "*i64", "numbers": "*fp32", "powers": "*fp32"}
    types |= {"chunks": "*i64", "count": "i32", **dict.fromkeys(fixed, "constexpr")}
    source = compiler.ASTSource(kernel, types, constexprs=fixed)
    target = backends.GPUTarget("cuda", 90, 32)
    own = {"enable_fp_fusion": False}
    text = compiler.compile(source, target=target, options=own).asm["ttir"]
    places = re.findall(r"tt\.addptr .*!tt\.ptr<f32>>, tensor<1024xi(\d+)>", text)
    assert places == ["64"] * 4


def test_every_launch_says_that_nothing_is_to_be_contracted(monkeypatch):
    """Triton 3.9 warns where it is not said, and 3.10 does otherwise."""
    said = []

    class Launched:
        def __getitem__(self, grid):
            return lambda *args, enable_fp_fusion=None, **own: said.append(
                enable_fp_fusion
            )

    monkeypatch.setattr(triton_adamw, "kernels", lambda: (Launched(), Launched()))
    OneLaunch([bound(0.1, 0.1, SHAPES, 1)])()
    assert said == [False, False]
