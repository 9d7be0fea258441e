"""One group with exempt norms in the Trainer of transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_optim import AdamW
from selective_optim.schedules import proportional_to_lr
from tests.support.compare import assert_same
from tests.support.framework_cases import (
    hand_split,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.integration

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}
POLICY = {"wd_policy": "no_bias_norm"}


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        attention_bias=True,
    )
    return transformers.LlamaForCausalLM(config)


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 32, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: Any, folder: Path, **arguments: Any) -> Any:
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
    )
    return transformers.Trainer(model, settings, train_dataset=texts(), **arguments)


def test_trainer_with_one_group_has_the_bits_of_two(tmp_path):
    ours, torchs = llama(), llama()
    one = AdamW(ours.parameters(), **SETTINGS, **POLICY)
    two = torch.optim.AdamW(hand_split(torchs), **SETTINGS, fused=True)
    trainer(ours, tmp_path / "ours", optimizers=(one, None)).train()
    trainer(torchs, tmp_path / "torch", optimizers=(two, None)).train()
    assert len(one.param_groups) == 1
    assert_same(ours, torchs)


def test_optimizer_cls_and_kwargs_with_a_model_makes_one_group(tmp_path):
    """The Trainer takes ``"model"`` out of the arguments and hands it over first."""
    ours, torchs = llama(), llama()
    arguments = {"model": ours, **SETTINGS, **POLICY}
    one = trainer(ours, tmp_path / "ours", optimizer_cls_and_kwargs=(AdamW, arguments))
    one.train()
    two = torch.optim.AdamW(hand_split(torchs), **SETTINGS, fused=True)
    trainer(torchs, tmp_path / "torch", optimizers=(two, None)).train()
    assert len(one.optimizer.param_groups) == 1
    assert_same(ours, torchs)


def test_optimizer_cls_and_kwargs_alone_gets_the_decay_of_the_trainers_groups(tmp_path):
    """Whose model is found, and whose groups say 0 where its arguments do."""
    arguments = (AdamW, {**SETTINGS, **POLICY})
    alone = trainer(llama(), tmp_path, optimizer_cls_and_kwargs=arguments)
    with pytest.warns(UserWarning, match="`weight_decay` is 0 in every group"):
        alone.train()
    assert all(row.owner for row in alone.optimizer.optimizer.decay_report())


def test_trainer_resumes_from_its_checkpoint_bit_for_bit(tmp_path):
    def ready() -> Any:
        model = llama()
        optimizer = AdamW(model.parameters(), **SETTINGS, **POLICY)
        return model, optimizer, trainer(model, tmp_path, optimizers=(optimizer, None))

    straight, one, first = ready()
    first.train()
    resumed, other, second = ready()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(resumed, straight)
    assert_same(other.state_dict()["state"], one.state_dict()["state"])
    assert second.state.global_step == 8


def test_proportional_decay_follows_the_schedule_of_the_trainer(tmp_path):
    model = llama()
    optimizer = AdamW(model.parameters(), **SETTINGS, **POLICY)
    proportional_to_lr(optimizer)
    seen: list[tuple[float, float]] = []
    optimizer.register_step_post_hook(
        lambda opt, *_: seen.append(copy.copy(read(opt.param_groups[0])))
    )
    trainer(model, tmp_path, optimizers=(optimizer, None)).train()
    rates = [1e-2 * (1 - step / 8) for step in range(8)]
    assert seen == [(pytest.approx(lr), pytest.approx(10 * lr)) for lr in rates]


def read(group: dict[str, Any]) -> tuple[float, float]:
    return group["lr"], group["weight_decay"]
