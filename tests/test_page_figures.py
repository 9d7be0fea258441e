"""Sentences of the README that no other test holds."""

import copy
import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from selective_optim import AdamW
from tests.support.framework_cases import hand_split

README = Path(__file__).parents[1] / "README.md"


def norm_after(cls, dtype, steps=100, **choice):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 33, generator=generator)
    param = nn.Parameter(values.to(dtype))
    optimizer = cls([param], lr=0.01, weight_decay=0.1, **choice)
    for _ in range(steps):
        grad = torch.randn(64, 33, generator=generator)
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach().double().norm().item()


def test_half_precision_nearly_loses_its_decay_in_the_for_loop():
    exact = norm_after(torch.optim.AdamW, torch.float64)
    ours = norm_after(AdamW, torch.bfloat16)
    loop = norm_after(torch.optim.AdamW, torch.bfloat16, foreach=False)
    start = norm_after(AdamW, torch.bfloat16, steps=0)
    told = [round(norm, 1) for norm in (start, exact, ours, loop)]
    assert told == pytest.approx([46.7, 42.3, 43.9, 46.8], abs=0.2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def clipped(params, model):
    generator = torch.Generator().manual_seed(1)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).mul_(1e3)
    nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
    return [param.grad.clone() for param in model.parameters()]


def test_clipping_in_one_order_gives_merged_and_split_groups_the_same():
    models = net(), net()
    one = AdamW(models[0].parameters(), wd_policy="no_bias_norm")
    two = torch.optim.AdamW(hand_split(models[1]))
    grads = [clipped(list(m.parameters()), m) for m in models]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    ordered = [
        clipped([p for group in o.param_groups for p in group["params"]], m)
        for o, m in zip((one, two), models)
    ]
    torch.testing.assert_close(*ordered)  # in the last bits they may differ


def test_flattened_state_of_ours_gives_torchs_exempt_group_the_full_decay():
    form = StateDictOptions(flatten_optimizer_state_dict=True)
    models = net(), net()
    ours = AdamW(models[0].parameters(), weight_decay=0.1, wd_policy="no_bias_norm")
    split = torch.optim.AdamW(hand_split(models[1]), weight_decay=0.1)
    for param in models[0].parameters():
        param.grad = torch.ones_like(param)
    ours.step()
    ours.zero_grad()
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], ours, options=form))
    set_optimizer_state_dict(models[1], split, saved, options=form)
    assert [group["weight_decay"] for group in split.param_groups] == [0.1, 0.1]


def saved_effect():
    path = (
        README.parent / "benchmarks/results/digits_effect_torch2.13.0_2026-11-21.json"
    )
    results = json.loads(path.read_text())["results"]
    return {
        (r["network"], r["weight_decay"], r["norms_and_biases"]): r for r in results
    }


@pytest.mark.parametrize("decay", [3.0, 10.0])
def test_conv_net_loses_less_on_new_digits_where_norms_are_exempt(decay):
    exempt, decayed = (
        saved_effect()["conv net", decay, kind]["losses"]
        for kind in ("exempt", "decayed")
    )
    assert mean(exempt) < 0.8 * mean(decayed)


@pytest.mark.parametrize("decay", [3.0, 10.0])
@pytest.mark.parametrize("measure", ["losses", "accuracies"])
def test_transformer_does_not_tell_the_two_apart(decay, measure):
    exempt, decayed = (
        saved_effect()["transformer", decay, kind][measure]
        for kind in ("exempt", "decayed")
    )
    apart = abs(mean(exempt) - mean(decayed))
    assert apart <= stdev(exempt) + stdev(decayed)
