"""A selective version of any optimizer class, which sees its groups as parts."""

from __future__ import annotations

import copyreg
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from inspect import Parameter, Signature
from operator import is_
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch

from selective_optim import _torch
from selective_optim._optimizer import (
    Model,
    SelectiveOptimizer,
    constants_of,
    decider_for,
)
from selective_optim._text import kept_on_error, require_numbers
from selective_optim.decay import Form
from selective_optim.decisions.state_dict import PARTS, Decided, require_groups_like
from selective_optim.report import form_of_class
from selective_optim.step import refusals
from selective_optim.step.class_step import ClassStep, View
from selective_optim.step.lasting_parts import (
    WD,
    Group,
    Split,
    chosen_form,
    flag_of,
    load_parts,
    record_of_parts,
    saved_parts,
    split_again,
    split_group,
)

OptimizerClass = type[torch.optim.Optimizer]
# Methods of schedule-free optimizers, which read and write their groups.
MODES = ("train", "eval")
# Differentiable: torch leaves it to the class to refuse tensors that are no leaves.
READING = {"differentiable": True}
STEP_HOOKS = ("step_pre", "step_post")


# Not blocks: an interrupt between a block and its end would leave autograd off.
_begin = torch.no_grad()(ClassStep.begin)
_pull_again = torch.no_grad()(ClassStep.pull_again)
_finish = torch.no_grad()(ClassStep.finish)


def as_torch_reads(group: Group, before: Iterable[Group], **defaults: Any) -> Group:
    """Let torch read and check a group, and no class that would step it."""
    # Not with other defaults in an optimizer meanwhile: an interrupt would leave them.
    reading = SimpleNamespace(
        defaults={**READING, **defaults}, param_groups=list(before)
    )
    torch.optim.Optimizer.add_param_group(reading, group)  # type: ignore[arg-type]
    read: Group = reading.param_groups[-1]
    return read


