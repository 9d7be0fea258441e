"""Step counters are made where they live: nothing is copied from the host.

On fake CUDA tensors, with the operations listed. A copy from pageable memory would
wait for the device, and may not happen at all while a CUDA graph is captured.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import selective_optim
from tests.support.fake_cuda import let_fakes_pass_for_plain

KINDS = {"automatic": {}, "fused": {"fused": True}, "capturable": {"capturable": True}}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Crossings(TorchDispatchMode):
    """Lists the operations that read or write both on the host and on the device."""

    def __init__(self):
        super().__init__()
        self.found, self.steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        self.steps += "_fused_adamw_" in str(func)
        if len(devices) > 1 or "_local_scalar_dense" in str(func):
            self.found.append(str(func))
        return out


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let fake tensors pass for plain ones."""
    let_fakes_pass_for_plain(monkeypatch)
    with FakeTensorMode():
        yield


def make(kind, count=6):
    params = [nn.Parameter(torch.empty(4, 4, device="cuda")) for _ in range(count)]
    for param in params:
        param.grad = torch.empty_like(param)
    return params, selective_optim.AdamW(params, **KINDS[kind])


@each_kind
@pytest.mark.parametrize("lent", [False, True])
def test_no_step_copies_from_the_host(fake_cuda, kind, lent):
    params, optimizer = make(kind)
    params[5].grad = None
    if lent:
        optimizer.state_dict()
    with Crossings() as crossings:
        optimizer.step()
        optimizer.step()
        params[0].grad, params[5].grad = None, torch.empty_like(params[5])
        optimizer.step()
        new = nn.Parameter(torch.empty(2, 2, device="cuda"))
        new.grad = torch.empty_like(new)
        optimizer.add_param_group({"params": [new]})
        optimizer.step()
        optimizer.state_dict()
        optimizer.step()
    assert crossings.steps == 5
    assert crossings.found == []
    devices = {own["step"].device.type for own in optimizer.state.values()}
    assert devices == {"cuda"}


def test_counters_from_the_host_are_copied_together(fake_cuda):
    """As a checkpoint of torch's default has them, where ours is fused."""
    _, optimizer = make("automatic")
    optimizer.step()
    saved = optimizer.state_dict()
    for own in saved["state"].values():
        own["step"] = torch.tensor(3.0, device="cpu")
    with Crossings() as crossings:
        optimizer.load_state_dict(saved)
        optimizer.step()
    assert crossings.found == ["aten._to_copy.default"]
    assert crossings.steps == 1
