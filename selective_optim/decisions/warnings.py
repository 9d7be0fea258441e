"""The warnings about decisions: in a constructor, and where a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from itertools import chain
from typing import Any
from weakref import WeakSet

from selective_optim._text import first_of, warn
from selective_optim.decay import Decay, Decision, is_zero, none_decays, target_text
from selective_optim.fused.guards import params_of
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import Policy
from selective_optim.step.setting import Group, alike

# How alike a key must be to one that is read to be taken for it: "wd_polcy" is 0.94
# and "weight_decays" 0.96. Keys that others put there are less: "lr_scale" is 0.4.
RESEMBLANCE = 0.85
# Every optimizer that decided, while it lives.
alive: WeakSet[Any] = WeakSet()


def warn_of_misspelt(group: Iterable[Any], names: Sequence[str]) -> None:
    for key in group:
        if key in names or not isinstance(key, str):
            continue
        nearest = max(names, key=lambda n: SequenceMatcher(None, n, key).ratio())
        # "initial_lr" and "weight_decay_mult" belong to other code: not misspelled.
        longer = any(key.startswith(f"{n}_") or key.endswith(f"_{n}") for n in names)
        if not longer and SequenceMatcher(None, nearest, key).ratio() >= RESEMBLANCE:
            warn(
                f"{key!r} in a parameter group has no effect. Did you mean {nearest!r}?"
            )


def warn_if_unsteady(
    policies: Iterable[Policy | None],
    infos: Iterable[Sequence[ParameterInfo]],
    decided: Iterable[Sequence[Decision]],
) -> None:
    """Ask functions of the user's a second time, and warn of other answers."""
    for policy, group, decisions in zip(policies, infos, decided):
        if policy is None or "anything" not in policy.needs:
            continue
        for place, (info, first) in enumerate(zip(group, decisions)):
            second = None
            with suppress(Exception):  # it may fail where it did not before
                second = policy.decide(info).decay.settled
            if second != first.decay:
                warn(
                    f"`wd_policy` {policy!r} decides differently at a second call: "
                    f"{first.label(info.group, place)} is {first.decay!r} and then "
                    f"{'an error' if second is None else repr(second)}, so ranks and "
                    f"resumed runs may differ. Let it depend only on `info`, or pass a "
                    f"mapping from names to numbers."
                )
                return


def warn_if_nothing_decays(
    groups: Sequence[Group],
    layout: Sequence[Sequence[Any]],  # rows of ``table``
    decays_elsewhere: Callable[[Policy], bool],
) -> None:
    """Warn if nothing will decay, and of a multiplier that reads like a decay."""
    all_rows = list(chain(*layout))
    policies = [row.policy for row in all_rows if row.policy is not None]
    if not policies:
        return
    policy, decays = policies[0], [row.decision.decay for row in all_rows]
    # One optimizer per parameter is common, and most of them have an exempt one.
    exempt = len(decays) > 1 and not any(decay.multiplier for decay in decays)
    if none_decays(groups) and not any(decay.of(0.0) for decay in decays):
        warn(
            f"`weight_decay` is 0 in every group, so `wd_policy` {policy!r} "
            f"has no effect. Pass weight_decay=0.01, or the value you want."
        )
    elif exempt and not decays_elsewhere(policy):
        warn(
            f"`wd_policy` {policy!r} exempts all {len(decays)} parameters. "
            f"Pass weight_decay=0 instead if nothing is to decay."
        )
    for group, rows in zip(groups, layout):
        for policy in {id(row.policy): row.policy for row in rows}.values():
            for multiplier, instead in policy.doubts if policy else ():
                decay = multiplier * float(group["weight_decay"])
                warn(
                    f"`wd_policy` multiplies weight_decay by {multiplier:g}, which "
                    f"comes to a decay of {decay:g}. Write {instead} if a multiplier "
                    f"is meant."
                )
                return


def warn_of_lost(inits: Sequence[str], rates: Sequence[str], whose: str) -> None:
    if inits:
        warn(
            f"the loaded checkpoint does not record what {first_of(inits, ', ')} "
            f"decay towards, so they decay towards their values when training "
            f"continues. Save {whose}.state_dict() under the same policy, and load "
            f"that with {whose}.load_state_dict."
        )
    if rates:
        warn(
            f"the loaded checkpoint does not record the rate that training began "
            f"with, by which the decay of {first_of(rates, ', ')} is divided, and "
            f"its own rate is another. Load what {whose}.state_dict() returned, or "
            f"make groups with the rate of the beginning: dict(params=..., "
            f"initial_lr=...)."
        )


