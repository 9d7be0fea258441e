"""Small tensors go through the fused kernels on one thread; nobody else notices."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from selective_optim import _torch
from selective_optim.step.parts import ONE_THREAD
from tests.support import twins
from tests.support.twins import CLASSES, assert_twins, ours, torchs

each_name = pytest.mark.parametrize("name", CLASSES)
KERNELS = {"SGD": "fused_sgd_", "Adam": "fused_adam_", "AdamW": "fused_adamw_"}
SMALL, LARGE = (3, 5), (ONE_THREAD + 1, 1)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch):
    """List, kernel call by kernel call, the threads and the sizes that it had."""
    calls = []
    for name in KERNELS.values():
        kernel = getattr(_torch, name)

        def noted(params, *args, _kernel=kernel, **kwargs):
            calls.append((torch.get_num_threads(), {p.numel() for p in params}))
            return _kernel(params, *args, **kwargs)

        monkeypatch.setattr(_torch, name, noted)
    return calls


@pytest.fixture
def settings(monkeypatch):
    """List the numbers of threads that were set."""
    numbers = []
    setter = _torch.set_threads

    def noted(number):
        numbers.append(number)
        setter(number)

    monkeypatch.setattr(_torch, "set_threads", noted)
    return numbers


def begun(name, groups, noted):
    """Make an optimizer after its first step, in which the class begins momentum."""
    optimizer = ours(name, "automatic", groups)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    twins.step(params, optimizer, 0)
    noted.clear()
    return optimizer


@pytest.mark.skipif(_torch.set_threads is None, reason="torch without OpenMP")
@each_name
def test_small_tensors_run_on_one_thread_and_large_ones_on_all(name, seen):
    params = twins.make_params([SMALL, LARGE, (ONE_THREAD, 1), SMALL])
    optimizer = begun(name, params, seen)
    for number in range(3):
        twins.step(params, optimizer, number)
        assert seen == [(2, {ONE_THREAD + 1}), (1, {15, ONE_THREAD})]
        seen.clear()
        assert torch.get_num_threads() == 2


@each_name
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_tensors_of_one_side_share_one_kernel_call(name, seen, shape):
    params = twins.make_params([shape] * 4)
    optimizer = begun(name, params, seen)
    for number in range(3):
        twins.step(params, optimizer, number)
    assert len(seen) == 3


@each_name
def test_rate_per_parameter_sets_the_threads_twice(name, settings):
    params = twins.make_params([SMALL] * 10)
    groups = [{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)]
    optimizer = begun(name, groups, settings)
    twins.step(params, optimizer, 1)
    assert settings == [1, 2]


@each_name
@pytest.mark.parametrize("kind", ["automatic", "fused", "foreach", "for-loop"])
def test_one_thread_is_left_alone(name, kind, settings):
    torch.set_num_threads(1)
    params = twins.make_params([SMALL, LARGE])
    optimizer = ours(name, kind, params)
    for number in range(3):
        twins.step(params, optimizer, number)
    assert settings == []


@each_name
def test_threads_that_change_between_steps_are_noticed_without_a_new_plan(name, seen):
    params = twins.make_params([SMALL, LARGE])
    optimizer = begun(name, params, seen)
    twins.step(params, optimizer, 0)
    before = optimizer._stepper.plans
    for number, threads in enumerate([1, 2, 3, 1], start=1):
        torch.set_num_threads(threads)
        seen.clear()
        twins.step(params, optimizer, number)
        alone, together = [(1, {15})], [(threads, {ONE_THREAD + 1})]
        merged = [(1, {15, ONE_THREAD + 1})]
        expected = merged if threads == 1 else [*together, *alone]
        # A matrix decays and a second one, too: one setting, so sizes alone part them.
        assert seen == expected
        assert torch.get_num_threads() == threads
    assert optimizer._stepper.plans == before


@each_name
@pytest.mark.parametrize("large", [False, True])
def test_threads_are_the_callers_again_after_an_error(name, monkeypatch, large):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    params = twins.make_params([LARGE, SMALL] if large else [SMALL, (3,)])
    optimizer = ours(name, "automatic", params)
    twins.step(params, optimizer, 0)
    optimizer._stepper.forget()
    monkeypatch.setattr(_torch, KERNELS[name], broken)
    with pytest.raises(RuntimeError, match="broken"):
        twins.step(params, optimizer, 1)
    assert torch.get_num_threads() == 2


@each_name
def test_other_threads_are_not_disturbed(name):
    """They keep their number, also those that begin during a step."""
    params = twins.make_params([SMALL] * 200)
    optimizer = ours(name, "automatic", params)
    seen, going = set(), True

    def look():
        seen.add(torch.get_num_threads())

    def keep_looking():
        while going:
            look()
            young = threading.Thread(target=look)
            young.start()
            young.join()

    looking = threading.Thread(target=keep_looking)
    looking.start()
    for number in range(50):
        twins.step(params, optimizer, number)
    going = False
    looking.join()
    assert seen == {2}


# Around cache lines, vector widths, the chunks of two threads, and the cut.
SIZES = [
    *range(1, 36),
    *(size + d for size in (64, 128, 256, 1024, ONE_THREAD, 8192) for d in (-1, 0, 1)),
]


@each_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_bits_are_those_of_torch_on_all_threads(name, dtype, scaled):
    half_sgd = name == "SGD" and dtype == torch.bfloat16
    if half_sgd and not _torch.HALF_SGD_ON_CPU:
        pytest.skip("torch's fused SGD in half precision is wrong on the CPU")
    left = []
    for make in (ours, torchs):
        drawn = twins.make_params([(size, 1) for size in SIZES])
        params = [nn.Parameter(param.to(dtype)) for param in drawn]
        optimizer = make(name, "fused", params)
        optimizer.grad_scale = torch.tensor(4.0) if scaled else None
        optimizer.found_inf = torch.tensor(0.0) if scaled else None
        for number in range(4):
            twins.step(params, optimizer, number)
        left.append((params, optimizer))
    assert_twins(left[0][0], left[1][0], left[0][1], left[1][1])
