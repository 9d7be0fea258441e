"""Which parameters well-known projects decay, by the project's name.

Each recipe is a function that gives the reason for which the project exempts a
parameter, or ``None`` where it decays, and names the source it reproduces. As in
the projects, a tied parameter goes by its first name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from selective_optim import _torch
from selective_optim.decay import EXEMPT, FULL, Verdict
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.markers import Lists, listing, unwrapped
from selective_optim.policies.selectors import Need

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
HUGGINGFACE_NAMES = tuple(
    map(
        re.compile,
        ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
    )
)
DCN = frozenset({"DeformConv2d", "ModulatedDeformConv2d"})


@dataclass(frozen=True, repr=False)
class Recipe(Policy):
    """Another project's rule.

    Args:
        name: The project.
        exempts: Gives the reason to exempt a parameter, or ``None`` to decay it.
        known: What must be known of a parameter to decide.
    """

    name: str
    exempts: Callable[[ParameterInfo], str | None]
    known: frozenset[Need]

    def __repr__(self) -> str:
        return f"named({self.name!r})"

    @property
    def needs(self) -> frozenset[Need]:
        return self.known

    def decide(self, info: ParameterInfo) -> Verdict:
        reason = self.exempts(info)
        if reason is None:
            return Verdict(FULL, f"{self.name}: decays")
        return Verdict(EXEMPT, f"{self.name}: {reason}")


@dataclass(frozen=True, repr=False)
class RootListRecipe(Recipe):
    """A recipe that also exempts what the model's own ``no_weight_decay()`` lists."""

    lists: Lists | None = field(default=None, compare=False)

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Verdict:
        root = unwrapped(info.path)[0]
        patterns = (self.lists or Lists()).names(root, "no_weight_decay")
        if listed := listing(info.name or "", patterns):
            return Verdict(EXEMPT, f"{self.name}: no_weight_decay() lists {listed!r}")
        return super().decide(info)


def huggingface(info: ParameterInfo) -> str | None:
    """Exempt what is inside an ``nn.LayerNorm`` or named like a bias or norm.

    Source:
        ``Trainer.get_decay_parameter_names`` in ``transformers/trainer.py`` and
        ``get_parameter_names`` in ``trainer_pt_utils.py``, version 5.23.0. The
        root itself is not asked; names are searched in lower case.
    """
    if any(isinstance(module, nn.LayerNorm) for module in unwrapped(info.path)[1:]):
        return "inside LayerNorm"
    name = (info.name or "").lower()
    found = next((p.pattern for p in HUGGINGFACE_NAMES if p.search(name)), None)
    return f"name has {found!r}" if found else None


def timm(info: ParameterInfo) -> str | None:
    """Exempt vectors, scalars and ``*.bias``, and the model's ``no_weight_decay()``.

    Source:
        ``param_groups_weight_decay`` in ``timm/optim/_param_groups.py``, given
        the model's list as ``create_optimizer_v2`` in ``_optim_factory.py``
        gives it, version 1.0.31.
    """
    if info.ndim is not None and info.ndim <= 1:
        return "ndim <= 1"
    return _dot_bias(info)


def _dot_bias(info: ParameterInfo) -> str | None:
    return "*.bias" if (info.name or "").endswith(".bias") else None


def fastai(info: ParameterInfo) -> str | None:
    """Exempt all inside seven norm classes, and what its owner calls ``bias``.

    Source:
        ``norm_bias_params`` in ``fastai/torch_core.py``, as ``Learner.create_opt``
        uses it for ``wd_bn_bias=False``, version 2.8.12.
    """
    norms = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm)
    for module in (module for place in info.places for module in place.path):
        if isinstance(module, norms):
            return f"inside {type(module).__name__}"
        if getattr(module, "bias", None) is info.parameter:
            return f"bias of {type(module).__name__}"
    return None


def mmengine(info: ParameterInfo) -> str | None:
    """Exempt what a norm holds and what is called ``bias``, but for that inside a DCN.

    Source:
        ``DefaultOptimWrapperConstructor.add_params`` in
        ``mmengine/optim/optimizer/default_constructor.py``, version 0.10.7, with
        ``paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0)``.
    """
    if isinstance(info.owner, (*_torch.NORM_BASES, nn.GroupNorm, nn.LayerNorm)):
        return f"held by {type(info.owner).__name__}"
    parents = info.path[-2:-1]
    return "bias" if info.leaf == "bias" and not any(map(_is_dcn, parents)) else None


