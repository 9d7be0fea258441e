"""Canonical names of parameters: what wrappers and parametrizations add is stripped.

The names that wrappers add are ``_torch.WRAPPERS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from selective_optim import _torch


def canonical_name(name: str) -> str:
    """Strip what wrappers and parametrizations add to a dotted name."""
    *modules, leaf = without_wrappers(name).split(".")
    if modules[-2:-1] == ["parametrizations"] and leaf.startswith("original"):
        *modules, _, leaf = modules
    return ".".join([*modules, leaf])


def without_wrappers(name: str) -> str:
    """Strip what wrappers add to a dotted name, and nothing else."""
    *modules, leaf = name.split(".")
    return ".".join([*(part for part in modules if part not in _torch.WRAPPERS), leaf])


def name_of_its_own(name: str) -> str | None:
    """Return what tells a parametrization's several parameters apart, if they are.

    One that made one parameter of one calls it ``original``, without a number.
    """
    plain = without_wrappers(name)
    *_, above, _, leaf = ("", "", *plain.split("."))
    numbered = above == "parametrizations" and leaf.removeprefix("original").isdigit()
    return plain if numbered else None


def told_apart(names: Sequence[str]) -> list[str]:
    """Make names canonical, but for those that a parametrization's parameters share."""
    canonical = list(map(canonical_name, names))
    bearers = Counter(canonical)
    return [
        short if bearers[short] == 1 else without_wrappers(name)
        for name, short in zip(names, canonical)
    ]
