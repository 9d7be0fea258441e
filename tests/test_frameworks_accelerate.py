"""Accelerate on one process: accumulation, clipping, schedules, saved state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from selective_optim import AdamW
from selective_optim.schedules import WeightDecay
from tests.support.compare import assert_same
from tests.support.framework_cases import (
    batches,
    hand_split,
)

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.integration

SETTINGS = {"lr": 1e-2, "weight_decay": 0.04}
DATA = batches(8, 8, 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def selective(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW(model.parameters(), **SETTINGS, wd_policy="no_bias_norm")


def by_hand(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(hand_split(model), **SETTINGS, fused=True)


def prepared(make: Any) -> tuple[Any, ...]:
    """Return an accelerator with all that it prepared."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = make(model)
    schedules = [
        lr_scheduler.CosineAnnealingLR(WeightDecay(optimizer), 4, eta_min=0.4),
        lr_scheduler.ExponentialLR(optimizer, 0.9),
    ]
    loader = DataLoader(DATA, batch_size=None)
    return accelerator, accelerator.prepare(model, optimizer, loader, *schedules)


def train(accelerator: Any, parts: Any, first: int, last: int) -> None:
    model, optimizer, loader, *schedules = parts
    for inputs, labels in list(loader)[first:last]:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for schedule in schedules:
                schedule.step()
            optimizer.zero_grad()


def test_accelerate_with_one_group_has_the_bits_of_two():
    ours, torchs = prepared(selective), prepared(by_hand)
    train(*ours, 0, 8)
    train(*torchs, 0, 8)
    assert_same(ours[1][0], torchs[1][0])
    decays = [group["weight_decay"] for group in torchs[1][1].param_groups]
    assert decays == [0.4, 0.0]
    assert [group["weight_decay"] for group in ours[1][1].param_groups] == [0.4]


def test_prepared_schedule_of_decay_belongs_to_the_prepared_optimizer():
    """Accelerate looks for it, to hold a schedule back when a step was skipped."""
    _, (_, optimizer, _, decay, _) = prepared(selective)
    assert decay.optimizers == [optimizer]
    assert WeightDecay(optimizer) == decay.scheduler.optimizer


def test_accelerate_resumes_from_its_saved_state_bit_for_bit(tmp_path: Path):
    straight, resumed = prepared(selective), prepared(selective)
    train(*straight, 0, 4)
    straight[0].save_state(str(tmp_path))
    train(*straight, 4, 8)
    resumed[0].load_state(str(tmp_path))
    train(*resumed, 4, 8)
    assert_same(resumed[1][0], straight[1][0])
    assert_same(
        resumed[1][1].state_dict()["state"], straight[1][1].state_dict()["state"]
    )
