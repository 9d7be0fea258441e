"""Which parameters well-known projects decay, by the project's name.

One function per project, with its source, gives the reason for which the project
exempts a parameter, or ``None`` where it decays. As in the projects, a tied
parameter goes by its first name.
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
from selective_optim.policies.no_weight_decay import (
    MARK,
    Lists,
    of_any_module,
    of_root,
    of_root_by_name,
    of_root_or_keyword,
    unwrapped,
)
from selective_optim.policies.selectors import Need

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Collected as ultralytics collects them.
TORCH_NORMS = tuple(item for name, item in sorted(vars(nn).items()) if "Norm" in name)
HUGGINGFACE_NAMES = tuple(
    map(
        re.compile,
        ("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
    )
)
DCN = frozenset({"DeformConv2d", "ModulatedDeformConv2d"})
TORCHVISION_EMBEDDINGS = frozenset(
    {"class_token", "position_embedding", "relative_position_bias_table"}
)
RTDETR_NORM = re.compile(r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$")
GPTNEOX_NORMS = frozenset(
    (
        *("LayerNorm", "RMSNorm", "ScaleNorm", "TELayerNorm", "TERMSNorm"),
        *("MixedFusedLayerNorm", "MixedFusedRMSNorm"),
    )
)
RWKV_RATES = (
    *("time_mix", "time_maa", "time_decay", "time_daaaa", "att.w0", "time_faaaa"),
    "time_first",
)


@dataclass(frozen=True, repr=False)
class Recipe(Policy):
    """Another project's rule.

    Args:
        exempts: Gives the reason to exempt a parameter, or ``None`` to decay it; it
            bears the name of the project.
        known: What must be known of a parameter to decide.
        listed: Gives the reason to exempt what the model's own methods list.
        lists: What the modules list, each asked once.
    """

    exempts: Callable[[ParameterInfo], str | None]
    known: frozenset[Need]
    listed: Callable[[ParameterInfo, Lists], str | None] | None = None
    lists: Lists | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The project."""
        return self.exempts.__name__

    def __repr__(self) -> str:
        return f"named({self.name!r})"

    @property
    def needs(self) -> frozenset[Need]:
        return self.known

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Verdict:
        reason = self.listed and self.listed(info, self.lists or Lists())
        reason = reason or self.exempts(info)
        if reason is None:
            return Verdict(FULL, f"{self.name}: decays")
        return Verdict(EXEMPT, f"{self.name}: {reason}")


# What several projects ask.


def _word(info: ParameterInfo, *words: str) -> str | None:
    """Tell which of some words the name of a parameter has."""
    found = next((word for word in words if word in (info.name or "")), None)
    return f"name has {found!r}" if found else None


def _dot_bias(info: ParameterInfo) -> str | None:
    return "*.bias" if (info.name or "").endswith(".bias") else None


def _vector(info: ParameterInfo) -> str | None:
    return "ndim == 1" if info.ndim == 1 else None


def _held_by(info: ParameterInfo, *classes: type) -> str | None:
    held = isinstance(info.owner, classes)
    return f"held by {type(info.owner).__name__}" if held else None


# The projects.


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
    if held := _held_by(info, *_torch.NORM_BASES, nn.GroupNorm, nn.LayerNorm):
        return held
    parents = info.path[-2:-1]
    return "bias" if info.leaf == "bias" and not any(map(_is_dcn, parents)) else None


def _is_dcn(module: nn.Module) -> bool:
    # By name, since mmcv may be missing where its models are used.
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
    return _held_by(info, *BATCH_NORMS, *INSTANCE_NORMS, *others)


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
    return _vector(info) or _dot_bias(info)


def dinov2(info: ParameterInfo) -> str | None:
    """Exempt ``*.bias`` and names that contain ``norm`` or ``gamma``.

    Source:
        ``get_params_groups_with_decay`` in ``dinov2/utils/param_groups.py``,
        as read in 2026.
    """
    return _word(info, "norm", "gamma") or _dot_bias(info)


def torchvision(
    info: ParameterInfo, bias: bool = False, embedding: bool = False
) -> str | None:
    """Exempt what a norm holds, as with ``--norm-weight-decay 0``.

    Args:
        info: The parameter.
        bias: Exempt what is called ``bias``, too, as with ``--bias-weight-decay 0``.
        embedding: Exempt what is called ``class_token``, ``position_embedding`` or
            ``relative_position_bias_table``, too, as with
            ``--transformer-embedding-decay 0``.

    Source:
        ``set_weight_decay`` in ``references/classification/utils.py``, called as in
        ``train.py`` beside it, as read in 2026.
    """
    if (bias and info.leaf == "bias") or (
        embedding and info.leaf in TORCHVISION_EMBEDDINGS
    ):
        return f"called {info.leaf}"
    others = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
    return _held_by(info, *_torch.NORM_BASES, *others)


