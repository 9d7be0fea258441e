"""Policies as text: what ``repr`` prints is read back, and nothing is evaluated.

``ast.parse`` takes the text apart by Python's grammar and runs nothing. What each
part may mean is looked up here: functions and names of policies, predicates, and
module classes that are loaded. Everything else is refused at its place.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from selective_optim.decay import Decay
from selective_optim.policies import selectors
from selective_optim.policies.base import Policy
from selective_optim.policies.selectors import (
    Predicate,
    Selector,
    as_selector,
    loaded_class,
)

EXPRESSION = re.compile(r"[({|&~]|\w\s*\*\s+\w|\w\s+\*\s*\w")
EXAMPLE = "Write for example exclude('*.bias', is_norm) * layerwise(0.75)."
TOO_DEEP = "it is nested too deeply"
WIDTH = 76  # of a text that a message shows; more is cut around the place
PREDICATES = {p.name: p for p in vars(selectors).values() if isinstance(p, Predicate)}


class PolicyTextError(ValueError):
    """A policy's text cannot be read; the message points at the place."""


def is_expression(text: str) -> bool:
    """Tell whether a text is more than a name or a glob: a call, a mapping, ``a * b``.

    A glob has parentheses nowhere, and no space beside its ``*``.
    """
    return bool(EXPRESSION.search(text))


def read_policy(
    text: str, functions: Mapping[str, Callable[..., Any]], names: Mapping[str, Policy]
) -> Policy:
    """Read an expression of policies.

    Args:
        text: The expression; it may go over several lines.
        functions: What makes policies, by name.
        names: Ready-made policies.

    Raises:
        PolicyTextError: It cannot be read; the message shows where.
    """
    return Reader(re.sub(r"\s*\n\s*", " ", text.strip()), functions, names).read()


