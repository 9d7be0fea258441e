"""The warnings of this library, such as that nothing decays or a policy changed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import SequenceMatcher
from itertools import chain
from typing import Any

from selective_optim.decay import Decay, Decision, is_zero, target_text

SHOWN = 3  # parameters that a warning names
# How alike a key must be to one that is read to be taken for it: "wd_polcy" is 0.94
# and "weight_decays" 0.96. Keys that others put there are less: "lr_scale" is 0.4.
RESEMBLANCE = 0.85
INSIDE = ("selective_optim", "torch", "contextlib")  # packages that warnings skip


def warn(message: str) -> None:
    """Warn at the line, outside this library and torch, that led here."""
    # From Python 3.12 on, `skip_file_prefixes` of warnings.warn does this.
    level, frame = 1, inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_if_idle(
    policy: Any,
    decays: Iterable[Any],
    multipliers: Collection[float],
    decays_elsewhere: Callable[[Any], bool],
) -> None:
    """Warn if a policy decays no parameter here or elsewhere, or no group decays."""
    if all(map(is_zero, decays)):
        warn(
            f"`weight_decay` is 0 in every group, so `wd_policy` {policy!r} "
            f"has no effect. Pass weight_decay=0.01, or the value you want."
        )
    # One optimizer per parameter is common, and most of them have an exempt one.
    elif len(multipliers) > 1 and not any(multipliers) and not decays_elsewhere(policy):
        warn(
            f"`wd_policy` {policy!r} exempts all {len(multipliers)} parameters. "
            f"Pass weight_decay=0 instead if nothing is to decay."
        )


def warn_of_small_multiplier(multiplier: float, wd: Any, instead: str) -> None:
    """Warn of a multiplier that reads like a decay."""
    warn(
        f"`wd_policy` multiplies weight_decay by {multiplier:g}, which comes to a "
        f"decay of {multiplier * float(wd):g}. Write {instead} "
        f"if a multiplier is meant."
    )


def warn_of_lost_policy(policy: object) -> None:
    """Warn of another optimizer's numbers, which do not bring its policy along."""
    warn(
        f"the arguments of this optimizer come from an optimizer whose `wd_policy` is "
        f"{policy!r}, and here everything decays. Pass wd_policy={policy!r}, or 'all' "
        f"if you mean that. Around code that makes optimizers itself, type "
        f"with deciding_for(model, wd_policy={policy!r})."
    )


def warn_of_high_rate(index: object, lr0: float, rate: float) -> None:
    """Warn of a rate above the one that decay is divided by."""
    warn(
        f"decay in group {index} is divided by {lr0:g}, the rate that it began with, "
        f"and its rate rises to {rate:g}: it decays more than `weight_decay` says. "
        f"Give it the rate that is meant: dict(params=..., initial_lr={rate:g})."
    )


def warn_of_decay_taken_over(policy: object) -> None:
    """Warn that groups lost their decay between construction and the first steps."""
    warn(
        f"`weight_decay` is 0 in every group since the first step, and was more when "
        f"the optimizer was made, so no group decays and `wd_policy` {policy!r} has no "
        f"effect. A wrapper that applies decay itself wants groups that are split by "
        f"hand: torch's class over selective_optim.param_groups(model, {policy!r}, "
        f"weight_decay=...). A schedule that begins at 0 may ignore this."
    )


def warn_of_other_rank(
    rank: int, name: str, here: str, there: str, count: int, found: bool
) -> None:
    """Warn that a rank decided otherwise than the one that came first."""
    same = "model=model and the same `wd_policy`" if found else "the same `wd_policy`"
    more = f" (and {count - 1} more)" if count > 1 else ""
    warn(
        f"rank {rank} decided otherwise than the rank that stepped first: {name} is "
        f"{here} here and {there} there{more}. Pass {same} and routes on every rank, "
        f"as texts or mappings from names. Ranks that train apart on purpose may "
        f"ignore this."
    )


def warn_of_unsteady_policy(policy: object, name: str, first: str, then: str) -> None:
    """Warn of a policy whose answers differ from one time to the next."""
    warn(
        f"`wd_policy` {policy!r} decides differently at a second call: {name} is "
        f"{first} and then {then}, so ranks and resumed runs may differ. Let it depend "
        f"only on `info`, or pass a mapping from names to numbers."
    )


def warn_of_own_step(name: str) -> None:
    """Warn that a subclass decays in a step of its own, past the policy."""
    warn(
        f"the step of {name} reads group['weight_decay'] itself and never reaches the "
        f"step of its base, so `wd_policy` has no effect. Call super().step(closure) "
        f"in it, or split the groups by hand: selective_optim.param_groups(model, ...)."
    )


