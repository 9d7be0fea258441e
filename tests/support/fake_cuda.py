"""CUDA tensors without a device: fake ones, and a list of what is asked of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What the host waits for: it needs a value, or a size that depends on values.
WAITING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"}
COPYING = {"_to_copy", "copy_", "_copy_from", "_pin_memory"}
# Asked by guards of fake tensors, and not by those of real ones.
OF_FAKES = {"device"}


class Calls(TorchDispatchMode):
    """Lists the operations of a block; a wait or a copy off the device raises.

    Fused kernels are listed and not run: not all of them have a fake version.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITING:
            raise AssertionError(f"{func} waits for the device")
        if name not in OF_FAKES:
            self.counts[name] += 1
        if name.startswith("_fused_"):
            return None
        result = func(*args, **(kwargs or {}))
        if name in COPYING and len(devices_of((args, kwargs, result))) > 1:
            raise AssertionError(f"{func} copies between host and device")
        return result


def devices_of(tree: Any) -> set[str]:
    """Name the types of the devices that tensors in nested arguments are on."""
    leaves = _pytree.tree_leaves(tree)
    return {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}


def copy_works() -> bool:
    """Tell whether ``Tensor.copy_`` takes fake CUDA tensors in this build of torch."""
    with FakeTensorMode():
        tensor = torch.ones((), device="cuda")
        try:
            tensor.copy_(tensor)
        except RuntimeError:
            return False
    return True


def let_fakes_pass_for_plain(monkeypatch: Any) -> None:
    """Let fake tensors go the way of what they stand in for.

    The library gives them to torch's for-loop, which all of torch's tools follow.
    """
    for room in ("step.parts", "fused.guards", "step.decay_passes"):
        name = f"selective_optim.{room}.PLAIN"
        monkeypatch.setattr(name, (Tensor, torch.nn.Parameter, FakeTensor))
