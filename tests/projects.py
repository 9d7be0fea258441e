"""What installed projects decay, by their own code.

torchvision's rule stands in a script that is not installed, and is restated.
"""

import warnings
from importlib.util import find_spec
from types import SimpleNamespace

from torch import nn

from selective_optim.parameters import ModuleIndex
from selective_optim.policies import named

NORMS = (
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
    *(nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm),
)


def names_of(model: nn.Module, ids: set[int]) -> set[str]:
    """Name the trained parameters among some: projects leave frozen ones out."""
    return {n for n, p in model.named_parameters() if p.requires_grad and id(p) in ids}


def decayed_by(model: nn.Module, recipe: str, infos=None) -> set[str]:
    infos = infos or ModuleIndex(model).everyone()
    policy = named(recipe).bind(infos)
    return names_of(model, {id(i.parameter) for i in infos if policy(i).multiplier})


def decayed_in(groups: list[dict]) -> set[int]:
    return {id(p) for group in groups if group["weight_decay"] for p in group["params"]}


def by_transformers(model):
    from transformers import Trainer

    names = set(Trainer.get_decay_parameter_names(None, model))
    return names_of(model, {id(p) for n, p in model.named_parameters() if n in names})


def by_timm(model):
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.1)
    return names_of(model, decayed_in(optimizer.param_groups))


def by_fastai(model):
    from fastai.torch_core import norm_bias_params

    exempt = {id(param) for param in norm_bias_params(model, with_bias=True)}
    return names_of(model, {id(p) for p in model.parameters()} - exempt)


def by_mmengine(model):
    from mmengine.optim import DefaultOptimWrapperConstructor

    constructor = DefaultOptimWrapperConstructor(
        {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}},
        {"norm_decay_mult": 0, "bias_decay_mult": 0, "bypass_duplicate": False},
    )
    groups: list[dict] = []
    constructor.add_params(groups, model)
    decay: dict[int, float] = {}
    for group in groups:  # of a tied parameter's places the first counts
        decay.setdefault(id(group["params"][0]), group.get("weight_decay", 0.1))
    return names_of(model, {param for param, wd in decay.items() if wd})


def by_ultralytics(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ultralytics.engine.trainer import BaseTrainer

    trainer = SimpleNamespace(args=SimpleNamespace(), data={})
    groups = BaseTrainer.build_optimizer(trainer, model, "SGD", decay=0.1).param_groups
    return names_of(model, decayed_in(groups))


def by_torchvision(model, keys=()):
    """Restate ``set_weight_decay`` with a norm decay of 0 and keys of 0."""
    decayed, seen = set(), set()
    for module in model.modules():
        for leaf, param in module.named_parameters(recurse=False):
            exempt = leaf in keys or isinstance(module, NORMS)
            if param not in seen and not exempt:
                decayed.add(id(param))
            seen.add(param)
    return names_of(model, decayed)


def by_torchvision_swin(model):
    keys = ("bias", "class_token", "position_embedding")
    return by_torchvision(model, (*keys, "relative_position_bias_table"))


PROJECTS = {
    "huggingface": ("transformers", by_transformers),
    "timm": ("timm", by_timm),
    "fastai": ("fastai", by_fastai),
    "mmengine": ("mmengine", by_mmengine),
    "ultralytics": ("ultralytics", by_ultralytics),
    "torchvision": ("torchvision", by_torchvision),
    "torchvision_swin": ("torchvision", by_torchvision_swin),
}


def installed():
    """List the recipes whose project is installed here."""
    return [recipe for recipe, (package, _) in PROJECTS.items() if find_spec(package)]
