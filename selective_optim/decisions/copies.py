"""Tensors that stand for parameters and are none: flattened, sharded, stacked, cloned.

Their shapes say nothing of what they are, and no module holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from selective_optim._living_modules import outermost_owners
from selective_optim._text import shape_of
from selective_optim.decay import Decision
from selective_optim.parameters import ModelIndex, ParameterInfo
from selective_optim.policies.selectors import Policy, lacking

Infos = Sequence[ParameterInfo]


def correspond(infos: Infos, old: Sequence[Decision], policy: Policy | None) -> bool:
    """Tell whether new tensors are, one to one, other forms of those before them.

    Args:
        infos: What is known of the new tensors.
        old: What was decided for the old ones.
        policy: The one that decided. Resized parameters inherit only if it could not
            decide for them anew.
    """
    if len(infos) != len(old) or any(info.owner is not None for info in infos):
        return False
    pairs = list(zip(infos, old))
    named = [(i.name, d.name) for i, d in pairs if i.name and d.name]
    if any(new != before for new, before in named):
        return False
    if _another_form(infos, old):
        # Not in another order: Megatron puts those in float32 first.
        sizes = sorted((d.shape.numel(), i.parameter.numel()) for i, d in pairs)
        return all(a[1] <= b[1] for a, b in pairwise(sizes))
    resized = all(info.ndim == len(d.shape) for info, d in pairs)
    return (
        resized
        and policy is not None
        and any(
            "anything" in policy.needs or lacking(policy.needs, info) for info in infos
        )
    )


def _another_form(infos: Infos, old: Sequence[Decision]) -> bool:
    """Tell whether all are flat where not all were, or stack what was there."""
    if len(infos) > len(old):
        return False
    flat = all(info.ndim == 1 for info in infos)
    was_flat = all(len(decision.shape) == 1 for decision in old)
    pairs = list(zip(infos, old))
    stacked = all(info.parameter.shape[1:] == d.shape for info, d in pairs)
    return (flat and not was_flat) or (len(infos) == len(old) and stacked)


def refuse_flattened(
    infos: Infos, old: Sequence[Decision], policy: Policy | None
) -> None:
    """Check that tensors in the places of others are not those in another form.

    Raises:
        ValueError: They are, and so many that no decision belongs to each.
    """
    known = any(info.owner is not None or info.name for info in infos)
    if policy is None or not policy.needs or not old or known:
        return
    # Where shapes decide, fewer that are not all flat are new parameters.
    merged = len(infos) < len(old) and (
        policy.needs != {"shapes"} or all(info.ndim == 1 for info in infos)
    )
    if merged or _another_form(infos, old):
        raise ValueError(
            f"`wd_policy` {policy!r} decided for {len(old)} parameters of group "
            f"{infos[0].group}, in whose places an engine put {len(infos)} "
            f"({shape_of(infos[0].parameter)}): no single decay is right for those. "
            f"{by_hand(policy)}."
        )


def by_hand(policy: Policy) -> str:
    """Write how tensors of which nothing is known get their decay."""
    text = repr(policy) if "anything" in policy.needs else f'"{policy!r}"'
    return (
        f"Split the groups by hand, which is exact there: "
        f"AdamW(param_groups(model, {text}, weight_decay=...))"
    )


def require_members(
    index: ModelIndex, groups: Iterable[tuple[Infos, Policy | None]]
) -> None:
    """Check that every parameter lives in ``model=``, if that was given.

    Raises:
        ValueError: One does not, or all are stacks of those that do; the message gives
            its shape and position.
    """
    groups = list(groups)
    alone = all(info.owner is None for infos, _ in groups for info in infos)
    for infos, policy in groups:
        strangers = [each for each in enumerate(infos) if each[1].owner is None]
        if not strangers or not (index.explicit or _are_stacks(infos, index)):
            continue
        position, info = strangers[0]
        where = (
            f"{info.describe(position)}, at position {position} of group {info.group}, "
            f"is in none of the modules given as `model`"
        )
        if policy is None or not alone or outermost_owners([info.parameter]):
            raise ValueError(
                f"{where}. Pass every module that holds parameters: model=[model, ...]."
            )
        raise ValueError(
            f"{where}, nor in any other that lives. {by_hand(policy)}, with copies in "
            f'the places of the parameters that each group names in "param_names".'
        )


def _are_stacks(infos: Infos, index: ModelIndex) -> bool:
    """Tell whether tensors are the model's parameters with one more dimension."""
    everyone = index.everyone()
    inside = sorted([info.parameter.shape[1:] for info in infos])
    return bool(everyone) and inside == sorted([i.parameter.shape for i in everyone])
