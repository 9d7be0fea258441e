"""Gains and shifts that a module hands to a functional norm in a method of its own.

Such a module is called after what it does, a feature map or an attention, and its
parameters after anything, so that no name tells. The method's source does: the
parameter itself stands among the arguments of a call such as ``F.layer_norm``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from textwrap import dedent
from types import CodeType, FunctionType

from selective_optim.parameters import own_classes

CALL = re.compile(r"(?:\w+_)?(?:batch|group|instance|layer|rms)_?norm(?:_fn)?$")
# What may stand between the attribute and the call without making it another value.
CASTS = frozenset({"contiguous", "float", "to", "type", "type_as"})
INPUTS = frozenset({"input", "x"})


@lru_cache(4096)
def handed_to_norm(cls: type, leaf: str) -> str | None:
    """Tell which call takes an attribute of a class as a norm's gain or shift.

    Args:
        cls: Class of a module that is not called a norm.
        leaf: Name of the attribute.

    Returns:
        ``"layer_norm takes gamma in FeatureMap.forward"``, or ``None`` where no
        such call stands in the source, or there is no source.
    """
    for base in own_classes(cls):
        for name, method in vars(base).items():
            if _mentions(method, leaf) and (call := _norm_call(method, leaf)):
                return f"{call} takes {leaf} in {base.__name__}.{name}"
    return None


def _mentions(method: object, leaf: str) -> bool:
    """Look into the byte code first: reading a source takes a thousand times longer."""
    method = inspect.unwrap(method) if isinstance(method, FunctionType) else method
    if not isinstance(method, FunctionType):
        return False
    names = set(_names(method.__code__))
    return leaf in names and any(map(CALL.match, names))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _norm_call(method: FunctionType, leaf: str) -> str | None:
    try:
        tree = ast.parse(dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, SyntaxError, TypeError):  # written in no file, or not in Python
        return None
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = (
        _called(call.func)
        for call in calls
        if any(_attribute(argument) == leaf for argument in _beside_input(call))
    )
    return next(filter(CALL.match, found), None)


def _beside_input(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the arguments but for the first, which is what the call normalizes."""
    yield from call.args[1:]
    yield from (word.value for word in call.keywords if word.arg not in INPUTS)


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        # self.layer_norm(x, self.mask) is a module, and takes what it likes.
        return "" if _attribute(function) else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _attribute(value: ast.expr) -> str | None:
    """Return the attribute of ``self`` that an expression is, or is a cast of."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if value.func.attr not in CASTS:
            return None
        value = value.func.value
    if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name):
        return None
    return value.attr if value.value.id == "self" else None
