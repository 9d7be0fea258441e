"""What others decay: well-known projects, by name, and authors who marked their models.

As in the projects, a tied parameter goes by its first name. The comment above a recipe
names its source: the project's main branch as read in 2026 where it has no version.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from numbers import Real
from operator import contains, eq
from typing import Any, TypeVar

from torch import Tensor, nn

from selective_optim import _torch
from selective_optim._text import received
from selective_optim.decay import EXEMPT, FULL, Answer, Decay, number_text
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.selectors import MODULES, NAMES, SHAPES, Need, Policy

MARK = "_no_weight_decay"
# S4 and what follows it write a parameter's own settings there.
SETTINGS = "_optim"
Matches = Callable[[str, str], bool]  # of a name with what a list has
MARKERS: dict[str, Matches] = {
    "no_weight_decay": fnmatchcase,
    "no_weight_decay_patterns": fnmatchcase,
    "no_weight_decay_keywords": contains,
}
Target = TypeVar("Target", nn.Module, Tensor)


def _unwrapped(path: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    while len(path) > 1 and _key(path[0], path[1]) in _torch.WRAPPERS:
        path = path[1:]
    return path


def _key(parent: nn.Module, child: nn.Module) -> str | None:
    return next((k for k, module in parent.named_children() if module is child), None)


def _relative_names(place: ParameterInfo) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module above a parameter with the parameter's name as seen from it."""
    parts, size = (place.name or "").split("."), 1
    for i in range(len(place.path) - 1, -1, -1):
        yield place.path[i], ".".join(parts[-size:])
        # A wrapper's own name is no part of the canonical one.
        if i and _key(place.path[i - 1], place.path[i]) not in _torch.WRAPPERS:
            size += 1


def _listed(module: nn.Module, method: str) -> list[str]:
    # Not where a wrapper passes attributes on: names would be under the wrong root.
    if not hasattr(type(module), method) and method not in vars(module):
        return []
    names: Any = getattr(module, method)
    return list(map(_torch.canonical_name, names() if callable(names) else names))


Lists = Callable[[nn.Module, str], list[str]]


def _listing(
    lists: Lists, module: nn.Module, name: str, methods: Mapping[str, Matches]
) -> str | None:
    """Say which method of a module lists a name, and as what."""
    for method, matches in methods.items():
        for entry in lists(module, method):
            if matches(name, entry):
                return f"{method}() lists {entry!r}"
    return None


def exempt_(target: Target) -> Target:
    """Mark a parameter, or every parameter of a module, as exempt for ``marked``.

    It sets ``_no_weight_decay = True`` on the parameters, as Mamba does. It also marks
    the module, so that the mark stays if a wrapper makes new parameters.

    Args:
        target: Marked in place.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is neither a parameter nor a module.

    Example:
        >>> layer = exempt_(nn.Linear(2, 2))
        >>> layer.weight._no_weight_decay
        True
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(
            f"`exempt_` takes a module or a parameter, not {target!r} "
            f"({type(target).__name__}). Write for example exempt_(model.head)."
        )
    setattr(target, MARK, True)
    if isinstance(target, nn.Module):
        for param in target.parameters():
            setattr(param, MARK, True)
    return target


@dataclass(frozen=True, repr=False)
class Marked(Policy):
    """Exempts what the model's author marked; see :func:`marked`."""

    weight_decay: float | None = None
    lists: Lists = field(default=_listed, compare=False)
    needs = NAMES | MODULES

    def __repr__(self) -> str:
        wd = self.weight_decay
        return "marked()" if wd is None else f"marked(weight_decay={wd!r})"

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=cache(_listed))  # each module is asked once

    def decide(self, info: ParameterInfo) -> Answer:
        if getattr(info.parameter, MARK, False):
            return Answer(EXEMPT, MARK)
        for place in info.places:
            for module, name in _relative_names(place):
                owner = type(module).__name__
                # Not getattr: wrappers answer for the module inside.
                if vars(module).get(MARK) is True:
                    return Answer(EXEMPT, f"{MARK} of {owner}")
                if listing := _listing(self.lists, module, name, MARKERS):
                    return Answer(EXEMPT, f"{owner}.{listing}")
        settings = getattr(info.parameter, SETTINGS, None)
        wd = settings.get("weight_decay") if isinstance(settings, Mapping) else None
        return Answer(FULL, "not marked") if wd is None else self._scaled_to(float(wd))

    def _scaled_to(self, wd: float) -> Answer:
        reason = f"{SETTINGS} has weight_decay {number_text(wd)}"
        if wd == 0:
            return Answer(EXEMPT, reason)
        if not self.weight_decay:
            raise ValueError(
                f"its {reason}, which scales the optimizer's own, and that is not "
                f"known. Write marked(weight_decay=...) with the optimizer's."
            )
        return Answer(Decay(wd / self.weight_decay), reason)


