"""What may happen between two steps, done to ours and to torch alike."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.soak.config import settings_of
from tests.soak.ours import group_dict, policy_of
from tests.soak.tensors import Mismatch, laid_out
from tests.soak.world import World

Change = Callable[[World, int, float], None]


def _group(world: World, which: int) -> int:
    """Choose a group by its place among those that ours has."""
    return which % len(world.joined)


def _set(world: World, place: int, **changes: Any) -> None:
    world.settings[world.joined[place]].update(changes)
    world.ours.param_groups[place].update(changes)


def hyperparameter_changes(world: World, which: int, value: float) -> None:
    place = _group(world, which)
    table = settings_of(world.config.name)
    # What amsgrad keeps cannot come later in torch; nesterov has conditions.
    names = [name for name in table if name not in ("amsgrad", "nesterov")]
    name = names[int(value * len(names))]
    own = world.settings[world.joined[place]]
    values = [v for v in table[name] if v != own[name]]
    if own.get("nesterov"):
        values = {"momentum": [0.9, 0.5], "dampening": [0.0]}.get(name, values)
    _set(world, place, **{name: values[which % len(values)]})


def rate_or_decay_changes(world: World, which: int, value: float) -> None:
    _set(world, _group(world, which), **{("lr", "weight_decay")[which // 4 % 2]: value})


def learning_rate_becomes_a_tensor(world: World, which: int, value: float) -> None:
    place = _group(world, which)
    if world.config.groups[world.joined[place]].kind != "foreach":
        world.settings[world.joined[place]]["lr"] = torch.tensor(value)
        world.ours.param_groups[place]["lr"] = torch.tensor(value)


def tensor_rate_is_filled(world: World, which: int, value: float) -> None:
    for groups in (world.settings, world.ours.param_groups):
        for group in groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)


def groups_become_alike(world: World, which: int, value: float) -> None:
    first = world.settings[world.joined[0]]
    shared = {
        key: first[key]
        for key in first
        if key != "amsgrad" and not isinstance(first[key], torch.Tensor)
    }
    for place in range(len(world.joined)):
        _set(world, place, **shared)


def _states(world: World, which: int) -> list[dict[str, Any]]:
    i = world.order[which % len(world.order)]
    return [world.ours.state[world.actual[i]], world.twins[i].state]


def state_is_looked_at(world: World, which: int, value: float) -> None:
    world.compare_state()


def state_is_scaled_in_place(world: World, which: int, value: float) -> None:
    for own in _states(world, which):
        for name, entry in own.items():
            if name != "step" and entry is not None:
                entry.mul_(value)


def state_entry_is_replaced(world: World, which: int, value: float) -> None:
    for own in _states(world, which):
        for name, entry in own.items():
            if entry is not None:
                own[name] = entry.clone().mul_(1 + (name == "step"))


def state_of_one_is_cleared(world: World, which: int, value: float) -> None:
    for own in _states(world, which):
        own.clear()


def all_state_is_cleared(world: World, which: int, value: float) -> None:
    world.ours.state.clear()
    for twin in world.twins:
        twin.optimizer.state.clear()


def state_is_replaced_by_a_copy(world: World, which: int, value: float) -> None:
    for state in (world.ours.state, *(twin.optimizer.state for twin in world.twins)):
        copied = {param: copy.deepcopy(own) for param, own in state.items()}
        state.clear()
        state.update(copied)


def state_dict_is_saved(world: World, which: int, value: float) -> None:
    twins = [twin.optimizer.state_dict() for twin in world.twins]
    saved = (world.ours.state_dict(), twins, world.settings, world.joined)
    world.saved = copy.deepcopy(saved)


def state_dict_is_loaded(world: World, which: int, value: float) -> None:
    if world.saved is None or world.saved[3] != world.joined:
        state_dict_is_saved(world, which, value)
    ours, twins, world.settings, _ = copy.deepcopy(world.saved)
    world.ours.load_state_dict(ours)
    for twin, state_dict in zip(world.twins, twins):
        twin.optimizer.load_state_dict(state_dict)


def run_is_resumed_from_a_file(world: World, which: int, value: float) -> None:
    torch.save(world.ours.state_dict(), file := io.BytesIO())
    file.seek(0)
    if len(world.joined) == len(world.config.groups):
        world.build()
    world.ours.load_state_dict(torch.load(file, weights_only=True))
    for twin in world.twins:
        twin.optimizer.load_state_dict(copy.deepcopy(twin.optimizer.state_dict()))


def copy_takes_over(world: World, which: int, value: float) -> None:
    world.actual, world.ours = copy.deepcopy((world.actual, world.ours))
    world.expected, world.twins = copy.deepcopy((world.expected, world.twins))


def unpickled_takes_over(world: World, which: int, value: float) -> None:
    world.actual, world.ours = pickle.loads(pickle.dumps((world.actual, world.ours)))
    world.named = all("param_names" in group for group in world.ours.param_groups)
    world.expected, world.twins = pickle.loads(
        pickle.dumps((world.expected, world.twins))
    )


def parameter_is_replaced(world: World, which: int, value: float) -> None:
    """Put another tensor in the place of one, with its state or without.

    Of all, where names are unknown, as after unpickling: one alone is refused.
    """
    if world.named:
        _replace(world, world.order[which % len(world.order)], carry=value < 0.5)
    else:
        parameters_are_replaced_one_by_one(world, which, value)


def parameters_are_replaced_one_by_one(world: World, which: int, value: float) -> None:
    """Put others in the place of all; each may get the ``id`` of the one before."""
    for i in world.order[:: 1 if which % 2 else -1]:
        _replace(world, i, carry=value < 0.5)


def _replace(world: World, i: int, carry: bool) -> None:
    twin = world.twins[i]
    group = world.ours.param_groups[world.joined.index(world.config.params[i].group)]
    for params, optimizer, place in (
        (world.actual, world.ours, (group, _place(group, world.actual[i]))),
        (world.expected, twin.optimizer, (twin.optimizer.param_groups[0], 0)),
    ):
        old, new = params[i], nn.Parameter(params[i].detach().clone() * 2)
        params[i] = place[0]["params"][place[1]] = new
        own = optimizer.state.pop(old, {})
        if carry and own:
            optimizer.state[new] = own
    world.module[f"p{i}"] = world.actual[i]


def _place(group: dict[str, Any], param: nn.Parameter) -> int:
    return next(i for i, own in enumerate(group["params"]) if own is param)


def values_are_replaced(world: World, which: int, value: float) -> None:
    for params in (world.actual, world.expected):
        param = params[which % len(params)]
        # In the same layout: that a view with gaps becomes dense need not be noticed.
        new = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype)
        param.data = new.copy_(param.data).mul_(value)


def values_move_apart(world: World, which: int, value: float) -> None:
    """Put the values into a view with gaps, which torch's fused kernels misread."""
    i = which % len(world.actual)
    if world.kind(i) != "fused" and world.actual[i].ndim:
        for params in (world.actual, world.expected):
            params[i].data = laid_out(params[i].data, "gapped")


