"""What the three optimizers share: deciding, stepping, and here state and report."""

from __future__ import annotations

from typing import Any

from selective_optim import _torch
from selective_optim._deciding import OWN_KEYS
from selective_optim._deciding import Model as Model
from selective_optim._loading import (
    RECORD,
    record_of,
    require_dict,
    require_loadable,
    warn_of_changes,
)
from selective_optim._stepping import SteppingOptimizer
from selective_optim.parameters import Knowledge
from selective_optim.report import DecayReport, make_report


class SelectiveOptimizer(SteppingOptimizer):
    """Decides once for every parameter and applies the decisions in ``step()``.

    Stands before a class of ``torch.optim`` whose constructor, groups and state
    stay what they are. What is added lives in attributes of its own.
    """

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict and, under ``"decay"``, what decays how.

        ``"decay"`` holds, group by group, a ``[multiplier, form]`` per parameter.
        """
        touched = self._stepper.touched or _torch.has_state_dict_hooks(self)
        state_dict = super().state_dict()
        # Copies: whoever edits them does not edit the optimizer.
        state_dict["state"] = {
            key: dict(own) if isinstance(own, dict) else own
            for key, own in state_dict["state"].items()
        }
        self._stepper.touched = touched
        for group in state_dict["param_groups"]:
            for name in OWN_KEYS:
                group.pop(name, None)
        decided = self._decided()
        state_dict[RECORD] = record_of(self._kernel, self.param_groups, decided)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of torch's class of the same name.

        The policy stays the constructor's, and an implementation that was chosen
        automatically is chosen again.

        Raises:
            TypeError: It is not a dict.
            ValueError: It does not fit this optimizer; then nothing is loaded.

        Warns:
            UserWarning: It records other decisions than this policy's, or stops all
                decay.
        """
        require_dict(state_dict)
        record: list[Any] = []

        def check(optimizer: Any, adapted: dict[str, Any]) -> None:
            require_loadable(self._kernel, self.param_groups, self._decided(), adapted)
            record.append(adapted.get(RECORD))

        # Registered last: hooks of the user may adapt the state dict first.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, free in zip(self.param_groups, self._free):
            if free:
                group["foreach"] = group["fused"] = None
        decided = self._decided()
        now = record_of(self._kernel, self.param_groups, decided)
        warn_of_changes(decided, self.param_groups, record[0], now, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_policy", "_ledger", "_kernel", "_free")
        return {
            **super().__getstate__(),
            **{name: self.__dict__[name] for name in own},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch writes straight into __dict__, past the property.
        rest = {key: value for key, value in state.items() if key != "state"}
        if "_kernel" in rest:  # a copy or an unpickled optimizer, not a loaded state
            self._knowledge, self._arrivals = Knowledge(), None
            self._take_kernel(rest["_kernel"])
        self.state = state["state"]
        super().__setstate__(rest)
        if "_ledger" in rest:
            self._ledger.settle(self.param_groups)
        self._plan_anew()

    def decay_report(self) -> DecayReport:
        """Tell what decays: in sum when printed, per parameter in ``rows``."""
        return make_report(self.param_groups, self._decided(), self._kernel.decoupled)
