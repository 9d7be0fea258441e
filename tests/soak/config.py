"""What a soak configuration is: parameters, groups, and what befalls them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.support.kernels import HALF_SGD_ON_CPU

KINDS: dict[str, dict[str, bool | None]] = {
    "automatic": {"fused": None, "foreach": None},
    "for-loop": {"fused": False, "foreach": False},
    "foreach": {"fused": None, "foreach": True},
    "fused": {"fused": True, "foreach": None},
}
SHAPES = [(), (1,), (3,), (0, 3), (4, 3), (2, 3, 2, 2), (5, 1), (17,), (2, 40)]
DTYPES = ["float32", "float64", "bfloat16", "float16", "complex64", "complex128"]
LAYOUTS = ["contiguous", "transposed", "gapped", "offset"]
GRADS = ["alike", "contiguous", "strided", "sparse"]
MULTIPLIERS = [1.0, 0.0, 0.5, 3.0]
FORMS = [None, "l2", "decoupled"]
POLICIES = ["callable", "mapping", "expression", "by group"]
SOURCES = ["pairs", "model", "module", "generator"]
WAYS = ["plain", "closure", "scaled", "infinite"]
SETTINGS: dict[str, dict[str, list[Any]]] = {
    "SGD": {
        "lr": [0.05, 0.0, 0.3],
        "weight_decay": [0.1, 0.0, 0.7],
        "momentum": [0.9, 0.0, 0.5],
        "dampening": [0.0, 0.3],
        "nesterov": [False, True],
        "maximize": [False, True],
    },
    "Adam": {
        "lr": [0.05, 0.0, 0.3],
        "weight_decay": [0.1, 0.0, 0.7],
        "betas": [(0.9, 0.999), (0.0, 0.5), (0.8, 0.99)],
        "eps": [1e-8, 1e-3],
        "amsgrad": [False, True],
        "maximize": [False, True],
    },
}


def settings_of(name: str) -> dict[str, list[Any]]:
    """Return the hyperparameters of a class with the values that are tried."""
    return SETTINGS["SGD" if name == "SGD" else "Adam"]


@dataclass(frozen=True)
class Param:
    """One parameter, its gradient's layout, its group and what decays."""

    shape: tuple[int, ...] = (4, 3)
    dtype: str = "float32"
    layout: str = "contiguous"
    grad: str = "alike"
    multiplier: float = 1.0
    form: str | None = None
    group: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Group:
    """One parameter group; ``joins`` is the round in which it is added."""

    kind: str
    settings: dict[str, Any]
    joins: int = 0


@dataclass(frozen=True)
class Event:
    """A change between two steps; the numbers say to what, as each kind reads them."""

    kind: str
    which: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class Round:
    """What happens before a step, which gradients it lacks, and how it is taken."""

    events: tuple[Event, ...] = ()
    absent: tuple[int, ...] = ()
    way: str = "plain"
    in_place: bool = False


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    name: str
    decoupled: bool
    params: tuple[Param, ...]
    groups: tuple[Group, ...]
    rounds: tuple[Round, ...]
    policy: str = "callable"
    source: str = "pairs"
    values: int = 0
    grad_scale: float = 1.0

    def members(self, group: int) -> list[int]:
        """Number the parameters of a group."""
        return [i for i, param in enumerate(self.params) if param.group == group]


def settled(config: Config) -> Config:
    """Leave out what torch refuses or gets wrong, of which there is no oracle."""
    used = sorted({param.group % len(config.groups) for param in config.params})
    groups = [_settled_group(config.groups[i]) for i in used]
    groups[0] = replace(groups[0], joins=0)
    params = [
        replace(p, group=used.index(p.group % len(config.groups)))
        for p in config.params
    ]
    late = any(group.joins for group in groups)
    source = config.source
    if late or (len(groups) > 1 and source in ("module", "generator")):
        source = "pairs"
    return replace(
        config,
        decoupled=config.decoupled and config.name != "AdamW",
        params=tuple(
            _settled_param(p, config.name, groups[p.group].kind) for p in params
        ),
        groups=tuple(groups),
        source=source,
    )


def _settled_group(group: Group) -> Group:
    settings = dict(group.settings)
    if settings.get("nesterov"):
        settings["momentum"] = settings["momentum"] or 0.9
        settings["dampening"] = 0.0
    return replace(group, settings=settings)


def _settled_param(param: Param, name: str, kind: str) -> Param:
    if param.grad == "sparse":
        possible = name == "SGD" and kind != "fused" and param.shape
        if not possible or param.dtype not in ("float32", "float64"):
            return _settled_param(replace(param, grad="alike"), name, kind)
        return replace(param, multiplier=0.0, layout="contiguous")
    if kind == "fused":
        return _fusable(param, name)
    return param


def _fusable(param: Param, name: str) -> Param:
    """Keep to what torch's fused kernels step right when they are asked for."""
    half = param.dtype in ("bfloat16", "float16")
    if param.torch_dtype.is_complex or (name == "SGD" and half and not HALF_SGD_ON_CPU):
        param = replace(param, dtype="float32")
    layout = "contiguous" if param.layout == "gapped" else param.layout
    return replace(param, layout=layout, grad="alike")
