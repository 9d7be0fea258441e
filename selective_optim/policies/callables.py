"""What a callable of the user's is shown: nothing to decide on that is not known.

A lambda that reads ``info.name`` where no name is known must not decide on
``None``: the reading raises, and the message says what was missing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from selective_optim.parameters import ParameterInfo


class UnknownError(Exception):
    """A callable read something that is not known of the parameter.

    Args:
        field: What it read.
    """

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


def _known(field: str) -> Any:
    def read(info: ParameterInfo) -> Any:
        value = vars(info)[field]
        # The shape of a scalar and its length are empty, and known.
        if value is None or (value == () and not isinstance(value, torch.Size)):
            raise UnknownError(field)
        return value

    return property(read)


class StrictInfo(ParameterInfo):
    """The same knowledge; reading what is not there raises instead of ``None``."""

    def __init__(self, info: ParameterInfo) -> None:
        vars(self).update(vars(info))
        vars(self)["elsewhere"] = tuple(map(StrictInfo, info.elsewhere))

    # Properties come before what stands in the instance's own dict.
    name, names, leaf = _known("name"), _known("names"), _known("leaf")
    owner, path = _known("owner"), _known("path")
    shape, ndim = _known("shape"), _known("ndim")

    def __getattr__(self, field: str) -> Any:
        fields = ", ".join(vars(self))
        raise AttributeError(
            f"ParameterInfo has no attribute {field!r}. Read one of {fields}."
        )

    def __repr__(self) -> str:
        return repr(ParameterInfo(**vars(self)))


@dataclass(frozen=True)
class LostCallable:
    """What is left of a callable that does not pickle: what it was called.

    Decisions that were taken are pickled with their optimizer; this raises where it
    is asked for a new one.
    """

    text: str

    def __repr__(self) -> str:
        return self.text

    def __call__(self, info: ParameterInfo) -> Any:
        raise ValueError(
            f"{self.text} did not pickle, and a new parameter is to be decided for. "
            f"Type optimizer.wd_policy = ..., or write the policy as a function."
        )


def picklable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callable, or, if it does not pickle, what tells so when asked."""
    try:
        # Tried at once: an error inside pickle would name neither policy nor remedy.
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError):
        return LostCallable(callable_text(function))
    return function


def callable_text(function: Callable[..., Any]) -> str:
    """Print a callable by its name; a lambda also by the line that made it."""
    if isinstance(function, partial) or not hasattr(function, "__qualname__"):
        return repr(function)
    name = function.__qualname__.rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"<lambda at {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}>"
