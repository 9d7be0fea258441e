"""Lightning: ``configure_optimizers``, the monitor, checkpoints, two schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from selective_optim import AdamW
from selective_optim.schedules import WeightDecay
from tests.support.compare import assert_same
from tests.support.framework_cases import (
    batches,
    hand_split,
)

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")
loggers = pytest.importorskip("lightning.pytorch.loggers")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

SETTINGS = {"lr": 1e-2, "weight_decay": 0.04}


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)


class Selective(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), **SETTINGS, wd_policy="no_bias_norm")
        rate = lr_scheduler.ExponentialLR(optimizer, 0.9)
        decay = lr_scheduler.CosineAnnealingLR(WeightDecay(optimizer), 8, eta_min=0.4)
        return [optimizer], [
            {"scheduler": rate, "interval": "step", "name": "rate"},
            {"scheduler": decay, "interval": "step", "name": "decay"},
        ]


class HandSplit(Classifier):
    """Two groups, and both schedules written out by hand."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(hand_split(self), **SETTINGS, fused=True)

    def on_train_batch_start(self, *_: Any) -> None:
        rate, decay = HISTORY[self.trainer.global_step]
        decayed, exempt = self.optimizers().param_groups
        decayed["lr"] = exempt["lr"] = rate
        decayed["weight_decay"] = decay


def history() -> list[tuple[float, float]]:
    """List rate and decay as schedulers of the rate alone give them."""
    param = nn.Parameter(torch.zeros(1))
    rate, decay = (torch.optim.SGD([param], lr=lr) for lr in SETTINGS.values())
    schedules = [
        lr_scheduler.ExponentialLR(rate, 0.9),
        lr_scheduler.CosineAnnealingLR(decay, 8, eta_min=0.4),
    ]
    values = []
    for _ in range(8):
        values.append((rate.param_groups[0]["lr"], decay.param_groups[0]["lr"]))
        for optimizer, schedule in zip((rate, decay), schedules):
            optimizer.step()
            schedule.step()
    return values


HISTORY = history()


class Recorder(loggers.CSVLogger):
    """Keeps in memory what is logged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append(metrics)

    def save(self) -> None:
        """Write nothing."""


def trainer(folder: Path, epochs: int, **arguments: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, "enable_checkpointing": False, **arguments},
    )


def loader() -> Any:
    """Give four batches, so that eight steps are two epochs."""
    return DataLoader(batches(4, 8, 4), batch_size=None)


def test_lightning_runs_both_schedules_as_by_hand(tmp_path):
    ours, torchs = Selective(), HandSplit()
    training = trainer(tmp_path, 2)
    training.fit(ours, loader())
    trainer(tmp_path, 2).fit(torchs, loader())
    assert len(training.optimizers[0].param_groups) == 1
    assert_same(ours, torchs)


def test_monitor_logs_rate_and_decay(tmp_path):
    recorder = Recorder(tmp_path)
    monitor = callbacks.LearningRateMonitor(log_momentum=True)
    model = Selective()
    training = trainer(tmp_path, 2, logger=recorder, callbacks=[monitor])
    training.fit(model, loader())
    logged = [(seen["rate"], seen["decay"]) for seen in recorder.seen]
    assert logged == HISTORY


def test_lightning_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    straight, begun, resumed = Selective(), Selective(), Selective()
    whole, first, second = (trainer(tmp_path, epochs) for epochs in (2, 1, 2))
    whole.fit(straight, loader())
    first.fit(begun, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second.fit(resumed, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert_same(resumed, straight)
    assert_same(
        second.optimizers[0].state_dict()["state"],
        whole.optimizers[0].state_dict()["state"],
    )
    decays = [t.optimizers[0].param_groups[0]["weight_decay"] for t in (whole, second)]
    assert decays == [0.4, 0.4]