def values_are_edited(world: World, which: int, value: float) -> None:
    for params in (world.actual, world.expected):
        params[which % len(params)].data.mul_(value)


def parameter_is_frozen(world: World, which: int, value: float) -> None:
    for params in (world.actual, world.expected):
        params[which % len(params)].requires_grad_(value < 0.5)


def groups_are_cleared_and_added_again(world: World, which: int, value: float) -> None:
    groups = [dict(group) for group in world.ours.param_groups]
    world.ours.param_groups.clear()
    for group in groups:
        world.ours.add_param_group(group)


# Attacks, which are drawn where that is asked for.


class Broken(Exception):
    """Raised by a closure, on purpose."""


def _spoiled(world: World, spoil: Callable[[], None]) -> None:
    """Step with a closure that takes gradients away and spoils, and take it back.

    Without gradients nothing moves, whether it is told in that step or in the next.
    """
    before = [{**g, "params": list(g["params"])} for g in world.ours.param_groups]

    def closure() -> None:
        for param in world.actual:
            param.grad = None
        spoil()

    try:
        world.ours.step(closure)
        world.ours.step()
    except (ValueError, Broken, KeyboardInterrupt):
        pass
    else:
        raise Mismatch(f"a step that was spoiled by {spoil.__name__} was not told")
    if len(world.ours.param_groups) != len(before):
        raise Mismatch(f"{len(world.ours.param_groups)} groups, not {len(before)}")
    for group, own in zip(world.ours.param_groups, before):
        for key in group.keys() - own.keys():
            del group[key]
        group["params"] = own["params"]
        if group["weight_decay"] != own["weight_decay"]:
            raise Mismatch(f"decay {group['weight_decay']}, not {own['weight_decay']}")


