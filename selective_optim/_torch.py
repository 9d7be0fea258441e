"""Every private name of torch that the library uses, and what serves without it.

An upgrade of torch has this one file to read. Where a name is missing, a warning at
import says so, and the same bits come slower: mostly as no plan is made then.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from itertools import takewhile
from operator import attrgetter, methodcaller
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_F = TypeVar("_F", bound=Callable[..., Any])
HALF = (torch.float16, torch.bfloat16)
FUNCTIONS = (FunctionType, MethodType)
_RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
_lost: list[str] = []


def _find(name: str, loss: str, instead: Any = None) -> Any:
    """Look up ``module:attribute``, or note what is lost and serve ``instead``."""
    # Two parts, as torch.optim removes its modules from its own namespace.
    module, _, path = name.partition(":")
    try:
        return attrgetter(path)(import_module(module))
    except (AttributeError, ImportError):
        _lost.append(f"{name.replace(':', '.')} ({loss})")
        return instead


# What a plan needs. Without one of these, torch's own classes step all parts.
NO_PLAN = "steps are not planned"
fused_adam_ = _find("torch:_fused_adam_", NO_PLAN)
fused_adamw_ = _find("torch:_fused_adamw_", NO_PLAN)
fused_sgd_ = _find("torch:_fused_sgd_", NO_PLAN)
_foreach_add_ = _find("torch:_foreach_add_", NO_PLAN)
_TensorGuards = _find("torch:_C._dynamo.guards.TensorGuards", NO_PLAN)
CAN_PLAN = not _lost
# Fused SGD in half precision is wrong on the CPU before torch 2.15: it was measured
# off by the size of the parameter itself in 2.7 and 2.13.
HALF_SGD_ON_CPU = _RELEASE >= (2, 15)
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


_default_store = _find(
    "torch.distributed.distributed_c10d:_get_default_store",
    "ranks that decide differently are not told",
    lambda: None,
)


def store_of_ranks() -> Any:
    dist = torch.distributed
    return _default_store() if dist.is_available() and dist.is_initialized() else None


EACH = "tensor by tensor"
foreach_mul_ = _find("torch:_foreach_mul_", f"decoupled SGD {EACH}", _mul_each_)


def foreach_add_(tensors: Sequence[Tensor], amount: float | Tensor) -> None:
    """Add one amount to every tensor, without waiting where it is on a device.

    torch's binding takes a tensor for a number, which the host must read, unless it
    is given what goes with tensors alone (2.7 to 2.15).
    """
    tensor_only = {"alpha": 1} if isinstance(amount, Tensor) else {}
    _foreach_add_(tensors, amount, **tensor_only)


def adding(counters: list[Tensor], amount: float | Tensor) -> Callable[[], object]:
    """Return a call that adds an amount to counters in float32 of one device."""
    is_one = isinstance(amount, float) and amount == 1.0
    if not is_one or not counters[0].is_cpu:
        return partial(foreach_add_, counters, amount)
    # On the CPU foreach takes 1.3 ms for 1,000 of them. A step of fused SGD with rate
    # -1 and gradient 1, the same sum to the bit, takes 0.1 ms.
    ones = [torch.ones((), dtype=torch.float32, device="cpu")] * len(counters)
    flags = dict.fromkeys(("nesterov", "maximize", "is_first_step"), False)
    factors = dict.fromkeys(("momentum", "dampening", "weight_decay"), 0.0)
    return partial(fused_sgd_, counters, ones, [], lr=-1.0, **factors, **flags)


# What a pass needs to compute several tensors as one: in a third of the time of what
# Python could do, 0.3 and 0.9 ms for 1,000. Without one of these, each goes by itself.
PASS = f"passes of decay {EACH}"
foreach_copy_ = _find("torch:_foreach_copy_", PASS)
flatten = _find("torch._utils:_flatten_dense_tensors", PASS)
unflatten = _find("torch._utils:_unflatten_dense_tensors", PASS)
CAN_JOIN = None not in (foreach_copy_, flatten, unflatten)


disable_dynamo: Callable[[_F], _F] = _find(
    "torch:_disable_dynamo", "nothing is slower", torch.compiler.disable
)


def run_as_is(step: _F) -> _F:
    """Keep a function from being compiled, though not what it calls."""
    return disable_dynamo(step, recursive=False)  # type: ignore[call-arg]  # torch's


@disable_dynamo
def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, and compile neither it nor what it calls."""
    return function(*args)


def _with_grad_mode(step: _F) -> _F:
    @wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return stepped  # type: ignore[return-value]  # wraps keeps the signature


# As a call among others: an interrupt at the end of a block would leave autograd off.
set_grad_enabled: Callable[[bool], object] = _find(
    "torch:_C._set_grad_enabled", "nothing is slower", torch.set_grad_enabled
)


use_grad_for_differentiable: Callable[[_F], _F] = _find(
    "torch.optim.optimizer:_use_grad_for_differentiable",
    "compiled steps need more memory",
    _with_grad_mode,
)