def _is_dcn(module: nn.Module) -> bool:
    return any(
        cls.__name__ in DCN and cls.__module__.startswith("mmcv.")
        for cls in type(module).__mro__
    )


def detectron2(info: ParameterInfo) -> str | None:
    """Exempt what a norm holds; biases decay.

    Source:
        ``get_default_optimizer_params`` in ``detectron2/solver/build.py``, as read
        in 2026, with the defaults ``WEIGHT_DECAY_NORM = 0.0``, ``WEIGHT_DECAY_BIAS =
        None`` of ``detectron2/config/defaults.py``.
    """
    others = (nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
    norm = isinstance(info.owner, (*BATCH_NORMS, *INSTANCE_NORMS, *others))
    return f"held by {type(info.owner).__name__}" if norm else None


def nanogpt(info: ParameterInfo) -> str | None:
    """Exempt vectors and scalars; embeddings decay.

    Source:
        ``GPT.configure_optimizers`` in nanoGPT's ``model.py``, as read in 2026.
    """
    return "ndim < 2" if info.ndim is not None and info.ndim < 2 else None


def mingpt(info: ParameterInfo) -> str | None:
    """Decay weights of ``Linear``; exempt biases, layer norms and embeddings.

    Raises:
        ValueError: The rule places a parameter nowhere, or twice, where minGPT
            stops with an assertion or a missing key.

    Source:
        ``GPT.configure_optimizers`` in ``mingpt/model.py``, as read in 2026.
    """
    sides = {side for place in info.places for side in _mingpt_sides(place)}
    if len(sides) == 1:
        return sides.pop() or None
    owner = "no module" if info.owner is None else type(info.owner).__name__
    how = "in two ways" if sides else "nowhere"
    raise ValueError(
        f"minGPT's rule places {info.name!r}, held by {owner}, {how}; it knows biases "
        f"and the weights of Linear, LayerNorm and Embedding. "
        f'Use wd_policy="no_bias_norm_embedding".'
    )


def _mingpt_sides(place: ParameterInfo) -> Iterable[str]:
    """Yield the reason to exempt one place of a parameter, or ``""`` to decay it."""
    if (place.leaf or "").endswith("bias"):
        return ["bias"]
    if not (place.leaf or "").endswith("weight"):
        return []
    if any(isinstance(module, nn.Linear) for module in place.path):
        return [""]
    norms = (nn.LayerNorm, nn.Embedding)
    return [f"inside {type(m).__name__}" for m in place.path if isinstance(m, norms)][
        :1
    ]


def megatron(info: ParameterInfo) -> str | None:
    """Exempt vectors and ``*.bias``; embeddings and scalars decay.

    Source:
        ``get_standard_config_overrides`` in ``megatron/core/optimizer/__init__.py``,
        as read in 2026, without ``apply_wd_to_qk_layernorm``.
    """
    return "ndim == 1" if info.ndim == 1 else _dot_bias(info)


def dinov2(info: ParameterInfo) -> str | None:
    """Exempt ``*.bias`` and names that contain ``norm`` or ``gamma``.

    Source:
        ``get_params_groups_with_decay`` in ``dinov2/utils/param_groups.py``,
        as read in 2026.
    """
    found = next(
        (word for word in ("norm", "gamma") if word in (info.name or "")), None
    )
    return f"name has {found!r}" if found else _dot_bias(info)


NAMES: frozenset[Need] = frozenset({"names"})
MODULES: frozenset[Need] = frozenset({"modules"})
SHAPES: frozenset[Need] = frozenset({"shapes"})

RECIPES: dict[str, Policy] = {
    "huggingface": Recipe("huggingface", huggingface, NAMES | MODULES),
    "timm": RootListRecipe("timm", timm, NAMES | MODULES | SHAPES),
    "fastai": Recipe("fastai", fastai, MODULES),
    "mmengine": Recipe("mmengine", mmengine, NAMES | MODULES),
    "detectron2": Recipe("detectron2", detectron2, MODULES),
    "nanogpt": Recipe("nanogpt", nanogpt, SHAPES),
    "mingpt": Recipe("mingpt", mingpt, NAMES | MODULES),
    "megatron": Recipe("megatron", megatron, NAMES | SHAPES),
    "dinov2": Recipe("dinov2", dinov2, NAMES),
}
