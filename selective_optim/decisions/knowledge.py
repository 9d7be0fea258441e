"""What is known of the tensors of groups that come in, living modules asked last.

Ranks find the same, or one of them refuses: a wrapper that lives on one rank alone
takes names away there, and another class around a tensor takes away its kind.

Some tensors stand for parameters and are none: flattened, sharded, stacked, cloned.
Their shapes say nothing of what they are, and no module holds them.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, compress, islice, repeat
from typing import NamedTuple

from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._text import shape_of
from selective_optim.decay import Decision
from selective_optim.parameters import (
    Asked,
    ModelIndex,
    ModuleRef,
    ParameterInfo,
    at_both,
    clear_at_registration,
    index_of,
    living,
    wanted,
)
from selective_optim.policies.recognition import kind_known, kind_of, says_nothing
from selective_optim.policies.selectors import KINDS, Policy, lacking

Infos = Sequence[ParameterInfo]


class Pending(NamedTuple):
    """A group on its way in, and who decides for it."""

    group: int
    params: Sequence[Tensor]
    names: Sequence[str | None]
    policy: Policy | None
    lr0s: Iterable[float | None] = repeat(None)


def describe(
    index: ModelIndex, pending: Sequence[Pending]
) -> list[list[ParameterInfo]]:
    """Describe the parameters of all groups; the index learns which modules live."""
    asked: list[Asked] = []
    for coming in pending:
        asked += wanted(coming.params, coming.names, coming.group)
    infos = index.infos(asked)
    policies = [coming.policy for coming in pending for _ in coming.params]
    gaps = [i for i, pair in enumerate(zip(policies, infos)) if _lacks(*pair)]
    # With `model=` a tensor of another model is a mistake.
    if gaps and not index.explicit:
        _search(index, infos, gaps)
    remaining = iter(infos)
    return [list(islice(remaining, len(coming.params))) for coming in pending]


def _lacks(policy: Policy | None, info: ParameterInfo) -> bool:
    """Tell whether a living module may know what a policy needs."""
    if policy is None or policy.needs <= {"shapes"}:
        return False
    if lacking(policy.needs, info):
        return True
    anything = "anything" in policy.needs
    if info.owner is None:
        return anything
    return (anything or not KINDS.isdisjoint(policy.needs)) and not kind_known(info)


def _search(index: ModelIndex, infos: list[ParameterInfo], gaps: Sequence[int]) -> None:
    """Fill in from living modules what policies need and nothing else gives."""
    lacking_infos = (infos[i] for i in gaps)
    asked = [(i.parameter, i.group, i.shape, i.name) for i in lacking_infos]
    roots = outermost_owners([param for param, *_ in asked])
    by_root = [index_of(root).infos(asked) for root in roots]
    used = set[int]()
    for i, *candidates in zip(gaps, *by_root):
        infos[i] = _joined(infos[i], [info for info in candidates if info])
        used |= {id(place.path[0]) for place in infos[i].places if place.path}
    index.find(root for root in roots if id(root) in used)


def _joined(info: ParameterInfo, candidates: Infos) -> ParameterInfo:
    """Join to what is known of a parameter what several outermost modules know."""
    sure = [each for each in candidates if kind_known(each)]
    if not sure and info.owner is None:
        sure = [each for each in candidates if not says_nothing(each)]
    if not sure or len(set(map(kind_of, sure))) > 1:
        return info
    joined = reduce(at_both, sure if info.owner is None else [*sure, info])
    names = {frozenset(each.names) for each in sure}
    if info.name and info.owner is None and info.name not in sure[0].names:
        return _renamed(joined, info.name)
    return _renamed(joined, None) if len(names) > 1 else joined


def _renamed(info: ParameterInfo, name: str | None) -> ParameterInfo:
    names = () if name is None else (name,)
    elsewhere = tuple(_renamed(place, name) for place in info.elsewhere)
    return replace(info, name=name, names=names, elsewhere=elsewhere, own_name=None)


# The modules that hold something, by its id, as they were when last looked for.
_holders: dict[int, list[ModuleRef]] = {}


def outermost_owners(params: Sequence[Tensor]) -> list[nn.Module]:
    """Find the outermost modules alive that hold any of ``params``.

    One look takes 0.3 s with 700,000 objects alive, and serves all until a module or a
    parameter is registered: one optimizer per parameter is how people save memory.
    """
    if not all(map(_holders_of, params)):
        clear_at_registration(_holders.clear)
        _holders.clear()
        _holders.update(_look_at_living())
    reached = [module for param in params for module in _holders_of(param)]
    seen, outermost = set[int](), []
    for module in reached:  # which grows by the modules around these
        if id(module) not in seen:
            seen.add(id(module))
            holders = _holders_of(module)
            reached += holders
            outermost += [] if holders else [module]
    return outermost


def _look_at_living() -> dict[int, list[ModuleRef]]:
    # A wrapper that was let go would give names until the collector runs by chance.
    gc.collect()
    objects, holders = gc.get_objects(), defaultdict[int, list[ModuleRef]](list)
    # Not `isinstance`, which runs code of objects that imitate other classes.
    are_modules = map(issubclass, map(type, objects), repeat(nn.Module))
    for module in compress(objects, are_modules):
        if _torch.is_constructed(module):
            for item in _held_by(module):
                holders[id(item)].append(weakref.ref(module))
    return holders


def _holders_of(item: Tensor | nn.Module) -> list[nn.Module]:
    modules = living(_holders.get(id(item), ()))
    return [m for m in modules if any(held is item for held in _held_by(m))]


def _held_by(module: nn.Module) -> Iterable[object]:
    return chain(_torch.registered(module).values(), _torch.children(module).values())


def correspond(infos: Infos, old: Sequence[Decision], policy: Policy | None) -> bool:
    """Tell whether new tensors are, one to one, other forms of those decided before."""
    if len(infos) != len(old) or any(info.owner is not None for info in infos):
        return False
    pairs = list(zip(infos, old))
    if any(i.name and d.name and i.name != d.name for i, d in pairs):
        return False
    if _another_form(infos, old):
        # Not in another order: Megatron puts those in float32 first.
        sizes = sorted((d.shape.numel(), i.parameter.numel()) for i, d in pairs)
        now = [size for _, size in sizes]
        return now == sorted(now)
    # Resized parameters are only if the policy could not decide for them anew.
    if policy is None or any(info.ndim != len(d.shape) for info, d in pairs):
        return False
    return "anything" in policy.needs or any(lacking(policy.needs, i) for i in infos)


def _another_form(infos: Infos, old: Sequence[Decision]) -> bool:
    """Tell whether all are flat where not all were, or stack what was there."""
    if len(infos) > len(old):
        return False
    flat = all(info.ndim == 1 for info in infos)
    was_flat = all(len(decision.shape) == 1 for decision in old)
    inside = [info.parameter.shape[1:] for info in infos]
    return (flat and not was_flat) or inside == [decision.shape for decision in old]


def refuse_flattened(
    infos: Infos, old: Sequence[Decision], policy: Policy | None
) -> None:
    """Check that tensors in the places of others are not those, joined or stacked."""
    identified = any(info.owner is not None or info.name for info in infos)
    if policy is None or not policy.needs or identified:
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
            f"{_by_hand(policy)}."
        )


def _by_hand(policy: Policy) -> str:
    """Write how tensors of which nothing is known get their decay."""
    text = repr(policy) if "anything" in policy.needs else f'"{policy!r}"'
    return (
        f"Split the groups by hand, which is exact there: "
        f"AdamW(param_groups(model, {text}, weight_decay=...))"
    )


def require_members(
    index: ModelIndex, groups: Sequence[Infos], policies: Iterable[Policy | None]
) -> None:
    """Check that every parameter lives in ``model=``, if that was given."""
    if not index.modules():
        return
    alone = all(info.owner is None for infos in groups for info in infos)
    for infos, policy in zip(groups, policies):
        strangers = [pair for pair in enumerate(infos) if pair[1].owner is None]
        if not strangers:
            continue
        if not index.explicit:
            shapes = sorted([info.parameter.shape for info in index.everyone()])
            inside = sorted([info.parameter.shape[1:] for info in infos])
            # Stacks of all that live in a module are refused even if it was not given.
            if shapes != inside:
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
            f"{where}, nor in any other that lives. {_by_hand(policy)}, with copies in "
            f'the places of the parameters that each group names in "param_names".'
        )
