"""Warn of ranks that decide differently, through the store of the process group.

DDP lets such ranks drift apart, and FSDP decays a part of a parameter alone. The rank
that steps first writes down what it decided; each later one reads that and compares.
Both is one call that waits for nobody.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from os.path import commonprefix
from zlib import compress, decompress

import torch.distributed as dist

from selective_optim import _torch
from selective_optim._warnings import warn_of_other_rank
from selective_optim.decisions.table import Group, Row

# What stands around a model, up to a module that is one of several, as a stage is.
AROUND = re.compile(r"(?:[^.\d][^.]*\.)*?(?=[^.]+\.\d+\.|[^.]*$)|")


def compare_with_first(
    groups: Sequence[Group], layout: Sequence[Sequence[Row]], found: bool = False
) -> None:
    """Warn if another rank decided otherwise for the same parameters.

    Names, or places where there are none, and shapes are the key: stages of a pipeline
    share neither, and ranks of ``ZeroRedundancyOptimizer`` hold other parameters. A
    sweep makes one optimizer after another: the key also counts those of these
    parameters that this rank has stepped. Names that living modules gave are compared
    without what stands before them all: another module may live around the model on
    one rank alone.
    """
    store = _torch.store_of_ranks()
    if store is None:
        return
    decided = sorted(_decided(groups, layout))
    if not decided:
        return
    decays = [decay for *_, decay in decided]
    names = [label.strip("'") for label, *_ in decided]
    # What all parameters of one module share is the name of that, and not around it.
    owners = {name.rpartition(".")[0] for name in names}
    shared = commonprefix(names) if found and len(owners) > 1 else ""  # noqa: RUF071
    around = AROUND.findall(shared)[0]
    shapes = (shape for _, shape, _ in decided)
    inside = (name.removeprefix(around) for name in names)
    known = "\n".join(map(" ".join, zip(inside, shapes)))
    key = f"selective_optim/{sha256(known.encode()).hexdigest()}"
    rank = dist.get_rank()
    try:
        key = f"{key}/{store.add(f'{key}/of rank {rank}', 1)}"
        # Decisions repeat from layer to layer: of 200,000 parameters this is a few kB.
        own = b64encode(compress("\n".join(decays).encode()))
        first = store.compare_set(key, "", own.decode())
    except RuntimeError:  # nobody serves it any longer
        return
    if first in (b"", own):  # empty: a store that keeps nothing, as of a fake group
        return
    there = decompress(b64decode(first)).decode().split("\n")
    others = [i for i, decay in enumerate(decays) if decay != there[i]]
    if others:
        at = others[0]
        warn_of_other_rank(
            rank, decided[at][0], decays[at], there[at], len(others), found
        )


def _decided(
    groups: Sequence[Group], layout: Sequence[Sequence[Row]]
) -> Iterator[tuple[str, str, str]]:
    """Name each parameter, its shape, how it decays and which route steps it.

    One without a name goes by its place where all places were decided by one rule: in
    those of shards and of master copies may stand another tensor on each rank.
    """
    policies = {id(row.policy) for rows in layout for row in rows}
    for index, (group, rows) in enumerate(zip(groups, layout)):
        route = f" on route {group['route']!r}" if "route" in group else ""
        pieces = _torch.flattened(group["params"])  # of another shape on every rank
        for place, (param, row) in enumerate(zip(group["params"], rows)):
            decision, needs = row.decision, row.policy.needs if row.policy else ()
            ruled = len(policies) == 1 and "anything" not in needs
            if decision.telling_name is None and not ruled:
                continue
            shape = "" if id(param) in pieces else str(tuple(decision.shape))
            yield decision.label(index, place), shape, f"{decision.decay!r}{route}"
