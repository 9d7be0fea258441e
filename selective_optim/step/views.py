"""Parts as the optimizer's own class sees them: groups that are made for one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.step.grad_scaler import (
    NO_SCALING,
    Scaling,
    drops,
    unless_dropped,
    unscale_,
)
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import Part
from selective_optim.step.passes import ahead_calls
from selective_optim.step.setting import Batch, Group, Setting, State, States


class View:
    """A part with its parameters at hand, and the group that the class sees.

    Args:
        part: Which parameters, and what they have in common.
        group: The user's group that they are of.
        kernel: Of the optimizer's class.
        params: All parameters of all groups, in order.
        reading: See ``Kernel.setting``.
    """

    def __init__(
        self,
        part: Part,
        group: Group,
        kernel: Kernel,
        params: Sequence[Tensor],
        reading: bool,
    ) -> None:
        self.key, self.inits = part.key, part.inits
        self.setting: Setting = kernel.setting(group, part.key.terms, reading)
        self.params = [params[i] for i in part.positions]
        self.group = {**group, **kernel.shown(self.setting), "params": self.params}
        if part.key.fused:
            self.group["fused"] = True
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"]))
            self.group["param_names"] = [names[id(param)] for param in self.params]

    @property
    def present(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [param for param in self.params if param.grad is not None]

    def batch(self, kernel: Kernel, states: States) -> Batch:
        """Collect the tensors of a pass ahead of the class's step."""
        params = self.present
        owns = [states.get(param) or {} for param in params]
        pairs = zip(self.params, self.inits)
        targets = [init for param, init in pairs if param.grad is not None]
        moments = [[own.get(e) for own in owns] for e in kernel.entries(self.group)]
        grads: list[Any] = [param.grad for param in params]
        return Batch(params, moments, [], targets, grads)

    def stand_in(self, states: States) -> list[tuple[Tensor, Tensor]]:
        """Put local shards where their ``DTensor``s are; fused SGD takes no others."""
        pairs = []
        for param in self.present:
            shard = _torch.local_tensor(param).detach()
            shard.grad = _torch.local_tensor(param.grad)
            states[shard] = _each_tensor(states.get(param) or {}, _torch.shard_of)
            pairs.append((param, shard))
        self.group["params"] = [shard for _, shard in pairs]
        return pairs


def _each_tensor(own: State, change: Callable[[Any], Any]) -> State:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in own.items()}


class ClassStep(AbstractContextManager[bool]):
    """What surrounds a step of parts by the optimizer's class.

    Runs the passes ahead of it, shows the views to the class, and does what a
    ``GradScaler`` asks for where the class cannot. Entering tells whether to step.

    Args:
        optimizer: The optimizer.
        views: The parts.
        kernel: Of the optimizer's class.
        states: The optimizer's state.
        scaling: What a ``GradScaler`` laid on the optimizer.
    """

    def __init__(
        self,
        optimizer: Any,
        views: Sequence[View],
        kernel: Kernel,
        states: States,
        scaling: Scaling,
    ) -> None:
        self._optimizer, self._views, self._kernel = optimizer, views, kernel
        self._states, self._scaling = states, scaling
        # Fused kernels unscale and skip by themselves.
        self._outside = scaling != NO_SCALING and not all(
            view.key.fused and not view.key.first and view.setting.ahead is None
            for view in views
        )
        self._before: list[tuple[Tensor, Tensor]] = []  # to be undone if dropped
        self._pulled: list[tuple[Tensor, Any]] = []
        self._shards: list[tuple[Tensor, Tensor]] = []

    @_torch.disable_dynamo
    def __enter__(self) -> bool:
        if self._outside and not self._unscale():
            return False
        try:
            for view in self._views:
                self._run_passes(view)
                if view.key.sharded:
                    self._shards += view.stand_in(self._states)
            self._optimizer._show([view.group for view in self._views])
        except BaseException:
            self._restore()
            raise
        return True

    @_torch.disable_dynamo
    def __exit__(self, *raised: object) -> None:
        self._optimizer._show(None)
        self._restore()
        found_inf = self._scaling.found_inf
        for shard, old in self._before:
            assert found_inf is not None  # only then anything is kept
            here = found_inf.to(shard.device)
            shard.copy_(unless_dropped(here, shard, old))

    def _unscale(self) -> bool:
        """Unscale outside of the class; tell whether the step is to be taken."""
        scale, found_inf = self._scaling
        params = [param for view in self._views for param in view.present]
        for device in dict.fromkeys(param.device for param in params):
            if scale is not None:
                mine: list[Any] = [p.grad for p in params if p.device == device]
                unscale_(mine, scale)
        if found_inf is None:
            touched: list[Tensor] | None = []
        else:
            touched = self._touched()
            if drops(found_inf, wait=touched is None):
                return False
            touched = [] if found_inf.is_cpu or touched is None else touched
        self._before = [(each, each.clone()) for each in map(_torch.shard_of, touched)]
        self._optimizer.grad_scale = self._optimizer.found_inf = None
        return True

    def _touched(self) -> list[Tensor] | None:
        """List what the step writes to; ``None`` where it makes some of that."""
        touched: list[Tensor] = []
        for view in self._views:
            entries = self._kernel.loaded_entries(view.group)
            for param in view.present:
                own = self._states.get(param) or {}
                tensors = [own.get(entry) for entry in entries]
                if any(tensor is None for tensor in tensors):
                    return None
                touched += [param, *tensors]
        return touched

    def _run_passes(self, view: View) -> None:
        ahead = view.setting.ahead
        if ahead is None or not view.present:
            return
        batch = view.batch(self._kernel, self._states)
        direction = self._kernel.direction
        calls, _ = ahead_calls(view.setting, batch, direction, NO_SCALING)
        for call in calls:
            call()
        if ahead.applied == "l2":
            self._pulled += [(param, param.grad) for param in batch.params]
            for param, grad in zip(batch.params, batch.grads):
                param.grad = grad

    def _restore(self) -> None:
        """Take back what stands in the user's tensors for the step alone."""
        for param, shard in self._shards:
            own = _each_tensor(
                self._states.pop(shard), lambda t, p=param: _torch.sharded_as(t, p)
            )
            if own:
                self._states[param] = {**own, **(self._states.get(param) or {})}
        for param, grad in self._pulled:
            param.grad = grad
        if self._outside:
            self._optimizer.grad_scale, self._optimizer.found_inf = self._scaling
        self._shards, self._pulled = [], []
