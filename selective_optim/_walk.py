"""Where parameters stand in a tree of modules, and what to call them there."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
# Iterators that hand on what others yield. What one refers to is what it reads.
RELAYS: tuple[type, ...] = (filter, map, chain, type(iter([])), type(iter(())))


@dataclass(frozen=True)
class Place:
    """One spot in a module tree at which a parameter is registered."""

    name: str
    leaf: str
    path: tuple[nn.Module, ...]


def canonical_name(name: str) -> str:
    """Strip what wrappers and parametrizations add to a dotted name."""
    *modules, leaf = without_wrappers(name).split(".")
    if modules[-2:-1] == ["parametrizations"] and leaf.startswith("original"):
        *modules, _, leaf = modules
    return ".".join([*modules, leaf])


def without_wrappers(name: str) -> str:
    """Strip what wrappers add to a dotted name, and nothing else."""
    *modules, leaf = name.split(".")
    return ".".join([*(part for part in modules if part not in WRAPPERS), leaf])


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    try:
        yield from list(root.named_modules(remove_duplicate=False))
    except RecursionError:  # a module that contains itself has endless aliases
        yield from root.named_modules()


def places(root: nn.Module) -> Iterator[tuple[Tensor, Place]]:
    """Walk over every place of every parameter, aliases of tied ones included."""
    paths: dict[str, tuple[nn.Module, ...]] = {"": ()}
    for prefix, module in _named_modules(root):
        path = (*paths[prefix.rpartition(".")[0]], module)
        paths[prefix] = path
        parametrized = isinstance(module, ParametrizationList)
        # torch's own method: a subclass that overrides it may not know these arguments.
        for leaf, param in nn.Module.named_parameters(
            module, recurse=False, remove_duplicate=False
        ):
            name = canonical_name(f"{prefix}.{leaf}" if prefix else leaf)
            original = parametrized and leaf.startswith("original")
            yield (
                param,
                Place(name, name.rpartition(".")[2], path[:-2] if original else path),
            )


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
