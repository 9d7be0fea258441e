"""A step of parts by the optimizer's own class, with the passes around it.

``grad_scale`` and ``found_inf`` of a ``GradScaler`` are applied here where the class
would see some of the parameters alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from selective_optim import _torch
from selective_optim.step.decay_passes import decay_agreeing_, pass_calls
from selective_optim.step.kernels import Kernel
from selective_optim.step.parts import Part
from selective_optim.step.setting import (
    NO_SCALING,
    Batch,
    Call,
    DecayPass,
    Direction,
    Group,
    State,
    States,
    scaling_of,
    unless_dropped,
    unscale_,
)


@dataclass(eq=False)
class View:
    """A part as its class sees it, with the decay that the class does not do."""

    group: Group  # what the class sees
    inits: Sequence[Tensor] = ()  # targets, if a tensor for each
    decay_pass: DecayPass | None = None
    direction: Direction | None = None  # if the class's update is known ahead
    entries: tuple[str, ...] | None = None  # of its state, shaped like the parameters
    sharded: bool = False  # the class sees local shards for DTensors
    takes_scale: bool = True  # a GradScaler's tensors may be left to the class
    fleeting: bool = False  # of a value that changes, to be read at every step

    @property
    def present(self) -> list[Tensor]:
        return [param for param in self.group["params"] if param.grad is not None]

    def batch(self, states: States) -> Batch:
        params = self.present
        own_states = [states.get(param) or {} for param in params]
        entries = self.entries or ()
        moments = [[state.get(entry) for state in own_states] for entry in entries]
        pairs = zip(self.group["params"], self.inits)
        targets = [init for param, init in pairs if param.grad is not None]
        grads: list[Any] = [param.grad for param in params]
        return Batch(params, moments, [], targets, grads)

    def show_shards(self, states: States) -> list[tuple[Tensor, Tensor]]:
        """Put local shards where their ``DTensor``s are; fused SGD takes no others."""
        params = self.present
        shards = [shard.detach() for shard in _torch.local_tensors(params)]
        for param, shard in zip(params, shards):
            shard.grad = _torch.local_tensor(param.grad)
            states[shard] = _map_tensors(_torch.shard_of, states.get(param) or {})
        self.group["params"] = shards
        return list(zip(params, shards))


def _map_tensors(change: Callable[[Any], Any], state: State) -> State:
    return {k: change(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def view_of(
    part: Part, group: Group, kernel: Kernel, params: Sequence[Tensor], reading: bool
) -> View:
    """Make a view of what is shown of a group; its parameters come at each step."""
    key = part.key
    share = kernel.share(group, key.decay_key, reading)
    shown = {**group, "weight_decay": share.wd}
    if "decoupled_weight_decay" in shown:
        shown["decoupled_weight_decay"] = share.form == "decoupled"
    if key.fused:
        shown["fused"] = True
    if "param_names" in group:
        names = dict(zip(map(id, group["params"]), group["param_names"]))
        mine = [id(params[i]) for i in part.positions]  # some may have none
        shown["param_names"] = [names[each] for each in mine if each in names]
    view = View(shown, part.inits, share.decay_pass, entries=kernel.entries(group))
    if share.decay_pass is not None:
        view.direction = partial(kernel.direction, kernel.setting(group, share))
    view.sharded, view.fleeting = key.sharded, share.fleeting
    view.takes_scale = key.fused and not key.first
    return view


class AroundStep:
    """Surrounds a step of the class: begin, let the class step if told so, finish."""

    def __init__(self, optimizer: Any, states: States) -> None:
        self._optimizer = optimizer  # a GradScaler may have laid its tensors on it
        self._states = states
        self._begun = False  # a class may ask for gradients more than once
        self._forget()

    def _forget(self) -> None:
        self._scaling = NO_SCALING
        self._undoable: list[tuple[Tensor, Tensor]] = []
        self._user_grads: list[tuple[Tensor, Any]] = []
        self._shards: list[tuple[Tensor, Tensor]] = []
        self._after: list[Call] = []

    def begin(self, views: Sequence[View]) -> bool:
        """Run the passes before the class's step, and tell whether to step at all."""
        again, self._begun = self._begun, True
        self._scaling = scaling_of(self._optimizer)
        if self._scaling != NO_SCALING and not self._apply_scaling(views):
            return False
        for view in views:
            decay_pass = view.decay_pass
            # Where the class asks for gradients again, parameters are not moved again.
            runs = decay_pass and (not again or decay_pass.applied == "l2")
            if decay_pass and runs and view.present:
                self._run(view, decay_pass)
            if view.sharded:
                self._shards += view.show_shards(self._states)
        return True

    def finish(self) -> None:
        """Decay what is decayed after the step, and undo a step that is dropped."""
        for call in self._after:
            call()
        for tensor, old in self._undoable:
            assert self._scaling.found_inf is not None  # only then anything is kept
            found_inf = self._scaling.found_inf.to(tensor.device)
            tensor.copy_(unless_dropped(found_inf, tensor, old))

    def restore(self) -> None:
        """Take back what stands in the user's tensors for the step alone."""
        for param, shard in self._shards:
            as_param = partial(_torch.sharded_as, param=param)
            state = _map_tensors(as_param, self._states.pop(shard))
            if state:
                self._states[param] = {**state, **(self._states.get(param) or {})}
        for param, grad in self._user_grads:
            if param.grad is not None:  # else the class has cleared it
                param.grad = grad
        if self._scaling != NO_SCALING:
            self._optimizer.grad_scale, self._optimizer.found_inf = self._scaling
        self._forget()

    def _apply_scaling(self, views: Sequence[View]) -> bool:
        """Unscale outside if the class cannot, and tell whether to step at all."""
        optimizer, (scale, found_inf) = self._optimizer, self._scaling
        if all(view.takes_scale and view.decay_pass is None for view in views):
            # GradScaler sums over devices, and kernels look for exactly 1.
            if found_inf is not None:
                optimizer.found_inf = found_inf.clamp(max=1.0)
            return True
        if scale is not None:
            grads: list[Any] = [param.grad for view in views for param in view.present]
            for device in {grad.device for grad in grads}:
                unscale_([grad for grad in grads if grad.device == device], scale)
        if found_inf is not None:
            touched = self._touched(views)
            # A step that makes state cannot be undone on the device: there the host
            # waits, and steps or does not.
            if touched is not None and not found_inf.is_cpu:
                shards = map(_torch.shard_of, touched)
                self._undoable = [(shard, shard.clone()) for shard in shards]
            elif found_inf.item():
                return False
        optimizer.grad_scale = optimizer.found_inf = None
        return True

    def _touched(self, views: Sequence[View]) -> list[Tensor] | None:
        """List what the step writes to; ``None`` where it makes some of that."""
        touched: list[Tensor] = []
        for view in views:
            for param in view.present:
                state = self._states.get(param) or {}
                if view.entries is None or not all(e in state for e in view.entries):
                    return None
                touched.append(param)
                touched += [v for v in state.values() if isinstance(v, Tensor)]
        return touched

    def _run(self, view: View, decay_pass: DecayPass) -> None:
        batch = view.batch(self._states)
        lr, maximize = view.group["lr"], view.group.get("maximize", False)
        if view.direction is None:
            lr = _read_rate(lr)
            if decay_pass.applied == "cautious":
                before = [param.detach().clone() for param in batch.params]
                rate = lr * decay_pass.wd
                decay = partial(decay_agreeing_, decay_pass, rate, batch, before)
                self._after.append(decay)
                return
        direction = view.direction
        calls, _ = pass_calls(decay_pass, lr, maximize, batch, direction, NO_SCALING)
        for call in calls:
            call()
        if decay_pass.applied == "l2":
            self._user_grads += [(param, param.grad) for param in batch.params]
            for param, grad in zip(batch.params, batch.grads):
                param.grad = grad


def _read_rate(lr: Any) -> float:
    """Read a rate once; a class that keeps it on a device waits for it here."""
    if isinstance(lr, Tensor) and _torch.is_capturing(lr.device):
        raise RuntimeError(
            "a rate that is a tensor on a device cannot be read while a CUDA graph is "
            "captured, and this decay depends on it. Set a number in the group, or use "
            "selective_optim.AdamW."
        )
    return float(lr)