class AnyOptimizer(SelectiveOptimizer):
    """Stands before a class that may keep what it writes into its groups.

    While the class constructs, adds a group or steps, it sees the parts, which live
    from one step to the next.
    """

    _kernel: Any = None  # how the class steps is not known
    # One list with shallow copies, which share groups; none while groups are read.
    _splits: Any = ()
    _keys: tuple[str, ...] = ()  # what the class reads in a group
    _parts: list[Group]  # in the list that the class made
    _class_adds = False  # the class adds parts now, which are decided
    _layout: object = None
    _class_step: object = None  # the code of the class's own step

    # Construction.

    def __init__(
        self,
        params: Any,
        *args: Any,
        wd_policy: Any = None,
        model: Model = None,
        **kwargs: Any,
    ) -> None:
        # Decided before the class exists: it is given the parts.
        self._decider = decider_for(model, wd_policy)
        signature = inspect.signature(type(self))
        bound = signature.bind_partial(params, *args, **kwargs)
        bound.apply_defaults()
        require_numbers(bound.arguments)
        with kept_on_error(params):
            lr = bound.arguments.get("lr")
            groups = self._read(params, signature.parameters, lr)
            self._construct(groups, args, kwargs)
        self._decider.warn_if_weak(groups)
        self._made()

    def _construct(self, groups: list[Group], args: Any, kwargs: Any) -> None:
        decided = self._decider.decisions(groups)
        splits = [split_group(*pair, None) for pair in zip(groups, decided)]
        self._class_adds = True
        parts = [part.group for split in splits for part in split.parts]
        super(SelectiveOptimizer, self).__init__(parts, *args, **kwargs)
        self._class_adds = False
        # Only now is there something to look at: what the constructor made.
        refusals.require_parts(self, splits)
        refusals.require_no_inner_optimizer(self)
        self._parts, self.param_groups = self.param_groups, groups
        self._adopt(splits, self._parts)
        self._splits = splits

    def _adopt(self, splits: Iterable[Split], made: Iterable[Group]) -> None:
        groups = iter(made)
        for split in splits:
            split.adopt([next(groups) for _ in split.parts], self.defaults)
            split.empty()
            if flag_of(split.group) is None:
                split.form = form_of_class(self, split.group)
            refusals.require_forms(self, split)

    def _group_keys(self) -> Iterable[str]:
        return [*self.defaults, *self._keys]

    def _read(self, params: Any, keys: Iterable[str], lr: Any) -> list[Group]:
        self._keys = tuple(keys)
        reading = {**READING, "lr": lr}
        torch.optim.Optimizer.__init__(self, self._decider.read(params), reading)
        self._decider.decide_pending()
        return self._groups

    def _append_group(self, group: Group) -> None:
        lr = self.defaults.get("lr")
        self._groups.append(as_torch_reads(group, self._groups, lr=lr))

    def _read_group(self, param_group: Group) -> None:
        """Read a group, which the class then makes of its parts, and decide for it."""
        given = set(param_group) if isinstance(param_group, dict) else ()
        SelectiveOptimizer.add_param_group(self, param_group)
        for key in {*READING, "lr"}.difference(given):
            del self._groups[-1][key]

    @_torch.disable_dynamo
    def add_param_group(self, param_group: Group) -> None:
        if self._class_adds or self._inside:
            super(SelectiveOptimizer, self).add_param_group(param_group)
            return
        if not self._splits:
            self._read_group(param_group)
            return
        self._drop_removed()
        groups, parts = len(self._groups), len(self._parts)
        with kept_on_error([param_group]):
            try:
                self._read_group(param_group)
                decided = self._decider.decisions(self._groups)
                split = split_group(self._groups[-1], decided[-1], None)
                self._show(self._parts)
                # Past the method that decides: parts were decided for as a group.
                for part in split.parts:
                    super(SelectiveOptimizer, self).add_param_group(part.group)
                self._show(None)
                self._adopt([split], self._parts[parts:])
            except BaseException:
                self._show(None)
                del self._parts[parts:], self._groups[groups:]
                raise
        self._splits.append(split)

    def _drop_removed(self) -> None:
        """Drop the parts of groups that were taken out, or the class finds them twice.

        Some frameworks clear the groups to shard the model, and add them anew.
        """
        here = set(map(id, self.param_groups))
        self._splits[:] = [own for own in self._splits if id(own.group) in here]
        self._parts[:] = [p.group for split in self._splits for p in split.parts]

    # What the class sees.

    @_torch.disable_dynamo
    def _enter(self) -> None:
        self._begin_training()
        self._hand_down()
        refusals.require_no_index_overrides(self, self._parts)
        # Not a count: after an interrupt anywhere the next step of a thread is right.
        self._threads_inside.add(get_ident())
        for split in self._splits:
            split.fill()
        self._show(self._parts)

    @_torch.disable_dynamo
    def _leave(self) -> None:
        """Show the user's groups again, with what the class wrote into their parts."""
        if not self._inside:
            return
        self._show(None)
        self._threads_inside.discard(get_ident())
        for split in self._splits:
            split.show()
            if not self._threads_inside:
                split.empty()

    def _hand_down(self) -> None:
        self._arrange()
        for split in self._splits:
            split.hand_down(self.defaults)

    def _arrange(self) -> None:
        """Split the groups as they now stand, or raise with nothing changed."""
        self._decider.refuse_written((), self.defaults)
        layout = self._decider.rows(self.param_groups)
        known = [split.group for split in self._splits]
        # A list that the user changed in place, or made anew, shows in one of the two.
        same = len(known) == len(self.param_groups)
        # The decider makes a new list whenever anything changed, so identity suffices.
        if layout is self._layout and same and all(map(is_, known, self.param_groups)):
            return
        decided = self._decider.fitting(self.param_groups)
        splits = [
            split_again(group, decisions, self._splits, self.defaults)
            for group, decisions in zip(self.param_groups, decided)
        ]
        for split in splits:
            refusals.require_forms(self, split)
        parts = [part.group for split in splits for part in split.parts]
        if list(map(id, parts)) != list(map(id, self._parts)):
            refusals.require_no_lists(self, len(self._parts))
        for split in splits:
            split.empty()
        self._splits[:], self._layout = splits, layout
        self._parts[:] = parts

    def _forget_plan(self) -> None:
        """Forget nothing: parts are compared with the decisions at every step."""

    def _decided_anew(self) -> None:
        self._arrange()

    def _default_form(self, group: Group) -> Form | None:
        return chosen_form(group)

    @property
    def param_groups(self) -> list[Group]:
        """The user's groups, as in torch; inside a step its class sees the parts."""
        shown = self._shown.param_groups
        if shown is not None:
            return shown
        # The step of the class itself, called on this object, would see no parts.
        if sys._getframe(1).f_code is self._class_step and self._splits:
            self._refuse_foreign_step(self._groups)
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self._set_groups(groups)

    @property
    def state(self) -> Any:
        """State tensors by parameter, as in torch."""
        return self._states

    @state.setter
    def state(self, value: Any) -> None:
        self._states = value

    # Stepping.

    @_torch.run_as_is
    def step(
        self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Step every parameter that has a gradient, each with its own decay.

        Args:
            closure: Reevaluates the model and returns the loss.
            *args: As the class takes them.
            **kwargs: As the class takes them.

        Returns:
            What the class returns.

        Raises:
            ValueError: A new parameter cannot be decided, or the class cannot be
                served; then nothing is stepped.
        """
        self._reached = True
        refusals.require_plain_arguments(self, (*args, *kwargs.values()))
        step = _torch.unhooked(super(SelectiveOptimizer, self).step)
        around = ClassStep(self, self._states)
        if closure is not None or args:
            args = (closure and self._outside(closure, around), *args)
        try:
            self._enter()
            if closure is None and not _begin(around, self._part_views()):
                return None
            # Hooks ran before; a class that calls its base's step has them run again.
            with _torch.without_hooks(self, *STEP_HOOKS):
                result = step(self, *args, **kwargs)
            _finish(around)
            compiling = torch.compiler.is_compiling()
            if not compiling and (watch := self._watch) is not None:
                layout = self._decider.layout
                self._watch = watch.look(self._groups, layout, self._kernel)
            return result
        finally:
            around.restore()
            self._leave()

    @_torch.disable_dynamo
    def _part_views(self) -> list[View]:
        splits = self._splits
        if any(part.inits for split in splits for part in split.parts):
            decided = self._decider.fitting(self._groups)
            for split, decisions in zip(splits, decided):
                split.lay_inits(decisions)
        return [view for split in splits for view in split.views()]

    def _outside(
        self, closure: Callable[[], Any], around: ClassStep
    ) -> Callable[[], Any]:
        """Let a closure see the user's groups; passes run once it has returned."""
        begun = False

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal begun
            around.restore()
            self._leave()
            result = closure(*args, **kwargs)
            self._enter()
            pull = _pull_again if begun else _begin
            pull(around, self._part_views())
            begun = True
            return result

        return called

    def _seeing_parts(self, method: str, *args: Any, **kwargs: Any) -> Any:
        own = getattr(super(SelectiveOptimizer, self), method)
        if self._inside or self._class_adds:
            return own(*args, **kwargs)
        self._enter()
        try:
            return own(*args, **kwargs)
        finally:
            self._leave()

    # State dicts and copies.

    def _kept_apart(self) -> dict[str, Any]:
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self._hand_down()
        record = record_of_parts(self._splits)
        return {} if record is None else {PARTS: record}

    def _require_loadable(self, state_dict: dict[str, Any], decided: Decided) -> None:
        require_groups_like(self.param_groups, decided, state_dict)
        saved_parts(state_dict, state_dict.get(PARTS), self._splits)

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def _loaded(self, state_dict: dict[str, Any]) -> None:
        groups = self.param_groups
        for split, group in zip(self._splits, groups):
            split.group = group
        self._arrange()
        saved = saved_parts(state_dict, state_dict.get(PARTS), self._splits)
        self._layout = None  # first: an interrupt must not leave parts half in place
        load_parts(self._splits, groups, saved, self.defaults)
        self._parts[:] = [p.group for split in self._splits for p in split.parts]

    def _copied(self) -> dict[str, Any]:
        # What was written into a group since the last step is not in its parts yet.
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self._hand_down()
        return {"splits": self._splits, "parts": self._parts}

    def _take_state(self) -> None:
        """Leave the state to the class."""

    def _take_copied(self, copied: dict[str, Any]) -> None:
        self._splits, self._parts = copied["splits"], copied["parts"]
        for split in self._splits:
            split.recognize()


def selective(optimizer_class: OptimizerClass) -> Any:
    """Make a subclass of an optimizer class that takes ``wd_policy`` and ``model``.

    Your groups do not change. When the class reads or writes its groups, as in
    ``step()``, each group is split into one part per decay, with its own
    ``weight_decay``. So the results have the same bits as with groups split by hand.

    Args:
        optimizer_class: Any class whose groups have a ``"weight_decay"``.

    Returns:
        The subclass. For torch's SGD, Adam and AdamW it is the class of the same name
        of this library.

    Raises:
        TypeError: It is no optimizer class, or it steps another optimizer.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> NAdam = selective(torch.optim.NAdam)
        >>> optimizer = NAdam(model.parameters(), weight_decay=0.1, wd_policy="no_bias")
        >>> [(row.name, row.weight_decay) for row in optimizer.decay_report().rows]
        [('weight', 0.1), ('bias', 0.0)]
    """
    if isinstance(optimizer_class, type) and issubclass(
        optimizer_class, SelectiveOptimizer
    ):
        return optimizer_class
    refusals.require_class(optimizer_class)
    # Found again, and not kept: classes refer to their subclasses weakly. SGD, Adam and
    # AdamW of this library stand before torch's themselves.
    for subclass in optimizer_class.__subclasses__():
        before, *others = subclass.__bases__
        if before in (SelectiveOptimizer, AnyOptimizer) and others == [optimizer_class]:
            return subclass
    return _make(optimizer_class)


def _make(cls: OptimizerClass) -> OptimizerClass:
    methods = {name: _seeing_parts(name) for name in _group_readers(cls)}
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": _constructor(cls),
        "_class_step": getattr(inspect.unwrap(cls.step), "__code__", None),
        **methods,
    }
    # pickle looks a class up by its name, unless copyreg knows its metaclass.
    kind = _kind(type(cls))  # type: ignore[arg-type]  # a class of classes hashes
    made: OptimizerClass = kind(cls.__name__, (AnyOptimizer, cls), namespace)
    return made


