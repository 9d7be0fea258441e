"""What the methods of a module do with its parameters, read off their source.

No name tells where a module hands its own parameters to a functional norm, or scales
by them what ``F.normalize`` returned. One called ``b1`` is a bias if it is only added.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from textwrap import dedent
from types import CodeType, FunctionType
from typing import Any

from selective_optim._torch import own_classes

NORM_CALL = re.compile(r"(?:\w+_)?(?:batch|group|instance|layer|rms)_?norm(?:_fn)?$")
# Makes vectors of length one: unit vectors.
UNIT_CALL = re.compile(r"(?:(?!un|de)\w+_)?(?:l2_?norm(?:ali[sz]e)?|normali[sz]e)$")
# What such a division divides by, as in `x / self.stdev`.
SPREAD = re.compile(r"(?:\w+_)?(?:std|stdev|stddev|rms|norm)$")
# What may stand between the attribute and the call without making it another value.
VIEWS = re.compile(
    r"contiguous|detach|expand|flatten|float|permute|rearrange|repeat|reshape|squeeze"
    r"|to|transpose|type|type_as|unsqueeze|view"
)
NORM_INPUTS = frozenset({"input", "x"})
ADDS = re.compile(r"(?:\w+_)?(?:linear|conv\dd|add|addmm|addcmul|baddbmm)$|tensor_sum$")
# Methods, calls and attributes that set or describe a parameter and compute nothing.
SETS = re.compile(r"__init__|extra_repr|fold_\w+|_?(?:re)?(?:init|set)\w*")
CHECKS = (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.If, ast.FormattedValue)
DESCRIBES = re.compile(r"data|device|dtype|hasattr|isinstance|shape|\w*_")


def scales_normalized(cls: type, leaf: str, norms: frozenset[str]) -> str | None:
    """Tell which call takes an attribute as a norm's gain or shift, and where."""
    for base, method, names in _methods(cls, leaf):
        # The byte code first: reading a source takes a thousand times longer.
        calls = any(k.match(n) for n in names for k in (NORM_CALL, UNIT_CALL, SPREAD))
        if calls or names & norms:  # norms of its own have no gain
            tree = _tree(method)
            if call := tree and (norm_call(tree, leaf) or unit_gain(tree, leaf, norms)):
                return f"{call} {leaf} in {base.__name__}.{method.__name__}"
    return None


# Called again for every layer of a class, and for every policy.
@lru_cache(4096)
def only_added(cls: Any, leaf: str) -> bool | None:
    """Tell whether methods add, and at most subtract, it; ``None`` if none uses it."""
    methods = [m for _, m, _ in _methods(cls, leaf) if not SETS.fullmatch(m.__name__)]
    trees = map(_tree, methods)
    uses = {u for t in trees for u in (_uses(t, leaf) if t else [""])} - {"describes"}
    return {"adds"} <= uses <= {"adds", "subtracts"} if uses else None


@lru_cache(4096)
def squashes(cls: Any) -> bool:  # mypy holds that classes of modules have no hash
    """Tell whether a method bounds what it returns, as dynamic tanh does: by tanh."""
    # Of a scripted class `forward` raises where it is read as an attribute.
    forwards = [vars(base).get("forward") for base in own_classes(cls)]
    codes = [f.__code__ for f in forwards if isinstance(f, FunctionType)][:1]
    return any(not {"tanh", "erf"}.isdisjoint(_names(code)) for code in codes)


def _methods(cls: type, leaf: str) -> Iterator[tuple[type, FunctionType, set[str]]]:
    # `vars` of a class holds none of its bases' methods.
    for base in own_classes(cls):
        for method in vars(base).values():
            if isinstance(method, FunctionType):
                method = inspect.unwrap(method)
                names = set(_names(method.__code__))
                if leaf in names:
                    yield base, method, names


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@lru_cache(64)
def _tree(method: FunctionType) -> ast.AST | None:
    try:
        return ast.parse(dedent(inspect.getsource(method)))
    except (OSError, SyntaxError, TypeError):  # written in no file, or not in Python
        return None


