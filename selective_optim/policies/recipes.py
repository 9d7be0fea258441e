"""Which parameters well-known projects decay, by the project's name.

A recipe's rule gives the reason for which the project exempts a parameter, or ``None``
where it decays. As in the projects, a tied parameter goes by its first name. The
comment above a recipe names its source; where no version stands there, the source is
the project's main branch as read in 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from operator import contains, eq

from torch import nn

from selective_optim import _torch
from selective_optim.decay import EXEMPT, FULL, Answer
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.lists import MARK, Lists, relative_names, unwrapped
from selective_optim.policies.selectors import MODULES, NAMES, SHAPES, Need

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Collected as ultralytics collects them.
TORCH_NORMS = tuple(item for name, item in sorted(vars(nn).items()) if "Norm" in name)
HUGGINGFACE_NAMES = (
    *("bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"),
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

    ``exempts`` gives the reason to exempt a parameter, or ``None`` to decay it, and
    ``listed`` the reason to exempt what the model's own methods list.
    """

    name: str
    known: frozenset[Need] = field(compare=False)
    exempts: Callable[[ParameterInfo], str | None] = field(compare=False)
    listed: Callable[[ParameterInfo, Lists], str | None] | None = field(
        default=None, compare=False
    )
    lists: Lists | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return f"named({self.name!r})"

    @property
    def needs(self) -> frozenset[Need]:
        return self.known

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        return _recipe, (self.name,)

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Answer:
        reason = self.listed and self.listed(info, self.lists or Lists())
        reason = reason or self.exempts(info)
        if reason is None:
            return Answer(FULL, f"{self.name}: decays")
        return Answer(EXEMPT, f"{self.name}: {reason}")


def _recipe(name: str) -> Recipe:
    return RECIPES[name]


# What several projects ask.


def _word(info: ParameterInfo, *words: str) -> str | None:
    found = next((word for word in words if word in (info.name or "")), None)
    return f"name has {found!r}" if found else None


def _dot_bias(info: ParameterInfo) -> str | None:
    return "*.bias" if (info.name or "").endswith(".bias") else None


def _vector(info: ParameterInfo) -> str | None:
    return "ndim == 1" if info.ndim == 1 else None


def _at_most_1d(info: ParameterInfo, told: str = "ndim <= 1") -> str | None:
    return told if info.ndim is not None and info.ndim <= 1 else None


def _held_by(info: ParameterInfo, *classes: type) -> str | None:
    held = isinstance(info.owner, classes)
    return f"held by {type(info.owner).__name__}" if held else None


def _of_root(
    info: ParameterInfo,
    lists: Lists,
    method: str = "no_weight_decay",
    matches: Callable[[str, str], bool] = eq,
) -> str | None:
    return lists.told(unwrapped(info.path)[0], method, info.name, matches)


_of_root_as_globs = partial(_of_root, matches=fnmatchcase)


def _of_root_or_keyword(info: ParameterInfo, lists: Lists) -> str | None:
    by_word = _of_root(info, lists, "no_weight_decay_keywords", contains)
    return _of_root(info, lists) or by_word


def _of_any_module(info: ParameterInfo, lists: Lists) -> str | None:
    for module, name in relative_names(info):
        if told := lists.told(module, "no_weight_decay", name, eq):
            return told
        globs = lists.names(module, "no_weight_decay_patterns")
        words = lists.names(module, "no_weight_decay_keywords")
        for glob in (*globs, *(f"*{word}" for word in words)):
            if fnmatchcase(name, glob):
                return f"listed as {glob!r}"
    return None


# Rules that take more than a line.


def _huggingface(info: ParameterInfo) -> str | None:
    # The root itself is not asked; names are searched in lower case.
    if any(isinstance(module, nn.LayerNorm) for module in unwrapped(info.path)[1:]):
        return "inside LayerNorm"
    name = (info.name or "").lower()
    found = next((p for p in HUGGINGFACE_NAMES if re.search(p, name)), None)
    return f"name has {found!r}" if found else None


def _fastai(info: ParameterInfo) -> str | None:
    norms = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm)
    for module in (module for place in info.places for module in place.path):
        if isinstance(module, norms):
            return f"inside {type(module).__name__}"
        if getattr(module, "bias", None) is info.parameter:
            return f"bias of {type(module).__name__}"
    return None