class Reader:
    """Reads one text; see :func:`read_policy`."""

    def __init__(
        self,
        text: str,
        functions: Mapping[str, Callable[..., Any]],
        names: Mapping[str, Policy],
    ) -> None:
        self.text = text
        self.functions = functions
        self.names = names

    def read(self) -> Policy:
        """Read the whole text as one policy."""
        try:
            body = ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            place = min((error.offset or 1) - 1, len(self.text))
            raise self._error(place, f"{error.msg}.", EXAMPLE) from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._error(0, f"{error or TOO_DEEP}.", EXAMPLE) from None
        try:
            return self._policy(body)
        except RecursionError:
            raise self._error(0, f"{TOO_DEEP}.", EXAMPLE) from None

    def _policy(self, node: ast.expr) -> Policy:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._policy(node.left) * self._policy(node.right)
        if isinstance(node, ast.Call) and _dotted(node.func) in self.functions:
            policy: Policy = self._call(node, self.functions[_dotted(node.func)])
            return policy
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.Dict):
            cases: Policy = self._called(
                node, self.functions["first_match"], [self._dict(node)]
            )
            return cases
        raise self._not_a_policy(node)

    def _not_a_policy(self, node: ast.expr) -> PolicyTextError:
        shown = ast.unparse(node)
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.BitOr):
            return self._wrong(node, f"{shown} joins policies with no `*`.", EXAMPLE)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            rest = f"Write scale(everything, by={shown})."
            return self._wrong(node, f"{shown} is a number, and no policy.", rest)
        name = _dotted(node.func if isinstance(node, ast.Call) else node)
        if isinstance(node, ast.Name) and name in self.functions:
            told = f"{name} is what makes a policy, and not called."
            return self._wrong(node, told, EXAMPLE)
        if name and name not in PREDICATES:
            kind = "function" if isinstance(node, ast.Call) else "name"
            known = self.functions if isinstance(node, ast.Call) else self.names
            told = f"{name!r} is the {kind} of no policy."
            return self._wrong(node, told, _closest(name, known))
        self._selector(node)  # which raises if it is none
        told = f"{shown} is a selector, and no policy."
        return self._wrong(node, told, f"Write exclude({shown}).")

    def _call(self, node: ast.Call, function: Callable[..., Any]) -> Any:
        arguments = [self._argument(each) for each in node.args]
        keywords = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._wrong(keyword.value, "`**` cannot stand here.", EXAMPLE)
            keywords[keyword.arg] = self._argument(keyword.value)
        return self._called(node, function, arguments, keywords)

    def _called(
        self,
        node: ast.expr,
        function: Callable[..., Any],
        arguments: list[Any],
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            return function(*arguments, **(keywords or {}))
        except (TypeError, ValueError, re.error) as error:
            text = str(error)
            told = text if text.endswith(".") else f"{text}."
            rest = "" if ". " in told else EXAMPLE
            raise self._wrong(node, told, rest) from error

    def _argument(self, node: ast.expr) -> Any:
        """Read a number, a text, a mapping, a decay or a selector."""
        if isinstance(node, ast.Constant) and _is_plain(node.value):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._argument(node.operand)
            if isinstance(value, int | float):
                return -value
        if isinstance(node, ast.Dict):
            return self._dict(node)
        if isinstance(node, ast.Call) and _dotted(node.func) == "Decay":
            return self._call(node, Decay)
        return self._selector(node)

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        return {
            self._selector(key or node): self._argument(value)
            for key, value in zip(node.keys, node.values)
        }

    def _selector(self, node: ast.expr) -> Selector:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return as_selector(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._selector(node.left) | self._selector(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
            return self._selector(node.left) & self._selector(node.right)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return ~self._selector(node.operand)
        if isinstance(node, ast.Call) and _dotted(node.func) == "re.compile":
            return as_selector(self._pattern(node))
        if name := _dotted(node):
            return self._named_selector(node, name)
        if isinstance(node, ast.Call) and (name := _dotted(node.func)) in PREDICATES:
            told = f"{name} is a selector and takes nothing."
            raise self._wrong(node, told, f"Write {name}.")
        told = f"{ast.unparse(node)} is no selector, number or text."
        raise self._wrong(node, told, EXAMPLE)

    def _named_selector(self, node: ast.expr, name: str) -> Selector:
        if name in PREDICATES:
            return PREDICATES[name]
        try:
            cls = loaded_class(name)
        except ValueError as error:
            raise self._wrong(node, str(error), "") from None
        if cls is None:
            told = f"{name} is no selector, and no module class that is loaded."
            layers = [f"nn.{layer}" for layer in dir(nn)] if "nn." in name else []
            meant = _closest(name, [*PREDICATES, *layers])
            rest = f"{meant} Else import the module of the class."
            raise self._wrong(node, told, rest)
        return as_selector(cls)

    def _pattern(self, node: ast.Call) -> re.Pattern[str]:
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        text = getattr(given[0], "value", None) if given else None
        flags = given[1:]
        if not isinstance(text, str) or len(flags) > 1:
            told = "re.compile takes a text and flags."
            raise self._wrong(node, told, r"Write for example re.compile('\\.bias$').")
        value = self._flags(flags[0]) if flags else 0
        compiled: re.Pattern[str] = self._called(node, re.compile, [text, value])
        return compiled

    def _flags(self, node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self._flags(node.left) | self._flags(node.right)
        module, _, name = _dotted(node).partition(".")
        if module != "re" or name not in re.RegexFlag.__members__:
            told = f"{ast.unparse(node)} is no flag."
            raise self._wrong(node, told, "Write for example re.IGNORECASE.")
        return int(re.RegexFlag[name])

    def _wrong(self, node: ast.expr, told: str, rest: str) -> PolicyTextError:
        # Python counts in bytes of UTF-8.
        before = self.text.encode()[: node.col_offset].decode()
        return self._error(len(before), told, rest)

    def _error(self, place: int, told: str, rest: str) -> PolicyTextError:
        start = max(0, place - WIDTH // 2)
        line = self.text[start : start + WIDTH]
        pointed = f"    {line}\n    {' ' * (place - start)}^"
        head = f"`wd_policy` cannot be read at character {place + 1}: {told}"
        return PolicyTextError(f"{head}\n{pointed}\n{rest}".rstrip())


def _dotted(node: ast.expr) -> str:
    """Write a name, or attributes of one, as text; empty for everything else."""
    if isinstance(node, ast.Attribute):
        above = _dotted(node.value)
        return f"{above}.{node.attr}" if above else ""
    return node.id if isinstance(node, ast.Name) else ""


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _closest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.0)
    return f"Did you mean {close[0]}?" if close else EXAMPLE
