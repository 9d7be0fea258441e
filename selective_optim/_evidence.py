"""The proof that the tensors of a plan still are what was planned.

Asked at every step, and cheap: identities for what only someone outside can
replace, one guard call for what every backward pass makes anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim._buckets import Bucket, Grads
from selective_optim._cells import fused_still
from selective_optim._kernels import States
from selective_optim._snapshot import flat, same_objects

_grad_of = attrgetter("grad")
_layout_of = attrgetter("layout")
_place_of = attrgetter("dtype", "device")


def without_gradients(params: Sequence[Tensor]) -> bool:
    """Tell whether no parameter has a gradient."""
    return all(map(is_, map(_grad_of, params), repeat(None)))


class Evidence:
    """Parameters and gradients, in the order plain fused, sharded fused, functional."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._fused_buckets = fused = [b for b in buckets if b.key.fused]
        self._active: list[Tensor] = flat(b.params for b in buckets)
        self._local: list[Tensor] = flat(b.local for b in fused)
        self._fused = len(self._local)
        self._plain = sum(len(b.params) for b in fused if not b.key.sharded)
        layouts = [b.key.layout for b in buckets for _ in b.params]
        self._functional_layouts = layouts[self._fused :]
        self._functional_places = self._places()
        self._proof: _torch.Proof | None = None
        self._specs: list[Any] = []
        self._some_absent = False

    def gradients(self) -> Grads | None:
        """Fetch the gradients; ``None`` if anything is not as it was planned."""
        whole = list(map(_grad_of, self._active))
        if not self._some_absent and (grads := self._checked(whole)):
            return grads
        there = [grad is not None for grad in whole]
        if all(there):
            # All were looked at just now, unless some were absent the last time.
            grads = self._checked(whole) if self._some_absent else None
            self._some_absent = False
            return grads
        self._some_absent = True
        filled = [self._stand_in(i) if g is None else g for i, g in enumerate(whole)]
        grads = self._checked(filled)
        return grads and grads._replace(there=there)

    def fetch(self) -> Grads:
        """Fetch the gradients for which the plan was just made."""
        whole: list[Any] = list(map(_grad_of, self._active))
        there = [grad is not None for grad in whole]
        shards = [
            None if grad is None else _torch.local_tensor(grad)
            for grad in whole[self._plain : self._fused]
        ]
        local = [*whole[: self._plain], *shards] if shards else whole
        return Grads(whole, local, None if all(there) else there)

    def _places(self) -> list[Any]:
        return list(map(_place_of, self._active[self._fused :]))

    def _stand_in(self, position: int) -> Any:
        """Make what passes for a gradient: the parameter itself, detached."""
        if position < self._fused:
            return self._active[position].detach()
        return SimpleNamespace(layout=self._functional_layouts[position - self._fused])

    def _checked(self, whole: list[Any]) -> Grads | None:
        try:
            return self._as_planned(whole)
        except AttributeError:  # a gradient is None, or not sharded where it was
            return None

    def _as_planned(self, whole: list[Any]) -> Grads | None:
        if self._fused < len(whole):
            layouts = list(map(_layout_of, whole[self._fused :]))
            if layouts != self._functional_layouts:
                return None
            if self._places() != self._functional_places:
                return None
        local = whole
        if self._plain < self._fused:
            if not self._shards_hold(whole):
                return None
            shards = map(_torch.local_tensor, whole[self._plain : self._fused])
            local = [*whole[: self._plain], *shards]
        fused = local if self._fused == len(local) else local[: self._fused]
        if self._proof is not None:
            holds = self._proof.holds((*self._local, *fused))
        else:
            holds = self._first_proof(fused)
        return Grads(whole, local) if holds else None

    def _first_proof(self, grads: list[Tensor]) -> bool:
        """Prove slowly, at the first replay, and record what to compare later."""
        for bucket in self._fused_buckets:
            lists = [grads[bucket.part], *bucket.moments]
            if not all(
                fused_still(bucket.key, *each) for each in zip(bucket.local, *lists)
            ):
                return False
        if self._local:
            self._proof = _torch.Proof([*self._local, *grads])
        return True

    def _shards_hold(self, whole: list[Any]) -> bool:
        part = slice(self._plain, self._fused)
        params, grads = self._active[part], whole[part]
        if not same_objects(list(map(_torch.local_tensor, params)), self._local[part]):
            return False
        specs = list(map(_torch.spec_of, grads))
        if same_objects(specs, self._specs):
            return True
        where = map(_torch.placement, map(_torch.spec_of, params))
        if not all(a == b for a, b in zip(where, map(_torch.placement, specs))):
            return False
        self._specs = specs
        return True


class StateEvidence:
    """The state of every parameter, entry by entry, as it was when planned."""

    def __init__(self, states: States, buckets: Sequence[Bucket]) -> None:
        self._keys, self._owns = list(states.keys()), list(states.values())
        self._entries = flat(map(dict.values, self._owns))
        self._moments: list[Tensor] = [
            moment for b in buckets if b.key.fused for moment in flat(b.moments)
        ]
        self._proof: _torch.Proof | None = None

    def holds(self, states: States) -> bool:
        """Tell whether nobody has replaced or re-typed anything."""
        return (
            same_objects(list(states.keys()), self._keys)
            and same_objects(list(states.values()), self._owns)
            and same_objects(flat(map(dict.values, self._owns)), self._entries)
            and self._moments_hold()
        )

    def _moments_hold(self) -> bool:
        if self._moments and self._proof is None:
            self._proof = _torch.Proof(self._moments)
        return self._proof is None or self._proof.holds(self._moments)