def _mmengine(info: ParameterInfo) -> str | None:
    if held := _held_by(info, *_torch.NORM_BASES, nn.GroupNorm, nn.LayerNorm):
        return held
    parents = (cls for module in info.path[-2:-1] for cls in type(module).__mro__)
    # By name, since mmcv may be missing where its models are used.
    in_dcn = any(
        cls.__name__ in DCN and cls.__module__.startswith("mmcv.") for cls in parents
    )
    return "bias" if info.leaf == "bias" and not in_dcn else None


def _mingpt(info: ParameterInfo) -> str | None:
    sides = {side for place in info.places for side in _mingpt_sides(place)}
    if len(sides) == 1:
        return sides.pop() or None
    # minGPT itself stops with an assertion or a missing key.
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
    others = (nn.LayerNorm, nn.Embedding)
    held = [type(m).__name__ for m in place.path if isinstance(m, others)]
    return [f"inside {name}" for name in held[:1]]


def _torchvision(info: ParameterInfo) -> str | None:
    others = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)
    return _held_by(info, *_torch.NORM_BASES, *others)


def _torchvision_swin(info: ParameterInfo) -> str | None:
    called = info.leaf in ("bias", *TORCHVISION_EMBEDDINGS)
    return f"called {info.leaf}" if called else _torchvision(info)


def _yolox(info: ParameterInfo) -> str | None:
    # YOLOX never trains what is called neither `weight` nor `bias`; here such
    # parameters are trained and exempt.
    if info.leaf != "weight":
        return "bias" if info.leaf == "bias" else "neither weight nor bias"
    if isinstance(info.owner, nn.BatchNorm2d):
        return "held by BatchNorm2d"
    module = (info.name or "").rpartition(".")[0]
    return "module's name has 'bn'" if "bn" in module else None


def _dinov3(info: ParameterInfo) -> str | None:
    ends = "name ends in 'bias'" if (info.name or "").endswith("bias") else None
    return ends or _word(info, "norm", "gamma", "fourier_w")


def _sam2(info: ParameterInfo) -> str | None:
    norm = "held by LayerNorm" if type(info.owner) is nn.LayerNorm else None
    return _word(info, "bias") or norm


def _rtdetr(info: ParameterInfo) -> str | None:
    return "norm of encoder or decoder" if RTDETR_NORM.search(info.name or "") else None


def _gptneox(info: ParameterInfo) -> str | None:
    owner = type(info.owner).__name__
    if owner in GPTNEOX_NORMS:
        return f"held by {owner}"
    if info.leaf == "bias":
        return "bias"
    return MARK if getattr(info.parameter, MARK, False) else None


def _rwkv(info: ParameterInfo) -> str | None:
    if found := _word(info, "_w1", "_w2"):
        return found
    if _word(info, "time_sta"):
        return None
    if found := _word(info, *RWKV_RATES):
        return found
    matrix = sum(size != 1 for size in info.shape or ()) >= 2
    weight = matrix and _word(info, ".weight")
    return None if weight else "no .weight of two dimensions"


def _olmo(info: ParameterInfo) -> str | None:
    return "embeddings.weight" if info.name == "embeddings.weight" else None


def _smollm3(info: ParameterInfo) -> str | None:
    # nanotron's name and that of transformers; tied names count, too.
    words = ("token_embedding", "embed_tokens")
    found = [word for name in info.names for word in words if word in name]
    return f"name has {found[0]!r}" if found else None


def _qwen3_next(info: ParameterInfo) -> str | None:
    # Megatron's names and those of transformers.
    if _word(info, "q_layernorm.", "k_layernorm.", "q_norm.", "k_norm."):
        return None
    return _vector(info) or _dot_bias(info)


def _dion(info: ParameterInfo) -> str | None:
    held = {"wte", "embedding", "lm_head"}.intersection((info.name or "").split("."))
    return f"in {min(held)}" if held else None


def _marin(info: ParameterInfo) -> str | None:
    # Grug's gate is an array; as a layer its weight is meant.
    name = f".{info.name or ''}".lower().removesuffix(".weight")
    if "router_bias" not in name and (name.endswith(".attn_gate") or ".router" in name):
        return None
    return "neither attn_gate nor router"


ALL = NAMES | MODULES | SHAPES

