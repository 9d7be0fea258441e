"""What frameworks ask an optimizer before they clip, skip, freeze and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from selective_optim import AdamW
from tests.support.compare import assert_same
from tests.support.framework_cases import batches, hand_split

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Precision .* is not supported"),
    pytest.mark.filterwarnings("ignore:.*checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen"),
]
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
DATA = batches(4, 8, 4)


def selective(model: nn.Module, **choice: Any) -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    return AdamW(params, **SETTINGS, wd_policy="no_bias_norm", model=model, **choice)


def torchs(model: nn.Module) -> torch.optim.Optimizer:
    """Groups split by hand, fused, and unscaled from outside as torch's default is."""
    optimizer = torch.optim.AdamW(hand_split(model), **SETTINGS, fused=True)
    optimizer._step_supports_amp_scaling = False
    return optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


# Lightning.


def trainer(folder: Path, **arguments: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def module_of(make: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            net = network()
            self.backbone, self.head = net[:2], net[2]

        def training_step(self, batch: Any, index: int) -> Any:
            inputs, labels = batch
            return nn.functional.cross_entropy(self.head(self.backbone(inputs)), labels)

        def configure_optimizers(self) -> Any:
            return make(self)

    return Classifier()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_clips_in_mixed_precision(precision, tmp_path):
    """It refuses optimizers that unscale by themselves, as explicit fused ones do."""
    trained = []
    for make in (selective, torchs):
        module = module_of(make)
        trainer(
            tmp_path,
            max_epochs=2,
            precision=precision,
            gradient_clip_val=0.01,
            # By value: a norm is summed in the order of the groups.
            gradient_clip_algorithm="value",
            enable_checkpointing=False,
        ).fit(module, DataLoader(DATA, batch_size=None))
        trained.append(module)
    assert_same(*trained)


def test_lightning_clips_by_norm_in_mixed_precision(tmp_path):
    module = module_of(selective)
    before = [param.detach().clone() for param in module.parameters()]
    trainer(
        tmp_path,
        max_epochs=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        enable_checkpointing=False,
    ).fit(module, DataLoader(DATA, batch_size=None))
    assert not any(map(torch.equal, before, module.parameters()))


def backbone_finetuning() -> Any:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    return callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, verbose=False
    )


def own_finetuning() -> Any:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")

    class Finetuning(callbacks.BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.backbone)

        def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                own = {"modules": module.backbone, "optimizer": optimizer, "lr": 1e-3}
                self.unfreeze_and_add_param_group(**own)

    return Finetuning()


def torchs_one_group(module: nn.Module) -> torch.optim.Optimizer:
    """Everything decays: how the callbacks add groups to torch's class."""
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, **SETTINGS, fused=True)


def selective_of_all(module: nn.Module) -> torch.optim.Optimizer:
    return AdamW([p for p in module.parameters() if p.requires_grad], **SETTINGS)


def run_and_resume(folder: Path, make: Any, finetuning: Any) -> tuple[Any, Any]:
    """Train three epochs; and two of them again from the checkpoint of the second."""
    lightning = pytest.importorskip("lightning")
    whole = module_of(make)
    loader = DataLoader(DATA, batch_size=None)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1)
    trainer(folder, max_epochs=4, callbacks=[finetuning(), keep]).fit(whole, loader)
    saved = sorted(folder.glob("epoch=2*.ckpt"))[-1]
    resumed = module_of(make)
    again = trainer(folder, max_epochs=4, callbacks=[finetuning()])
    again.fit(resumed, loader, ckpt_path=saved, weights_only=False)
    return whole, resumed


each_finetuning = pytest.mark.parametrize(
    "finetuning", [backbone_finetuning, own_finetuning]
)


@each_finetuning
def test_lightning_resumes_after_an_unfreeze_as_with_torchs_class(finetuning, tmp_path):
    """Both runs, for Lightning leaves frozen again what it resumes with any class."""
    ours = run_and_resume(tmp_path / "ours", selective_of_all, finetuning)
    theirs = run_and_resume(tmp_path / "torch", torchs_one_group, finetuning)
    for mine, judge in zip(ours, theirs, strict=True):
        assert_same(mine, judge)
        own, theirs = (m.trainer.optimizers[0].state_dict() for m in (mine, judge))
        assert_same(own["state"], theirs["state"])


@each_finetuning
def test_lightning_resumes_after_an_unfreeze_with_the_decisions(finetuning, tmp_path):
    for module in run_and_resume(tmp_path, selective, finetuning):
        rows = module.trainer.optimizers[0].decay_report().rows
        moved = {row.name for row in rows if row.weight_decay}
        assert moved == {"backbone.0.weight", "head.weight"}
        assert len(rows) == 6


# Accelerate.


@pytest.mark.parametrize("make", [selective, torchs])
def test_accelerate_sees_dropped_steps(make):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    # As on a GPU with fp16, where Accelerate makes the scaler itself.
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    model = network()
    model, optimizer = accelerator.prepare(model, make(model))
    optimizer.scaler = accelerator.scaler
    optimizer._accelerate_step_called = False
    skipped = []
    for number in range(4):
        inputs, labels = DATA[number]
        loss = nn.functional.cross_entropy(model(inputs), labels)
        accelerator.scaler.scale(loss).backward()
        if number == 1:
            model[0].weight.grad[0, 0] = float("inf")
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        optimizer.zero_grad()
    assert skipped == [False, True, False, False]
