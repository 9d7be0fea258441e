"""A selective version of any optimizer class, which sees its groups as parts."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from inspect import Parameter, Signature
from itertools import chain, islice, repeat
from operator import attrgetter
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import torch

from selective_optim import _torch
from selective_optim._optimizer import COPIED, Model, SelectiveOptimizer, constants_of
from selective_optim.decisions.state_dict import PARTS, Decided, require_groups_like
from selective_optim.fused.guards import same_objects
from selective_optim.report import form_of_class
from selective_optim.step.class_step import AroundStep, View
from selective_optim.step.kernels import Kernel
from selective_optim.step.lasting_parts import (
    Split,
    load_parts,
    record_of_parts,
    require_class,
    require_forms,
    require_no_index_overrides,
    require_no_lists,
    require_parts,
    require_plain_arguments,
    saved_parts,
    split_again,
    split_group,
)
from selective_optim.step.setting import WD, Group, chosen_form

OptimizerClass = type[torch.optim.Optimizer]
# Methods of schedule-free optimizers, which read and write their groups.
MODES = ("train", "eval")
# Differentiable: torch leaves it to the class to refuse tensors that are no leaves.
READING = {"differentiable": True}


# Not blocks: an interrupt between a block and its end would leave autograd off.
_begin = _torch.disable_dynamo(torch.no_grad()(AroundStep.begin))
_finish = _torch.disable_dynamo(torch.no_grad()(AroundStep.finish))


def as_torch_reads(group: Group, before: Iterable[Group], **defaults: Any) -> Group:
    """Let torch read and check a group, and no class that would step it."""
    stated = set(group) if isinstance(group, dict) else set()
    # Not with other defaults in an optimizer meanwhile: an interrupt would leave them.
    reader = SimpleNamespace(defaults=READING | defaults, param_groups=list(before))
    torch.optim.Optimizer.add_param_group(reader, group)  # type: ignore[arg-type]
    read: Group = reader.param_groups[-1]
    for key in READING.keys() - stated:
        del read[key]
    return read


class ClassKernel(Kernel):
    """Stands for the kernels of a class, of which the form at most is known."""

    counts = planned = False
    choices = ()

    def default_form(self, group: Group) -> Any:
        return chosen_form(group)


class AnyOptimizer(SelectiveOptimizer):
    """Stands before any class, and shows it lasting parts of the user's groups."""

    _kernel = ClassKernel()
    # One list with shallow copies, which share groups.
    _splits: list[Split]
    # Those of all splits, in the list that the class made; none while groups are read.
    _parts: Any = None
    _class_adds = False  # the class adds parts now, which are decided
    _layout: object = None

    def __init__(
        self,
        params: Any,
        *args: Any,
        wd_policy: Any = None,
        model: Model = None,
        **kwargs: Any,
    ) -> None:
        bound = inspect.signature(type(self)).bind_partial(params, *args, **kwargs)
        bound.apply_defaults()

        def make(known: Any) -> None:
            # Decided before the class exists: it is given the parts.
            self._read(known, bound.signature.parameters, bound.arguments.get("lr"))
            groups = self._groups
            decided = self._decider.decisions_to_step(groups)
            splits = list(map(split_group, groups, decided))
            parts = _groups_of(splits)
            self._class_adds = True
            try:
                super(SelectiveOptimizer, self).__init__(parts, *args, **kwargs)
            finally:
                self._class_adds = False
            # Only now is there something to look at: what the constructor made.
            require_parts(self, _groups_of(splits))
            self._parts, self.param_groups = self.param_groups, groups
            self._adopt(splits, self._parts)

        self._construct_deciding(params, wd_policy, model, bound.arguments, make)

    def _read(self, params: Any, keys: Iterable[str], lr: Any) -> None:
        # Also where `__init__` is called a second time, as torch's may be.
        self._keys, self._splits = tuple(keys), []
        self._parts = self._layout = None
        torch.optim.Optimizer.__init__(self, params, {**READING, "lr": lr})
        self._decider.decide_pending()

    def _adopt(self, splits: list[Split], parts: Iterable[Group]) -> None:
        made = iter(parts)
        for split in splits:
            split.adopt(list(islice(made, len(split.parts))), self.defaults)
            split.form = form_of_class(self, {})
            require_forms(self, split)
        self._splits += splits

    @_torch.disable_dynamo
    def add_param_group(self, param_group: Group) -> None:
        if self._class_adds or self._inside:
            super(SelectiveOptimizer, self).add_param_group(param_group)
            return
        # Some frameworks clear the groups to shard the model, and add them anew. Of
        # groups that were taken out the class would find the parameters twice.
        if self._parts is not None:
            ids = set(map(id, self._groups))
            self._splits[:] = [s for s in self._splits if id(s.group) in ids]
            self._parts[:] = _groups_of(self._splits)
        super().add_param_group(param_group)

    def _append_group(self, group: Group) -> None:
        lr = self.defaults.get("lr")
        self._groups.append(as_torch_reads(group, self._groups, lr=lr))

    def _split_last_group(self, given: Group) -> None:
        """Let the class make its groups of the parts, if it exists already."""
        group = self._groups[-1]
        if "lr" not in given:
            del group["lr"]  # where the class has another
        if self._parts is None:
            return
        split = split_group(group, self._decider.decisions_to_step(self._groups)[-1])
        count = len(self._parts)
        try:
            self._show(self._parts)
            # Past the method that decides: parts were decided for as a group.
            for part in split.parts:
                super(SelectiveOptimizer, self).add_param_group(part.group)
            self._show(None)
            self._adopt([split], self._parts[count:])
        except BaseException:
            self._show(None)
            del self._parts[count:]
            raise

    @_torch.disable_dynamo
    def _enter(self) -> None:
        self._begin_training()
        self._hand_down()
        require_no_index_overrides(self, self._parts)
        # Not a count: after an interrupt anywhere the next step of a thread is right.
        self._threads_inside.add(get_ident())
        for split in self._splits:
            split.place_params()
        self._show(self._parts)

    @_torch.disable_dynamo
    def _leave(self) -> None:
        """Show the user's groups again, with what the class wrote into their parts."""
        if not self._inside:
            return
        self._show(None)
        self._threads_inside.discard(get_ident())
        for split in self._splits:
            split.hand_up()
            if not self._threads_inside:
                split.remove_params()

    def _hand_down(self) -> None:
        self._arrange()
        for split in self._splits:
            split.hand_down(self.defaults)

    def _arrange(self) -> None:
        """Split the groups as they now stand, or raise with nothing changed."""
        groups = self._groups
        layout = self._decider.updated_rows(groups)
        # A list that the user changed in place, or made anew, shows in one of the two.
        # The decider makes a new list whenever anything changed, so identity suffices.
        known_groups = [split.group for split in self._splits]
        if layout is self._layout and same_objects(groups, known_groups):
            return
        splits = [
            split_again(group, decisions, self._splits, self.defaults)
            for group, decisions in zip(groups, self._decider.decisions_to_step(groups))
        ]
        for split in splits:
            require_forms(self, split)
        parts = _groups_of(splits)
        if not same_objects(parts, self._parts):
            require_no_lists(self, len(self._parts))
        for split in splits:
            split.remove_params()
        self._splits[:], self._layout = splits, layout
        self._parts[:] = parts

    _decided_anew = _arrange

    @_torch.run_as_is
    def step(
        self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Let the class step, each parameter with its own decay.

        Raises:
            ValueError: A new parameter cannot be decided, or the class cannot be
                served; then nothing is stepped.
        """
        self._reached = True
        require_plain_arguments(self, (*args, *kwargs.values()))
        step = _torch.unhooked(super(SelectiveOptimizer, self).step)
        around = AroundStep(self, self.state)
        if callable(closure):
            args = (self._outside(closure, around), *args)
        elif closure is not None or args:  # a value that the class takes
            args = (closure, *args)
        try:
            self._enter()
            if not callable(closure) and not _begin(around, self._part_views()):
                return None
            # Hooks ran before; a class that calls its base's step has them run again.
            with _torch.without_step_hooks(self):
                result = step(self, *args, **kwargs)
            _finish(around)
            if self._watch is not None:
                self._look()
            return result
        finally:
            _torch.uncompiled(around.restore)
            self._leave()

    @_torch.disable_dynamo
    def _part_views(self) -> list[View]:
        decided: Iterable[Any] = repeat(())
        parts = (part for split in self._splits for part in split.parts)
        if any(part.decay_key.decay.needs_init for part in parts):
            decided = self._decider.decisions_to_step(self._groups)
        return list(chain.from_iterable(map(Split.views, self._splits, decided)))

    def _outside(
        self, closure: Callable[[], Any], around: AroundStep
    ) -> Callable[[], Any]:
        """Let a closure see the user's groups; passes run once it has returned."""

        def called(*args: Any, **kwargs: Any) -> Any:
            _torch.uncompiled(around.restore)
            self._leave()
            result = closure(*args, **kwargs)
            self._enter()
            _begin(around, self._part_views())
            return result

        return called

    def _own_entries(self) -> dict[str, Any]:
        self._hand_down_if_decided()
        record, entries = record_of_parts(self._splits), super()._own_entries()
        return entries if record is None else {**entries, PARTS: record}

    def _hand_down_if_decided(self) -> None:
        with suppress(ValueError):  # what cannot be decided is told at the next step
            self._hand_down()

    def _require_loadable(self, state_dict: dict[str, Any], decided: Decided) -> None:
        require_groups_like(self.param_groups, decided, state_dict)
        saved_parts(state_dict, state_dict.get(PARTS), self._splits)

    def _loaded(self, state_dict: dict[str, Any]) -> None:
        for split, group in zip(self._splits, self.param_groups):
            split.group = group
        self._arrange()
        saved = saved_parts(state_dict, state_dict.get(PARTS), self._splits)
        self._layout = None  # first: an interrupt must not leave parts half in place
        load_parts(self._splits, saved, self.defaults)
        self._parts[:] = _groups_of(self._splits)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._hand_down_if_decided()
        reduced = super().__reduce_ex__(protocol)
        reduced[2][COPIED].update(splits=self._splits, parts=self._parts)
        return reduced

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if copied := state.get(COPIED):
            self._splits, self._parts = copied["splits"], copied["parts"]
            for split in self._splits:
                split.recognize()


def _groups_of(splits: Iterable[Split]) -> list[Group]:
    return [part.group for split in splits for part in split.parts]


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
    cls: Any = optimizer_class
    if isinstance(cls, type) and issubclass(cls, SelectiveOptimizer):
        return cls
    require_class(cls)
    # Found again, and not kept: classes refer to their subclasses weakly. SGD, Adam and
    # AdamW of this library stand before torch's themselves.
    for subclass in cls.__subclasses__():
        first, *others = subclass.__bases__
        if first in (SelectiveOptimizer, AnyOptimizer) and others == [cls]:
            return subclass
    namespace = {
        **{n: getattr(cls, n) for n in ("__module__", "__qualname__", "__doc__")},
        "__init__": _constructor(cls),
        "_class_step_code": getattr(inspect.unwrap(cls.step), "__code__", None),
        **{name: _seeing_parts(name) for name in _group_readers(cls)},
    }
    metaclass: Any = type(cls)  # hashes, which mypy does not hold
    return _picklable(metaclass)(cls.__name__, (AnyOptimizer, cls), namespace)


def _constructor(cls: OptimizerClass) -> Callable[..., None]:
    """Make one with the signature of the class, and our keywords at its end."""

    def __init__(self: AnyOptimizer, params: Any, *args: Any, **kwargs: Any) -> None:
        AnyOptimizer.__init__(self, params, *args, **kwargs)

    parameters = [
        *inspect.signature(cls.__init__).parameters.values(),
        Parameter("wd_policy", Parameter.KEYWORD_ONLY, default=None),
        Parameter("model", Parameter.KEYWORD_ONLY, default=None),
    ]
    # `**kwargs` of the class go to the end.
    parameters.sort(key=attrgetter("kind"))
    vars(__init__)["__signature__"] = Signature(parameters)
    return __init__


def _group_readers(cls: OptimizerClass) -> set[str]:
    """Name the methods that read groups outside of a step: modes, and what decays."""
    functions = [
        (name, function)
        for base in cls.__mro__
        if base not in torch.optim.Optimizer.__mro__
        for name, function in vars(base).items()
        if inspect.isfunction(function) and not hasattr(AnyOptimizer, name)
    ]
    # Of one that is overridden, any version may read what decays.
    return {n for n, f in functions if n in MODES or WD in constants_of(f)}


def _seeing_parts(name: str) -> Callable[..., Any]:
    def method(self: AnyOptimizer, *args: Any, **kwargs: Any) -> Any:
        method_of_class = getattr(super(SelectiveOptimizer, self), name)
        if self._inside or self._class_adds:
            return method_of_class(*args, **kwargs)
        self._enter()
        try:
            return method_of_class(*args, **kwargs)
        finally:
            self._leave()

    method.__name__ = name
    return method


@lru_cache
def _picklable(metaclass: Any) -> Any:
    """Derive a class of classes that pickle as the call that makes them."""
    # pickle looks a class up by name, unless copyreg knows the class of it.
    name, namespace = f"Selective{metaclass.__name__}", {"__repr__": _class_text}
    derived = type(name, (metaclass,), namespace)
    copyreg.pickle(derived, _reduce_class)
    return derived


def _class_text(cls: type) -> str:
    base = _served_class(cls)
    return f"selective({type.__repr__(base)})" if base else type.__repr__(cls)


def _reduce_class(cls: type) -> Any:
    base = _served_class(cls)
    return (selective, (base,)) if base else cls.__qualname__


def _served_class(cls: type) -> type | None:
    """Return what a class was made from, unless it is a subclass that has a name."""
    return cls.__bases__[1] if cls.__bases__[0] is AnyOptimizer else None