def marked(weight_decay: float | None = None) -> Policy:
    """Exempt what the model's author marked, and decay the rest.

    A parameter is marked if one of these holds:

    - Its attribute ``_no_weight_decay`` is true.
    - ``no_weight_decay()`` or ``no_weight_decay_patterns()`` of a module above it
      returns its name, or a glob that matches it, as seen from that module.
    - Its name contains one of such a module's ``no_weight_decay_keywords()``.
    - Its attribute ``_optim`` is ``{"weight_decay": 0}``.

    Modules inside DDP, FSDP and ``torch.compile`` wrappers are asked too.

    Args:
        weight_decay: The optimizer's decay, above 0. Pass it if an ``_optim`` states
            another decay than 0: 0.05 there decays half as much if this is 0.1.
            Without it the policy raises for such a parameter.

    Raises:
        TypeError: ``weight_decay`` is not a number.
        ValueError: ``weight_decay`` is 0, negative, infinite or NaN.

    Example:
        >>> marked() * marked(weight_decay=0.1)
        marked() * marked(weight_decay=0.1)
    """
    if weight_decay is not None and not isinstance(weight_decay, Real):
        raise TypeError(
            f"`weight_decay` must be a number, not {received(weight_decay)}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    if weight_decay is not None and not 0 < float(weight_decay) < math.inf:
        raise ValueError(
            f"`weight_decay` must be finite and > 0, not {weight_decay}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    return Marked(weight_decay)


Ask = Callable[[ParameterInfo], str | None]
AskLists = Callable[[ParameterInfo, Lists], str | None]


@dataclass(frozen=True, repr=False)
class Recipe(Policy):
    """Another project's rule: exempt is what a question gives a reason for."""

    name: str
    needs: frozenset[Need] = field(compare=False)
    exempts: tuple[Ask, ...] = field(compare=False)
    # Asked first: what the model's own methods list.
    listed: AskLists = field(default=lambda info, lists: None, compare=False)
    lists: Lists = field(default=_listed, compare=False)

    def __repr__(self) -> str:
        return f"named({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Recipe], tuple[str]]:
        return _recipe, (self.name,)

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=cache(_listed))

    def decide(self, info: ParameterInfo) -> Answer:
        reason = self.listed(info, self.lists)
        for ask in self.exempts:
            reason = reason or ask(info)
        if reason is None:
            return Answer(FULL, f"{self.name}: decays")
        return Answer(EXEMPT, f"{self.name}: {reason}")


def _recipe(name: str) -> Recipe:
    return RECIPES[name]


def _when(reason: str, holds: Callable[[ParameterInfo], object]) -> Ask:
    return lambda info: reason if holds(info) else None


def _words(*words: str, tied: bool = False) -> Ask:
    def ask(info: ParameterInfo) -> str | None:
        names = info.names if tied else (info.name or "",)
        word = next((word for name in names for word in words if word in name), None)
        return f"name has {word!r}" if word else None

    return ask


def _held_by(*classes: type) -> Ask:
    def ask(info: ParameterInfo) -> str | None:
        inside = isinstance(info.owner, classes)
        return f"held by {type(info.owner).__name__}" if inside else None

    return ask


def _of_root(**methods: Matches) -> AskLists:
    def ask(info: ParameterInfo, lists: Lists) -> str | None:
        return _listing(lists, _unwrapped(info.path)[0], info.name or "", methods)

    return ask


def _of_any_module(info: ParameterInfo, lists: Lists) -> str | None:
    for module, name in _relative_names(info):
        if listing := _listing(lists, module, name, {"no_weight_decay": eq}):
            return listing
        globs = [*lists(module, "no_weight_decay_patterns")]
        globs += [f"*{word}" for word in lists(module, "no_weight_decay_keywords")]
        for glob in globs:
            if fnmatchcase(name, glob):
                return f"listed as {glob!r}"
    return None


_dot_bias = _when("*.bias", lambda info: (info.name or "").endswith(".bias"))
_ends_in_bias = _when(
    "name ends in 'bias'", lambda info: (info.name or "").endswith("bias")
)
_vector = _when("ndim == 1", lambda info: info.ndim == 1)
_at_most_1d = _when("ndim <= 1", lambda info: info.ndim in (0, 1))
_below_2d = _when("ndim < 2", lambda info: info.ndim in (0, 1))
_listed_by_root = _of_root(no_weight_decay=eq)
_listed_by_swin = _of_root(no_weight_decay=eq, no_weight_decay_keywords=contains)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
FASTAI_NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm)
MORE_OF_DETECTRON2 = (nn.SyncBatchNorm, nn.GroupNorm, nn.LocalResponseNorm)
NORMS = (*_torch.NORM_BASES, nn.LayerNorm, nn.GroupNorm)
GPTNEOX_NORMS = {"LayerNorm", "RMSNorm", "ScaleNorm", "TELayerNorm", "TERMSNorm"}
GPTNEOX_NORMS |= {"MixedFusedLayerNorm", "MixedFusedRMSNorm"}
RTDETR_NORM = re.compile(r"^(?=.*(?:encoder|decoder))(?=.*(?:norm|bn)).*$")
# Collected as ultralytics collects them.
_torchs_norm = _held_by(*(v for k, v in sorted(vars(nn).items()) if "Norm" in k))
_torchvision = _held_by(*NORMS, nn.LocalResponseNorm)
_detectron2 = _held_by(*FASTAI_NORMS, *MORE_OF_DETECTRON2)
_plain_layernorm = _when(
    "held by LayerNorm", lambda info: type(info.owner) is nn.LayerNorm
)
_rtdetr = _when(
    "norm of encoder or decoder", lambda info: RTDETR_NORM.search(info.name or "")
)
_olmo = _when("embeddings.weight", lambda info: info.name == "embeddings.weight")
_open_clip = _words("bn", "ln", "bias", "logit_scale")
_rwkv_rate = _words(
    *("_w1", "_w2", "time_mix", "time_maa", "time_decay", "time_daaaa", "att.w0"),
    *("time_faaaa", "time_first"),
)
# nanotron's name and that of transformers; tied names count, too.
_smollm3 = _words("token_embedding", "embed_tokens", tied=True)
# Megatron's names and those of transformers.
_query_or_key = _words("q_layernorm.", "k_layernorm.", "q_norm.", "k_norm.")