def _constructor(cls: OptimizerClass) -> Callable[..., None]:
    """Make one with the signature of the class, and our keywords at its end."""

    def __init__(self: AnyOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        AnyOptimizer.__init__(self, params, *args, **kwargs)

    given = list(inspect.signature(cls.__init__).parameters.values())
    rest = [p for p in given if p.kind is Parameter.VAR_KEYWORD]
    others = [p for p in given if p.kind is not Parameter.VAR_KEYWORD]
    ours = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None)
        for name in ("wd_policy", "model")
    ]
    vars(__init__)["__signature__"] = Signature([*others, *ours, *rest])
    return __init__


def _group_readers(cls: OptimizerClass) -> set[str]:
    """Name the methods that read groups outside of a step: modes, and what decays."""
    own = {
        name: function
        for base in cls.__mro__
        if base not in torch.optim.Optimizer.__mro__
        for name, function in vars(base).items()
        if inspect.isfunction(function) and not hasattr(AnyOptimizer, name)
    }
    decaying = {n for n, function in own.items() if WD in constants_of(function)}
    return decaying | (own.keys() & set(MODES))


def _seeing_parts(name: str) -> Callable[..., Any]:
    """Make a method that runs the class's with its groups split."""

    def method(self: AnyOptimizer, *args: Any, **kwargs: Any) -> Any:
        return self._seeing_parts(name, *args, **kwargs)

    method.__name__ = name
    return method


@lru_cache
def _kind(kind: Any) -> Any:
    """Derive a class of classes that pickle as the call that makes them.

    No module has these classes under a name, by which pickle looks classes up.
    """
    made = type(f"Selective{kind.__name__}", (kind,), {"__repr__": _text})
    copyreg.pickle(made, _reduce)
    return made


def _text(cls: type) -> str:
    base = _base(cls)
    return f"selective({type.__repr__(base)})" if base else type.__repr__(cls)


def _reduce(cls: type) -> Any:
    base = _base(cls)
    return (selective, (base,)) if base else cls.__qualname__


def _base(cls: type) -> type | None:
    """Return what a class was made from, unless it is a subclass that has a name."""
    return cls.__bases__[1] if cls.__bases__[0] is AnyOptimizer else None