def tensor_proof(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return what tells whether as many tensors, in the same order, look the same."""
    # In type, dtype, device, layout, shape and strides. The guard of compiled code
    # takes 0.02 us per tensor, asking for the dtype 0.05. It also asks for the
    # dispatch state, as under autocast, so that `False` says nothing of the tensors.
    # Sizes and strides are those that the tensors have.
    dims = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
    check: Callable[..., bool] = _TensorGuards(*tensors, **dims).check
    return check


sparse_values = methodcaller("_values")  # those that are stored, as one tensor


amp_unscale_ = _find(
    "torch:_amp_foreach_non_finite_check_and_unscale_",
    f"unscaling {EACH}",
    lambda grads, _, inverse: _mul_each_(grads, inverse),
)


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Run torch's check of ``capturable``, whatever this torch calls it."""
    older = getattr(optimizer, "_cuda_graph_capture_health_check", lambda: None)
    getattr(optimizer, "_accelerator_graph_capture_health_check", older)()


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, when nothing may be copied to it."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    return on_cuda and torch.cuda.is_current_stream_capturing()


def not_to_be_patched(step: _F) -> _F:
    """Keep ``LRScheduler`` from patching a step to learn of calls that go elsewhere."""
    # It leaves alone what bears its mark (torch/optim/lr_scheduler.py, 2.7 to 2.15).
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's mark
    return step


# Under which ``LRScheduler`` notes that the optimizer stepped; without, it warns.
STEP_NOTE = "_opt_called"


# Hooks. torch wraps the step of each class that is instantiated, to run them.


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function behind a step, to be called with the optimizer."""
    if type(step) not in FUNCTIONS:  # a proxy or partial, which knows its optimizer
        return lambda _, *args, **named: step(*args, **named)
    # A user's wrapper around torch's takes over its marks.
    while getattr(step, "hooked", False) and _is_in_torch(step):
        step = step.__wrapped__  # type: ignore[attr-defined]  # functools.wraps sets it
    return step.__func__ if type(step) is MethodType else step


def _is_in_torch(function: Any) -> bool:
    # Not what `wraps` copies. torch's compiler is in torch, too, and wraps its steps.
    names = getattr(function, "__globals__", {}) if type(function) in FUNCTIONS else {}
    return str(names.get("__name__")).startswith("torch.")


_torchs: set[Any] = set()  # functions that were found to be torch's


def is_torchs(method: Any) -> bool:
    """Tell whether a method is torch's own, and nobody has wrapped it."""
    function = method.__func__ if type(method) is MethodType else None
    if type(function) is FunctionType and function in _torchs:  # asked at every step
        return True
    while _is_in_torch(method) and hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    if found := _is_in_torch(method):
        _torchs.add(function)  # and none of a user's, which would be kept alive
    return found


@contextmanager
def without_step_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    hooks = {name: vars(optimizer).get(name, {}) for name in names}
    vars(optimizer).update({name: OrderedDict() for name in names})
    try:
        yield
    finally:
        vars(optimizer).update(hooks)


def hooks_of(optimizer: torch.optim.Optimizer, kind: str) -> list[Callable[..., Any]]:
    return [*vars(optimizer).get(f"_optimizer_{kind}_hooks", {}).values()]


# Under which wrappers (DDP, compiled modules, FSDP1, checkpointing) register what they
# wrap, so that it stands in the names of parameters.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)


def canonical_name(name: str) -> str:
    """Strip what wrappers and parametrizations add to a dotted name."""
    *modules, leaf = without_wrappers(name).split(".")
    if modules[-2:-1] == ["parametrizations"] and leaf.startswith("original"):
        *modules, _, leaf = modules
    return ".".join([*modules, leaf])


def without_wrappers(name: str) -> str:
    *modules, leaf = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), leaf])


def name_of_its_own(name: str) -> str | None:
    """Return what tells a parametrization's several parameters apart, if they are."""
    # One parameter of one is called `original`, without a number.
    plain = without_wrappers(name)
    *_, above, _, leaf = ("", "", *plain.split("."))
    numbered = above == "parametrizations" and leaf.removeprefix("original").isdigit()
    return plain if numbered else None


def telling_name(name: str) -> str:
    return name_of_its_own(name) or canonical_name(name)


# A module's own parameters and modules by name, ``None`` among them. torch's methods
# copy and deduplicate; these are the dicts behind them.
registered = attrgetter("_parameters")
children = attrgetter("_modules")


def is_constructed(module: nn.Module) -> bool:
    # In its dict: asking one that is being made runs its own `__getattr__`.
    return {"_parameters", "_modules"} <= vars(module).keys()


# torch's private bases of all batch and instance norms, which mmengine tests for.
NORM_BASES = (nn.SyncBatchNorm.__mro__[1], nn.InstanceNorm1d.__mro__[1])


def own_classes(cls: type) -> list[type]:
    return list(takewhile(lambda base: base is not nn.Module, cls.__mro__))


