"""What every selective optimizer has: a policy, a report, and a record of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from selective_optim import _torch
from selective_optim._decider import OWN_KEYS, Decider
from selective_optim._loading import RECORD, Record, record_of
from selective_optim._text import warn
from selective_optim.decay import Form
from selective_optim.policies import Policy, WdPolicy
from selective_optim.report import DecayReport, make_report

Model = nn.Module | Sequence[nn.Module] | None


# Whoever writes a group by hand names a few keys; an optimizer fills in these.
FILLED = {"lr", "weight_decay", "maximize", "foreach", "differentiable"}
# Every optimizer that decided, while it lives.
alive: WeakSet[PolicyOptimizer] = WeakSet()


class PolicyOptimizer(torch.optim.Optimizer):
    """Knows who decays in its groups; how that is applied is left to subclasses."""

    _decider: Decider

    def _form_of(self, group: dict[str, Any], form: Form | None) -> Form | None:
        """Tell in which form a parameter of a group decays; ``None`` if unknown."""
        raise NotImplementedError  # pragma: no cover

    def _decided_anew(self) -> None:
        """Take note that the policy was assigned, or refuse it."""

    def _group_keys(self) -> Iterable[str]:
        """List the keys that are read in a group, which a misspelt one resembles."""
        return self.defaults

    @_torch.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and decide for its parameters.

        Args:
            param_group: As for ``torch.optim``; ``"params"`` may also be a module or
                a sequence of modules, ``"wd_policy"`` overrides the constructor's,
                and ``"model"`` adds to the modules that are known.

        Raises:
            ValueError: The policy cannot be decided; then nothing is added.
        """
        filled = isinstance(param_group, dict) and param_group.keys() >= FILLED
        policy, group = self._decider.open(param_group, self._group_keys())
        super().add_param_group(group)
        try:
            self._decider.arrive(self.param_groups, policy, group is not param_group)
        except BaseException:
            self.param_groups.pop()
            raise
        finally:
            self._decider.index.let_go()
        if filled and policy is None and group["weight_decay"]:
            self._warn_of_lost_policy(group)

    def _warn_of_lost_policy(self, group: dict[str, Any]) -> None:
        """Warn if a group was another optimizer's: it does not bring the policy along.

        Nor can the policy be taken along: a dict that was given to two optimizers,
        one with a policy and one without, looks the same.
        """
        for other in [each for each in alive if each is not self]:
            if policy := other._decider.decided_by(group["params"]):
                warn(
                    f"a group comes from an optimizer whose `wd_policy` is {policy!r}, "
                    f"and decays in full here. Pass wd_policy={policy!r}, or 'all' if "
                    f"that is meant."
                )
                return

    @property
    def wd_policy(self) -> Policy | None:
        """Who decays. Assigning decides anew for every parameter, or raises."""
        return self._decider.policy

    @wd_policy.setter
    def wd_policy(self, wd_policy: WdPolicy) -> None:
        before = self._decider.snapshot(self.param_groups, self.defaults)
        self._decider.assign(wd_policy, self.param_groups)
        try:
            self._decided_anew()
        except BaseException:
            self._decider = Decider.restored(before, self.param_groups)
            raise

    def decay_report(self) -> DecayReport:
        """Tell what decays: in sum when printed, per parameter in ``rows``."""
        decided = self._decider.readable(self.param_groups, self.defaults)
        return make_report(self.param_groups, decided, self._form_of)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.wd_policy is None:
            return text
        return f"{text.removesuffix(')')}wd_policy: {self.wd_policy!r}\n)"

    def _record(self) -> Record:
        """Write down how every parameter decays, as a state dict holds it."""
        decided = self._decider.readable(self.param_groups, self.defaults)
        return record_of(self._form_of, self.param_groups, decided)

    def _recorded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the record to torch's state dict, and take out what torch lacks."""
        for group in state_dict["param_groups"]:
            for name in OWN_KEYS:
                group.pop(name, None)
        state_dict[RECORD] = self._record()
        return state_dict