def closure_raises(world: World, which: int, value: float) -> None:
    def fail() -> None:
        raise (Broken, KeyboardInterrupt)[which % 2]

    _spoiled(world, fail)


def closure_writes_a_policy(world: World, which: int, value: float) -> None:
    group = world.ours.param_groups[_group(world, which)]

    def write() -> None:
        group["wd_policy"] = "no_such_policy"

    _spoiled(world, write)


def closure_appends_a_stranger(world: World, which: int, value: float) -> None:
    """Which a policy by names cannot decide."""
    group = world.ours.param_groups[_group(world, which)]

    def append() -> None:
        group["params"] = [*group["params"], nn.Parameter(torch.ones(2))]

    _spoiled(world, append)


def parameter_is_swapped(world: World, which: int, value: float) -> None:
    """Another tensor comes behind one that stays the parameter that it is."""
    i = world.order[which % len(world.order)]
    for params in (world.actual, world.expected):
        old = params[i]
        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype)
        other = nn.Parameter(new.copy_(old.detach()), old.requires_grad)
        torch.utils.swap_tensors(old, other)


def unpickled_is_swapped(world: World, which: int, value: float) -> None:
    unpickled_takes_over(world, which, value)
    parameter_is_swapped(world, which, value)


def moments_become_zero(world: World, which: int, value: float) -> None:
    """Of either sign, which is no sign that they have not begun."""
    for own in _states(world, which):
        for name, entry in own.items():
            if name != "step" and entry is not None and not entry.is_sparse:
                entry.fill_(0.0 if value < 0.5 else -0.0)


def policy_is_assigned_again(world: World, which: int, value: float) -> None:
    """Where names are known; a group's own policy is not the optimizer's."""
    if world.config.policy != "by group" and world.named:
        world.ours.wd_policy = "all"
        world.ours.wd_policy = policy_of(world.config)


def step_is_taken_by_another_thread(world: World, which: int, value: float) -> None:
    world.elsewhere = True


def step_is_watched_by_another_thread(world: World, which: int, value: float) -> None:
    world.watched = True


def joins(world: World, number: int) -> None:
    """Add the groups that come in this round."""
    for group, spec in enumerate(world.config.groups):
        if number and spec.joins == number:
            world.joined.append(group)
            own = group_dict(world.config, world.actual, world.settings, group)
            world.ours.add_param_group(own)


EVENTS: dict[str, Change] = {
    change.__name__: change
    for change in (
        hyperparameter_changes,
        rate_or_decay_changes,
        learning_rate_becomes_a_tensor,
        tensor_rate_is_filled,
        groups_become_alike,
        state_is_looked_at,
        state_is_scaled_in_place,
        state_entry_is_replaced,
        state_of_one_is_cleared,
        all_state_is_cleared,
        state_is_replaced_by_a_copy,
        state_dict_is_saved,
        state_dict_is_loaded,
        run_is_resumed_from_a_file,
        copy_takes_over,
        unpickled_takes_over,
        parameter_is_replaced,
        parameters_are_replaced_one_by_one,
        values_are_replaced,
        values_move_apart,
        values_are_edited,
        parameter_is_frozen,
        groups_are_cleared_and_added_again,
    )
}
ATTACKS: dict[str, Change] = {
    change.__name__: change
    for change in (
        closure_raises,
        closure_writes_a_policy,
        closure_appends_a_stranger,
        parameter_is_swapped,
        unpickled_is_swapped,
        moments_become_zero,
        policy_is_assigned_again,
        step_is_taken_by_another_thread,
        step_is_watched_by_another_thread,
    )
}