def torchvision_swin(info: ParameterInfo) -> str | None:
    """Exempt norms, biases and tables of embeddings, as its Swin and MaxViT do.

    Source:
        As :func:`torchvision`, with all three arguments 0, which is how
        ``references/classification/README.md`` trains Swin and MaxViT.
    """
    return torchvision(info, bias=True, embedding=True)


def ultralytics(info: ParameterInfo) -> str | None:
    """Exempt names with ``bias`` or ``logit_scale`` and what torch's norms hold.

    Source:
        ``BaseTrainer.build_optimizer`` in ``ultralytics/engine/trainer.py``,
        version 8.4.190, for every optimizer but MuSGD.
    """
    return _word(info, "bias", "logit_scale") or _held_by(info, *TORCH_NORMS)


def yolox(info: ParameterInfo) -> str | None:
    """Decay what is called ``weight``, but for BatchNorm2d and modules named bn.

    YOLOX never trains what is called neither ``weight`` nor ``bias``; here such
    parameters are trained and exempt.

    Source:
        ``Exp.get_optimizer`` in ``yolox/exp/yolox_base.py``, as read in 2026.
    """
    if info.leaf != "weight":
        return "bias" if info.leaf == "bias" else "neither weight nor bias"
    if isinstance(info.owner, nn.BatchNorm2d):
        return "held by BatchNorm2d"
    module = (info.name or "").rpartition(".")[0]
    return "module's name has 'bn'" if "bn" in module else None


def open_clip(info: ParameterInfo) -> str | None:
    """Exempt vectors, scalars and what any module of the model lists.

    Source:
        ``make_wd_exclude`` and ``collect_no_weight_decay`` in
        ``src/open_clip_train/optim.py``, as read in 2026: names of
        ``no_weight_decay()``, globs of ``no_weight_decay_patterns()``, and
        ``no_weight_decay_keywords()`` as ends of names.
    """
    return "ndim <= 1" if info.ndim is not None and info.ndim <= 1 else None


def open_clip_2025(info: ParameterInfo) -> str | None:
    """Exempt vectors, scalars and names with bn, ln, bias or logit_scale.

    Source:
        ``main`` in ``src/open_clip_train/main.py``, version 3.3.0.
    """
    if info.ndim is not None and info.ndim < 2:
        return "ndim < 2"
    return _word(info, "bn", "ln", "bias", "logit_scale")


def swin(info: ParameterInfo) -> str | None:
    """Exempt vectors, ``*.bias`` and what the model lists; scalars decay.

    Source:
        ``set_weight_decay`` in Swin-Transformer's ``optimizer.py``, as read in 2026,
        with the model's ``no_weight_decay()`` and ``no_weight_decay_keywords()``.
    """
    return _vector(info) or _dot_bias(info)


def convnext(info: ParameterInfo) -> str | None:
    """Exempt vectors, ``*.bias`` and the model's ``no_weight_decay()``; scalars decay.

    Source:
        ``get_parameter_groups`` in ConvNeXt's ``optim_factory.py``, as read in 2026.
        BEiT's is the same. Rates per layer: ``layerwise_groups``.
    """
    return _vector(info) or _dot_bias(info)


def mae(info: ParameterInfo) -> str | None:
    """Exempt vectors and the model's ``no_weight_decay()``; other biases decay.

    The part of MAE's fine-tuning that decays; its rates, 0.75 per layer, are those
    of ``layerwise_groups(model, lr, 0.75, lr_scale=True)``.

    Source:
        ``param_groups_lrd`` in MAE's ``util/lr_decay.py``, as read in 2026.
    """
    return _vector(info)


def dinov3(info: ParameterInfo) -> str | None:
    """Exempt names that end in bias or have norm, gamma or fourier_w.

    The part that decays: neither the rates per layer, nor the rate of
    ``patch_embed``, nor the strength of the DINO head, which is 1 by default.

    Source:
        ``get_params_groups_with_decay`` in ``dinov3/train/param_groups.py``, as
        read in 2026.
    """
    ends = "name ends in 'bias'" if (info.name or "").endswith("bias") else None
    return ends or _word(info, "norm", "gamma", "fourier_w")


