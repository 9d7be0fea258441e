"""Which parameters well-known projects decay, by the project's name.

The rules themselves, one function per project with its source, stand in
``recipe_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from selective_optim.decay import EXEMPT, FULL, Verdict
from selective_optim.parameters import ParameterInfo
from selective_optim.policies import recipe_rules as rules
from selective_optim.policies.base import Policy
from selective_optim.policies.markers import Lists
from selective_optim.policies.selectors import Need


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
class ListRecipe(Recipe):
    """A recipe that also exempts what the model's own methods list.

    Args:
        listed: Gives the reason to exempt what is listed, or ``None``.
        lists: What the modules list, each asked once.
    """

    listed: Callable[[ParameterInfo, Lists], str | None] = rules.of_root
    lists: Lists | None = field(default=None, compare=False)

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Verdict:
        if listed := self.listed(info, self.lists or Lists()):
            return Verdict(EXEMPT, f"{self.name}: {listed}")
        return super().decide(info)


NAMES: frozenset[Need] = frozenset({"names"})
MODULES: frozenset[Need] = frozenset({"modules"})
SHAPES: frozenset[Need] = frozenset({"shapes"})
ALL = NAMES | MODULES | SHAPES

RECIPES: dict[str, Policy] = {
    "huggingface": Recipe("huggingface", rules.huggingface, NAMES | MODULES),
    "timm": ListRecipe("timm", rules.timm, ALL),
    "fastai": Recipe("fastai", rules.fastai, MODULES),
    "mmengine": Recipe("mmengine", rules.mmengine, NAMES | MODULES),
    "detectron2": Recipe("detectron2", rules.detectron2, MODULES),
    "torchvision": Recipe("torchvision", rules.torchvision, NAMES | MODULES),
    "torchvision_swin": Recipe(
        "torchvision_swin", rules.torchvision_swin, NAMES | MODULES
    ),
    "ultralytics": Recipe("ultralytics", rules.ultralytics, NAMES | MODULES),
    "yolox": Recipe("yolox", rules.yolox, NAMES | MODULES),
    "rtdetr": Recipe("rtdetr", rules.rtdetr, NAMES),
    "sam2": Recipe("sam2", rules.sam2, NAMES | MODULES),
    "swin": ListRecipe("swin", rules.swin, ALL, rules.of_root_or_keyword),
    "convnext": ListRecipe("convnext", rules.convnext, ALL, rules.of_root_by_name),
    "mae": ListRecipe("mae", rules.mae, ALL, rules.of_root_by_name),
    "dinov2": Recipe("dinov2", rules.dinov2, NAMES),
    "dinov3": Recipe("dinov3", rules.dinov3, NAMES),
    "open_clip": ListRecipe("open_clip", rules.open_clip, ALL, rules.of_any_module),
    "open_clip_2025": Recipe("open_clip_2025", rules.open_clip_2025, NAMES | SHAPES),
    "nanogpt": Recipe("nanogpt", rules.nanogpt, SHAPES),
    "mingpt": Recipe("mingpt", rules.mingpt, NAMES | MODULES),
    "megatron": Recipe("megatron", rules.megatron, NAMES | SHAPES),
    "gptneox": Recipe("gptneox", rules.gptneox, NAMES | MODULES),
    "rwkv": Recipe("rwkv", rules.rwkv, NAMES | SHAPES),
    "olmo": Recipe("olmo", rules.olmo, NAMES),
}
