"""Which modules live in the process, and which of them hold a tensor.

One look takes 0.3 s with 700,000 objects alive, half of it for the collector, and
serves every optimizer until a module or a parameter is registered anywhere: one
optimizer per parameter is how people save memory. Nothing is kept alive.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from selective_optim import _torch

Holders = Mapping[int, list["weakref.ref[nn.Module]"]]
_caches: list[Callable[[], None]] = []


def clear_at_registration(clear: Callable[[], None]) -> None:
    """Have a cache cleared whenever a parameter or module is registered somewhere.

    A place that is gone shows when it is looked up; one that is new, as when two
    weights are tied, would not.
    """
    # Not at import: torch calls these at every registration in the process.
    if not _caches:
        register_module_parameter_registration_hook(_clear)
        register_module_module_registration_hook(_clear)
    _caches.append(clear)


def _clear(*_: object) -> None:
    for clear in _caches:
        clear()


class Scan:
    """The modules that lived at one moment, by what each of them holds."""

    last: Scan | None = None

    def __init__(self) -> None:
        # A wrapper that was let go would give names until the collector runs by chance.
        gc.collect()
        owners: Any = defaultdict(list)
        parents: Any = defaultdict(list)
        # Not `isinstance`, which runs code of objects that imitate other classes.
        modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
        # One that is being made may lack what `nn.Module.__init__` sets.
        for module in (m for m in modules if "_modules" in vars(m)):
            ref = weakref.ref(module)
            for found, entries in (
                (owners, _torch.registered(module)),
                (parents, _torch.children(module)),
            ):
                for item in entries.values():
                    found[id(item)].append(ref)
        self.owners: Holders = owners
        self.parents: Holders = parents

    def outermost(self, params: Iterable[Tensor]) -> list[nn.Module]:
        """Return the modules around those that hold any of ``params``."""
        level = {id(m): m for p in params for m in self._owners_of(p)}
        seen, outermost = dict(level), list[nn.Module]()
        while level:
            above: dict[int, nn.Module] = {}
            for module in level.values():
                around = _holders(self.parents, module, _torch.children)
                above |= {id(m): m for m in around}
                outermost += [] if around else [module]
            level = {key: m for key, m in above.items() if key not in seen}
            seen |= level
        return outermost

    def knows(self, params: Iterable[Tensor]) -> bool:
        """Tell whether some module holds each of ``params``."""
        return all(map(self._owners_of, params))

    def _owners_of(self, param: Tensor) -> list[nn.Module]:
        return _holders(self.owners, param, _torch.registered)


def _holders(
    found: Holders, item: object, entries: Callable[[nn.Module], Mapping[str, object]]
) -> list[nn.Module]:
    """Return the modules that were found to hold something, and still do."""
    living = [m for ref in found.get(id(item), ()) if (m := ref()) is not None]
    return [m for m in living if any(each is item for each in entries(m).values())]


def _forget() -> None:
    Scan.last = None


def outermost_owners(params: Iterable[Tensor]) -> list[nn.Module]:
    """Find the outermost modules alive that hold any of ``params``."""
    params, last = list(params), Scan.last
    if last is None or not last.knows(params):
        if _forget not in _caches:
            clear_at_registration(_forget)
        last = Scan.last = Scan()
    return last.outermost(params)