def sam2(info: ParameterInfo) -> str | None:
    """Exempt names with bias and what an ``nn.LayerNorm``, no subclass, holds.

    The part that decays: its rates per layer are those of ``layerwise_groups``.

    Source:
        ``weight_decay`` in ``sam2.1_hiera_b+_MOSE_finetune.yaml``, applied by
        ``training/optimizer.py``, as read in 2026.
    """
    norm = "held by LayerNorm" if type(info.owner) is nn.LayerNorm else None
    return _word(info, "bias") or norm


def rtdetr(info: ParameterInfo) -> str | None:
    """Exempt norms of encoder and decoder, by name; biases and the backbone decay.

    The part that decays: the backbone's own rate, 1e-5, is a group's.

    Source:
        ``rtdetrv2_pytorch/configs/rtdetrv2/rtdetrv2_r50vd_6x_coco.yml``, read by
        ``get_optim_params`` in ``src/core/yaml_config.py``, as read in 2026.
    """
    found = RTDETR_NORM.search(info.name or "")
    return "norm of encoder or decoder" if found else None


def gptneox(info: ParameterInfo) -> str | None:
    """Exempt what seven norm classes hold, ``bias`` and ``_no_weight_decay``.

    Source:
        ``get_params_for_weight_decay_optimization`` in
        ``megatron/model/utils.py``, as read in 2026.
    """
    owner = type(info.owner).__name__
    if owner in GPTNEOX_NORMS:
        return f"held by {owner}"
    if info.leaf == "bias":
        return "bias"
    return MARK if getattr(info.parameter, MARK, False) else None


def rwkv(info: ParameterInfo) -> str | None:
    """Decay ``.weight`` of two dimensions, those of one left out, and states.

    The part that decays, as with ``layerwise_lr`` 1, its default: the rates of 2 and
    3 times are not set.

    Source:
        ``RWKV.configure_optimizers`` in ``RWKV-v5/src/model.py``, as read in 2026.
    """
    if found := _word(info, "_w1", "_w2"):
        return found
    if _word(info, "time_sta"):
        return None
    if found := _word(info, *RWKV_RATES):
        return found
    matrix = sum(size != 1 for size in info.shape or ()) >= 2
    weight = matrix and _word(info, ".weight")
    return None if weight else "no .weight of two dimensions"


def olmo(info: ParameterInfo) -> str | None:
    """Exempt the embedding; norms and biases decay.

    Source:
        ``OptimGroupOverride(params=["embeddings.weight"], ...)`` in
        ``src/scripts/train/OLMo2`` and ``OLMo3`` of OLMo-core, as read in 2026.
    """
    return "embeddings.weight" if info.name == "embeddings.weight" else None


NAMES: frozenset[Need] = frozenset({"names"})
MODULES: frozenset[Need] = frozenset({"modules"})
SHAPES: frozenset[Need] = frozenset({"shapes"})
ALL = NAMES | MODULES | SHAPES

RECIPES: dict[str, Policy] = {
    recipe.name: recipe
    for recipe in (
        Recipe(huggingface, NAMES | MODULES),
        Recipe(timm, ALL, of_root),
        Recipe(fastai, MODULES),
        Recipe(mmengine, NAMES | MODULES),
        Recipe(detectron2, MODULES),
        Recipe(torchvision, NAMES | MODULES),
        Recipe(torchvision_swin, NAMES | MODULES),
        Recipe(ultralytics, NAMES | MODULES),
        Recipe(yolox, NAMES | MODULES),
        Recipe(rtdetr, NAMES),
        Recipe(sam2, NAMES | MODULES),
        Recipe(swin, ALL, of_root_or_keyword),
        Recipe(convnext, ALL, of_root_by_name),
        Recipe(mae, ALL, of_root_by_name),
        Recipe(dinov2, NAMES),
        Recipe(dinov3, NAMES),
        Recipe(open_clip, ALL, of_any_module),
        Recipe(open_clip_2025, NAMES | SHAPES),
        Recipe(nanogpt, SHAPES),
        Recipe(mingpt, NAMES | MODULES),
        Recipe(megatron, NAMES | SHAPES),
        Recipe(gptneox, NAMES | MODULES),
        Recipe(rwkv, NAMES | SHAPES),
        Recipe(olmo, NAMES),
    )
}
