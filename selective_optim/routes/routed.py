"""One optimizer of several classes, each of which steps what its route takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import chain, repeat
from operator import is_
from typing import Any

import torch

from selective_optim import _torch
from selective_optim._optimizer import Model, SelectiveOptimizer
from selective_optim._text import copied_groups, first_of, require_numbers, warn
from selective_optim.adamw import AdamW
from selective_optim.any_class import MODES, READING, as_torch_reads, selective
from selective_optim.decay import none_decays
from selective_optim.decisions.decider import WRITTEN, Decider
from selective_optim.decisions.knowledge import Pending
from selective_optim.decisions.state_dict import Decided
from selective_optim.decisions.watch import Watch, loss_of
from selective_optim.policies.named import WdPolicy, as_policy
from selective_optim.policies.predicates import (
    everything,
    is_embedding,
    is_hidden_matrix,
    is_matrix,
)
from selective_optim.policies.selectors import Policy, Selector, as_selector
from selective_optim.report import DecayReport, amount, make_rows, report_on
from selective_optim.routes.route import (
    ROUTE,
    Route,
    known_route,
    read_routes,
    require_used,
    split_by_route,
)
from selective_optim.routes.state_dict import (
    States,
    in_order,
    joined,
    loadable,
    warn_of_new,
    warn_of_unused,
)
from selective_optim.step.setting import (
    NO_SCALING,
    WD,
    Group,
    base_rate,
    scaling_of,
    without,
)

NUMBER = re.compile(r"(?<=\bgroup )\d+|(?<=param_groups\[)\d+")
# torch's, of its Newton-Schulz iteration (torch/optim/_muon.py).
COEFFICIENTS = (3.4445, -4.775, 2.0315)


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
    _compare_ranks = SelectiveOptimizer._compare_ranks

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
        self._decider = Decider.for_constructor(as_policy, wd_policy, model)
        self.optimizers = {}
        self._common = {} if weight_decay is None else {WD: weight_decay}
        super().__init__(self._decider.collect(copied_groups(params)), dict(READING))
        self._place(self._take_route_groups())
        first = self.param_groups[0]
        self.defaults = {key: first.get(key) for key in ("lr", WD)}
        self._decider.warn_if_nothing_decays(self.param_groups)
        self._watch = Watch(not none_decays(self.param_groups))
        self._compare_ranks()
        self._decider.index.release()

    def _read_group(self, param_group: Any) -> None:
        """Take a group as torch does; it is decided for when all are there."""
        keys = [*self._keys, ROUTE, "lr_scale"]
        policy, group = self._decider.unpack(param_group, keys)
        if isinstance(group, dict) and isinstance(group.get("lr"), Mapping):
            for name in group["lr"]:
                known_route(name, self._routes)
        self.param_groups.append(as_torch_reads(group, self.param_groups))
        self._decider.add_group(self.param_groups, policy, group is not param_group)

    def _take_route_groups(self) -> list[Group]:
        """Split by route the groups that were read, and decide for what each takes."""
        decider, constructing = self._decider, not self.optimizers
        coming, groups = decider.take_pending(), self.param_groups
        first = len(groups) - len(coming)
        taken = split_by_route(decider, self._routes, coming, groups, constructing)
        if constructing:
            require_used(self._routes, taken, warns=self._may_be_empty)
        route_groups, pending = list[Group](), list[Pending]()
        for user_group, route, positions in taken:
            group = route.group_of(groups[user_group.group], positions, self._keys)
            policy = user_group.policy
            if policy is decider.policy:  # the user's group brings none
                policy = route.policy or policy
            names, lr0s = group.get("param_names", ()), repeat(base_rate(group))
            index = first + len(route_groups)
            pending.append(Pending(index, group["params"], names, policy, lr0s))
            route_groups.append(group)
        if constructing:
            decider.decide_for(pending, [decider.policy, *(p.policy for p in pending)])
        elif ROUTE not in groups[first]:
            decider.decide_for(pending, [])
        elif coming[0].policy is not decider.policy:
            # A group that names its route is decided by the optimizer of that, which
            # remembers groups that were cleared, and gets the group's own policy.
            route_groups[0]["wd_policy"] = coming[0].policy
        del groups[first:]
        return route_groups

    def _place(self, route_groups: list[Group]) -> None:
        """Add groups to the optimizers of their routes, and list what these hold."""
        order = [*self._order, *(group[ROUTE] for group in route_groups)]
        for route in self._routes:
            if groups := [g for g in route_groups if g[ROUTE] == route.name]:
                self._add_to_route(route, groups)
        self.param_groups[:] = self._groups_in(order)

    def _add_to_route(self, route: Route, groups: list[Group]) -> None:
        params = [param for group in groups for param in group["params"]]
        with route.explaining(params, self._decider.name_of):
            if route.name not in self.optimizers:
                parent = self._decider
                policy = route.policy or parent.policy
                decider = Decider(parent.as_policy, policy, parent.index, parent)
                arguments = {**self._common, **route.arguments, "wd_policy": decider}
                self.optimizers[route.name] = route.selective(groups, **arguments)
                return
            route.check(params)  # some classes do so in constructors alone
        with self._numbering(route.name):
            for group in groups:
                self.optimizers[route.name].add_param_group(group)

    @property
    def _keys(self) -> set[str]:
        return {key for route in self._routes for key in route.keys}

    @property
    def _order(self) -> list[str]:
        return [group[ROUTE] for group in self.param_groups]

    def _groups_in(self, order: Sequence[str]) -> list[Group]:
        groups = {route: o.param_groups for route, o in self.optimizers.items()}
        return in_order(groups, order)

    def _readable(self) -> dict[str, Decided]:
        optimizers = self.optimizers.items()
        return {
            route: o._decider.decisions_to_read(o.param_groups)
            for route, o in optimizers
        }

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
        self._decider.collect(())
        try:
            self._read_group(*copied_groups([param_group]))
            self._place(self._take_route_groups())
        except BaseException:
            self._decider.take_pending()
            self.param_groups[:] = before
            self._distribute()
            raise
        self._compare_ranks()

    def _distribute(self) -> None:
        """Give each route's optimizer the groups that now stand in the list."""
        by_route: dict[str, list[Group]] = {name: [] for name in self.optimizers}
        for index, group in enumerate(self.param_groups):
            if group.get(ROUTE) not in by_route:
                raise ValueError(
                    f"group {index} has the route {group.get(ROUTE)!r}, and the routes "
                    f"are {', '.join(map(repr, by_route))}. Add a group by "
                    f"optimizer.add_param_group(dict(params=...))."
                )
            by_route[group[ROUTE]].append(group)
        for name, groups in by_route.items():
            optimizer = self.optimizers[name]
            before = optimizer.param_groups
            if len(before) == len(groups) and all(map(is_, before, groups)):
                continue
            # torch adds keys to `defaults` as it loads, that the class does not read.
            keys = optimizer.defaults.keys() & known_route(name, self._routes).keys
            for group in groups:
                if missing := sorted(keys - group.keys()):
                    raise ValueError(
                        f"a group of route {name!r} has no {missing[0]!r}: it was made "
                        f"for another class. Make a new optimizer with other routes, "
                        f"and load this one's state_dict() into it."
                    )
            optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """State tensors by parameter, of all routes."""
        by_route = {route: o.state for route, o in self.optimizers.items()}
        return States(by_route, self.param_groups)

    @state.setter
    def state(self, value: Any) -> None:
        for optimizer in self.optimizers.values():
            params = chain(*(group["params"] for group in optimizer.param_groups))
            states = {param: value[param] for param in params if param in value}
            optimizer.state = defaultdict(dict, states)

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
        owners: list[Any] = [self, *optimizers]
        before = [o._decider.snapshot(o.param_groups) for o in owners]
        try:
            self._decider.assign(wd_policy, self.param_groups)
            for optimizer in optimizers:
                optimizer.wd_policy = self._decider.policy
        except BaseException:
            for owner, snapshot in zip(owners, before):
                owner._decider = Decider.restored(snapshot, owner.param_groups)
            for optimizer in optimizers:
                optimizer._decider.parent = self._decider
                optimizer._decided_anew()
            raise
        self._compare_ranks()

    def decay_report(self) -> DecayReport:
        """Report what decays, and which route steps it."""
        self._distribute()
        by_route, optimizers = self._readable(), self.optimizers
        groups, index = self.param_groups, self._decider.index
        decided = in_order(by_route, self._order)
        rows = make_rows(
            groups, decided, lambda g: optimizers[g[ROUTE]]._form_of(g), index
        )
        lost = (
            loss_of(o._kernel, o.param_groups, by_route[route])
            for route, o in optimizers.items()
        )
        return report_on(rows, groups, index, *lost)

    def __getattr__(self, name: str) -> Any:
        """Offer ``train`` and ``eval`` where a class has them."""
        if name not in MODES:  # a scaler asks at every step
            raise AttributeError(name)
        optimizers = vars(self).get("optimizers", {}).values()
        methods = [getattr(o, name) for o in optimizers if hasattr(o, name)]
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
        self._require_ready()
        route, scaling = "", scaling_of(self)
        scaled = [] if scaling == NO_SCALING else list(self.optimizers.values())
        try:  # no block for each route, at every step
            for optimizer in scaled:  # as a `GradScaler` sets them on this optimizer
                vars(optimizer).update(scaling._asdict())
            for route in self.optimizers:
                optimizer = self.optimizers[route]
                _torch.unhooked(type(optimizer).step)(optimizer)
        except (TypeError, ValueError, RuntimeError):
            with self._numbering(route):
                raise
        finally:
            for optimizer in scaled:
                for key in scaling._asdict():
                    vars(optimizer).pop(key, None)
        if self._watch is not None:
            optimizers = list(self.optimizers.values())
            groups = [group for o in optimizers for group in o.param_groups]
            layout = [rows for o in optimizers for rows in o._decider.layout]
            if not self._watch.begin(groups, layout):
                self._watch = None
        return loss

    @_torch.disable_dynamo
    def _require_ready(self) -> None:
        """Raise where a route cannot decide, before any has stepped."""
        self._distribute()
        self._decider.refuse_written(self.defaults)
        # Not each parameter, at every step.
        pairs = [(group["params"], group[ROUTE]) for group in self.param_groups]
        layout = [(id(params), len(params), route) for params, route in pairs]
        if layout == self._checked and WRITTEN.isdisjoint(chain(*self.param_groups)):
            return
        for route, optimizer in self.optimizers.items():
            with self._numbering(route):
                optimizer._decider.updated_rows(optimizer.param_groups)
        self._move_state()
        self._checked = layout

    def _move_state(self) -> None:
        """Let state follow parameters that you moved to a group of another route."""
        pairs = [(p, g[ROUTE]) for g in self.param_groups for p in g["params"]]
        routes, places, lost = dict(pairs), set(pairs), list[str]()
        for name, optimizer in self.optimizers.items():
            # Not the attribute: a state that was seen is checked at every step.
            states = vars(optimizer).get("state", optimizer._states) or {}
            for param in [p for p in states if p in routes and (p, name) not in places]:
                state = optimizer.state.pop(param)
                other = self.optimizers[routes[param]]
                if type(other) is type(optimizer) and not other.state.get(param):
                    other.state[param] = state
                elif state:
                    names = (o._decider.name_of(param) for o in (other, optimizer))
                    lost.append(next(map(repr, filter(None, names)), "a parameter"))
        if lost:
            warn(
                f"{first_of(lost, ', ')} went by hand to a route that does not go on "
                f"with the state of another, so state begins anew there. Leave a "
                f"parameter in groups of its route to keep its state."
            )

    @contextmanager
    def _numbering(self, route: str) -> Iterator[None]:
        """Let what an optimizer of a route raises count groups as they stand here."""
        try:
            yield
        except (TypeError, ValueError, RuntimeError) as error:
            indices = [i for i, name in enumerate(self._order) if name == route]
            coming = len(self.param_groups)
            numbers = dict(enumerate([*indices, coming]))
            text = NUMBER.sub(lambda m: str(numbers.get(int(m[0]), m[0])), str(error))
            error.args = (text,)
            raise

    @_torch.disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return one state dict in torch's format, with a ``"route"`` in each group."""
        self._distribute()
        self._move_state()

        def save(*_: object) -> dict[str, Any]:
            saved = {route: o.state_dict() for route, o in self.optimizers.items()}
            return joined(saved, self._order)

        # Before the user's hooks, which may change the state dict.
        with self.register_state_dict_post_hook(save, prepend=True):
            return super().state_dict()

    @_torch.disable_dynamo
    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state dict of this class, or those of separate optimizers.

        It finds parameters by name if their order has changed. A parameter that another
        route steps now, or that was not saved, gets no state. State of a parameter that
        is not here is left out.

        Args:
            state_dict: The result of ``state_dict()``. Or the state dicts of separate
                optimizers, as a list in the order of the routes or as a mapping from
                routes. Or that of an optimizer of another project whose groups have
                ``"use_muon"``, ``"use_fallback"``, ``"algorithm"`` or ``"kind"``.

        Raises:
            ValueError: It has other routes, or does not fit; then nothing is loaded.

        Warns:
            UserWarning: Some parameters get no state, or decay differently than saved,
                or saved state is left out.
        """
        self._distribute()
        for hook in _torch.hooks_of(self, "load_state_dict_pre"):
            adapted = hook(self, state_dict)
            state_dict = state_dict if adapted is None else adapted
        decided, order = self._readable(), self._order
        saved, new, unused = loadable(state_dict, self.optimizers, decided)
        for route, optimizer in self.optimizers.items():  # before anything is loaded
            with self._numbering(route):
                optimizer._require_loadable(saved[route], decided[route])
        warn_of_new(new)
        warn_of_unused(unused, state_dict)
        for route, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[route])
        self.param_groups = self._groups_in(order)
        for hook in _torch.hooks_of(self, "load_state_dict_post"):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("defaults", "param_groups", "optimizers", "_routes", "_common")
        decider = self._decider.snapshot(self.param_groups)
        return {**{key: vars(self)[key] for key in kept}, "decider": decider}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # `copy.copy` shares groups and states, and decides for itself.
        optimizers = {name: copy(o) for name, o in state["optimizers"].items()}
        super().__setstate__({**without(state, ["decider"]), "optimizers": optimizers})
        self._decider = Decider.restored(state["decider"], self.param_groups)
        for optimizer in optimizers.values():
            optimizer._decider.parent = self._decider


class Muon(Routed):
    """One optimizer: ``torch.optim.Muon`` for hidden matrices, AdamW for the rest.

    Hidden matrices are weights of two dimensions that are neither embedding nor output
    layer (``policies.is_hidden_matrix``). AdamW steps all others, also convolutions and
    stacked experts. ``selective(torch.optim.Muon)`` is torch's class for matrices only.

    Args:
        params: As for ``Routed``.
        lr: Learning rate of Muon, >= 0.
        weight_decay: Decay of Muon and AdamW, >= 0.
        momentum: Decay rate of Muon's average of gradients.
        nesterov: Use Nesterov's momentum in Muon.
        ns_coefficients: Coefficients of Muon's Newton-Schulz iteration.
        eps: Added to the norm that the iteration divides by.
        ns_steps: Number of iterations.
        adjust_lr_fn: How Muon's rate depends on the shape of a matrix: ``"original"``
            (the default) or ``"match_rms_adamw"``, for rates that suit AdamW.
        rest: Arguments of AdamW.
        output: Selector of the output layer, if the model does not show which it is.
        wd_policy: Which parameters decay, under Muon and AdamW.
        model: The module, or modules, that hold the parameters.

    Raises:
        ImportError: This torch has no Muon (before 2.9).
        TypeError: AdamW does not take one of the arguments in ``rest``.
        ValueError: It is not known which kind of layer holds a parameter.

    Warns:
        UserWarning: The output layer is not certain, or a tenth or more of the elements
            of weights have more than two dimensions.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)
        ... )
        >>> optimizer = Muon(model.parameters(), output="2.*", rest=dict(lr=3e-4))
        >>> [(row.name, row.route) for row in optimizer.decay_report()][:2]
        [('1.weight', 'muon'), ('0.weight', 'adamw')]

    Source:
        ``torch/optim/_muon.py``; Jordan et al. 2024, "Muon: An optimizer for hidden
        layers in neural networks".
    """

    _may_be_empty = True  # on some models one of the two steps nothing

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rest: Mapping[str, Any] | None = None,
        output: Any = None,
        wd_policy: WdPolicy = None,
        model: Model = None,
    ) -> None:
        muon = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        cls = getattr(torch.optim, "Muon", None)
        if cls is None:
            raise ImportError(
                f"torch {torch.__version__} has no Muon; 2.9 has. Type "
                f"pip install -U torch."
            )
        hidden: Selector = is_hidden_matrix
        if output is not None:
            hidden = is_matrix & ~is_embedding & ~as_selector(output)
        super().__init__(
            params,
            {"muon": (hidden, cls, muon), "adamw": (everything, AdamW, rest or {})},
            weight_decay=weight_decay,
            wd_policy=wd_policy,
            model=model,
        )
        self._warn_of_wide()

    def _warn_of_wide(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        # Tables of positions have a first dimension of 1.
        wide = [p.numel() for p in params if p.ndim > 2 and p.shape[0] > 1]
        share = sum(wide) / max(sum(p.numel() for p in params), 1)
        if share >= 0.1:
            warn(
                f"torch's Muon steps only matrices, so AdamW steps "
                f"{amount(len(wide), 'weight')} of more than two dimensions, "
                f"{share:.0%} of all elements. To step convolutions "
                f"with Muon, use Routed instead, with the route "
                f"'muon': (is_hidden_weight, timm.optim.Muon, dict(lr=0.02))."
            )
