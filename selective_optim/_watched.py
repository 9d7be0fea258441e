"""What a user's callable is shown, so that it cannot decide on what is not known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from selective_optim.parameters import ParameterInfo

KNOWABLE = frozenset({"name", "names", "leaf", "owner", "path", "shape", "ndim"})


class UnknownError(Exception):
    """A callable read something that is not known of the parameter.

    Args:
        function: The callable, as it prints.
        field: What it read.
    """

    def __init__(self, function: str, field: str) -> None:
        super().__init__(function, field)
        self.function = function
        self.field = field


class Watched(ParameterInfo):
    """The same knowledge, which notes what was read of it although it is not there."""

    def __init__(self, info: ParameterInfo) -> None:
        self.__dict__.update(vars(info), missed=[])

    def __getattribute__(self, field: str) -> Any:
        value = super().__getattribute__(field)
        if field in KNOWABLE and not value and _is_unknown(value):
            self.missed.append(field)
        return value

    def __getattr__(self, field: str) -> Any:
        fields = ", ".join(name for name in vars(self) if name != "missed")
        raise AttributeError(
            f"ParameterInfo has no attribute {field!r}. Read one of {fields}."
        )

    def __repr__(self) -> str:
        known = {key: value for key, value in vars(self).items() if key != "missed"}
        return repr(ParameterInfo(**known))


# Python's messages about wrong uses of it name the class.
Watched.__name__ = Watched.__qualname__ = ParameterInfo.__name__


def _is_unknown(value: object) -> bool:
    # The shape of a scalar and its length are empty, and known.
    return value is None or (value == () and not isinstance(value, torch.Size))


def ask(function: Callable[[ParameterInfo], Any], info: ParameterInfo) -> Any:
    """Return the callable's answer, if it rests on what is known.

    Raises:
        UnknownError: The callable read what is not known of the parameter.
    """
    watched = Watched(info)
    try:
        answer = function(watched)
    except Exception as error:
        if watched.missed:
            raise UnknownError(callable_text(function), watched.missed[-1]) from error
        raise
    if watched.missed:
        raise UnknownError(callable_text(function), watched.missed[0])
    return answer


def callable_text(function: Callable[..., Any]) -> str:
    """Print a callable by its name; a lambda also by the line that made it."""
    if isinstance(function, partial) or not hasattr(function, "__qualname__"):
        return repr(function)
    name = function.__qualname__.rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"<lambda at {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}>"
