"""What is known of the parameters of groups that come in, living modules asked last.

Ranks find the same, or one of them refuses: a wrapper that lives on one rank alone
takes names away there, and another class around a tensor takes away its kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from typing import NamedTuple

from torch import Tensor

from selective_optim._living import outermost_owners
from selective_optim.parameters import (
    ModelIndex,
    ParameterInfo,
    Wanted,
    at_both,
    index_of,
    wanted,
)
from selective_optim.policies.base import Policy
from selective_optim.policies.recognition import kind_known, says_nothing
from selective_optim.policies.selectors import KINDS, Need, kind_of, lacking


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
    flat = list(chain.from_iterable(asked))
    infos = index.infos(flat)
    # With `model=` a tensor of another model is a mistake.
    if not index.explicit:
        none = frozenset[Need]()
        by_group = [each.policy.needs if each.policy else none for each in coming]
        needs = chain.from_iterable([n] * len(a) for n, a in zip(by_group, asked))
        _search(index, flat, infos, list(needs))
    rest = iter(infos)
    return [list(islice(rest, len(own))) for own in asked]


def _search(
    index: ModelIndex,
    asked: Sequence[Wanted],
    infos: list[ParameterInfo],
    needs: Sequence[frozenset[Need]],
) -> None:
    """Fill in from living modules what policies need and nothing else gives."""
    short = [i for i, info in enumerate(infos) if _unsure(needs[i], info)]
    if not short:
        return
    roots = outermost_owners(asked[i].param for i in short)
    told = [index_of(root).infos([asked[i] for i in short]) for root in roots]
    for i, *each in zip(short, *told):
        infos[i] = _joined(infos[i], [info for info in each if info is not None])
    paths = [place.path for i in short for place in infos[i].places]
    used = [path[0] for path in paths if path]
    index.find(root for root in roots if root in used)


def _unsure(needs: frozenset[Need], info: ParameterInfo) -> bool:
    """Tell whether a living module may know what a policy needs and is not known."""
    if not needs & {"names", "leaves", "modules", "anything"}:
        return False
    if info.owner is None and "anything" in needs:
        return True
    by_kind = info.owner is not None and needs & (KINDS | {"anything"})
    return bool(lacking(needs, info)) or bool(by_kind and not kind_known(info))


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
