"""Every private name of torch that the library uses, and what serves without it.

An upgrade of torch has this one file to read. Each name has a fallback that gives
the same bits and is slower; where one is missing, a warning at import says so.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_F = TypeVar("_F", bound=Callable[..., Any])
HALF = (torch.float16, torch.bfloat16)
_RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_lost: list[str] = []


def _find(name: str, loss: str, instead: Any = None) -> Any:
    """Look up ``module:attribute``, or note what is lost and serve ``instead``.

    torch.optim removes its modules from its own namespace, hence the two parts.
    """
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(import_module(module))
    except (AttributeError, ImportError):
        _lost.append(f"{name.replace(':', '.')} ({loss})")
        return instead


# Kernels. Without one, torch's functional runs, which every bucket can do.
NO_FUSED = "steps are not fused"
fused_adam_ = _find("torch:_fused_adam_", NO_FUSED)
fused_adamw_ = _find("torch:_fused_adamw_", NO_FUSED)
fused_sgd_ = _find("torch:_fused_sgd_", NO_FUSED)
# Fused SGD in half precision is wrong on the CPU before torch 2.15: it was measured
# off by the size of the parameter itself in 2.7 and 2.13.
HALF_SGD_ON_CPU = _RELEASE >= (2, 15)
# Fused Adam computes float32 in float32 on CUDA, by the machine code of 2.11 and 2.15;
# that of 2.7 in double precision. What came between was not looked at.
FUSED_IN_FLOAT32 = _RELEASE >= (2, 11)
# Adam's fused CUDA kernels read moments in bfloat16 beside parameters in float32
# (functional-adamw-bf16-state in the documentation of 2.15).
FUSED_DTYPES = frozenset({torch.float32, torch.float64, *HALF})
FUSED_DEVICES = frozenset(
    _find(
        "torch.utils._foreach_utils:_get_fused_kernels_supported_devices",
        "fused on the CPU and CUDA alone",
        lambda: ["cpu", "cuda"],
    )()
)


def _mul_each_(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


def _add_each_(tensors: Sequence[Tensor], amount: float | Tensor) -> None:
    for tensor in tensors:
        tensor.add_(amount)


EACH = "tensor by tensor"
foreach_mul_ = _find("torch:_foreach_mul_", f"decoupled SGD {EACH}", _mul_each_)
_foreach_add_ = _find("torch:_foreach_add_", f"counters advance {EACH}")


def foreach_add_(tensors: Sequence[Tensor], amount: float | Tensor) -> None:
    """Add one amount to every tensor, without waiting where it is on a device.

    torch's binding takes a tensor for a number, which the host must read, unless it
    is given what goes with tensors alone (2.7 to 2.15).
    """
    if _foreach_add_ is None:
        _add_each_(tensors, amount)
    elif isinstance(amount, Tensor):
        _foreach_add_(tensors, amount, alpha=1)
    else:
        _foreach_add_(tensors, amount)


def _by_class(cls: type[torch.optim.Optimizer], entries: Sequence[str]) -> Any:
    """Stand in for torch's functional: a throw-away optimizer given the state."""

    def functional(
        params: list[Tensor], grads: list[Tensor], *lists: list[Any], **arguments: Any
    ) -> None:
        for name in ("has_complex", "has_sparse_grad"):
            arguments.pop(name, None)
        # SGD's functional is not told, it traces what autograd follows.
        arguments.setdefault("differentiable", torch.is_grad_enabled())
        if "beta1" in arguments:
            arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
        optimizer = cls(params, **arguments)
        kept = [param.grad for param in params]
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            own = {e: values[i] for e, values in zip(entries, lists) if values}
            optimizer.state[param].update(own)
            param.grad = grad
        try:
            optimizer.step()
        finally:
            for param, before in zip(params, kept, strict=True):
                param.grad = before
        for i, param in enumerate(params):
            for entry, values in zip(entries, lists):
                if values:
                    values[i] = optimizer.state[param].get(entry)

    return functional


SLOW_FUNCTIONAL = "for-loop and foreach by throw-away optimizers"
adam = _find("torch.optim.adam:adam", SLOW_FUNCTIONAL) or _by_class(
    torch.optim.Adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
)
sgd = _find("torch.optim.sgd:sgd", SLOW_FUNCTIONAL) or _by_class(
    torch.optim.SGD, ("momentum_buffer",)
)
disable_dynamo: Callable[[_F], _F] = _find(
    "torch:_disable_dynamo", "nothing is slower", torch.compiler.disable
)


