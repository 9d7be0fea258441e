"""Random edits to ours and to torch's class with groups split by hand, compared.

``World`` holds both. What should be, in which group a parameter stands, with which
numbers, and whether it decays, is kept apart from either in ``Spec``; the twin's
groups are written from it before every step.

Run it longer by hand:

    python -m tests.fuzz --sequences 2000

``--attacks`` adds closures and hooks that spoil a step, tensors that are swapped, also
after a pickle, moments of zero, complex parameters and other threads; ``--compiled``
steps both sides under ``torch.compile`` while policies change.
"""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch._dynamo
from torch import nn

import selective_optim
from tests.support.others import in_another_thread, looking

STEPS = 30
COMPILED_STEPS = 6
MODES = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
    "automatic": {},
}
OTHER_MODES = {**MODES, "fused": {"foreach": True}, "for-loop": {"foreach": False}}
CLASSES = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    ],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "maximize": True}],
    "AdamW": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True}],
}
# Stepped by the class itself, over parts; only with attacks.
OTHERS = {
    "NAdam": [{"lr": 0.01}, {"lr": 0.01, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.01, "decoupled_weight_decay": True}],
}
SIZES = (2, 3, 5)


class Block(nn.Module):
    """A layer and its norm, of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZES[0], width)
        self.norm = nn.LayerNorm(width)


@dataclass
class Spec:
    """What should be: by parameter, its group and whether it decays.

    Parameters are numbered in the order in which they came.
    """

    layout: list[list[int]]
    numbers: list[dict[str, Any]]
    decays: dict[int, bool] = field(default_factory=dict)


class Side:
    """One of the two: a model, its parameters by number, and an optimizer."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.model = nn.ModuleList()
        self.params: list[nn.Parameter] = []
        self.optimizer: Any = None
        self.dtype = dtype

    def grow(self, width: int, seed: int) -> list[nn.Parameter]:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which writes down a traceback for a GPU to come.
            torch.default_generator.manual_seed(seed)
            block = Block(width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch finds complex modules new
            block.to(self.dtype)
        self.model.append(block)
        self.params += list(block.parameters())
        return list(block.parameters())


class World:
    """Ours and the twin, and one method per kind of edit.

    Args:
        rng: Draws everything.
        name: Of the class.
        hyper: Its numbers.
        mode: Key of ``MODES``.
        typed: Whether a model is known, and ``"no_bias_norm"`` the policy.
        quiet: Whether nobody reads ``optimizer.state`` but where an edit does.
        dtype: Of every parameter.
    """

    def __init__(
        self,
        rng: random.Random,
        name: str,
        hyper: dict[str, Any],
        mode: str,
        typed: bool,
        quiet: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rng, self.typed, self.quiet = rng, typed, quiet
        self.ours, self.twin = Side(dtype), Side(dtype)
        self.spec = Spec([], [])
        self.copies: list[Any] = []
        self.saved: Any = None
        self.exempting = True
        self.known = True
        self.edits = EDITS
        wd = {"weight_decay": 0.3}
        for _ in range(3):
            self._grow()
        cut = rng.randrange(1, 8)
        self.spec.layout = [list(range(cut)), list(range(cut, 12))]
        self.spec.numbers = [{**hyper, **wd}, {**hyper, **wd, "lr": hyper["lr"] / 2}]
        groups = [
            {"params": [self.ours.params[i] for i in own], **numbers}
            for own, numbers in zip(self.spec.layout, self.spec.numbers)
        ]
        policy: dict[str, Any] = {"wd_policy": "matrices"}
        if typed:
            policy = {"wd_policy": "no_bias_norm", "model": self.ours.model}
        torchs = getattr(torch.optim, name)
        chosen = MODES[mode] if name in CLASSES else OTHER_MODES[mode]
        self.ours.optimizer = selective_optim.selective(torchs)(
            groups, **chosen, **policy
        )
        # Left open, ours takes the fused kernel, so its judge is torch's fused.
        fused = name in CLASSES and not dtype.is_complex
        judge = chosen or ({"fused": True} if fused else {})
        self.twin.optimizer = torchs(self._split(), **judge, **hyper)

    def _grow(self) -> list[int]:
        width, seed = self.rng.choice(SIZES), self.rng.randrange(1 << 30)
        first = len(self.twin.params)
        for side in (self.ours, self.twin):
            side.grow(width, seed)
        new = list(range(first, first + 4))
        # Of a Linear the weight, and nothing of a LayerNorm.
        self.spec.decays |= {i: not self.exempting or i % 4 == 0 for i in new}
        return new

    def _split(self) -> list[dict[str, Any]]:
        """Write the twin's groups: each of ours, split in two.

        And in two again, for torch's fused SGD does not begin some momentum buffers
        of a group beside others that go on: it raises.
        """
        groups = []
        state = {} if self.twin.optimizer is None else self.twin.optimizer.state
        for own, numbers in zip(self.spec.layout, self.spec.numbers):
            for decays, begun in product((True, False), repeat=2):
                params = [
                    param
                    for i, param in ((i, self.twin.params[i]) for i in own)
                    if self.spec.decays[i] == decays and bool(state.get(param)) == begun
                ]
                wd = numbers["weight_decay"] if decays else 0.0
                groups.append({**numbers, "params": params, "weight_decay": wd})
        return groups

    # Edits to groups.

    def _group(self) -> int:
        return self.rng.randrange(len(self.spec.layout))

    def _write(self, index: int) -> None:
        """Bring our group's list to what should be, in one of the ways of users."""
        group = self.ours.optimizer.param_groups[index]
        wanted = [self.ours.params[i] for i in self.spec.layout[index]]
        way = self.rng.randrange(4)
        if way == 0 and isinstance(group["params"], list):
            group["params"][:] = wanted
        elif way == 1:
            group["params"] = deque(wanted)
        elif way == 2:
            self.ours.optimizer.param_groups[index] = {**group, "params": wanted}
        else:
            group["params"] = wanted

    def permute(self) -> None:
        index = self._group()
        self.rng.shuffle(self.spec.layout[index])
        self._write(index)

    def move(self) -> None:
        source, target = self._group(), self._group()
        if len(self.spec.layout[source]) > 1 and source != target:
            moved = self.spec.layout[source].pop(0)
            self.spec.layout[target].append(moved)
            self._write(source)
            self._write(target)

    def take_out(self) -> None:
        index = self._group()
        if len(self.spec.layout[index]) > 1:
            place = self.rng.randrange(len(self.spec.layout[index]))
            self.spec.layout[index].pop(place)
            self._write(index)

    def put_back(self) -> None:
        standing = {i for own in self.spec.layout for i in own}
        absent = [i for i in range(len(self.twin.params)) if i not in standing]
        if absent and self.known:
            index = self._group()
            self.spec.layout[index].insert(0, self.rng.choice(absent))
            self._write(index)

    def append_new(self) -> None:
        if not self.known:
            return
        index = self._group()
        self.spec.layout[index] += self._grow()
        self._write(index)

    def replace_old_by_new(self) -> None:
        if not self.known:
            return
        index = self._group()
        new = self._grow()
        self.spec.layout[index] = [*self.spec.layout[index][1:], *new]
        self._write(index)

    def add_group(self) -> None:
        if len(self.spec.layout) > 4:
            return
        new = self._grow()
        like = self.rng.randrange(len(self.spec.numbers))
        numbers = dict(self.spec.numbers[like])
        group = {"params": [self.ours.params[i] for i in new], **numbers}
        if not self.known:
            group["model"], self.known = self.ours.model, True
            self.ours.optimizer.add_param_group(group)
        elif self.rng.random() < 0.5:
            self.ours.optimizer.add_param_group(group)
        else:
            groups = self.ours.optimizer.param_groups
            groups.append({**groups[like], **group})
        self.spec.layout.append(new)
        self.spec.numbers.append(numbers)

    def rebuild_groups(self) -> None:
        optimizer = self.ours.optimizer
        order = list(range(len(optimizer.param_groups)))
        self.rng.shuffle(order)
        self.spec.layout = [self.spec.layout[i] for i in order]
        self.spec.numbers = [self.spec.numbers[i] for i in order]
        groups = [dict(optimizer.param_groups[i]) for i in order]
        if self.rng.random() < 0.5:
            optimizer.param_groups = groups
            self.copies = []  # which keep theirs, as torch's do
        else:
            optimizer.param_groups[:] = groups

    # Edits to numbers.

    def _set(self, **numbers: Any) -> None:
        index = self._group()
        self.spec.numbers[index].update(numbers)
        self.ours.optimizer.param_groups[index].update(numbers)

    def change_rate(self) -> None:
        self._set(lr=self.rng.choice([0.0, 0.001, 0.02, 0.3]))

    def change_decay(self) -> None:
        self._set(weight_decay=self.rng.choice([0.0, 0.1, 0.5]))

    def change_betas(self) -> None:
        if "momentum" in self.ours.optimizer.param_groups[0]:
            if self.ours.optimizer.param_groups[0]["momentum"]:
                self._set(momentum=self.rng.choice([0.5, 0.8]))
        else:
            self._set(betas=self.rng.choice([(0.8, 0.9), (0.5, 0.99)]))

    def turn_around(self) -> None:
        self._set(maximize=self.rng.random() < 0.5)

    def change_policy(self) -> None:
        if not self.known:
            return
        self.exempting = not self.exempting
        usual = "no_bias_norm" if self.typed else "matrices"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no group may decay at the moment
            self.ours.optimizer.wd_policy = usual if self.exempting else "all"
        self.copies = []
        for i in self.spec.decays:
            self.spec.decays[i] = not self.exempting or i % 4 == 0

    # Edits to state. Each is done to both sides by the same lines.

    def _both_states(self) -> list[tuple[Any, Any]]:
        """Draw a number; return for each side its state and the parameter."""
        drawn = self.rng.randrange(len(self.twin.params))
        return [
            (side.optimizer.state, side.params[drawn])
            for side in (self.ours, self.twin)
        ]

    def clear_state(self) -> None:
        for state, param in self._both_states():
            state.pop(param, None)

    def clear_all_state(self) -> None:
        for side in (self.ours, self.twin):
            side.optimizer.state.clear()

    def replace_entries(self) -> None:
        for state, param in self._both_states():
            for entry, value in state.get(param, {}).items():
                if isinstance(value, torch.Tensor):
                    state[param][entry] = value.clone()

    def move_entries(self) -> None:
        way = self.rng.randrange(3)
        for state, param in self._both_states():
            for value in state.get(param, {}).values():
                if isinstance(value, torch.Tensor):
                    if way == 0:
                        value.data = value.data.clone()
                    elif way == 1:
                        value.set_(value.clone())
                    else:
                        torch.utils.swap_tensors(value, value.clone())

    def set_counter(self) -> None:
        value = float(self.rng.randrange(1, 9))
        for state, param in self._both_states():
            if "step" in state.get(param, {}):
                state[param]["step"].fill_(value)

    def scale_moments(self) -> None:
        for state, param in self._both_states():
            for entry, value in state.get(param, {}).items():
                if isinstance(value, torch.Tensor) and entry != "step":
                    value.mul_(0.5)

    def swap_states(self) -> None:
        a = self.rng.randrange(len(self.twin.params))
        alike = [
            i
            for i, param in enumerate(self.twin.params)
            if param.shape == self.twin.params[a].shape
        ]
        b = self.rng.choice(alike)
        for side in (self.ours, self.twin):
            state, one, other = side.optimizer.state, side.params[a], side.params[b]
            if one in state and other in state:
                state[one], state[other] = state[other], state[one]

    def read_state(self) -> None:
        repr(self.ours.optimizer.state)

    # Edits to parameters.

    def replace_data(self) -> None:
        drawn = self.rng.randrange(len(self.twin.params))
        for side in (self.ours, self.twin):
            side.params[drawn].data = side.params[drawn].data * 1.5

    def freeze(self) -> None:
        drawn = self.rng.randrange(len(self.twin.params))
        for side in (self.ours, self.twin):
            side.params[drawn].requires_grad_(not side.params[drawn].requires_grad)

    # Copies and checkpoints.

    def deepcopy(self) -> None:
        for side in (self.ours, self.twin):
            own = copy.deepcopy((side.model, side.params, side.optimizer))
            side.model, side.params, side.optimizer = own
        self.copies = []

    def pickle(self) -> None:
        for side in (self.ours, self.twin):
            own = pickle.dumps((side.model, side.params, side.optimizer))
            side.model, side.params, side.optimizer = pickle.loads(own)
        self.copies = []
        # An optimizer is not pickled with its model, which must be named again.
        self.known = not self.typed

    def shallow_copy(self) -> None:
        self.copies = [self.ours.optimizer, copy.copy(self.ours.optimizer)]

    def save(self) -> None:
        standing = {i for own in self.spec.layout for i in own}
        for i, param in enumerate(self.twin.params):
            if i not in standing:  # of which torch's state_dict knows no number
                self.twin.optimizer.state.pop(param, None)
                self.ours.optimizer.state.pop(self.ours.params[i], None)
        file = io.BytesIO()
        torch.save(self.ours.optimizer.state_dict(), file)
        states = [
            copy.deepcopy(self.twin.optimizer.state.get(self.twin.params[i]))
            for own in self.spec.layout
            for i in own
        ]
        self.saved = file, copy.deepcopy(self.spec), states

    def load(self) -> None:
        if self.saved is None or self.saved[1].layout != self.spec.layout:
            self.save()
        file, spec, states = self.saved
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another policy may have saved
            self.ours.optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.copies = []  # which keep their groups and state, as torch's do
        self.spec.numbers = copy.deepcopy(spec.numbers)
        self.twin.optimizer.state.clear()
        numbers = [i for own in self.spec.layout for i in own]
        for i, state in zip(numbers, states):
            if state is not None:
                self.twin.optimizer.state[self.twin.params[i]] = copy.deepcopy(state)

    # Stepping and judging.

    def edit(self, done: list[str]) -> None:
        done.append(self.rng.choice(self.edits))
        getattr(self, done[-1])()

    def step(self) -> None:
        if self.copies:  # the copy and its original in turn
            self.ours.optimizer = self.rng.choice(self.copies)
        self._set_grads()
        self._require_numbers()
        self.twin.optimizer.param_groups[:] = [
            {**self.twin.optimizer.defaults, **group} for group in self._split()
        ]
        for side in (self.ours, self.twin):
            self._take(side)
        self._require_same()

    def _take(self, side: Side) -> None:
        side.optimizer.step()

    def _set_grads(self) -> None:
        share = self.rng.choice([0.0, 0.0, 0.0, 0.3, 0.9])
        seed = self.rng.randrange(1 << 30)
        absent = [self.rng.random() < share for _ in self.twin.params]
        for side in (self.ours, self.twin):
            generator = torch.Generator().manual_seed(seed)
            for param, none in zip(side.params, absent, strict=True):
                grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
                param.grad = None if none else grad

    def _require_numbers(self) -> None:
        for group, numbers, own in zip(
            self.ours.optimizer.param_groups,
            self.spec.numbers,
            self.spec.layout,
            strict=True,
        ):
            for key, value in numbers.items():
                assert group[key] == value, (key, group[key], value)
            standing = [id(param) for param in group["params"]]
            assert standing == [id(self.ours.params[i]) for i in own]

    def _require_same(self) -> None:
        for i, pair in enumerate(zip(self.ours.params, self.twin.params, strict=True)):
            assert torch.equal(*pair), f"parameter {i} differs"
        # Past the attribute, which takes note of everyone who reads, where nobody has.
        hidden = vars(self.ours.optimizer).get("_states") if self.quiet else None
        state = self.ours.optimizer.state if hidden is None else hidden
        assert len(state) == len(self.twin.optimizer.state)
        for i, param in enumerate(self.twin.params):
            theirs = self.twin.optimizer.state.get(param, {})
            mine = state.get(self.ours.params[i], {})
            assert mine.keys() == theirs.keys(), (i, mine.keys(), theirs.keys())
            for entry, value in theirs.items():
                same = value is mine[entry] is None or torch.equal(mine[entry], value)
                assert same, (i, entry, mine[entry], value)


class Broken(Exception):
    """Raised on purpose, by closures and hooks."""


class Attacked(World):
    """With what nobody expects between two steps, and in them.

    Whatever spoils a step is given no gradients, so that it moves nothing whether it
    is told in that step or in the next.
    """

    elsewhere = False  # whether our next step is taken by another thread
    watched = False  # whether another thread looks on

    # Steps that fail.

    def _without_grads(self) -> None:
        for param in self.ours.params:
            param.grad = None

    def _failing(self, spoil: Callable[[], None]) -> None:
        """Step with a closure that spoils, see that it is told, and take it back."""
        optimizer = self.ours.optimizer
        before = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]

        def closure() -> None:
            self._without_grads()
            spoil()

        told = False
        for step in (lambda: optimizer.step(closure), optimizer.step):
            try:
                step()
            except (ValueError, Broken, KeyboardInterrupt):
                told = True
                break
        assert told, "a step that was spoiled was not told"
        groups = optimizer.param_groups
        assert len(groups) in (len(before), len(before) + 1), (
            "groups are not the user's"
        )
        del groups[len(before) :]
        for group, own in zip(groups, before):
            for key in group.keys() - own.keys():
                del group[key]
            assert group["weight_decay"] == own["weight_decay"]
            group["params"] = own["params"]

    def _stranger(self) -> nn.Parameter:
        return nn.Parameter(torch.ones(4, 7, dtype=self.ours.dtype))

    def raise_in_a_closure(self) -> None:
        self._failing(self._raise)

    def _raise(self, *args: Any) -> None:
        raise self.rng.choice([Broken, KeyboardInterrupt])

    def raise_in_a_hook(self) -> None:
        self._without_grads()
        optimizer = self.ours.optimizer
        kind = self.rng.choice(["pre", "post"])
        handle = getattr(optimizer, f"register_step_{kind}_hook")(self._raise)
        try:
            optimizer.step()
        except (Broken, KeyboardInterrupt):
            handle.remove()
        else:
            raise AssertionError("a hook that raises was not heard")

    def write_a_policy_in_a_closure(self) -> None:
        group = self.ours.optimizer.param_groups[self._group()]
        self._failing(lambda: group.update(wd_policy="none"))

    def append_a_stranger_in_a_closure(self) -> None:
        if self.typed and self.exempting:  # who else would decide for anything
            group = self.ours.optimizer.param_groups[self._group()]
            params = [*group["params"], self._stranger()]
            self._failing(lambda: group.update(params=params))

    def append_a_group_in_a_closure(self) -> None:
        if self.typed and self.exempting:
            groups = self.ours.optimizer.param_groups
            like = {**groups[self._group()], "params": [self._stranger()]}
            self._failing(lambda: groups.append(like))

    # Tensors behind parameters, and moments.

    def _swap(self, drawn: list[int]) -> None:
        for side in (self.ours, self.twin):
            for i in drawn:
                param = side.params[i]
                other = nn.Parameter(param.detach().clone(), param.requires_grad)
                torch.utils.swap_tensors(param, other)

    def swap_one(self) -> None:
        self._swap([self.rng.randrange(len(self.twin.params))])

    def swap_all(self) -> None:
        self._swap(list(range(len(self.twin.params))))

    def pickle_and_swap(self) -> None:
        self.pickle()
        self.swap_one()

    def zero_moments(self) -> None:
        zero = self.rng.choice([0.0, -0.0])
        for state, param in self._both_states():
            for entry, value in state.get(param, {}).items():
                if isinstance(value, torch.Tensor) and entry != "step":
                    value.fill_(zero)

    # Other threads.

    def step_elsewhere(self) -> None:
        self.elsewhere = True

    def be_watched(self) -> None:
        self.watched = True

    def _take(self, side: Side) -> None:
        ours = side is self.ours
        elsewhere, watched = ours and self.elsewhere, ours and self.watched
        if ours:
            self.elsewhere = self.watched = False
        step = super()._take
        with looking(side.optimizer, watched):
            if elsewhere:
                in_another_thread(lambda: step(side))
            else:
                step(side)


class Compiled(World):
    """Steps both sides under ``torch.compile``, which is to see every edit."""

    def _take(self, side: Side) -> None:
        torch.compile(side.optimizer.step, backend="eager")()


def edits_of(*classes: type[World]) -> list[str]:
    """List the edits that classes define."""
    return [
        name
        for cls in classes
        for name in vars(cls)
        if not name.startswith("_")
        and name not in ("edit", "step", "elsewhere", "watched")
    ]


EDITS = edits_of(World)
ATTACKS = edits_of(Attacked)
# Cheap ones, for a compiled step is compiled anew after each of them.
COMPILED_EDITS = [
    *("permute", "move", "rebuild_groups", "change_policy", "change_policy"),
    *("change_rate", "change_decay", "freeze", "scale_moments", "deepcopy", "load"),
]


def world_of(rng: random.Random, attacks: bool, compiled: bool) -> tuple[World, str]:
    """Draw a world, and tell what was drawn."""
    classes = {**CLASSES, **OTHERS} if attacks else CLASSES
    name = rng.choice(sorted(classes))
    hyper, mode = rng.choice(classes[name]), rng.choice(sorted(MODES))
    dtype = torch.float32
    cls: type[World] = Attacked if attacks else World
    if compiled:
        cls, mode = Compiled, rng.choice(["foreach", "for-loop"])
    if attacks and name == "SGD" and mode != "fused" and rng.random() < 0.4:
        dtype = torch.complex64
    typed, quiet = rng.random() < 0.5, rng.random() < 0.5
    told = f"{name}{(hyper, mode)}, typed {typed}, quiet {quiet}, {dtype}"
    return cls(rng, name, hyper, mode, typed, quiet, dtype), told


def run(
    seed: int, steps: int = STEPS, attacks: bool = False, compiled: bool = False
) -> list[str]:
    """Run one sequence, and return what was done.

    Raises:
        AssertionError: Ours and torch's differ, or one raises; names what was done.
    """
    rng = random.Random(seed)
    world, told = world_of(rng, attacks, compiled)
    world.edits = COMPILED_EDITS if compiled else EDITS + ATTACKS * attacks
    done: list[str] = []
    often = rng.choice([0.0, 0.3, 0.7])
    try:
        for _ in range(steps):
            while rng.random() < often:
                world.edit(done)
            done.append("step")
            world.step()
    except Exception as error:
        raise AssertionError(
            f"seed {seed}, {told}: {', '.join(done)}: {error}"
        ) from error
    return done


def run_compiled(seed: int) -> list[str]:
    """Run one sequence of compiled steps, as often compiled as it takes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1000):
        return run(seed, COMPILED_STEPS, compiled=True)


def main(arguments: list[str]) -> None:
    """Run many sequences, and tell how many."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first sequence")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--attacks", action="store_true", help="with more edits")
    kinds.add_argument("--compiled", action="store_true", help="with compiled steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in range(options.seed, options.seed + options.sequences):
        if options.compiled:
            run_compiled(seed)
        else:
            run(seed, attacks=options.attacks)
    steps = COMPILED_STEPS if options.compiled else STEPS
    print(f"{options.sequences} sequences of {steps} steps, no difference")


if __name__ == "__main__":
    main(sys.argv[1:])
