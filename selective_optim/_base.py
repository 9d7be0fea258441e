"""What the three optimizers share: deciding at construction, stepping by plan, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._cells import Member, free_choice
from selective_optim._decisions import (
    Decision,
    Ledger,
    decide,
    require_matches,
)
from selective_optim._kernels import Group, Kernel, States, is_zero
from selective_optim._loading import record_of, require_loadable, warn_of_changes
from selective_optim._plan import Stepper
from selective_optim._rules import Form, Policy
from selective_optim.parameters import Knowledge, ParameterInfo
from selective_optim.policies import as_policy
from selective_optim.report import DecayReport, make_report

Model = nn.Module | Sequence[nn.Module] | None
# What a group may bring and does not keep; ZeroRedundancyOptimizer writes them back.
OWN_KEYS = ("wd_policy", "model")
RECORD = "decay"  # the key of a state dict under which decisions are recorded


class Arrival(NamedTuple):
    """A group on its way in: what is known of its parameters, and who decides."""

    group: int
    infos: list[ParameterInfo]
    policy: Policy | None


class SelectiveOptimizer(torch.optim.Optimizer):
    """Decides once for every parameter and applies the decisions in ``step()``.

    Stands before a class of ``torch.optim`` whose constructor, groups and state
    stay what they are. What is added lives in attributes of its own.
    """

    _kernel: Kernel
    _states: States

    @contextmanager
    def _deciding(
        self, params: Any, wd_policy: object, model: Model, kernel: Kernel
    ) -> Iterator[Any]:
        """Give torch's constructor what it takes, then decide for all groups at once."""
        self._policy = None if wd_policy is None else as_policy(wd_policy)
        self._knowledge = Knowledge(model)
        self._ledger = Ledger()
        self._arrivals: list[Arrival] | None = []
        self._take_kernel(kernel)
        yield self._knowledge.learn(params)
        arrivals, self._arrivals = self._arrivals, None
        self._settle(arrivals, policies=[self._policy, *(a.policy for a in arrivals)])
        self._touched = False
        self._warn_if_idle()

    def _take_kernel(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._stepper = Stepper(kernel)
        self._touched = False
        # The user's choice, which a checkpoint must not undo: open or stated.
        self._free: list[bool] = []

    # Groups

    @_torch.disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does, and decide for its parameters.

        Args:
            param_group: As for ``torch.optim``; ``"params"`` may also be a module or
                a sequence of modules, and ``"wd_policy"`` overrides the constructor's.

        Raises:
            ValueError: The policy cannot be decided; then nothing is added.
        """
        policy, param_group = self._policy_of(param_group)
        super().add_param_group(param_group)
        try:
            self._arrive(self.param_groups[-1], policy)
        except Exception:
            self.param_groups.pop()
            raise

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

    def _arrive(self, group: Group, policy: Policy | None) -> None:
        index = len(self.param_groups) - 1
        infos = self._knowledge.infos(group["params"], group.get("param_names"), index)
        decisions = self._ledger.remembered(index, infos)
        if decisions is not None:
            self._record(index, decisions)
            return
        self._knowledge.require_members(infos)
        arrival = Arrival(index, infos, policy)
        if self._arrivals is not None:
            self._arrivals.append(arrival)
        else:
            self._settle([arrival], policies=[] if policy is self._policy else [policy])

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
        for arrival, decisions in zip(arrivals, decided, strict=True):
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

    def _warn_if_idle(self) -> None:
        if self._policy is None:
            return
        decisions = [d for group in self._ledger.groups for d in group]
        if not any(d.multiplier for d in decisions + self._elsewhere()):
            warnings.warn(
                f"`wd_policy` {self._policy!r} exempts all {len(decisions)} parameters. "
                f"Leave it out, with weight_decay=0, if nothing is to decay.",
                stacklevel=5,
            )
        elif all(is_zero(group["weight_decay"]) for group in self.param_groups):
            warnings.warn(
                f"`weight_decay` is 0 in every group, so `wd_policy` {self._policy!r} has no "
                f"effect. Pass weight_decay=0.01, or the value you want.",
                stacklevel=5,
            )

    def _elsewhere(self) -> list[Decision]:
        """Decide for the rest of the model, of which another rank may hold a part."""
        try:
            return decide(self._policy, self._knowledge.everyone())
        except ValueError:  # a policy may be silent on what it was not asked to decide
            return []
        finally:
            self._knowledge.forget_places()

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, each with its own decay.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            ValueError: A hyperparameter was set to a value out of range.
            RuntimeError: A parameter with a sparse gradient decays.
        """
        if torch.compiler.is_compiling() or self.defaults["differentiable"]:
            return self._functional_step(closure)
        if self._kernel.counts:
            _torch.check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._stepper.step(
                self.param_groups,
                self._members,
                self._states,
                (getattr(self, "grad_scale", None), getattr(self, "found_inf", None)),
                self._touched,
            )
        return loss

    @_torch.use_grad_for_differentiable
    def _functional_step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step as torch's own ``step`` does, for ``torch.compile`` and ``differentiable``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists: list[list[Any]] = [[] for _ in range(self._kernel.lists)]
            flag, parts = self._init_group(group, *lists)
            for multiplier, form, chosen in parts:
                setting = self._kernel.setting(group, multiplier, form)
                mine = _pick(lists, chosen)
                self._kernel.traced(setting, mine, flag)
                self._kernel.keep(self.state, mine)
        return loss

    @_torch.disable_dynamo
    def _init_group(self, group: Group, *lists: list[Any]) -> Any:
        """Fill the lists as torch does; also return which of them were decided alike.

        ``torch.compile`` runs a method of this name as it is, and compiles what is
        done with the lists.
        """
        flag = super()._init_group(group, *lists)  # type: ignore[misc]  # of torch's class
        index = next(i for i, own in enumerate(self.param_groups) if own is group)
        decided = zip(group["params"], self._decided()[index])
        parts: dict[tuple[float, Form | None], list[int]] = {}
        for position, decision in enumerate(
            d for p, d in decided if p.grad is not None
        ):
            key = (decision.multiplier, decision.form)
            parts.setdefault(key, []).append(position)
        return flag, tuple((*key, tuple(chosen)) for key, chosen in parts.items())

    def _decided(self) -> list[list[Decision]]:
        """Return the decisions, parameter by parameter as the groups stand now."""
        try:
            return self._ledger.follow(self.param_groups, self._knowledge.name_of)
        finally:
            self._knowledge.forget_places()

    def _members(self) -> list[Member]:
        decided = self._decided()
        return [
            Member(param, index, d.multiplier, d.form, d.label(index, position))
            for index, (group, decisions) in enumerate(
                zip(self.param_groups, decided, strict=True)
            )
            for position, (param, d) in enumerate(
                zip(group["params"], decisions, strict=True)
            )
        ]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell ``GradScaler`` to hand over its scale and not to ask for a synchronization."""
        return all(group["fused"] or free_choice(group) for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore what torch's constructor writes: the groups know."""

    # State

    @property
    def state(self) -> States:  # type: ignore[override]  # an attribute in torch
        """State tensors by parameter, as in torch; once looked at, checked every step."""
        if not torch.compiler.is_compiling():  # a compiled step may not set attributes
            self._touched = True
        return self._states

    @state.setter
    def state(self, value: States) -> None:
        self._touched = True
        self._states = value

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict and, under ``"decay"``, what decays how.

        ``"decay"`` holds, group by group, a ``[multiplier, form]`` per parameter.
        """
        touched = self._touched or _torch.has_state_dict_hooks(self)
        state_dict = super().state_dict()
        # Copies: whoever edits them does not edit the optimizer.
        state_dict["state"] = {
            key: dict(own) if isinstance(own, dict) else own
            for key, own in state_dict["state"].items()
        }
        self._touched = touched
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
            ValueError: It does not fit this optimizer; then nothing is loaded.

        Warns:
            UserWarning: It records other decisions than this policy's.
        """
        decided = self._decided()
        require_loadable(self._kernel, self.param_groups, decided, state_dict)
        super().load_state_dict(state_dict)
        for group, free in zip(self.param_groups, self._free):
            if free:
                group["foreach"] = group["fused"] = None
        now = record_of(self._kernel, self.param_groups, decided)
        warn_of_changes(decided, state_dict.get(RECORD), now, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_policy", "_ledger", "_kernel", "_free")
        return {
            **super().__getstate__(),
            **{name: self.__dict__[name] for name in own},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch writes straight into __dict__, past the property.
        rest = {key: value for key, value in state.items() if key != "state"}
        self.state = state["state"]
        if "_kernel" in rest:  # a copy or an unpickled optimizer, not a loaded state
            self._knowledge, self._arrivals = Knowledge(), None
            self._take_kernel(rest["_kernel"])
        super().__setstate__(rest)
        self._stepper = Stepper(self._kernel)
        self._touched = False  # the state is fresh: nobody else holds it yet

    # Report

    def decay_report(self) -> DecayReport:
        """Tell what decays: per group and reason when printed, per parameter in ``rows``."""
        decided = self._decided()
        return make_report(self.param_groups, decided, self._kernel.decoupled)


def _pick(lists: list[list[Any]], chosen: Sequence[int]) -> list[list[Any]]:
    return [[entry[i] for i in chosen] if entry else [] for entry in lists]