def _huggingface(info: ParameterInfo) -> str | None:
    # The root itself is not asked; names are searched in lower case.
    if any(isinstance(module, nn.LayerNorm) for module in _unwrapped(info.path)[1:]):
        return "inside LayerNorm"
    name = (info.name or "").lower()
    norms = ("layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
    word = next((word for word in ("bias", *norms) if re.search(word, name)), None)
    return f"name has {word!r}" if word else None


def _fastai(info: ParameterInfo) -> str | None:
    for place in info.places:
        for module in place.path:
            if isinstance(module, FASTAI_NORMS):
                return f"inside {type(module).__name__}"
            if getattr(module, "bias", None) is info.parameter:
                return f"bias of {type(module).__name__}"
    return None


def _mmengine(info: ParameterInfo) -> str | None:
    # By name, since mmcv may be missing where its models are used.
    bases = [base for module in info.path[-2:-1] for base in type(module).__mro__]
    of_mmcv = {b.__name__ for b in bases if b.__module__.startswith("mmcv.")}
    inside = of_mmcv & {"DeformConv2d", "ModulatedDeformConv2d"}
    return "bias" if info.leaf == "bias" and not inside else None


def _mingpt(info: ParameterInfo) -> str | None:
    sides = set()  # what to exempt it for, "" to decay it
    for place in info.places:
        leaf = place.leaf or ""
        exempt = [m for m in place.path if isinstance(m, nn.LayerNorm | nn.Embedding)]
        if leaf.endswith("bias"):
            sides.add("bias")
        elif not leaf.endswith("weight"):
            continue
        elif any(isinstance(module, nn.Linear) for module in place.path):
            sides.add("")
        elif exempt:
            sides.add(f"inside {type(exempt[0]).__name__}")
    if len(sides) == 1:
        return sides.pop() or None
    # minGPT itself stops with an assertion or a missing key.
    raise ValueError(
        f"minGPT's rule places {info.name!r}, held by {type(info.owner).__name__}, "
        f"{'in two ways' if sides else 'nowhere'}; it knows biases and the weights of "
        f'Linear, LayerNorm and Embedding. Use wd_policy="no_bias_norm_embedding".'
    )


def _torchvision_swin(info: ParameterInfo) -> str | None:
    tables = ("class_token", "position_embedding", "relative_position_bias_table")
    return f"called {info.leaf}" if info.leaf in ("bias", *tables) else None


def _yolox(info: ParameterInfo) -> str | None:
    # YOLOX never trains what is called neither `weight` nor `bias`; here such
    # parameters are trained and exempt.
    if info.leaf != "weight":
        return "bias" if info.leaf == "bias" else "neither weight nor bias"
    if isinstance(info.owner, nn.BatchNorm2d):
        return "held by BatchNorm2d"
    module = (info.name or "").rpartition(".")[0]
    return "module's name has 'bn'" if "bn" in module else None


def _gptneox(info: ParameterInfo) -> str | None:
    owner = type(info.owner).__name__
    if owner in GPTNEOX_NORMS:
        return f"held by {owner}"
    if info.leaf == "bias":
        return "bias"
    return MARK if getattr(info.parameter, MARK, False) else None


def _rwkv(info: ParameterInfo) -> str | None:
    name = info.name or ""
    if "time_sta" in name and "_w1" not in name and "_w2" not in name:
        return None
    if reason := _rwkv_rate(info):
        return reason
    matrix = sum(size != 1 for size in info.shape or ()) >= 2
    return None if matrix and ".weight" in name else "no .weight of two dimensions"


def _qwen3_next(info: ParameterInfo) -> str | None:
    return None if _query_or_key(info) else _vector(info) or _dot_bias(info)


def _dion(info: ParameterInfo) -> str | None:
    parts = {"wte", "embedding", "lm_head"}.intersection((info.name or "").split("."))
    return f"in {min(parts)}" if parts else None


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
    Recipe("huggingface", NAMES | MODULES, (_huggingface,)),
    # Exempts vectors, scalars and `*.bias`, and the model's `no_weight_decay()`.
    # `param_groups_weight_decay` in timm/optim/_param_groups.py, given the model's
    # list as `create_optimizer_v2` in _optim_factory.py gives it, version 1.0.31.
    Recipe(
        "timm", ALL, (_at_most_1d, _dot_bias), _of_root(no_weight_decay=fnmatchcase)
    ),
    # Exempts parameters of seven norm classes, and attributes called `bias`.
    # `norm_bias_params` in fastai/torch_core.py, as `Learner.create_opt` uses it for
    # `wd_bn_bias=False`, version 2.8.12.
    Recipe("fastai", MODULES, (_fastai,)),
    # Exempts parameters of norms and attributes called `bias`, except inside a DCN.
    # `DefaultOptimWrapperConstructor.add_params` in
    # mmengine/optim/optimizer/default_constructor.py, version 0.10.7, with
    # `paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0)`.
    Recipe("mmengine", NAMES | MODULES, (_held_by(*NORMS), _mmengine)),
    # Exempts parameters of norms; biases decay. `get_default_optimizer_params` in
    # detectron2/solver/build.py, with `WEIGHT_DECAY_NORM = 0.0` and
    # `WEIGHT_DECAY_BIAS = None`, the defaults of detectron2/config/defaults.py.
    Recipe("detectron2", MODULES, (_detectron2,)),
    # Exempts parameters of norms, as `--norm-weight-decay 0` does. `set_weight_decay`
    # in references/classification/utils.py, called as in train.py beside it.
    Recipe("torchvision", NAMES | MODULES, (_torchvision,)),
    # Exempts norms, biases and tables of embeddings. `--bias-weight-decay 0` and
    # `--transformer-embedding-decay 0`, with which
    # references/classification/README.md trains Swin and MaxViT.
    Recipe("torchvision_swin", NAMES | MODULES, (_torchvision_swin, _torchvision)),
    # Exempts names with `bias` or `logit_scale` and parameters of torch's norms.
    # `BaseTrainer.build_optimizer` in ultralytics/engine/trainer.py, version
    # 8.4.190, for every optimizer but MuSGD.
    Recipe(
        "ultralytics", NAMES | MODULES, (_words("bias", "logit_scale"), _torchs_norm)
    ),
    # Decays attributes called `weight`, except in BatchNorm2d and modules named bn.
    # `Exp.get_optimizer` in yolox/exp/yolox_base.py.
    Recipe("yolox", NAMES | MODULES, (_yolox,)),
    # Exempts norms of encoder and decoder, by name; biases and the backbone decay. The
    # backbone's own rate, 1e-5, is a group's.
    # rtdetrv2_pytorch/configs/rtdetrv2/rtdetrv2_r50vd_6x_coco.yml, read by
    # `get_optim_params` in src/core/yaml_config.py.
    Recipe("rtdetr", NAMES, (_rtdetr,)),
    # Exempts names with bias and parameters of `nn.LayerNorm`, not of subclasses. Rates
    # per layer are those of `layerwise_groups`. `weight_decay` in
    # sam2.1_hiera_b+_MOSE_finetune.yaml, applied by training/optimizer.py.
    Recipe("sam2", NAMES | MODULES, (_words("bias"), _plain_layernorm)),
    # Exempts vectors, `*.bias` and names that the model lists; scalars decay.
    # `set_weight_decay` in Swin-Transformer's optimizer.py, with the model's
    # `no_weight_decay()` and `no_weight_decay_keywords()`.
    Recipe("swin", ALL, (_vector, _dot_bias), _listed_by_swin),
    # Exempts vectors, `*.bias` and the model's `no_weight_decay()`; scalars decay.
    # `get_parameter_groups` in ConvNeXt's optim_factory.py; BEiT's is the same. Rates
    # per layer are those of `layerwise_groups`.
    Recipe("convnext", ALL, (_vector, _dot_bias), _listed_by_root),
    # Exempts vectors and the model's `no_weight_decay()`; other biases decay. The rates
    # of MAE's fine-tuning, 0.75 per layer, are those of
    # `layerwise_groups(model, lr, 0.75, lr_scale=True)`.
    # `param_groups_lrd` in MAE's util/lr_decay.py.
    Recipe("mae", ALL, (_vector,), _listed_by_root),
    # Exempts `*.bias` and names that contain `norm` or `gamma`.
    # `get_params_groups_with_decay` in dinov2/utils/param_groups.py.
    Recipe("dinov2", NAMES, (_words("norm", "gamma"), _dot_bias)),
    # Exempts names that end in bias or contain norm, gamma or fourier_w. It has neither
    # rates per layer and of `patch_embed` nor the factor of the DINO head, 1 by
    # default. `get_params_groups_with_decay` in dinov3/train/param_groups.py.
    Recipe("dinov3", NAMES, (_ends_in_bias, _words("norm", "gamma", "fourier_w"))),
    # Exempts vectors, scalars and what modules of the model list. These are names of
    # `no_weight_decay()`, globs of `no_weight_decay_patterns()`, and
    # `no_weight_decay_keywords()` as ends of names. `make_wd_exclude` and
    # `collect_no_weight_decay` in src/open_clip_train/optim.py.
    Recipe("open_clip", ALL, (_at_most_1d,), _of_any_module),
    # Exempts vectors, scalars and names with bn, ln, bias or logit_scale.
    # `main` in src/open_clip_train/main.py, version 3.3.0.
    Recipe("open_clip_2025", NAMES | SHAPES, (_below_2d, _open_clip)),
    # Exempts vectors and scalars; embeddings decay.
    # `GPT.configure_optimizers` in nanoGPT's model.py.
    Recipe("nanogpt", SHAPES, (_below_2d,)),
    # Decays weights of `Linear`; exempts biases, layer norms and embeddings.
    # `GPT.configure_optimizers` in mingpt/model.py.
    Recipe("mingpt", NAMES | MODULES, (_mingpt,)),
    # Exempts vectors and `*.bias`; embeddings and scalars decay.
    # `get_standard_config_overrides` in megatron/core/optimizer/__init__.py, without
    # `apply_wd_to_qk_layernorm`.
    Recipe("megatron", NAMES | SHAPES, (_vector, _dot_bias)),
    # Exempts seven norm classes, `bias`, and parameters marked `_no_weight_decay`.
    # `get_params_for_weight_decay_optimization` in megatron/model/utils.py of GPT-NeoX.
    Recipe("gptneox", NAMES | MODULES, (_gptneox,)),
    # Decays `.weight` with two dimensions above 1, and states. Rates of 2 and 3 times,
    # as with `layerwise_lr` 1, the default, are not set.
    # `RWKV.configure_optimizers` in RWKV-v5/src/model.py.
    Recipe("rwkv", NAMES | SHAPES, (_rwkv,)),
    # Exempts the embedding; norms and biases decay.
    # `OptimGroupOverride(params=["embeddings.weight"], ...)` in
    # src/scripts/train/OLMo2 and OLMo3 of OLMo-core.
    Recipe("olmo", NAMES, (_olmo,)),
    # Exempts the embedding, also where it is the output layer; norms and biases decay.
    # `weight_decay_exclude_named_params` in text/pretraining/smollm3/stage1_8T.yaml of
    # smollm, read by `get_custom_weight_decay_for_named_parameters` in
    # src/nanotron/helpers.py.
    Recipe("smollm3", NAMES, (_smollm3,)),
    # Exempts vectors and `*.bias`, except norms of queries and keys.
    # `get_standard_config_overrides` in megatron/core/optimizer/__init__.py with
    # `apply_wd_to_qk_layernorm`, called there the way of Qwen3-Next.
    Recipe("qwen3_next", NAMES | SHAPES, (_qwen3_next,)),
    # Exempts nothing. `weight_decay` of both optimizers in
    # torchtitan/models/kimi_k2_7/config_registry.py.
    Recipe("kimi", frozenset(), ()),
    # Exempts embedding and output layer; vectors decay. `create_optimizer` in dion's
    # train.py and the example of its README.md.
    Recipe("dion", NAMES, (_dion,)),
    # Decays only gates of attention and routers. The run goes from 0.02 to 0.
    # `_gate_router_decay_mask` in experiments/grug/moe_hero_ep/optimizer.py of marin.
    Recipe("marin", NAMES, (_marin,)),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