def original_class(module: nn.Module | None) -> str:
    """Name the class that a scripted or unflattened module was of; else ""."""
    # Modules of ExportedProgram.module() do not say what they were made of.
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name)
    if type(module).__module__ == "torch.export.unflatten":
        name = getattr(module, "type_name", str)()  # not so the root in 2.7
        return str(name).rpartition(".")[2]
    return ""


def _find_thread_setter() -> Callable[[int], object] | None:
    """Find what sets the number of threads of this Python thread's parallel regions."""
    # `torch.set_num_threads` sets it for the process: threads that begin their first
    # parallel work meanwhile keep it, and oneDNN's caches are cleared. OpenMP's is one
    # per thread; found through torch's library, it is that of torch's own OpenMP.
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
set_threads: Any = _find_thread_setter()


def thread_count() -> int:
    return 1 if set_threads is None else torch.get_num_threads()


# A tensor's own dict: an object that lives as long as its tensor, is no other
# tensor's, and can be held without holding the tensor. An id can come again for
# another tensor; and `torch.utils.swap_tensors`, which moves modules of DTensors,
# refuses a tensor that anyone refers to weakly.
token_of = attrgetter("__dict__")


def dtensor_class() -> type | None:
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def local_tensor(tensor: Any) -> Tensor:
    """Return a ``DTensor``'s shard on this rank, undispatched where torch lets us."""
    shard: Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor.to_local() if shard is None else shard


_local, _spec = attrgetter("_local_tensor"), attrgetter("_spec")
_traits = attrgetter("dtype", "device", "shape")


def local_tensors(tensors: Sequence[Any]) -> list[Tensor]:
    """List the shards of many ``DTensor``s, in C where torch lets us."""
    try:
        return list(map(_local, tensors))
    except AttributeError:
        return list(map(local_tensor, tensors))


def shard_of(tensor: Any) -> Tensor:
    """Return a ``DTensor``'s shard on this rank, and any other tensor as it is."""
    return local_tensor(tensor) if type(tensor) is dtensor_class() else tensor


def placement(tensor: Any) -> Any:
    """Return mesh and placements of a ``DTensor``, ``None`` for any other tensor."""
    sharded = type(tensor) is dtensor_class()
    return (tensor.device_mesh, tensor.placements) if sharded else None


def sharded_as(shard: Tensor, param: Any) -> Any:
    """Make a ``DTensor`` of a shard that lies as that of a parameter does."""
    where = placement(param)
    if where is None or shard.shape != local_tensor(param).shape:
        return shard
    cls: Any = dtensor_class()
    sizes = {"shape": param.shape, "stride": param.stride()}
    return cls.from_local(shard, *where, run_check=False, **sizes)


def lies_as(tensor: Any, param: Any) -> bool:
    """Tell whether a tensor has a parameter's dtype and shape, and lies as it does."""
    same: bool = _traits(tensor) == _traits(param)
    return same and placement(tensor) == placement(param)


def placed_as(tensor: Any, param: Any) -> Any:
    """Shard a tensor as a parameter is sharded.

    A whole one is the same on every rank, so that nothing need be sent.
    """
    now, where = placement(tensor), placement(param)
    if where is None:
        return tensor if now is None else tensor.full_tensor()
    if now is not None:
        return tensor.redistribute(*where)
    share = import_module("torch.distributed.tensor").distribute_tensor
    return share(tensor, *where, src_data_rank=None)


def specs_of(tensors: Sequence[Any]) -> list[Any]:
    """List what says where ``DTensor``s live: one object each as long as it stays."""
    try:
        return list(map(_spec, tensors))  # in C
    except AttributeError:
        return list(map(placement, tensors))


# With which FSDP1 marks a parameter that is flattened; they are the tensor's own.
FLAT_MARKS = frozenset({"_fsdp_flattened", "_is_flat_param"})


def is_flattened(param: Tensor) -> bool:
    return not FLAT_MARKS.isdisjoint(token_of(param))


def is_flat_parameter(param: Tensor) -> bool:
    return bool(getattr(param, "_is_flat_param", False))


def original_shapes(modules: Iterable[nn.Module]) -> dict[int, torch.Size]:
    """Map ``id(parameter)`` to the shape it had before FSDP1 flattened it."""
    shapes: dict[int, torch.Size] = {}
    # In its dict: for what a module lacks, asking makes and drops an error.
    handles = [vars(module).get("_handle") for module in modules]
    for handle in filter(None, handles):
        flat = getattr(handle, "flat_param", None)
        params = getattr(flat, "_params", None) or ()
        for param, shape in zip(params, getattr(flat, "_shapes", ())):
            shapes[id(param)] = torch.Size(shape)
    return shapes


if _lost:
    warnings.warn(
        f"torch {torch.__version__} lacks names that selective_optim uses, so this is "
        f"exact and slower: {', '.join(_lost)}. Install a newer selective_optim.",
        stacklevel=2,
    )
