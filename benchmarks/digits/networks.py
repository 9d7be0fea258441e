"""Two small networks for images of 8 x 8, and their parameters sorted by hand."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm2d, nn.LayerNorm)
GAIN, BIAS, WEIGHT = "norm gain", "bias", "weight"


class ConvNet(nn.Module):
    """Three convolutions with batch norm, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(
                nn.Conv2d(1, 32, 3, padding=1, bias=False),
                nn.BatchNorm2d(32),
                nn.ReLU(),
            ),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)),
            *(nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)),
            *(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(64 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Transformer(nn.Module):
    """Three pre-norm layers over sixteen patches of 2 x 2, and a linear head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layer = partial(
            nn.TransformerEncoderLayer,
            width,
            4,
            2 * width,
            dropout=0.0,
            norm_first=True,
        )
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(layer(batch_first=True) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.layers(tokens)).mean(1))


NETWORKS: dict[str, type[nn.Module]] = {"conv net": ConvNet, "transformer": Transformer}


def build(network: str, seed: int, device: torch.device | str = "cpu") -> nn.Module:
    """Build a network with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return NETWORKS[network]().to(device)


def kinds(model: nn.Module) -> dict[str, list[Tensor]]:
    """Sort parameters into norm gains, biases and weights, as one does by hand."""
    sorted_: dict[str, list[Tensor]] = {GAIN: [], BIAS: [], WEIGHT: []}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            gain = GAIN if isinstance(module, NORMS) else WEIGHT
            sorted_[BIAS if name.endswith("bias") else gain].append(param)
    return sorted_
