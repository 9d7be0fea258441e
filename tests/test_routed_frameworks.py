"""`Routed` and `Muon` as one optimizer in frameworks, beside separate optimizers."""

import pytest
import torch
from torch.utils.data import DataLoader

from selective_optim import AdamW, Muon, Routed, deciding_for
from selective_optim.policies import is_hidden_matrix
from tests.support.compare import assert_same
from tests.support.framework_cases import exempt_names
from tests.support.routes import Body, loss_of, routed, twins

pytestmark = pytest.mark.integration
RATES = {"muon": 0.02, "adamw": 3e-3}
REST = {"lr": RATES["adamw"], "betas": (0.9, 0.95)}
SETTINGS = {"lr": RATES["muon"], "weight_decay": 0.1, "wd_policy": "no_bias_norm"}


def by_hand(model, is_body):
    """Make the two optimizers, with exempt norms and biases in the second."""
    exempt = exempt_names(model)
    body, decayed, rest = [], [], []
    for name, param in model.named_parameters():
        (body if is_body(name) else rest if name in exempt else decayed).append(param)
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return (
        Body(body, lr=RATES["muon"], weight_decay=0.1),
        torch.optim.AdamW(groups, **REST, weight_decay=0.1, fused=True),
    )


# The Trainer of transformers


def in_layers(name):
    return ".layers." in name and "norm" not in name and name.endswith("weight")


@pytest.fixture
def hf():
    pytest.importorskip("transformers")
    from tests import test_frameworks_transformers as hf

    return hf


class Pair(torch.optim.Optimizer):
    """Two optimizers under one list of groups, as a user would write by hand."""

    def __init__(self, *optimizers):
        self.each = optimizers
        groups = [group for o in optimizers for group in o.param_groups]
        super().__init__([p for g in groups for p in g["params"]], {"lr": 1e-3})
        self.param_groups = groups

    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        first, second = self.each
        # Accelerate loads a state dict, which makes new groups.
        first.param_groups, second.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        first.step()
        second.step()
        return loss


def test_trainer_makes_it_and_its_schedule_scales_both_rates(hf, tmp_path):
    ours, theirs = hf.llama(), hf.llama()
    settings = {**SETTINGS, "rest": REST, "model": ours}
    one = hf.trainer(ours, tmp_path / "a", optimizer_cls_and_kwargs=(Muon, settings))
    one.train()
    pair = Pair(*by_hand(theirs, in_layers))
    hf.trainer(theirs, tmp_path / "b", optimizers=(pair, None)).train()
    assert [group["route"] for group in one.optimizer.param_groups] == [*RATES]
    assert_same(ours, theirs)


ROUTES = {
    "muon": (is_hidden_matrix, Body, {"lr": RATES["muon"]}),
    "adamw": ("*", AdamW, REST),
}


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(Muon, {"lr": RATES["muon"], "rest": REST}), (Routed, {"routes": ROUTES})],
)
def test_trainer_makes_it_where_deciding_for_knows_the_model(
    hf, tmp_path, cls, settings
):
    """The Trainer splits groups by its own rule, and their decay is its argument's."""
    ours, theirs = hf.llama(), hf.llama()
    one = hf.trainer(ours, tmp_path / "a", optimizer_cls_and_kwargs=(cls, settings))
    one.args.weight_decay = 0.1
    with deciding_for(ours, wd_policy="no_bias_norm"):
        one.create_optimizer()
    routes = [group["route"] for group in one.optimizer.param_groups]
    assert routes == ["muon", "adamw", "adamw"]
    one.train()
    pair = Pair(*by_hand(theirs, in_layers))
    hf.trainer(theirs, tmp_path / "b", optimizers=(pair, None)).train()
    assert_same(ours, theirs)


def test_trainer_resumes_bit_for_bit(hf, tmp_path):
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        model = hf.llama()
        settings = {**SETTINGS, "rest": REST, "model": model}
        run = hf.trainer(model, tmp_path, optimizer_cls_and_kwargs=(Muon, settings))
        run.train(resume_from_checkpoint=resume)
        runs.append((model.state_dict(), run.optimizer.state_dict()["state"]))
    assert_same(*runs)