def run_as_is(step: _F) -> _F:
    """Keep a function from being compiled, though not what it calls."""
    return disable_dynamo(step, recursive=False)  # type: ignore[call-arg]  # torch's


def _check_fused(param: Tensor, cuda_unsupported: bool = False) -> None:
    if param.device.type not in FUSED_DEVICES or not torch.is_floating_point(param):
        raise RuntimeError(
            f"`fused=True` requires floating point parameters on one of "
            f"{sorted(FUSED_DEVICES)}, not {param.dtype} on {param.device.type}."
        )


require_fused_support = _find(
    "torch.optim.optimizer:_device_dtype_check_for_fused",
    "another error text for fused=True",
    _check_fused,
)


def _with_grad_mode(step: _F) -> _F:
    @wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return stepped  # type: ignore[return-value]  # wraps keeps the signature


# torch unwraps two layers to compile a whole step: this one, and that of its hooks.
use_grad_for_differentiable: Callable[[_F], _F] = _find(
    "torch.optim.optimizer:_use_grad_for_differentiable",
    "compiled steps need more memory",
    _with_grad_mode,
)


class _PythonGuards:
    """What :class:`TensorProof` records, compared in Python."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._seen = list(map(_traits, tensors))

    def check(self, *tensors: Tensor | None) -> bool:
        return list(map(_traits, tensors)) == self._seen


def _traits(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    where = (type(tensor), tensor.dtype, tensor.device, tensor.layout)
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return (*where, tensor.shape, strides, tensor.is_neg())


_TensorGuards = _find(
    "torch:_C._dynamo.guards.TensorGuards", "0.5 us more per tensor and step"
)


class TensorProof:
    """A record of tensors' type, dtype, device, layout, shape and strides.

    The check is one call of the guard that compiled code uses: 0.02 us per tensor,
    where asking each for its dtype alone takes 0.05.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards: Any = (
            _PythonGuards(tensors)
            if _TensorGuards is None
            else _TensorGuards(
                *tensors,
                dynamic_dims_sizes=[list(t.shape) for t in tensors],
                dynamic_dims_strides=[list(t.stride()) for t in tensors],
            )
        )

    def holds(self, tensors: Iterable[Tensor | None]) -> bool:
        """Tell whether as many tensors, given in the same order, look the same.

        The guard also asks for the dispatch state, as under autocast; ``False``
        then says nothing of the tensors.
        """
        return bool(self._guards.check(*tensors))


_unscale = _find(
    "torch:_amp_foreach_non_finite_check_and_unscale_", f"unscaling {EACH}"
)


def unscale_(grads: Sequence[Tensor], grad_scale: Tensor) -> None:
    """Divide gradients of one device by the scale, as ``GradScaler.unscale_`` does."""
    device = grads[0].device
    inverse = grad_scale.double().reciprocal().float().to(device)
    values = [grad._values() if grad.is_sparse else grad for grad in grads]
    if _unscale is None:
        _mul_each_(values, inverse)
    else:
        _unscale(values, torch.zeros((), dtype=torch.float32, device=device), inverse)


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Run torch's check of ``capturable``, whatever this torch calls it."""
    for name in (
        "_accelerator_graph_capture_health_check",
        "_cuda_graph_capture_health_check",
    ):
        if hasattr(optimizer, name):
            getattr(optimizer, name)()
            return


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, when nothing may be copied to it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def not_to_be_patched(step: _F) -> _F:
    """Keep ``LRScheduler`` from patching a step to learn of calls that go elsewhere.

    It leaves alone what bears its mark (``torch/optim/lr_scheduler.py``, 2.7 to 2.15).
    """
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's mark
    return step


# Under which ``LRScheduler`` notes that the optimizer stepped; without, it warns.
STEP_NOTE = "_opt_called"


# Hooks. torch wraps the step of each class that is instantiated, to run them.


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of a method, without the wrapper that runs hooks."""
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]  # functools.wraps sets it
    return getattr(step, "__func__", step)


def hooks_of(optimizer: torch.optim.Optimizer, kind: str) -> list[Any]:
    """List the hooks of a kind: ``"state_dict_pre"``, ``"load_state_dict_post"``."""
    return list(getattr(optimizer, f"_optimizer_{kind}_hooks", {}).values())


@contextmanager
def without_hooks(optimizer: torch.optim.Optimizer, *kinds: str) -> Iterator[None]:
    """Keep an optimizer's own hooks of these kinds from running."""
    names = [f"_optimizer_{kind}_hooks" for kind in kinds]
    kept = {name: vars(optimizer).get(name, {}) for name in names}
    vars(optimizer).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        vars(optimizer).update(kept)


