"""A selective version of any optimizer class."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter, Signature
from typing import Any

import torch

from selective_optim._optimizer import PolicyOptimizer
from selective_optim.adam import Adam
from selective_optim.adamw import AdamW
from selective_optim.sgd import SGD
from selective_optim.split.optimizer import SplitOptimizer
from selective_optim.split.refusals import require_class

OptimizerClass = type[torch.optim.Optimizer]
OURS = {torch.optim.SGD: SGD, torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}
# Methods of schedule-free optimizers, which read and write their groups.
MODES = ("train", "eval")


def selective(optimizer_class: OptimizerClass) -> Any:
    """Make a drop-in subclass of an optimizer class that decides what decays.

    Groups stay the user's. Inside ``step()``, and wherever else the class reads or
    writes groups, it sees them split: one part per decay, each with its own
    ``weight_decay``. So its bits are those of groups split by hand.

    Args:
        optimizer_class: Any class whose groups have a ``"weight_decay"``.

    Returns:
        The subclass, with ``wd_policy`` and ``model`` as further arguments; for SGD,
        Adam and AdamW of torch, those of this library.

    Raises:
        TypeError: It is no optimizer class, or one that steps another optimizer.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> NAdam = selective(torch.optim.NAdam)
        >>> optimizer = NAdam(model.parameters(), weight_decay=0.1, wd_policy="no_bias")
        >>> [(row.name, row.weight_decay) for row in optimizer.decay_report().rows]
        [('weight', 0.1), ('bias', 0.0)]
    """
    if optimizer_class in OURS:
        return OURS[optimizer_class]
    if isinstance(optimizer_class, type) and issubclass(
        optimizer_class, PolicyOptimizer
    ):
        return optimizer_class
    require_class(optimizer_class)
    # Found again, and not kept: classes refer to their subclasses weakly.
    for subclass in optimizer_class.__subclasses__():
        if issubclass(subclass, SplitOptimizer) and subclass.__bases__ == (
            SplitOptimizer,
            optimizer_class,
        ):
            return subclass
    return _make(optimizer_class)


def _make(cls: OptimizerClass) -> OptimizerClass:
    methods = {name: _seeing_parts(name) for name in MODES if hasattr(cls, name)}
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": _constructor(cls),
        **methods,
    }
    # pickle looks a class up by its name, unless copyreg knows its metaclass.
    kind = _kind(type(cls))  # type: ignore[arg-type]  # a class of classes hashes
    made: OptimizerClass = kind(cls.__name__, (SplitOptimizer, cls), namespace)
    return made


def _constructor(cls: OptimizerClass) -> Callable[..., None]:
    """Make a constructor with the signature of the class, and ours at its end."""

    def __init__(self: SplitOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        SplitOptimizer.__init__(self, params, *args, **kwargs)

    vars(__init__)["__signature__"] = _signature(cls)
    return __init__


def _seeing_parts(name: str) -> Callable[..., Any]:
    """Make a method that runs the class's with its groups split."""

    def method(self: SplitOptimizer, *args: Any, **kwargs: Any) -> Any:
        return self._seeing_parts(name, *args, **kwargs)

    method.__name__ = name
    return method


def _signature(cls: OptimizerClass) -> Signature:
    """Add our arguments to those of a constructor, keyword-only and last."""
    given = list(inspect.signature(cls.__init__).parameters.values())
    rest = [p for p in given if p.kind is Parameter.VAR_KEYWORD]
    others = [p for p in given if p.kind is not Parameter.VAR_KEYWORD]
    ours = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None)
        for name in ("wd_policy", "model")
    ]
    return Signature([*others, *ours, *rest])


@lru_cache
def _kind(kind: Any) -> Any:
    """Derive a class of classes that pickle as the call that makes them.

    No module has these classes under a name, by which pickle looks classes up.
    """
    made = type(f"Selective{kind.__name__}", (kind,), {"__repr__": _text})
    copyreg.pickle(made, _reduce)
    return made


def _text(cls: type) -> str:
    base = _base(cls)
    text = type.__repr__(base or cls)
    return f"selective({text})" if base else text


def _reduce(cls: type) -> Any:
    base = _base(cls)
    return (selective, (base,)) if base else cls.__qualname__


def _base(cls: type) -> type | None:
    """Return what a class was made from, unless it is a subclass that has a name."""
    return cls.__bases__[1] if cls.__bases__[0] is SplitOptimizer else None
