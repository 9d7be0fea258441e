"""The networks a step is measured on, as shapes: no model is built or imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch

Shape = tuple[int, ...]
Layer = tuple[Shape, ...]

LAYERS = 26  # what layerwise learning rates make of ViT-L: 24 blocks, stem and head


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    ``groups`` are the user's parameter groups, before anybody splits them by decay.
    ``own_lr`` gives each its own learning rate. ``large`` cases, and others that are
    of interest on a GPU, run on a CPU only when they are asked for. ``busy`` ones run
    on a CPU alone, beside as many busy processes as there are cores, as where data is
    loaded or another training runs.
    ``dtype`` is that of the parameters; with ``tensor_lr`` rates are tensors on the
    device; ``scaled`` steps are told what a ``GradScaler`` hands over.
    """

    name: str
    title: str
    groups: tuple[Layer, ...]
    own_lr: bool = False
    sharded: bool = False
    large: bool = False
    busy: bool = False
    dtype: torch.dtype = torch.float32
    tensor_lr: bool = False
    scaled: bool = False

    @property
    def shapes(self) -> list[Shape]:
        return list(chain.from_iterable(self.groups))

    @property
    def elements(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def compiles(self) -> bool:
        """Tell whether torch.compile is done with torch's step within minutes."""
        return not self.sharded and not self.busy and len(self.groups) <= LAYERS

    def lr_of(self, group: int, base: float) -> float:
        return base * (1 - group / (2 * len(self.groups))) if self.own_lr else base


def tiny(count: int = 1000) -> Layer:
    return tuple((4,) if index % 2 else (4, 4) for index in range(count))


def small(count: int = 1000) -> Layer:
    """Return tensors of 64 elements, the fewest that torch parts among threads."""
    return tuple((64,) if index % 2 else (8, 8) for index in range(count))


def _norm(width: int) -> Layer:
    return ((width,), (width,))


def _bottleneck(inputs: int, width: int, first: bool) -> Layer:
    outputs = 4 * width
    shortcut = ((outputs, inputs, 1, 1), *_norm(outputs)) if first else ()
    return (
        (width, inputs, 1, 1),
        *_norm(width),
        (width, width, 3, 3),
        *_norm(width),
        (outputs, width, 1, 1),
        *_norm(outputs),
        *shortcut,
    )


def resnet50() -> Layer:
    shapes: list[Shape] = [(64, 3, 7, 7), *_norm(64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _bottleneck(inputs, width, first=block == 0)
            inputs = 4 * width
    return (*shapes, (1000, 2048), (1000,))


def vit(width: int, blocks: int) -> list[Layer]:
    """Return the stem, the attention and the MLP of each block, and the head."""
    stem = ((1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,))
    wide = 4 * width
    attention = (
        *_norm(width), (3 * width, width), (3 * width,), (width, width), (width,),
    )  # fmt: skip
    mlp = (*_norm(width), (wide, width), (wide,), (width, wide), (width,))
    head = (*_norm(width), (1000, width), (1000,))
    return [stem, *([attention, mlp] * blocks), head]


def decoder(
    width: int = 2048, blocks: int = 16, wide: int = 8192, words: int = 128256
) -> Layer:
    """Return a language model with grouped queries and tied embeddings."""
    keys = width // 4
    block = (
        (width, width), (keys, width), (keys, width), (width, width),
        (wide, width), (wide, width), (width, wide), (width,), (width,),
    )  # fmt: skip
    return ((words, width), *(block * blocks), (width,))


def _joined(layers: Iterable[Layer]) -> Layer:
    return tuple(chain.from_iterable(layers))


def _whole_blocks(halves: Sequence[Layer]) -> list[Layer]:
    stem, *inner, head = halves
    pairs = zip(inner[::2], inner[1::2], strict=True)
    return [stem, *map(_joined, pairs), head]


def _pieces(shapes: Layer, count: int) -> list[Layer]:
    size = len(shapes)
    return [shapes[i * size // count : (i + 1) * size // count] for i in range(count)]


def _singles(shapes: Layer) -> tuple[Layer, ...]:
    return tuple((shape,) for shape in shapes)


VIT_S, VIT_L = vit(384, 12), vit(1024, 24)

CASES = (
    Case("tiny", "1,000 tiny tensors", (tiny(),)),
    Case("small", "1,000 small tensors", (small(),)),
    Case("small_busy", "1,000 small, busy machine", (small(),), busy=True),
    Case("resnet50", "ResNet-50", (resnet50(),)),
    Case("vit_s", "ViT-S/16", (_joined(VIT_S),)),
    # Twelve blocks make 14 layers; their halves make the 26 of the large model.
    Case("vit_s_layers", "ViT-S/16, 26 layerwise rates", tuple(VIT_S), own_lr=True),
    Case("vit_l", "ViT-L/16", (_joined(VIT_L),), large=True),
    Case(
        "vit_l_layers",
        "ViT-L/16, 26 layerwise rates",
        tuple(_whole_blocks(VIT_L)),
        own_lr=True,
        large=True,
    ),
    Case(
        "vit_l_bf16",
        "ViT-L/16 in bfloat16",
        (_joined(VIT_L),),
        large=True,
        dtype=torch.bfloat16,
    ),
    Case("decoder", "decoder, 1.2 billion", (decoder(),), large=True),
    Case(
        "tiny_layers",
        "1,000 tiny, 26 layerwise rates",
        tuple(_pieces(tiny(), LAYERS)),
        own_lr=True,
    ),
    Case(
        "tiny_layers_tensors",
        "1,000 tiny, 26 rates in tensors",
        tuple(_pieces(tiny(), LAYERS)),
        own_lr=True,
        large=True,
        tensor_lr=True,
    ),
    Case("tiny_scaled", "1,000 tiny, GradScaler", (tiny(),), large=True, scaled=True),
    Case("tiny_groups", "1,000 groups, one setting", _singles(tiny())),
    Case(
        "tiny_groups_lr",
        "1,000 groups, a rate each",
        _singles(tiny()),
        own_lr=True,
    ),
    Case("dtensor", "1,000 tiny DTensors", (tiny(),), sharded=True),
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
