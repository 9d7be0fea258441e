"""Keeping a plan between steps, and making a new one when it is no longer true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from time import sleep

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.fused.counters import Counters
from selective_optim.fused.guards import distinct, params_of
from selective_optim.fused.plan import Plan
from selective_optim.step.kernels import Kernel, require_no_nan
from selective_optim.step.parts import (
    DecidedParam,
    Part,
    counts_beside,
    fused_choice,
    make_layout,
    wants_fused,
)
from selective_optim.step.setting import Groups, Scaling, State, States

# Lists every parameter, in order, with what was decided for it.
ListDecided = Callable[[], Sequence[DecidedParam]]
# Off, the class steps what a plan would: the same bits, more calls.
PLANNING = _torch.CAN_PLAN


# By ids of tokens: the token, so that no id comes again, with dtype and device.
Places = dict[int, tuple[object, torch.dtype, torch.device]]


def _places_of(params: Sequence[Tensor]) -> Places:
    tokens = list(map(_torch.token_of, params))
    return {id(t): (t, p.dtype, p.device) for t, p in zip(tokens, params)}


class Stepper:
    """Keeps the plan of an optimizer and makes a new one when the old is not true."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.plans = 0  # how many were made
        self._plan: Plan | None = None
        self._counters = Counters()
        self._stepped: Places = {}  # who had a part in the last plan
        self.exposed = False
        self.seen = False  # state was seen in a step, and is exposed at its end
        # The thread that steps, or with a minus the one that is in `expose`; a dict, as
        # `setdefault` cannot be interrupted half done.
        self._owner: dict[str, int] = {}
        # Where each parameter was when its state was last known to fit it.
        self._places: Places = {}

    @_torch.disable_dynamo
    def expose(self, states: States) -> None:
        """Take note that someone outside may edit the state, now or from now on.

        Until then nothing outside can edit it: a step need not look at state, and
        may hold its tensors, and counters may be views of one tensor.
        """
        if self.exposed:
            return
        # In a step another thread reads it, or a mode around it between operations.
        if self._owner.setdefault("thread", -get_ident()) != -get_ident():
            self.seen = True
            return
        try:
            self.forget()  # a plan that was made before holds tensors
            self._counters.part(states, self.seen)
            # Last: after an interrupt, the next step does the rest.
            self.exposed, self.seen = True, False
        finally:
            self._owner.clear()

    def claim(self) -> bool:
        """Take the plan for this thread, unless another one steps by it."""
        thread = get_ident()
        for _ in range(100):
            if (owner := self._owner.setdefault("thread", thread)) >= 0:
                return owner == thread
            sleep(0.001)  # another thread takes the state apart, and looks at it then
        self._owner["thread"] = thread  # it was interrupted
        return True

    def forget(self) -> None:
        self._plan = None

    def adopt(self, groups: Groups, states: States) -> None:
        """Take over a state that was loaded or copied."""
        self.forget()
        self._places = _places_of(params_of(groups))
        if not self.kernel.counts:
            return
        # Counters that a for-loop left on the CPU would keep a parameter from the
        # fused kernel. Others stay, as in torch.
        moving: dict[tuple[torch.device, torch.device], list[State]] = {}
        for group in groups:
            choice = fused_choice(self.kernel, group)
            for param in group["params"]:
                own = states.get(param) or {}
                step = own.get("step")
                if (
                    isinstance(step, Tensor)
                    and not counts_beside(param, step)
                    and wants_fused(self.kernel, choice, param)
                ):
                    moving.setdefault((step.device, param.device), []).append(own)
        for (_, device), owns in moving.items():
            # One copy between devices for all.
            values = torch.stack([own["step"].reshape(()).float() for own in owns])
            for own, value in zip(owns, values.to(device).unbind()):
                own["step"] = value.clone()

    def plans_for(self, groups: Groups) -> bool:
        """Tell whether parts can be planned: no group computes what is read."""
        return PLANNING and set(map(type, groups)) <= {dict}

    def step(
        self,
        groups: Groups,
        decided: ListDecided,
        states: States,
        scaling: Scaling,
        step_parts: Callable[[list[Part]], None],
    ) -> None:
        """Step by a plan, after what the optimizer's class steps (``step_parts``)."""
        try:
            plan = self._plan
            grads = None if plan is None else plan.current_grads(groups, states)
            if plan is None or grads is None:
                plan = self._new_plan(groups, decided, states)
                grads = plan.find_grads()
            assert grads is not None  # which a new plan fits
            if plan.rest:
                step_parts(plan.rest)
            if grads:
                plan.run(grads, scaling)
            if plan.once:
                self.forget()
        except BaseException:
            self.forget()  # how far a failed step came is not known
            raise

    @_torch.disable_dynamo
    def unplanned_parts(
        self, groups: Groups, decided: ListDecided, states: States, may_choose: bool
    ) -> list[Part]:
        """Make parts for the class alone; without ``may_choose``, as flags say."""
        self.forget()
        require_no_nan(self.kernel, groups)
        params = decided()
        self._follow_moved(groups, params, states)
        return make_layout(self.kernel, groups, params, states, (), may_choose).parts

    def finish(self, mine: bool, states: States) -> None:
        """End a step, however it went, and take note of a look at the state in it."""
        if mine:
            self._owner.clear()
        if self.seen:
            self.expose(states)

    @torch.no_grad()
    def _new_plan(self, groups: Groups, decided: ListDecided, states: States) -> Plan:
        params = decided()
        self.forget()
        self.plans += 1
        # Before any state is made: a refusal leaves the optimizer as it was.
        require_no_nan(self.kernel, groups)
        self._follow_moved(groups, params, states)
        given = (self.kernel, groups, params, states)
        # Where counters are shared, each group counts for itself, as the class does it.
        owns = [states.get(each.param) or {} for each in params if self.exposed]
        owns = [own for own in owns if "step" in own]
        planned = distinct([own["step"] for own in owns]) == distinct(owns)
        layout = make_layout(*given, self._stepped, planned=planned)
        mine = [params[i].param for part in layout.parts for i in part.positions]
        # Tokens, not parameters: what is kept must not keep a deleted model alive.
        self._stepped = _places_of(mine)
        if any(group.get("capturable") for group in groups):
            # A CUDA graph remembers where counters lie: they must not move later.
            self._counters.part(states)
        fused = [part for part in layout.parts if part.key.planned]
        # Nothing is planned and nothing held: its class may read the state at no cost.
        self.seen |= not (fused or layout.idle or layout.once)
        for position in sorted({i for part in fused for i in part.positions}):
            param, group, *_ = params[position]
            if not self.kernel.has_state(states.get(param) or {}, groups[group]):
                step = self._counters.begin(param.device, len(params))
                self.kernel.begin(states[param], param, groups[group], step)
        own = (self._counters, self.exposed)
        self._plan = Plan(self.kernel, groups, layout, states, *own)
        return self._plan

    def _follow_moved(
        self, groups: Groups, params: Sequence[DecidedParam], states: States
    ) -> None:
        """Move state to where ``model.to(...)`` moved parameters, as loading would.

        What never fitted its parameter was put there on purpose, as moments of less
        precision are, and stays.
        """
        places = _places_of([each.param for each in params])
        for param, group, *_ in params if places != self._places else ():
            now = places[id(_torch.token_of(param))]
            was = self._places.get(id(now[0]), now)
            if was == now:  # or not seen before
                continue
            own = states.get(param) or {}
            moving = set(self.kernel.entries(groups[group]))
            choice = fused_choice(self.kernel, groups[group])
            if wants_fused(self.kernel, choice, param):
                moving.add("step")  # which a fused kernel reads beside the parameter
            for entry in moving & own.keys():
                value = own[entry]
                if isinstance(value, Tensor):
                    dtype, device = value.dtype, value.device
                    own[entry] = value.to(
                        now[1] if dtype == was[1] and entry != "step" else dtype
                    ).to(now[2] if device == was[2] else device)
        self._places = places
