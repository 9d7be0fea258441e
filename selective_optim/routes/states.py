"""The states of several optimizers, read and written as those of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch


class States(MutableMapping[Any, Any]):
    """State by parameter, each where the optimizer that steps it keeps it.

    Args:
        optimizers: By route.
        groups: Of all of them, as they stand.
    """

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self._optimizers, self._groups = optimizers, groups

    def _owner(self, key: Any) -> Any:
        """Return the state that has a key, or else is of whoever steps it."""
        for optimizer in self._optimizers.values():
            if key in optimizer.state:
                return optimizer.state
        for group in self._groups:
            if any(param is key for param in group["params"]):
                return self._optimizers[group["route"]].state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._owner(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._owner(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._owner(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in o.state for o in self._optimizers.values())

    def __iter__(self) -> Iterator[Any]:
        for optimizer in self._optimizers.values():
            yield from optimizer.state

    def __len__(self) -> int:
        return sum(len(o.state) for o in self._optimizers.values())

    def __repr__(self) -> str:
        return repr(dict(self))