# Lightning


def lightning_module(make):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = twins()[0]

        def training_step(self, batch, index):
            return loss_of(self.net, int(batch))

        def configure_optimizers(self):
            optimizer = make(self)
            rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return [optimizer], [{"scheduler": rate, "interval": "step"}]

    return Module()


def fit(module, folder, epochs, **arguments):
    lightning = pytest.importorskip("lightning")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=str(folder),
        gradient_clip_val=0.01,
        # Norms would be added up in the order of the groups.
        gradient_clip_algorithm="value",
        **dict.fromkeys(
            ("enable_progress_bar", "enable_model_summary", "logger"), False
        ),
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(torch.arange(4), batch_size=None), **arguments)
    return trainer


def in_blocks(name):
    return "blocks." in name and name.endswith("0.weight")


IGNORED = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many", "ignore:.*LeafSpec"
)


@IGNORED
def test_lightning_takes_it_as_one_optimizer(tmp_path):
    ours = lightning_module(lambda module: routed(module, routes=ROUTES))
    theirs = lightning_module(lambda module: Pair(*by_hand(module, in_blocks)))
    [one] = fit(ours, tmp_path, 2).optimizers
    fit(theirs, tmp_path, 2)
    assert_same(ours, theirs)
    rates = [group["lr"] for group in one.param_groups]
    assert rates == pytest.approx([0.9**8 * lr for lr in RATES.values()])


@IGNORED
def test_lightning_resumes_bit_for_bit(tmp_path):
    straight, begun, resumed = (
        lightning_module(lambda module: routed(module, routes=ROUTES)) for _ in range(3)
    )
    [whole] = fit(straight, tmp_path, 2).optimizers
    fit(begun, tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    path = str(tmp_path / "half.ckpt")
    [one] = fit(resumed, tmp_path, 2, ckpt_path=path).optimizers
    assert_same(resumed, straight)
    assert_same(one.state_dict()["state"], whole.state_dict()["state"])


# Accelerate


def prepared(make):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = twins()[0]
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def train_prepared(parts, steps):
    accelerator, model, optimizer, schedule = parts
    for number in steps:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, number))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def test_accelerate_takes_it_as_one_optimizer():
    ours = prepared(lambda model: routed(model, routes=ROUTES))
    theirs = prepared(lambda model: Pair(*by_hand(model, in_blocks)))
    for parts in (ours, theirs):
        train_prepared(parts, range(8))
    assert_same(ours[1], theirs[1])
    rates = [group["lr"] for group in ours[2].param_groups]
    assert rates == pytest.approx([0.9**4 * lr for lr in RATES.values()])


def test_accelerate_resumes_from_its_saved_state_bit_for_bit(tmp_path):
    straight, resumed = (
        prepared(lambda model: routed(model, routes=ROUTES)) for _ in range(2)
    )
    train_prepared(straight, range(4))
    straight[0].save_state(str(tmp_path))
    train_prepared(straight, range(4, 8))
    resumed[0].load_state(str(tmp_path))
    train_prepared(resumed, range(4, 8))
    assert_same(resumed[1], straight[1])
    assert_same(*(run[2].state_dict()["state"] for run in (resumed, straight)))


# Schedulers


def test_timms_scheduler_scales_each_rate_down_to_one_least_rate():
    scheduler = pytest.importorskip("timm.scheduler")
    one = routed(twins()[0], routes=ROUTES)
    warm_up = {"warmup_t": 2, "warmup_lr_init": 1e-4, "t_in_epochs": False}
    schedule = scheduler.CosineLRScheduler(one, 8, lr_min=1e-5, **warm_up)

    def rates(update):
        schedule.step_update(update)
        return [group["lr"] for group in one.param_groups]

    assert rates(0) == [1e-4, 1e-4]
    assert rates(1) == pytest.approx([(1e-4 + lr) / 2 for lr in RATES.values()])
    middle = [1e-5 + (lr - 1e-5) / 2 for lr in RATES.values()]
    assert rates(4) == pytest.approx(middle)
    assert rates(8) == pytest.approx([1e-5, 1e-5])