def norm_call(tree: ast.AST, leaf: str) -> str | None:
    """Tell which functional norm takes an attribute beside its input."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and NORM_CALL.match(_called(call)):
            words = (w.value for w in call.keywords if w.arg not in NORM_INPUTS)
            if leaf in map(_attribute, (*call.args[1:], *words)):
                return f"{_called(call)} takes"
    return None


def _called(call: ast.Call) -> str:
    # self.layer_norm(x, self.mask) is a module, and takes what it likes.
    is_module = isinstance(call.func, ast.Attribute) and _attribute(call.func)
    return "" if is_module else _name(call.func)


def _name(value: ast.expr) -> str:
    return str(getattr(value, "attr", getattr(value, "id", "")))


def _attribute(value: ast.expr) -> str | None:
    """Return the attribute of ``self`` that an expression is, viewed or plus 1."""
    match _viewed(value):
        case ast.Attribute(ast.Name("self"), name):
            return name
        case ast.BinOp(side, ast.Add() | ast.Mult(), ast.Constant()):
            return _attribute(side)
        case ast.BinOp(ast.Constant(), ast.Add() | ast.Mult(), side):
            return _attribute(side)
    return None


def _viewed(value: ast.expr) -> ast.expr:
    match value:
        case ast.Subscript(inner):
            return _viewed(inner)
        case ast.Call(ast.Attribute(inner, name)) if VIEWS.fullmatch(name):
            return _viewed(inner)
        case ast.Call(ast.Name(name), [inner, *_]) if VIEWS.fullmatch(name):
            return _viewed(inner)
    return value


def unit_gain(tree: ast.AST, leaf: str, norms: Iterable[str]) -> str | None:
    """Tell which call made vectors of length one that an attribute multiplies."""
    kinds = (ast.Assign, ast.Return, ast.Expr)
    statements = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    # Names of unit vectors, or of what makes them, and what made them.
    makers = {f"self.{norm}": norm for norm in norms}
    for statement in sorted(statements, key=lambda node: node.lineno):
        for node in ast.walk(statement.value or statement):
            factors = _factors(node)
            maker = next(filter(None, (_maker(f, makers) for f in factors)), None)
            if maker and leaf in map(_attribute, factors):
                return f"{maker} is scaled by"
        for target in statement.targets if isinstance(statement, ast.Assign) else []:
            targets = getattr(target, "elts", [target])
            values = getattr(statement.value, "elts", [statement.value] * len(targets))
            made_now = [_maker(value, makers) for value in values]
            makers.update(zip(map(_name, targets), made_now))
    return None


def _factors(node: ast.AST) -> list[ast.expr]:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return []
    return [f for side in (node.left, node.right) for f in _factors(side) or [side]]


def _maker(value: ast.expr, makers: dict[str, str]) -> str:
    """Name what made an expression a unit vector, if anything did."""
    # Every element of `x[..., None]` meets all of a vector: a layer of one input.
    if ast.unparse(value).endswith(", None]"):
        return ""
    if factors := _factors(value):
        return next(filter(None, (_maker(f, makers) for f in factors)), "")
    match value:
        case ast.IfExp(_, body, other):
            return _maker(body, makers) or _maker(other, makers)
        case ast.BinOp(_, ast.Div(), divisor):
            spread = _name(_viewed(divisor))
            return spread if SPREAD.match(spread) else ""
    match _viewed(value):
        case ast.Name(name):
            return makers.get(name, "")
        case ast.Call(function, [first, *_]) as call:
            if maker := makers.get(f"self.{_attribute(function)}"):
                return maker
            # A weight of length one is what weight norm makes; its gain is a weight.
            if _attribute(first) is None:
                mapped = first if _called(call) == "map" else function
                called = [_name(n) for n in ast.walk(mapped) if isinstance(n, ast.expr)]
                return next(filter(UNIT_CALL.match, called), "")
    return ""


def _uses(tree: ast.AST, leaf: str) -> Iterator[str]:
    """Say of each use of an attribute: adds, subtracts, describes, or "" for others."""
    parents = {child: n for n in ast.walk(tree) for child in ast.iter_child_nodes(n)}
    uses = [
        n for n in parents if isinstance(n, ast.Attribute) and _attribute(n) == leaf
    ]
    return (_use(n, parents, leaf) for n in uses if isinstance(n.ctx, ast.Load))


def _use(node: ast.AST, parents: dict[ast.AST, ast.AST], leaf: str) -> str:
    while True:
        inner, node = node, parents[node]
        match node:
            case ast.Attribute(attr=name) if VIEWS.fullmatch(name):
                node = parents[node]
            case ast.Attribute(attr=name):
                return "describes" if DESCRIBES.fullmatch(name) else ""
            case ast.BinOp(left, ast.Mult(), right):
                other = right if left is inner else left
                # `self.b * self.cfg.use_b` multiplies with a setting, and no tensor.
                if not isinstance(other, ast.Attribute) or _attribute(other):
                    return ""
            case ast.BinOp(op=ast.Add()) | ast.AugAssign(op=ast.Add()):
                return "adds"
            case ast.BinOp(op=ast.Sub()) | ast.AugAssign(op=ast.Sub()):
                return "" if getattr(node, "left", None) is inner else "subtracts"
            case ast.keyword(str(name)) if "bias" in name:
                return "adds"
            case ast.Call() if not VIEWS.fullmatch(_called(node)):
                called = _called(node)
                if DESCRIBES.fullmatch(called):
                    return "describes"
                beside = goes_with(leaf, map(_attribute, node.args))
                return "adds" if beside or ADDS.match(called) else ""
            case ast.Assign(targets):
                return "adds" if all("bias" in _name(t) for t in targets) else ""
            case ast.Subscript() | ast.IfExp() | ast.keyword() | ast.Call():
                continue
            case _:
                return "describes" if isinstance(node, CHECKS) else ""


def goes_with(leaf: str, others: Iterable[str | None]) -> bool:
    """Tell whether the weight of a bias is among other attributes: W_Q for b_Q."""
    weight = re.sub(r"(^|_)b(?=\d*(?:_|$))", r"\1w", leaf).lower()
    names = {other.lower() for other in others if other and other != leaf}
    return weight in names or (leaf == "b" and any("weight" in name for name in names))