_RECIPES = (
    # Exempts what is inside an `nn.LayerNorm` or named like a bias or norm.
    # `Trainer.get_decay_parameter_names` in transformers/trainer.py and
    # `get_parameter_names` in trainer_pt_utils.py, version 5.23.0.
    Recipe("huggingface", NAMES | MODULES, _huggingface),
    # Exempts vectors, scalars and `*.bias`, and the model's `no_weight_decay()`.
    # `param_groups_weight_decay` in timm/optim/_param_groups.py, given the model's
    # list as `create_optimizer_v2` in _optim_factory.py gives it, version 1.0.31.
    Recipe("timm", ALL, lambda i: _at_most_1d(i) or _dot_bias(i), _of_root_as_globs),
    # Exempts all inside seven norm classes, and what its owner calls `bias`.
    # `norm_bias_params` in fastai/torch_core.py, as `Learner.create_opt` uses it for
    # `wd_bn_bias=False`, version 2.8.12.
    Recipe("fastai", MODULES, _fastai),
    # Exempts what a norm holds and what is called `bias`, but for that inside a DCN.
    # `DefaultOptimWrapperConstructor.add_params` in
    # mmengine/optim/optimizer/default_constructor.py, version 0.10.7, with
    # `paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0)`.
    Recipe("mmengine", NAMES | MODULES, _mmengine),
    # Exempts what a norm holds; biases decay. `get_default_optimizer_params` in
    # detectron2/solver/build.py, with `WEIGHT_DECAY_NORM = 0.0` and
    # `WEIGHT_DECAY_BIAS = None`, the defaults of detectron2/config/defaults.py.
    Recipe(
        "detectron2",
        MODULES,
        lambda i: _held_by(
            i,
            *(*BATCH_NORMS, *INSTANCE_NORMS, nn.SyncBatchNorm, nn.GroupNorm),
            *(nn.LayerNorm, nn.LocalResponseNorm),
        ),
    ),
    # Exempts what a norm holds, as `--norm-weight-decay 0` does. `set_weight_decay` in
    # references/classification/utils.py, called as in train.py beside it.
    Recipe("torchvision", NAMES | MODULES, _torchvision),
    # Exempts biases and tables of embeddings, too: `--bias-weight-decay 0` and
    # `--transformer-embedding-decay 0`, with which
    # references/classification/README.md trains Swin and MaxViT.
    Recipe("torchvision_swin", NAMES | MODULES, _torchvision_swin),
    # Exempts names with `bias` or `logit_scale` and what torch's norms hold.
    # `BaseTrainer.build_optimizer` in ultralytics/engine/trainer.py, version
    # 8.4.190, for every optimizer but MuSGD.
    Recipe(
        "ultralytics",
        NAMES | MODULES,
        lambda i: _word(i, "bias", "logit_scale") or _held_by(i, *TORCH_NORMS),
    ),
    # Decays what is called `weight`, but for BatchNorm2d and modules named bn.
    # `Exp.get_optimizer` in yolox/exp/yolox_base.py.
    Recipe("yolox", NAMES | MODULES, _yolox),
    # Exempts norms of encoder and decoder, by name; biases and the backbone decay. The
    # backbone's own rate, 1e-5, is a group's.
    # rtdetrv2_pytorch/configs/rtdetrv2/rtdetrv2_r50vd_6x_coco.yml, read by
    # `get_optim_params` in src/core/yaml_config.py.
    Recipe("rtdetr", NAMES, _rtdetr),
    # Exempts names with bias and what an `nn.LayerNorm`, no subclass, holds; rates per
    # layer are those of `layerwise_groups`. `weight_decay` in
    # sam2.1_hiera_b+_MOSE_finetune.yaml, applied by training/optimizer.py.
    Recipe("sam2", NAMES | MODULES, _sam2),
    # Exempts vectors, `*.bias` and what the model lists; scalars decay.
    # `set_weight_decay` in Swin-Transformer's optimizer.py, with the model's
    # `no_weight_decay()` and `no_weight_decay_keywords()`.
    Recipe("swin", ALL, lambda i: _vector(i) or _dot_bias(i), _of_root_or_keyword),
    # Exempts vectors, `*.bias` and the model's `no_weight_decay()`; scalars decay.
    # `get_parameter_groups` in ConvNeXt's optim_factory.py; BEiT's is the same. Rates
    # per layer are those of `layerwise_groups`.
    Recipe("convnext", ALL, lambda i: _vector(i) or _dot_bias(i), _of_root),
    # Exempts vectors and the model's `no_weight_decay()`; other biases decay. The rates
    # of MAE's fine-tuning, 0.75 per layer, are those of
    # `layerwise_groups(model, lr, 0.75, lr_scale=True)`.
    # `param_groups_lrd` in MAE's util/lr_decay.py.
    Recipe("mae", ALL, _vector, _of_root),
    # Exempts `*.bias` and names that contain `norm` or `gamma`.
    # `get_params_groups_with_decay` in dinov2/utils/param_groups.py.
    Recipe("dinov2", NAMES, lambda i: _word(i, "norm", "gamma") or _dot_bias(i)),
    # Exempts names that end in bias or have norm, gamma or fourier_w; neither the rates
    # per layer, nor that of `patch_embed`, nor the strength of the DINO head, 1 by
    # default. `get_params_groups_with_decay` in dinov3/train/param_groups.py.
    Recipe("dinov3", NAMES, _dinov3),
    # Exempts vectors, scalars and what any module of the model lists: names of
    # `no_weight_decay()`, globs of `no_weight_decay_patterns()`, and
    # `no_weight_decay_keywords()` as ends of names. `make_wd_exclude` and
    # `collect_no_weight_decay` in src/open_clip_train/optim.py.
    Recipe("open_clip", ALL, _at_most_1d, _of_any_module),
    # Exempts vectors, scalars and names with bn, ln, bias or logit_scale.
    # `main` in src/open_clip_train/main.py, version 3.3.0.
    Recipe(
        "open_clip_2025",
        NAMES | SHAPES,
        lambda i: (
            _at_most_1d(i, "ndim < 2") or _word(i, "bn", "ln", "bias", "logit_scale")
        ),
    ),
    # Exempts vectors and scalars; embeddings decay.
    # `GPT.configure_optimizers` in nanoGPT's model.py.
    Recipe("nanogpt", SHAPES, lambda i: _at_most_1d(i, "ndim < 2")),
    # Decays weights of `Linear`; exempts biases, layer norms and embeddings.
    # `GPT.configure_optimizers` in mingpt/model.py.
    Recipe("mingpt", NAMES | MODULES, _mingpt),
    # Exempts vectors and `*.bias`; embeddings and scalars decay.
    # `get_standard_config_overrides` in megatron/core/optimizer/__init__.py, without
    # `apply_wd_to_qk_layernorm`.
    Recipe("megatron", NAMES | SHAPES, lambda i: _vector(i) or _dot_bias(i)),
    # Exempts what seven norm classes hold, `bias` and `_no_weight_decay`.
    # `get_params_for_weight_decay_optimization` in megatron/model/utils.py of GPT-NeoX.
    Recipe("gptneox", NAMES | MODULES, _gptneox),
    # Decays `.weight` of two dimensions, those of one left out, and states; with
    # `layerwise_lr` 1, the default, rates of 2 and 3 times are not set.
    # `RWKV.configure_optimizers` in RWKV-v5/src/model.py.
    Recipe("rwkv", NAMES | SHAPES, _rwkv),
    # Exempts the embedding; norms and biases decay.
    # `OptimGroupOverride(params=["embeddings.weight"], ...)` in
    # src/scripts/train/OLMo2 and OLMo3 of OLMo-core.
    Recipe("olmo", NAMES, _olmo),
    # Exempts the embedding, also where it is the output layer; norms and biases decay.
    # `weight_decay_exclude_named_params` in text/pretraining/smollm3/stage1_8T.yaml of
    # smollm, read by `get_custom_weight_decay_for_named_parameters` in
    # src/nanotron/helpers.py.
    Recipe("smollm3", NAMES, _smollm3),
    # Exempts vectors and `*.bias` but for norms of queries and keys.
    # `get_standard_config_overrides` in megatron/core/optimizer/__init__.py with
    # `apply_wd_to_qk_layernorm`, called there the way of Qwen3-Next.
    Recipe("qwen3_next", NAMES | SHAPES, _qwen3_next),
    # Exempts nothing. `weight_decay` of both optimizers in
    # torchtitan/models/kimi_k2_7/config_registry.py.
    Recipe("kimi", frozenset(), lambda i: None),
    # Exempts embedding and output layer; vectors decay. `create_optimizer` in dion's
    # train.py and the example of its README.md.
    Recipe("dion", NAMES, _dion),
    # Decays gates of attention and routers alone, in the run from 0.02 to 0.
    # `_gate_router_decay_mask` in experiments/grug/moe_hero_ep/optimizer.py of marin.
    Recipe("marin", NAMES, _marin),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
