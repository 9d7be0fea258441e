"""One optimizer of several classes, each of which steps the parameters of its route."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch

from selective_optim import _torch
from selective_optim._optimizer import Model, SelectiveOptimizer, decider_for
from selective_optim._text import copied_groups, kept_on_error, require_numbers, warn
from selective_optim.any_class import MODES, READING, as_torch_reads, selective
from selective_optim.decay import is_zero
from selective_optim.decisions.decider import WRITTEN, Decider, part_of
from selective_optim.decisions.knowledge import Pending
from selective_optim.decisions.watch import Watch, loss_of
from selective_optim.policies.named import WdPolicy, as_policy
from selective_optim.policies.selectors import Policy
from selective_optim.report import DecayReport, make_report
from selective_optim.routes.loading import States, joined, loadable, warn_of_new
from selective_optim.routes.route import (
    Route,
    ask_routes,
    known_route,
    read_routes,
    unused,
)
from selective_optim.step.setting import NO_SCALING, base_rate, scaling_of

Group = dict[str, Any]
ROUTE, WD = "route", "weight_decay"
OWN_KEYS = (ROUTE, "lr_scale")
SCALING = ("grad_scale", "found_inf")
NUMBER = re.compile(r"(?<=\bgroup )\d+|(?<=param_groups\[)\d+")


class Routed(torch.optim.Optimizer):
    """One optimizer that steps different parameters with different classes.

    A parameter goes to the first route that matches it. Each of your groups becomes one
    group per route, with the name of the route in ``"route"``. ``optimizers`` has the
    optimizer of each route. The results have the same bits as with separate optimizers.

    Args:
        params: As for the optimizers of this library. A group's ``"lr"`` may be a
            mapping from routes to rates; its ``"lr_scale"`` is a factor on the rate of
            every route. All parameters of a group with a ``"route"`` take that route.
        routes: From a name to a selector (as in ``policies``), a class (any that
            ``selective`` accepts) and the arguments for it.
        weight_decay: Decay of every route whose arguments have none, >= 0; by default
            that of its class.
        wd_policy: Which parameters decay, as for the optimizers of this library. The
            arguments of a route may have another one.
        model: The module, or modules, that hold the parameters.

    Raises:
        TypeError: A route is not a tuple as above, or its class does not take an
            argument.
        ValueError: No route matches a parameter, or a route gets none; or a class
            refuses a parameter of its route.

    Example:
        >>> from selective_optim import AdamW
        >>> from selective_optim.policies import is_hidden_matrix
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)
        ... )
        >>> optimizer = Routed(model, {
        ...     "body": ("1.weight", torch.optim.RMSprop, dict(lr=0.02)),
        ...     "adamw": ("*", AdamW, dict(lr=3e-4)),
        ... }, weight_decay=0.1, wd_policy="no_bias")
        >>> [(group["route"], group["lr"]) for group in optimizer.param_groups]
        [('body', 0.02), ('adamw', 0.0003)]
    """

    _decider: Decider
    optimizers: dict[str, SelectiveOptimizer]
    _may_be_empty = False  # whether a route may take nothing
    _watch: Watch | None = None  # of the first steps
    _checked: Any = None  # groups as they were when every route could decide

    # Construction.

    def __init__(
        self,
        params: Any,
        routes: Mapping[str, Any],
        *,
        weight_decay: float | None = None,
        wd_policy: WdPolicy = None,
        model: Model = None,
    ) -> None:
        self._routes = read_routes(routes, selective)
        require_numbers({WD: weight_decay})
        self._decider = decider_for(model, wd_policy)
        self.optimizers = {}
        known = self._decider.read(copied_groups(params))
        super().__init__(known, dict(READING))
        parts = self._decided_parts(self._decider.take_pending(), strict=True)
        self._common = {} if weight_decay is None else {WD: weight_decay}
        for route in self._routes:
            mine = [group for group in parts if group[ROUTE] == route.name]
            if mine:
                self._make(route, mine)
        self._link([group[ROUTE] for group in parts])
        first = self.param_groups[0]
        self.defaults = {key: first.get(key) for key in ("lr", WD)}
        self._decider.warn_if_weak(self.param_groups)
        decays = not all(is_zero(group[WD]) for group in self.param_groups)
        self._watch = Watch(decays)
        self._compare_anew()
        self._decider.index.release()

    def _make(self, route: Route, groups: list[Group]) -> None:
        arguments = {**self._common, **route.arguments}
        arguments["wd_policy"] = part_of(self._decider)
        self.optimizers[route.name] = route.make(
            groups, arguments, self._decider.name_of
        )

    def _read_group(self, param_group: Any) -> None:
        """Take a group as torch does; it is decided for when all are there."""
        policy, group = self._decider.unpack(param_group, [*self._keys, *OWN_KEYS])
        if isinstance(group, dict) and isinstance(group.get("lr"), Mapping):
            for name in group["lr"]:
                known_route(name, self._routes)
        given = set(group) if isinstance(group, dict) else set()
        read = as_torch_reads(group, self.param_groups)
        for key in READING.keys() - given:
            del read[key]
        self.param_groups.append(read)
        self._decider.add_group(self.param_groups, policy, group is not param_group)

    def _decided_parts(self, coming: Sequence[Pending], strict: bool) -> list[Group]:
        """Split groups by route, and decide for what each route takes.

        If ``strict``, as in a constructor, every route must take something.
        """
        decider, policies = self._decider, dict[str, Policy | None]()
        taken = ask_routes(decider, self._routes, coming, self.param_groups, strict)
        if strict and (told := unused(self._routes, taken, self.param_groups)):
            if not self._may_be_empty:
                raise ValueError(told)
            warn(told)
        for route in self._routes:
            own = route.arguments.get("wd_policy")
            policies[route.name] = decider.policy if own is None else as_policy(own)
        parts, pending = list[Group](), list[Pending]()
        first = 0 if strict else len(self.param_groups) - len(coming)
        for each, names in zip(coming, taken):
            group = self.param_groups[each.group]
            for route in self._routes:
                chosen = [i for i, name in enumerate(names) if name == route.name]
                # A rank that shards groups by route may hold nothing of one.
                if not chosen and group.get(ROUTE) != route.name:
                    continue
                part = route.part(group, chosen, self._keys)
                own_policy = each.policy is not decider.policy
                policy = each.policy if own_policy else policies[route.name]
                told = part.get("param_names", ())
                lr0s = repeat(base_rate(part))
                index = first + len(parts)
                pending.append(Pending(index, part["params"], told, policy, lr0s))
                parts.append(part)
        asked = [each.policy for each in pending] if strict else ()
        decider.decide_for(pending, [decider.policy, *asked] if strict else [])
        return parts

    @property
    def _keys(self) -> set[str]:
        return {key for route in self._routes for key in route.keys}

    def _link(self, order: Sequence[str]) -> None:
        """List the groups of all routes, in the order of their routes that is given."""
        groups = {name: iter(o.param_groups) for name, o in self.optimizers.items()}
        self.param_groups = [next(groups[name]) for name in order]

    @_torch.disable_dynamo
    def add_param_group(self, param_group: Any) -> None:
        """Add a parameter group, split by routes.

        Args:
            param_group: As for the constructor.

        Raises:
            ValueError: No route matches, or the policy cannot decide; nothing is added.
        """
        if not self.optimizers:
            self._read_group(param_group)
            return
        self._distribute()
        before = list(self.param_groups)
        self._decider.read(())
        try:
            with kept_on_error([param_group]):
                for part in self._new_parts(*copied_groups([param_group])):
                    self._add_part(part)
        except BaseException:
            self._decider.take_pending()
            self.param_groups[:] = before
            self._distribute()
            raise
        self._compare_anew()

    def _compare_anew(self) -> None:
        self._watch = self._watch or Watch()
        self._watch.compare(found=bool(self._decider.index.found))

    def _new_parts(self, group: Any) -> list[Group]:
        """Split a group by routes, unless it says where it goes."""
        count, policy = len(self.param_groups), self._decider.policy
        self._read_group(group)
        coming, read = self._decider.take_pending(), self.param_groups[count]
        if ROUTE not in read:
            parts = self._decided_parts(coming, strict=False)
        else:  # its optimizer decides, which knows a group that was cleared
            own = {} if coming[0].policy is policy else {"wd_policy": coming[0].policy}
            route = known_route(read[ROUTE], self._routes)
            parts = [route.part({**read, **own}, None, self._keys)]
        del self.param_groups[count:]
        return parts

    def _add_part(self, part: Group) -> None:
        route = known_route(part[ROUTE], self._routes)
        if route.name not in self.optimizers:
            self._make(route, [part])
        else:
            with self._numbered(route.name):
                self.optimizers[route.name].add_param_group(part)
        group = self.optimizers[route.name].param_groups[-1]
        route.require_served(group["params"], self._decider.name_of)
        self.param_groups.append(group)

    def _distribute(self) -> None:
        """Give each route's optimizer the groups that now stand in the list."""
        mine: dict[str, list[Group]] = {name: [] for name in self.optimizers}
        for index, group in enumerate(self.param_groups):
            if group.get(ROUTE) not in mine:
                raise ValueError(
                    f"group {index} has the route {group.get(ROUTE)!r}, and the routes "
                    f"are {', '.join(map(repr, mine))}. Add a group by "
                    f"optimizer.add_param_group(dict(params=...))."
                )
            mine[group[ROUTE]].append(group)
        for name, groups in mine.items():
            known = self.optimizers[name].param_groups
            if len(known) != len(groups) or not all(map(is_, known, groups)):
                self._require_whole(name, groups)
                self.optimizers[name].param_groups = groups

    def _require_whole(self, name: str, groups: Sequence[Group]) -> None:
        # torch adds keys to `defaults` as it loads, that the class does not read.
        own = known_route(name, self._routes).keys
        keys = self.optimizers[name].defaults.keys() & own
        for group in groups:
            if missing := sorted(keys - group.keys()):
                raise ValueError(
                    f"a group of route {name!r} has no {missing[0]!r}: it was made for "
                    f"another class. Make a new optimizer with other routes, and load "
                    f"this one's state_dict() into it."
                )

    # What all routes have together.

    @property
    def state(self) -> Any:
        """State tensors by parameter, of all routes."""
        return States(self.optimizers, self.param_groups)

    @state.setter
    def state(self, value: Any) -> None:
        for optimizer in self.optimizers.values():
            params = chain(*(group["params"] for group in optimizer.param_groups))
            own = ((param, value[param]) for param in params if param in value)
            optimizer.state = defaultdict(dict, own)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        optimizers = self.optimizers.values()
        return all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)

    @property
    def wd_policy(self) -> Policy | None:
        """The policy. If you assign one, it decides again for every parameter."""
        return self._decider.policy

    @wd_policy.setter
    def wd_policy(self, wd_policy: WdPolicy) -> None:
        self._distribute()
        optimizers = list(self.optimizers.values())
        for optimizer in optimizers:
            self._decider.gather(optimizer._decider, optimizer.param_groups)
        before = self._decider.snapshot(self.param_groups)
        each = [o._decider.snapshot(o.param_groups) for o in optimizers]
        try:
            self._decider.assign(wd_policy, self.param_groups)
            for optimizer in optimizers:
                optimizer.wd_policy = self._decider.policy
        except BaseException:
            self._decider = Decider.restored(before, self.param_groups)
            for optimizer, snapshot in zip(optimizers, each):
                restored = Decider.restored(snapshot, optimizer.param_groups)
                optimizer._decider = restored
                restored.whole = self._decider
                optimizer._decided_anew()
            raise
        self._compare_anew()

    def decay_report(self) -> DecayReport:
        """Report what decays, and which route steps it."""
        self._distribute()
        known, lost = dict[int, Any](), list[str]()
        for optimizer in self.optimizers.values():
            groups = optimizer.param_groups
            decided = optimizer._decider.readable(groups)
            known |= {id(g): (optimizer, own) for g, own in zip(groups, decided)}
            lost.append(loss_of(optimizer._kernel, groups, decided))
        report = make_report(
            self.param_groups,
            [known[id(group)][1] for group in self.param_groups],
            lambda group: known[id(group)][0]._form_of(group),
            self._decider.index,
        )
        told = filter(None, [report.remark, *lost])
        return replace(report, remark="; ".join(told))

    def __getattr__(self, name: str) -> Any:
        """Offer ``train`` and ``eval`` where a class has them."""
        if name not in MODES:  # a scaler asks at every step
            raise AttributeError(name)
        owners = vars(self).get("optimizers", {})
        methods = [getattr(o, name) for o in owners.values() if hasattr(o, name)]
        if not methods:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

        def switch() -> None:
            self._distribute()
            for method in methods:
                method()

        return switch

    def __repr__(self) -> str:
        policy = "" if self.wd_policy is None else f"wd_policy: {self.wd_policy!r}\n"
        return f"{super().__repr__().removesuffix(')')}{policy})"

    # Stepping.

    @_torch.run_as_is
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient, with the class of its route.

        Args:
            closure: Reevaluates the model and returns the loss; called once.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            ValueError: A group has no route of this optimizer; nothing is stepped.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _require_ready(self)
        with self._scaled():
            name = ""
            try:  # no block for each route, at every step
                for name in self.optimizers:
                    optimizer = self.optimizers[name]
                    _torch.unhooked(type(optimizer).step)(optimizer)
            except (TypeError, ValueError, RuntimeError) as error:
                with self._numbered(name):
                    raise error
        if self._watch is not None:
            parts = list(self.optimizers.values())
            groups = [group for part in parts for group in part.param_groups]
            layout = [rows for part in parts for rows in part._decider.layout]
            if not self._watch.begin(groups, layout):
                self._watch = None
        return loss

    def _require_ready(self) -> None:
        """Raise where a route cannot decide, before any has stepped."""
        self._distribute()
        self._decider.refuse_written((), self.defaults)
        # Not each parameter, at every step.
        lists = [group["params"] for group in self.param_groups]
        groups = [(id(params), len(params)) for params in lists]
        if groups == self._checked and WRITTEN.isdisjoint(chain(*self.param_groups)):
            return
        for name, optimizer in self.optimizers.items():
            with self._numbered(name):
                optimizer._decider.rows(optimizer.param_groups)
        self._checked = groups

    @contextmanager
    def _numbered(self, name: str) -> Iterator[None]:
        """Let what a route raises count groups as they stand here."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            own = [i for i, g in enumerate(self.param_groups) if g[ROUTE] == name]
            here = dict(enumerate([*own, len(self.param_groups)]))  # one may be coming
            told = NUMBER.sub(lambda n: str(here.get(int(n[0]), n[0])), str(error))
            error.args = (told,)
            raise

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Pass on the attributes that a ``GradScaler`` sets on this optimizer."""
        scaling = scaling_of(self)
        told = () if scaling == NO_SCALING else self.optimizers.values()
        for optimizer in told:
            vars(optimizer).update(zip(SCALING, scaling))
        try:
            yield
        finally:
            for optimizer in told:
                for name in SCALING:
                    vars(optimizer).pop(name, None)

    # State dicts and copies.

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return one state dict in torch's format, with a ``"route"`` in each group."""
        self._distribute()

        def save(*_: object) -> dict[str, Any]:
            saved = {name: o.state_dict() for name, o in self.optimizers.items()}
            return joined(saved, [group[ROUTE] for group in self.param_groups])

        # Before the user's hooks, which may change the state dict.
        handle = self.register_state_dict_post_hook(save, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @_torch.disable_dynamo
    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state dict of this class, or those of separate optimizers.

        It finds parameters by name if their order has changed. A parameter that another
        route steps now, or that was not saved, gets no state.

        Args:
            state_dict: The result of ``state_dict()``. Or the state dicts of separate
                optimizers, as a list in the order of the routes or as a mapping from
                routes. Or that of an optimizer of another project whose groups have
                ``"use_muon"``, ``"use_fallback"``, ``"algorithm"`` or ``"kind"``.

        Raises:
            ValueError: It has other routes, or does not fit; then nothing is loaded.

        Warns:
            UserWarning: Some parameters get no state, or decay differently than saved.
        """
        self._distribute()
        for hook in _torch.hooks_of(self, "load_state_dict_pre"):
            adapted = hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        decided = {
            name: o._decider.readable(o.param_groups)
            for name, o in self.optimizers.items()
        }
        saved, new = loadable(state_dict, self.optimizers, decided)
        for name, optimizer in self.optimizers.items():  # before anything is loaded
            with self._numbered(name):
                optimizer._require_loadable(saved[name], decided[name])
        warn_of_new(new)
        order = [group[ROUTE] for group in self.param_groups]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
        self._link(order)
        for hook in _torch.hooks_of(self, "load_state_dict_post"):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "optimizers": self.optimizers,
            "_routes": self._routes,
            "_common": self._common,
            "decider": self._decider.snapshot(self.param_groups),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        rest = dict(state)
        decider = rest.pop("decider")
        # `copy.copy` shares groups and states, and decides for itself.
        rest["optimizers"] = {n: copy(o) for n, o in rest["optimizers"].items()}
        self.optimizers = rest["optimizers"]
        super().__setstate__(rest)
        self._decider = Decider.restored(decider, self.param_groups)
        for optimizer in self.optimizers.values():
            optimizer._decider.whole = self._decider


_require_ready = _torch.disable_dynamo(Routed._require_ready)
