"""Every private name of torch that the library uses, and the facts behind them.

An upgrade of torch has this one file to read. The names are checked at import, so
a torch without one fails with a sentence and not inside a step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_F = TypeVar("_F", bound=Callable[..., Any])
# Written ``module:attribute``; torch.optim removes its modules from its own namespace.
NAMES = (
    "torch:_fused_adam_",
    "torch:_fused_adamw_",
    "torch:_fused_sgd_",
    "torch:_foreach_mul_",
    "torch:_amp_foreach_non_finite_check_and_unscale_",
    "torch:_disable_dynamo",
    "torch:_C._dynamo.guards.TensorGuards",
    "torch.optim:Adam._init_group",
    "torch.optim:SGD._init_group",
    "torch.optim.adam:adam",
    "torch.optim.sgd:sgd",
    "torch.optim.optimizer:_device_dtype_check_for_fused",
    "torch.optim.optimizer:_get_scalar_dtype",
    "torch.optim.optimizer:_use_grad_for_differentiable",
    "torch.utils._foreach_utils:_get_fused_kernels_supported_devices",
)


def _lookup(name: str) -> Any:
    module, _, path = name.partition(":")
    return attrgetter(path)(import_module(module))


def missing_names(names: Sequence[str] = NAMES) -> list[str]:
    """List the private names that the torch at hand does not have."""

    def absent(name: str) -> bool:
        try:
            _lookup(name)
        except (AttributeError, ImportError):
            return True
        return False

    return [name.replace(":", ".") for name in names if absent(name)]


def require_names(names: Sequence[str] = NAMES) -> None:
    """Check the torch at hand.

    Raises:
        ImportError: It lacks a name that the library uses.
    """
    if missing := missing_names(names):
        raise ImportError(
            f"selective_optim uses {', '.join(missing)}, which torch "
            f"{torch.__version__} does not have. Install torch 2.7 or later, or a "
            f"newer selective_optim."
        )


require_names()

fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_
fused_sgd_ = torch._fused_sgd_
foreach_mul_ = torch._foreach_mul_
adam = _lookup("torch.optim.adam:adam")
sgd = _lookup("torch.optim.sgd:sgd")
disable_dynamo: Callable[[_F], _F] = _lookup("torch:_disable_dynamo")
require_fused_support = _lookup("torch.optim.optimizer:_device_dtype_check_for_fused")
scalar_dtype = _lookup("torch.optim.optimizer:_get_scalar_dtype")
use_grad_for_differentiable = _lookup(
    "torch.optim.optimizer:_use_grad_for_differentiable"
)
_TensorGuards = _lookup("torch:_C._dynamo.guards.TensorGuards")

FUSED_DEVICES = frozenset(
    _lookup("torch.utils._foreach_utils:_get_fused_kernels_supported_devices")()
)
FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
# Fused SGD in half precision is wrong on the CPU before torch 2.15: it was measured
# off by the size of the parameter itself in 2.7 and 2.13.
_RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
HALF_SGD_ON_CPU = _RELEASE >= (2, 15)


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Run torch's check of ``capturable``, whatever this torch calls it."""
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return


def has_state_dict_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether hooks of ``state_dict`` are shown the state, and may keep it.

    A torch that calls them otherwise is taken to have some.
    """
    names = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    return any(bool(getattr(optimizer, name, True)) for name in names)


def not_to_be_patched(step: _F) -> _F:
    """Keep ``LRScheduler`` from patching a step to learn of calls that go elsewhere.

    It leaves alone what bears its mark (``torch/optim/lr_scheduler.py``, 2.7 to 2.15).
    """
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's mark
    return step


class Proof:
    """A record of tensors' type, dtype, device, layout, shape and strides.

    The check is one call of the guard that compiled code uses: 0.08 ms for 2,000
    tensors, where asking each for its dtype alone takes 0.09 ms.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = _TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        )

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Tell whether as many tensors, given in the same order, look the same."""
        return bool(self._guards.check(*tensors))


def dtensor_class() -> type | None:
    """Return ``DTensor`` if anyone in the process has imported it.

    Raises:
        ImportError: It lacks a name that the library uses.
    """
    module = sys.modules.get("torch.distributed.tensor")
    cls: type | None = getattr(module, "DTensor", None)
    if cls is not None and not (
        hasattr(cls, "_local_tensor") and hasattr(cls, "_spec")
    ):
        require_names(["torch.distributed.tensor:DTensor._local_tensor"])
        require_names(["torch.distributed.tensor:DTensor._spec"])
    return cls


local_tensor = attrgetter(
    "_local_tensor"
)  # a DTensor's shard on this rank, undispatched
spec_of = attrgetter("_spec")


def placement(spec: Any) -> Any:
    """Return where a ``DTensor`` of this spec lives: its mesh and placements."""
    return spec.mesh, spec.placements


def unscale_(grads: Sequence[Tensor], grad_scale: Tensor) -> None:
    """Divide gradients of one device by the scale, as ``GradScaler.unscale_`` does."""
    device = grads[0].device
    inverse = grad_scale.double().reciprocal().float().to(device)
    ignored = torch.zeros((), dtype=torch.float32, device=device)
    values = [grad._values() if grad.is_sparse else grad for grad in grads]
    torch._amp_foreach_non_finite_check_and_unscale_(values, ignored, inverse)


def is_flattened(param: Tensor) -> bool:
    """Tell whether FSDP1 made this parameter a piece of a flat one."""
    return bool(getattr(param, "_fsdp_flattened", False)) or is_flat_parameter(param)


def is_flat_parameter(param: Tensor) -> bool:
    """Tell whether this is FSDP1's flat parameter itself."""
    return bool(getattr(param, "_is_flat_param", False))


def original_shapes(root: nn.Module) -> dict[int, torch.Size]:
    """Map ``id(parameter)`` to the shape it had before FSDP1 flattened it."""
    shapes: dict[int, torch.Size] = {}
    for module in root.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        for param, shape in zip(
            getattr(flat, "_params", None) or (), getattr(flat, "_shapes", ())
        ):
            shapes[id(param)] = torch.Size(shape)
    return shapes