# Under which wrappers (DDP, compiled modules, FSDP1, checkpointing) register what they
# wrap, so that it stands in the names of parameters.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)


# Modules. torch's methods copy and deduplicate; these are the dicts behind them.


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the modules registered on a module, each under every name it has."""
    return [(k, m) for k, m in module._modules.items() if m is not None]


def child_of(module: nn.Module, key: str) -> nn.Module | None:
    """Return the module registered under a name."""
    registered = module._modules
    # Not `get`: scripted modules keep theirs in mappings without it.
    return registered[key] if key in registered else None  # noqa: SIM401


def own_parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List the parameters registered on a module itself."""
    return [(k, p) for k, p in module._parameters.items() if p is not None]


# A module's own parameters by name, ``None`` among them.
registered = attrgetter("_parameters")


# torch's private bases of all batch and instance norms, which mmengine tests for.
NORM_BASES = (nn.SyncBatchNorm.__mro__[1], nn.InstanceNorm1d.__mro__[1])


# Threads.


def _find_thread_setter() -> Callable[[int], object] | None:
    """Find what sets the number of threads of this Python thread's parallel regions.

    ``torch.set_num_threads`` sets it for the process: threads that begin their first
    parallel work meanwhile keep it, and oneDNN's caches are cleared. OpenMP's own
    setting is one per thread. It is looked up through torch's library, so that it is
    that of the OpenMP which torch runs on, and tried out.
    """
    library = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    before = torch.get_num_threads()
    try:
        path = Path(torch.__file__).parent / "lib" / library
        setter = ctypes.PyDLL(str(path)).omp_set_num_threads
        setter.argtypes, setter.restype = [ctypes.c_int], None
        setter(before + 1)
        obeyed = torch.get_num_threads() == before + 1
        setter(before)
    except (OSError, AttributeError):
        return None
    return setter if obeyed else None


# ``None`` where torch runs on something else: then kernels take all threads.
set_threads = _find_thread_setter()


def thread_count() -> int:
    """Return how many threads a kernel on the CPU takes, 1 where that cannot be set."""
    return 1 if set_threads is None else torch.get_num_threads()


# Tensors.


# A tensor's own dict: an object that lives as long as its tensor, is no other
# tensor's, and can be held without holding the tensor. An id can come again for
# another tensor; and `torch.utils.swap_tensors`, which moves modules of DTensors,
# refuses a tensor that anyone refers to weakly.
token_of = attrgetter("__dict__")


def dtensor_class() -> type | None:
    """Return ``DTensor`` if anyone in the process has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def local_tensor(tensor: Any) -> Tensor:
    """Return a ``DTensor``'s shard on this rank, undispatched where torch lets us."""
    try:
        shard: Tensor = tensor._local_tensor
    except AttributeError:
        shard = tensor.to_local()
    return shard


def shard_of(tensor: Any) -> Tensor:
    """Return a ``DTensor``'s shard on this rank, and any other tensor as it is."""
    sharded = type(tensor) is dtensor_class()
    return local_tensor(tensor) if sharded else tensor


def spec_of(tensor: Any) -> Any:
    """Return what says where a ``DTensor`` lives; one object as long as it stays."""
    try:
        return tensor._spec
    except AttributeError:
        return tensor.device_mesh, tensor.placements


def placement(spec: Any) -> tuple[Any, Any]:
    """Return mesh and placements of what :func:`spec_of` gave."""
    return spec if isinstance(spec, tuple) else (spec.mesh, spec.placements)


def is_flattened(param: Tensor) -> bool:
    """Tell whether FSDP1 made this parameter a piece of a flat one."""
    marks = ("_fsdp_flattened", "_is_flat_param")
    return any(map(getattr, repeat(param), marks, repeat(False)))


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


if _lost:
    warnings.warn(
        f"torch {torch.__version__} lacks names that selective_optim uses, so this is "
        f"exact and slower: {', '.join(_lost)}. Install a newer selective_optim.",
        stacklevel=2,
    )
