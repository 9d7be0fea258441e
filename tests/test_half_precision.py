"""Decay that half precision rounds away is told once; decay that arrives is not.

Which rates lose how much was simulated, with gradients of noise. The fused kernel
rounds once, after decay and update. The others multiply by ``1 - lr * wd`` first, and
that is 1 in half precision unless the rate is high.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from selective_optim import SGD, Adam, AdamW, selective
from selective_optim.policies import form
from tests.support import attacks
from tests.support.attacks import Own

BF16, FP16 = torch.bfloat16, torch.float16
KINDS = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Two(nn.Module):
    """A matrix and a norm."""

    def __init__(self, std, dtype):
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            drawn = torch.randn(64, 64, generator=generator)
            self.layer.weight.copy_(std * drawn)
        self.to(dtype)


def make(std, lr, dtype=BF16, cls=AdamW, **more):
    model = Two(std, dtype)
    numbers = {"lr": lr, "weight_decay": 0.1, "wd_policy": "no_bias_norm"}
    if dtype == FP16:
        numbers["eps"] = 1e-3  # the default is 0 there
    return model, cls(model.parameters(), **{**numbers, **more})


def told(model, step, times=3):
    """Step on noise, and list what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(times):
            for param in model.parameters():
                param.grad = None
            attacks.set_grads([*model.parameters()], number)
            step()
    about = [w for w in caught if issubclass(w.category, UserWarning)]
    return [str(w.message) for w in about if "lr_scheduler" not in str(w.message)]


# Less than half of the decay arrives, by deviation of the weights and rate.
LOST = [
    *((BF16, 0.02, lr) for lr in (1e-4, 3e-5, 1e-5)),
    *((BF16, 0.04, lr) for lr in (1e-4, 3e-5)),
    *((BF16, 0.2, lr) for lr in (1e-3, 3e-4, 1e-4)),
    *((BF16, 1.0, lr) for lr in (1e-3, 3e-4, 1e-4)),
    (FP16, 0.02, 1e-5),
    (FP16, 0.04, 1e-5),
    (FP16, 0.2, 1e-4),
    *((FP16, 1.0, lr) for lr in (3e-4, 1e-4)),
]
# Four fifths and more do, where decay and update are rounded together.
KEPT = [
    *((BF16, 0.02, lr) for lr in (1e-2, 1e-3, 3e-4)),
    *((BF16, 0.04, lr) for lr in (1e-2, 1e-3)),
    *((FP16, 0.02, lr) for lr in (1e-3, 3e-4, 1e-4)),
    *((FP16, 0.04, lr) for lr in (1e-3, 3e-4, 1e-4)),
    (FP16, 0.2, 1e-3),
    (torch.float64, 1.0, 1e-5),
]
# Where they are not, all of it is lost there, and arrives at higher rates.
LOST_APART = [*LOST, *(case for case in KEPT if case[0] in (BF16, FP16))]
KEPT_APART = [
    (BF16, 0.2, 5e-2),
    *((FP16, 0.2, lr) for lr in (2e-2, 1e-2)),
    *((torch.float32, 1.0, lr) for lr in (1e-3, 1e-5)),
]
TOGETHER, APART = ("automatic", "fused"), ("foreach", "for-loop")


def crossed(kinds, cases):
    return [(*case, kind) for kind in kinds for case in cases]


def assert_told(messages):
    [message] = messages
    assert "layer.weight" in message
    assert "float32" in message
    assert "tochastic rounding" in message or "Kahan" in message
    assert "use fused" not in message  # which rounds as well


@pytest.mark.parametrize(
    ("dtype", "std", "lr", "kind"),
    [*crossed(TOGETHER, LOST), *crossed(APART, LOST_APART)],
    ids=str,
)
def test_decay_that_is_rounded_away_is_told_once(dtype, std, lr, kind):
    model, optimizer = make(std, lr, dtype, **KINDS[kind])
    assert_told(told(model, optimizer.step))


@pytest.mark.parametrize(
    ("dtype", "std", "lr", "kind"),
    [*crossed(TOGETHER, [*KEPT, *KEPT_APART]), *crossed(APART, KEPT_APART)],
    ids=str,
)
def test_decay_that_arrives_is_not_told_of(dtype, std, lr, kind):
    model, optimizer = make(std, lr, dtype, **KINDS[kind])
    assert told(model, optimizer.step) == []


# Losing ones, made so that there is nothing to lose.

LOSING = {"std": 1.0, "lr": 1e-4}