def warn_of_origin(optimizer: Any, numbers: Group, params: Sequence[Any]) -> None:
    """Warn once of a group, or of keywords, that are those of one with a policy.

    The policy is not taken along: a dict given to two optimizers looks the same.
    """
    if optimizer._warned_of_origin or is_zero(numbers.get("weight_decay", 0)):
        return
    # Whoever writes a group by hand names a few.
    keys, ids = numbers.keys(), set(map(id, params))
    others = [o for o in alive if o is not optimizer and o.defaults.keys() <= keys]
    owners = [o for o in others if ids & set(map(id, params_of(o._groups)))]
    for other in owners or [o for o in others if _made_like(optimizer, o, numbers)]:
        candidates = params if owners else params_of(other._groups)
        if policy := other._decider.decided_by(candidates):
            warn(
                f"the arguments of this optimizer come from an optimizer whose "
                f"`wd_policy` is {policy!r}, and here everything decays. Pass "
                f"wd_policy={policy!r}, or 'all' if you mean that. Around code that "
                f"makes optimizers itself, type with deciding_for(model, "
                f"wd_policy={policy!r})."
            )
            optimizer._warned_of_origin = True
            return


def _made_like(optimizer: Any, other: Any, numbers: Group) -> bool:
    """Tell whether another was made with these numbers, or has them now."""
    names = other.defaults.keys() & numbers.keys()
    return isinstance(optimizer, type(other)) and any(
        all(alike(numbers[name], group.get(name)) for name in names)
        for group in (other.defaults, *other._groups)
    )


def warn_of_changes(
    decided: Sequence[Sequence[Decision]],
    before: Sequence[Any],  # the decay of each group before it was loaded
    param_groups: Sequence[dict[str, Any]],
    saved: Sequence[Any] | None,  # entries of its record, if it has one
    now: Sequence[Any],  # entries of what is decided now
    policies: Any,  # the texts that it has
    as_policy: Callable[[object], Policy],
) -> None:
    """Warn once if a checkpoint was made with other decisions than those now taken."""
    labels = [
        [d.label(i, n) for n, d in enumerate(group)] for i, group in enumerate(decided)
    ]
    if saved is not None and (changes := _changes(chain(*labels), saved, now)):
        warn(
            f"the loaded checkpoint was made with another weight decay policy: "
            f"{first_of(changes, '; ')}. The policy of the constructor is kept; "
            f"pass {_typed(policies, as_policy)} to continue as before."
        )
    # Without a record, groups split by hand may take the decay from parameters: merged
    # ones have that of the first, which may have been exempt.
    exempt = any(not decision.decay.multiplier for decision in chain(*decided))
    lost = [
        label
        for group, wd, names, decisions in zip(param_groups, before, labels, decided)
        if is_zero(group["weight_decay"]) and not is_zero(wd)
        for label, decision in zip(names, decisions)
        if decision.decay.multiplier and decision.decay.fixed is None
    ]
    if saved is None and exempt and lost:
        warn(
            f"the loaded checkpoint sets weight_decay to 0 for {first_of(lost, ', ')}, "
            f"which the policy decays: a group takes it from one of its parameters, "
            f"and groups that were split by hand had exempt ones. Convert the state "
            f"dict (not flattened) with selective_optim.checkpoint.merge_groups before "
            f"loading, or set weight_decay in optimizer.param_groups."
        )


def _typed(saved: Any, as_policy: Callable[[object], Policy]) -> str:
    """Write how the policies of a state dict are passed again, where that is known."""
    lines = []
    for text in dict.fromkeys(saved) if isinstance(saved, list) else ():
        with suppress(TypeError, ValueError):  # of a callable the text is its name
            text = text and repr(repr(as_policy(text)))
        lines.append(f"wd_policy={text}")
    return " and ".join(lines) or "the old one as wd_policy"


def _changes(
    labels: Iterable[str], saved: Sequence[Any], now: Sequence[Any]
) -> list[str]:
    changes = []
    for label, old, new in zip(labels, map(_decay_in, saved), map(_decay_in, now)):
        if old is None or new is None:
            continue  # nothing is recorded of a new layer
        if old != new and (old.multiplier or new.multiplier):
            was, now_is = _text(old, "was", "decayed"), _text(new, "is", "decays")
            changes.append(f"{label} {was} and now {now_is}")
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


def _text(decay: Decay, be: str, verb: str) -> str:
    if not decay.multiplier:
        return f"{be} exempt"
    amount = f"{decay.multiplier:g} times as much"
    if decay.fixed is not None:
        amount = f"by {decay.fixed:g}"
    elif decay.multiplier == 1:
        amount = "in full"
    form = f" ({decay.form})" if decay.form else ""
    target = "" if decay.target is None else f" towards {target_text(decay.target)}"
    return f"{verb} {amount}{form}{target}"