def warn_of_misspelt(group: Iterable[Any], known: Collection[str]) -> None:
    """Warn of keys without effect that look like a key that is read."""
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        nearest = max(known, key=lambda k: SequenceMatcher(None, k, key).ratio())
        # "initial_lr" and "weight_decay_mult" belong to other code: not misspelled.
        own = any(key.startswith(f"{k}_") or key.endswith(f"_{k}") for k in known)
        if not own and SequenceMatcher(None, nearest, key).ratio() >= RESEMBLANCE:
            warn(
                f"{key!r} in a parameter group has no effect. Did you mean {nearest!r}?"
            )


def warn_of_changes(
    decided: Sequence[Sequence[Decision]],
    before: Sequence[Any],
    param_groups: Sequence[dict[str, Any]],
    saved: Sequence[Any] | None,
    now: Sequence[Any],
    advice: str,
) -> None:
    """Warn once if a checkpoint was made with other decisions than those now taken."""
    # Without a record, groups split by hand may take the decay from parameters: merged
    # ones have that of the first, which may have been exempt.
    if saved is not None and (changes := _changes(decided, saved, now)):
        warn(
            f"the loaded checkpoint was made with another weight decay policy: "
            f"{_first_of(changes, '; ')}. The policy of the constructor is kept; "
            f"{advice} to continue as before."
        )
    elif saved is None and (lost := _losers(decided, before, param_groups)):
        warn(
            f"the loaded checkpoint sets weight_decay to 0 for "
            f"{_first_of(lost, ', ')}, which the policy decays: a group takes it from "
            f"one of its parameters, and groups that were split by hand had exempt "
            f"ones. Convert the state dict (not flattened) with selective_optim."
            f"checkpoint.merge_groups before loading, or set weight_decay in "
            f"optimizer.param_groups."
        )


def warn_of_lost_inits(names: Sequence[str], whose: str) -> None:
    """Warn once that a checkpoint does not tell where parameters began."""
    warn(
        f"the loaded checkpoint does not record what {_first_of(names, ', ')} decay "
        f"towards, so they decay towards their values when training continues. Save "
        f"{whose}.state_dict() under the same policy, and load that with "
        f"{whose}.load_state_dict."
    )


def warn_of_lost_rates(names: Sequence[str], whose: str) -> None:
    """Warn once that a checkpoint does not tell which rate training began with."""
    warn(
        f"the loaded checkpoint does not record the rate that training began with, by "
        f"which the decay of {_first_of(names, ', ')} is divided, and its own rate is "
        f"another. Load what {whose}.state_dict() returned, or make groups with the "
        f"rate of the beginning: dict(params=..., initial_lr=...)."
    )


def _first_of(items: Sequence[str], separator: str) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{separator.join(items[:SHOWN])}{more}"


def _losers(
    decided: Sequence[Sequence[Decision]],
    before: Sequence[Any],
    param_groups: Sequence[dict[str, Any]],
) -> list[str]:
    if all(each.decay.multiplier for each in chain.from_iterable(decided)):
        return []  # without an exempt parameter there was nothing to split
    return [
        decision.label(index, position)
        for index, (group, decisions) in enumerate(zip(param_groups, decided))
        if is_zero(group["weight_decay"]) and not is_zero(before[index])
        for position, decision in enumerate(decisions)
        if decision.decay.multiplier and decision.decay.fixed is None
    ]


def _changes(
    decided: Sequence[Sequence[Decision]], saved: Sequence[Any], now: Sequence[Any]
) -> list[str]:
    labels = [
        decision.label(index, position)
        for index, decisions in enumerate(decided)
        for position, decision in enumerate(decisions)
    ]
    changes = []
    for label, old, new in zip(labels, map(_decay_in, saved), map(_decay_in, now)):
        if old is None or new is None:
            continue  # nothing is recorded of a new layer
        if old != new and (old.multiplier or new.multiplier):
            was, comes = _told(old, "was", "decayed"), _told(new, "is", "decays")
            changes.append(f"{label} {was} and now {comes}")
    return changes


def _decay_in(entry: Any) -> Decay | None:
    # What cannot be read, as of another version, is not compared.
    try:
        begin = entry[2] if len(entry) > 2 else {}
        fixed = begin.get("fixed")  # numbers may have become tensors on the way
        fixed = None if fixed is None else float(fixed)
        return Decay(float(entry[0]), entry[1], begin.get("target"), fixed)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):
        return None


def _told(decay: Decay, be: str, verb: str) -> str:
    if not decay.multiplier:
        return f"{be} exempt"
    times = f"{decay.multiplier:g} times as much"
    times = "in full" if decay.multiplier == 1 else times
    times = times if decay.fixed is None else f"by {decay.fixed:g}"
    how = f" ({decay.form})" if decay.form else ""
    how += "" if decay.target is None else f" towards {target_text(decay.target)}"
    return f"{verb} {times}{how}"
