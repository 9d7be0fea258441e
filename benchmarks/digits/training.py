"""Training on scikit-learn's handwritten digits, the same bits in every run.

The training loop can begin at any step, because a batch depends on the seed and the
step alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR

BATCH = 64
WARM_UP = 20  # steps


class Data(NamedTuple):
    """Images (n x 1 x 8 x 8, from 0 to 1) and labels, to train on and held out."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // BATCH


def load(device: torch.device | str = "cpu") -> Data:
    """Load the digits bundled with scikit-learn; every fifth image is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(digits.target, device=device)
    held_out = torch.arange(len(labels), device=device) % 5 == 4
    images = images.unsqueeze(1)
    return Data(
        images[~held_out], labels[~held_out], images[held_out], labels[held_out]
    )


def batch(data: Data, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a step, which depends on the seed and the step alone."""
    epoch, position = divmod(step, data.steps_per_epoch)
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(data.images), generator=generator)
    chosen = order[position * BATCH : (position + 1) * BATCH].to(data.images.device)
    return data.images[chosen], data.labels[chosen]


def rate(step: int, total: int) -> float:
    """Warm up linearly, then fall to zero as a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / total))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    epochs: int,
    on_step: Callable[[int], object] = lambda step: None,
    *,
    seed: int = 0,
    first_step: int = 0,
) -> None:
    """Train in place, from the beginning or from where a checkpoint was saved.

    Args:
        model: The network.
        optimizer: Its optimizer, loaded from the checkpoint if ``first_step > 0``.
        data: What to train on.
        epochs: Epochs in all, those before ``first_step`` included.
        on_step: Called after every step with the number of steps taken so far.
        seed: Decides the order of the images.
        first_step: Steps that the checkpoint has already taken.
    """
    total = epochs * data.steps_per_epoch
    factor = partial(rate, total=total)
    scheduler = LambdaLR(optimizer, factor, last_epoch=first_step - 1)
    model.train()
    for step in range(first_step, total):
        images, labels = batch(data, seed, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
        on_step(step + 1)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of held-out images that the network reads right."""
    model.eval()
    read = model(data.held_out_images).argmax(1)
    return (read == data.held_out_labels).float().mean().item()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copy all parameters, buffers and optimizer state, by name."""
    tensors = dict(model.state_dict())
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            tensors[f"{name}: {key}"] = value
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Name the tensors of two snapshots that differ in a bit, or stand in only one."""
    names = dict.fromkeys([*first, *second])
    return [n for n in names if not _same_bits(first.get(n), second.get(n))]


def _same_bits(first: Tensor | None, second: Tensor | None) -> bool:
    """Compare dtype, shape and bytes: NaN equals itself, and -0 does not equal 0."""
    if first is None or second is None:
        return False
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(*(t.flatten().view(torch.uint8) for t in (first, second)))


@contextmanager
def reproducible() -> Iterator[None]:
    """Make torch compute the same bits every time, on the CPU and on a GPU."""
    # cuBLAS reads this when it starts; without it two runs may differ in the last bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    # Sums depend on the number of threads, and images of 8 x 8 do not occupy a second.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
