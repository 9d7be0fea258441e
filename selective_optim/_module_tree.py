"""Where parameters stand in a tree of modules, and what to call them there."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from selective_optim import _torch

# Iterators that hand on what others yield. What one refers to is what it reads.
RELAYS: tuple[type, ...] = (filter, map, chain, type(iter([])), type(iter(())))
Path = tuple[nn.Module, ...]


def canonical_name(name: str) -> str:
    """Strip what wrappers and parametrizations add to a dotted name."""
    *modules, leaf = without_wrappers(name).split(".")
    if modules[-2:-1] == ["parametrizations"] and leaf.startswith("original"):
        *modules, _, leaf = modules
    return ".".join([*modules, leaf])


def without_wrappers(name: str) -> str:
    """Strip what wrappers add to a dotted name, and nothing else."""
    *modules, leaf = name.split(".")
    return ".".join([*(part for part in modules if part not in _torch.WRAPPERS), leaf])


class Node:
    """A module at one place of a tree, remembered without keeping it alive.

    Args:
        module: The module.
        parent: The node above; ``None`` for the root.
        key: Name under which the parent registered it.
    """

    __slots__ = ("key", "module", "parent")

    def __init__(self, module: nn.Module, parent: Node | None, key: str) -> None:
        self.module = weakref.ref(module)
        self.parent = parent
        self.key = key

    def path(self) -> Path | None:
        """Return the modules from the root to this one if it still stands here."""
        module = self.module()
        if module is None or self.parent is None:
            return None if module is None else (module,)
        above = self.parent.path()
        if above is None or _torch.child_of(above[-1], self.key) is not module:
            return None
        return (*above, module)


@dataclass(frozen=True)
class Place:
    """One spot in a tree at which a parameter is registered.

    Args:
        node: The module that registered it.
        key: Under which name.
        name: Its canonical dotted name.
        leaf: Last part of that.
    """

    node: Node
    key: str
    name: str
    leaf: str

    def path(self, param: Tensor) -> Path | None:
        """Return the modules from the root to the owner if ``param`` stands here.

        What a parametrization was made of belongs to the module that it was
        registered on.
        """
        path = self.node.path()
        if path is None:
            return None
        here = _torch.registered(path[-1])
        if self.key not in here or here[self.key] is not param:
            return None
        made = isinstance(path[-1], ParametrizationList) and self.key.startswith(
            "original"
        )
        return path[:-2] if made else path


def places(root: nn.Module) -> list[tuple[Tensor, Place]]:
    """List every place of every parameter, aliases of tied ones included."""
    found: list[tuple[Tensor, Place]] = []

    def walk(module: nn.Module, node: Node, prefix: str, inside: Path) -> None:
        for key, param in _torch.own_parameters(module):
            name = canonical_name(prefix + key)
            found.append((param, Place(node, key, name, name.rpartition(".")[2])))
        for key, child in _torch.children_of(module):
            if child not in inside:  # one that contains itself has endless aliases
                below = Node(child, node, key)
                walk(child, below, f"{prefix}{key}.", (*inside, child))

    walk(root, Node(root, None, ""), "", (root,))
    return found


def modules_behind(params: object) -> list[nn.Module]:
    """Find the modules that ``params`` is, lists, or is being generated from.

    ``model.parameters()`` and ``model.named_parameters()`` are generators whose
    frame holds the module until they have run; a generator expression, ``filter``,
    ``map`` or ``itertools.chain`` over such generators leads to them.
    """
    if isinstance(params, nn.Module):
        return [params]
    if isinstance(params, RELAYS):
        sources = gc.get_referents(params)
        sources += chain(*(s for s in sources if isinstance(s, (list, tuple))))
        return [module for source in sources for module in modules_behind(source)]
    if inspect.isgenerator(params):
        frame = inspect.getgeneratorlocals(params)
        return modules_behind(frame.get("self", frame.get(".0")))
    return list(params) if is_modules(params) else []


def is_modules(params: object) -> TypeGuard[Sequence[nn.Module]]:
    """Tell whether ``params`` is a list or tuple of nothing but modules."""
    return (
        isinstance(params, Sequence)
        and bool(params)
        and all(isinstance(item, nn.Module) for item in params)
    )
