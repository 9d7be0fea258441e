"""Deciding at construction, and for every group that is added later."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._cells import free_choice
from selective_optim._decisions import (
    Decision,
    Ledger,
    decide,
    require_matches,
    require_once,
)
from selective_optim._kernels import Group, Kernel, is_zero
from selective_optim._rules import Policy
from selective_optim.parameters import Knowledge, ParameterInfo
from selective_optim.policies import as_policy

Model = nn.Module | Sequence[nn.Module] | None
# What a group may bring and does not keep; ZeroRedundancyOptimizer writes them back.
OWN_KEYS = ("wd_policy", "model")


class Arrival(NamedTuple):
    """A group on its way in: what is known of its parameters, and who decides."""

    group: int
    infos: list[ParameterInfo]
    policy: Policy | None


class DecidingOptimizer(torch.optim.Optimizer):
    """Knows what was decided for every parameter of its groups."""

    _kernel: Kernel

    @contextmanager
    def _deciding(
        self, params: Any, wd_policy: object, model: Model, kernel: Kernel
    ) -> Iterator[Any]:
        """Give torch's constructor what it takes, then decide for all groups."""
        self._policy = None if wd_policy is None else as_policy(wd_policy)
        self._knowledge = Knowledge(model)
        self._ledger = Ledger()
        # The user's choice of implementation, which a checkpoint must not undo.
        self._free: list[bool] = []
        self._arrivals: list[Arrival] | None = []
        self._take_kernel(kernel)
        yield self._knowledge.learn(params)
        arrivals, self._arrivals = self._arrivals, None
        policies = [self._policy, *(arrival.policy for arrival in arrivals)]
        self._settle(arrivals, policies)
        self._warn_if_idle([policy for policy in policies if policy is not None])
        self._plan_anew()

    def _take_kernel(self, kernel: Kernel) -> None:
        """Start stepping afresh with this kernel."""
        self._kernel = kernel

    def _plan_anew(self) -> None:
        """Forget what was planned, for a state that nobody else holds yet."""

    @_torch.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and decide for its parameters.

        Args:
            param_group: As for ``torch.optim``; ``"params"`` may also be a module or
                a sequence of modules, and ``"wd_policy"`` overrides the constructor's.

        Raises:
            ValueError: The policy cannot be decided; then nothing is added.
        """
        policy, arriving = self._policy_of(param_group)
        super().add_param_group(arriving)
        try:
            self._arrive(self.param_groups[-1], policy, arriving is param_group)
        except Exception:
            self.param_groups.pop()
            raise
        finally:
            if self._arrivals is None:
                self._knowledge.forget_places()

    def _policy_of(self, group: Any) -> tuple[Policy | None, Any]:
        """Take out the group's own policy and learn from its parameters."""
        if not isinstance(group, dict) or "params" not in group:
            return None, group  # torch says what is wrong
        group["params"] = self._knowledge.learn(group["params"])
        own = {name: group[name] for name in OWN_KEYS if name in group}
        if not own:
            return self._policy, group
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        # A copy: the caller's dict keeps its policy, for a second optimizer.
        group = {key: value for key, value in group.items() if key not in own}
        policy = own.get("wd_policy", self._policy)
        return None if policy is None else as_policy(policy), group

    def _arrive(self, group: Group, policy: Policy | None, recall: bool) -> None:
        index = len(self.param_groups) - 1
        infos = self._knowledge.infos(group["params"], group.get("param_names"), index)
        if policy is not None:  # without one, as torch: a warning
            require_once(infos)
        decisions = self._ledger.remembered(index, infos)
        if recall and decisions is not None:  # not if it brings a policy of its own
            self._record(index, decisions)
            return
        self._knowledge.require_members(infos)
        arrival = Arrival(index, infos, policy)
        if self._arrivals is not None:
            self._arrivals.append(arrival)
        else:
            self._settle([arrival], [] if policy is self._policy else [policy])

    def _settle(
        self, arrivals: list[Arrival], policies: Iterable[Policy | None]
    ) -> None:
        """Decide for groups that arrive together, or raise with nothing recorded.

        Args:
            arrivals: The groups.
            policies: Those whose globs must each match something.
        """
        for policy in {id(p): p for p in policies if p is not None}.values():
            mine = [info for a in arrivals if a.policy is policy for info in a.infos]
            require_matches(policy, mine, self._knowledge.everyone)
        decided = [decide(self._bound(a.policy, a.infos), a.infos) for a in arrivals]
        for arrival, decisions in zip(arrivals, decided):
            self._record(arrival.group, decisions)
        self._knowledge.forget_places()

    def _bound(
        self, policy: Policy | None, infos: list[ParameterInfo]
    ) -> Policy | None:
        if policy is None or not policy.whole_model:
            return policy
        return policy.bind(self._knowledge.everyone() or infos)

    def _record(self, index: int, decisions: list[Decision]) -> None:
        group = self.param_groups[index]
        self._ledger.record(index, group["params"], decisions)
        self._free[index : index + 1] = [free_choice(group)]

    def _decided(self) -> list[list[Decision]]:
        """Return the decisions, parameter by parameter as the groups stand now."""
        try:
            return self._ledger.follow(self.param_groups, self._knowledge.name_of)
        finally:
            self._knowledge.forget_places()

    def _warn_if_idle(self, policies: list[Policy]) -> None:
        if not policies:
            return
        decisions = [d for group in self._ledger.groups for d in group]
        if all(is_zero(group["weight_decay"]) for group in self.param_groups):
            warnings.warn(
                f"`weight_decay` is 0 in every group, so `wd_policy` {policies[0]!r} "
                f"has no effect. Pass weight_decay=0.01, or the value you want.",
                stacklevel=5,
            )
        elif not any(d.multiplier for d in decisions) and not self._decays_elsewhere():
            warnings.warn(
                f"`wd_policy` {policies[0]!r} exempts all {len(decisions)} "
                f"parameters. Pass weight_decay=0 instead if nothing is to decay.",
                stacklevel=5,
            )

    def _decays_elsewhere(self) -> bool:
        """Ask about the rest of the model, of which another rank may hold a part."""
        everyone = self._knowledge.everyone()
        self._knowledge.forget_places()
        try:
            others = decide(self._bound(self._policy, everyone), everyone)
        except ValueError:  # it was not asked to decide for these
            return False
        return any(decision.multiplier for decision in others)
