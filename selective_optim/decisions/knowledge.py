"""What is known of the parameters of groups that come in, living modules asked last.

Ranks find the same, or one of them refuses: a wrapper that lives on one rank alone
takes names away there, and another class around a tensor takes away its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from selective_optim._living_modules import outermost_owners
from selective_optim.parameters import (
    ModelIndex,
    ParameterInfo,
    Wanted,
    at_both,
    index_of,
    together,
    wanted,
)
from selective_optim.policies.predicates import kind_of
from selective_optim.policies.recognition import kind_known, kinds_known, says_nothing
from selective_optim.policies.selectors import KINDS, Need, Policy, lacking


class Pending(NamedTuple):
    """A group on its way in, and who decides for it."""

    group: int
    params: Sequence[Tensor]
    names: Sequence[str | None]
    policy: Policy | None
    lr0s: Iterable[float | None] = ()


def describe(index: ModelIndex, coming: Sequence[Pending]) -> list[list[ParameterInfo]]:
    """Describe the parameters of all groups in one go.

    Args:
        index: What is known of the model; learns which living modules were found.
        coming: The groups.
    """
    asked = [wanted(each.params, each.names, each.group) for each in coming]
    rest = iter(index.infos(together(asked)))
    infos = [list(islice(rest, len(own.params))) for own in asked]
    # With `model=` a tensor of another model is a mistake.
    if not index.explicit:
        unsure = zip(coming, asked, infos)
        _search(index, [gap for each in unsure for gap in _gaps(*each)])
    return infos


class Gap(NamedTuple):
    """A place in a list where a living module may know more."""

    infos: list[ParameterInfo]
    position: int
    asked: list[Any]  # in columns, as in ``Wanted``


def _gaps(each: Pending, asked: Wanted, infos: list[ParameterInfo]) -> list[Gap]:
    """List where a policy needs what is not known."""
    needs = each.policy.needs if each.policy else frozenset[Need]()
    if needs <= {"shapes"}:
        return []
    anything = "anything" in needs
    doubts = (anything or needs & KINDS) and not kinds_known(infos)
    return [
        Gap(infos, position, [column[position] for column in asked])
        for position, info in enumerate(infos)
        if lacking(needs, info)
        or (anything and info.owner is None)
        or (doubts and info.owner is not None and not kind_known(info))
    ]


def _search(index: ModelIndex, gaps: Sequence[Gap]) -> None:
    """Fill in from living modules what policies need and nothing else gives."""
    if not gaps:
        return
    asked = Wanted(*zip(*[gap.asked for gap in gaps]))
    roots = outermost_owners(asked.params)
    told = [index_of(root).infos(asked) for root in roots]
    used = set[int]()
    for gap, *each in zip(gaps, *told):
        found = _joined(gap.infos[gap.position], [info for info in each if info])
        gap.infos[gap.position] = found
        used |= {id(place.path[0]) for place in found.places if place.path}
    index.find(root for root in roots if id(root) in used)


def _joined(given: ParameterInfo, told: Sequence[ParameterInfo]) -> ParameterInfo:
    """Join what several outermost modules tell of a parameter."""
    sure = [info for info in told if kind_known(info)]
    if not sure and given.owner is None:
        sure = [info for info in told if not says_nothing(info)]
    if not sure or len(set(map(kind_of, sure))) > 1:
        return given
    joined = reduce(at_both, sure if given.owner is None else [*sure, given])
    names = {frozenset(info.names) for info in sure}
    if given.name and given.owner is None and given.name not in sure[0].names:
        return _renamed(joined, given.name)
    return _renamed(joined, None) if len(names) > 1 else joined


def _renamed(info: ParameterInfo, name: str | None) -> ParameterInfo:
    names = () if name is None else (name,)
    elsewhere = tuple(_renamed(place, name) for place in info.elsewhere)
    return replace(info, name=name, names=names, elsewhere=elsewhere, own_name=None)