def decoupled_adam():
    return make(**LOSING, cls=Adam, decoupled_weight_decay=True)


def adam_by_a_form():
    policy = "exclude(is_bias, is_norm) * form('decoupled')"
    return make(**LOSING, cls=Adam, wd_policy=policy)


def corrected():
    return make(**LOSING, wd_policy="exclude(is_bias, is_norm) * form('corrected')")


@pytest.mark.parametrize("build", [decoupled_adam, adam_by_a_form, corrected])
def test_every_decoupled_form_is_told(build):
    model, optimizer = build()
    assert_told(told(model, optimizer.step))


def l2():
    return make(**LOSING, cls=Adam)


def l2_by_a_form():
    return make(**LOSING, wd_policy=form("l2"))


def sgd():
    return make(1.0, 1e-1, cls=SGD, fused=False, foreach=False)


def no_decay_any_more():
    model, optimizer = make(**LOSING)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    return model, optimizer


def another_class():
    """Which may round stochastically, or by Kahan's sum."""
    return make(**LOSING, cls=selective(Own))


NOTHING_LOST = [l2, l2_by_a_form, sgd, no_decay_any_more, another_class]


@pytest.mark.parametrize("build", NOTHING_LOST)
def test_other_decay_is_not_told_of(build):
    model, optimizer = build()
    assert told(model, optimizer.step, times=1) == []


def test_exempt_half_precision_beside_decayed_float32_is_not_told_of():
    model = Two(1.0, torch.float32)
    model.norm.to(BF16)
    optimizer = AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.1, wd_policy="no_bias_norm"
    )
    assert told(model, optimizer.step) == []


# When it is asked: once, at the first step that may move something.


@pytest.mark.parametrize("kind", TOGETHER)
def test_warm_up_from_a_small_rate_is_no_false_alarm(kind):
    model, optimizer = make(0.02, 1e-3, **KINDS[kind])
    scheduler = LinearLR(optimizer, 1e-3, total_iters=5)
    steps = iter([optimizer.step, scheduler.step] * 6)
    assert told(model, lambda: next(steps)(), times=12) == []


def test_cycle_that_begins_low_is_no_false_alarm():
    model, optimizer = make(0.02, 1e-3)
    OneCycleLR(optimizer, max_lr=1e-2, total_steps=100, div_factor=4)
    assert told(model, optimizer.step) == []


@each_kind
def test_step_at_rate_0_is_not_the_one_that_is_asked_at(kind):
    """torch.distributed.checkpoint takes one to make state, and then restores rates."""
    model, optimizer = make(**LOSING, **KINDS[kind])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert told(model, optimizer.step, times=2) == []
    for group in optimizer.param_groups:
        group["lr"] = LOSING["lr"]
    assert_told(told(model, optimizer.step))


def test_rate_that_falls_later_is_not_told_of():
    model, optimizer = make(0.02, 1e-3)
    assert told(model, optimizer.step) == []
    optimizer.param_groups[0]["lr"] = 1e-6
    assert told(model, optimizer.step) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_step_does_not_ask():
    model, optimizer = make(**LOSING, foreach=False, fused=False)
    torch._dynamo.reset()
    assert told(model, torch.compile(optimizer.step, backend="eager")) == []
    torch._dynamo.reset()


def test_report_says_it_too():
    _, losing = make(**LOSING)
    _, keeping = make(0.02, 1e-3)
    assert "float32" in str(losing.decay_report())
    assert "float32" not in str(keeping.decay_report())


# Groups: the first parameter that loses is named, and once for all.


def test_first_parameter_that_loses_is_named():
    model = nn.ModuleDict({"a": Two(0.02, FP16), "b": Two(1.0, BF16)})
    groups = [{"params": own.parameters()} for own in model.values()]
    optimizer = AdamW(
        groups, lr=3e-4, weight_decay=0.1, wd_policy="no_bias_norm", model=model
    )
    [message] = told(model, optimizer.step)
    assert "b.layer.weight" in message


def test_each_group_is_asked_by_its_own_rate():
    model = nn.ModuleDict({"a": Two(0.02, BF16), "b": Two(0.02, BF16)})
    groups = [
        {"params": model["a"].parameters(), "lr": 1e-3},
        {"params": model["b"].parameters(), "lr": 1e-6},
    ]
    optimizer = AdamW(groups, weight_decay=0.1, wd_policy="no_bias_norm", model=model)
    [message] = told(model, optimizer.step)
    assert "b.layer.weight" in message
