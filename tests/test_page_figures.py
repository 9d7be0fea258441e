"""Figures and sentences of README and pages, held to saved results and to torch."""

import copy
from math import ceil
from statistics import mean, stdev

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from benchmarks.pages import PAGES, newest
from benchmarks.step import on_gpu
from benchmarks.step.arms import BARE, DEFAULT, FUSED, OURS
from selective_optim import AdamW
from selective_optim.policies.recipes import RECIPES
from tests import judgement, test_cuda_calls, test_errors
from tests.support.framework_cases import hand_split
from tests.support.pages import page_id

TEXTS = {page_id(path): " ".join(path.read_text("utf-8").split()) for path in PAGES}
LARGE = "resnet50", "vit_s", "vit_s_layers"  # few tensors of some size
MANY = "tiny", "small", "tiny_layers", "tiny_groups", "tiny_groups_lr", "dtensor"


def cases(names, optimizers=("adamw", "sgd")):
    """Yield the arms of saved cases."""
    for record in newest("cpu_torch*.json")["cases"]:
        if record["case"] in names and record["optimizer"] in optimizers:
            yield record["arms"]


def times(name, optimizer, *arms, key="median"):
    """Return the median, or the mean, of some arms of one case."""
    [known] = cases([name], [optimizer])
    told = [known[arm]["ms"] | {"mean": known[arm]["mean_ms"]} for arm in arms]
    return [own[key] for own in told]


def ratios(names, arm, over, optimizers=("adamw", "sgd")):
    """Return the smallest and largest ratio of two arms, of medians as in the table."""
    found = [
        known[arm]["ms"]["median"] / known[over]["ms"]["median"]
        for known in cases(names, optimizers)
        if arm in known and over in known
    ]
    return min(found), max(found)


def first_steps(name, optimizer):
    for record in newest("cpu_torch*.json")["cases"]:
        if (record["case"], record["optimizer"]) == (name, optimizer):
            return [record["first_step_ms"][arm]["median"] for arm in (OURS, FUSED)]
    raise AssertionError(name)


def compared():
    """Return how many optimizer classes were exact, and how many were refused."""
    found = newest("any_class*.json")["libraries"]
    return sum(each["exact"] for each in found), sum(len(r["refused"]) for r in found)


def owners():
    """Return how many libraries, vectors and classes were judged, and with what end."""
    found = newest("owners*.json")
    libraries = found["libraries"]
    counts = [sum(each[key] for each in libraries) for key in ("attributes", "classes")]
    return len(libraries), *counts, len(found["wrong"]), len(found["unsure"])


def percent(low, high):
    return round(100 * low - 100), round(100 * high - 100)


FIGURES = {
    "fast": (
        "README.md",
        "a step takes {:.2f} ms on two CPU threads. Over groups split by hand, torch "
        "takes {:.2f} ms fused and {:.2f} ms by default",
        lambda: times("small", "adamw", OURS, FUSED, DEFAULT),
    ),
    "exact": (
        "README.md",
        "{} optimizer classes of eleven libraries were compared",
        lambda: compared()[:1],
    ),
    "refused": (
        "README.md",
        "refuses {} of {} optimizer classes",
        lambda: (compared()[1], sum(compared())),
    ),
    "version of the survey": (
        "any_optimizer.md",
        "with torch {}.{} on a CPU",
        lambda: newest("any_class*.json")["torch"].split(".")[:2],
    ),
    "classes of timm": (
        "start/timm.md",
        "{} of timm's classes give the same bits",
        lambda: [
            each["exact"]
            for each in newest("any_class*.json")["libraries"]
            if each["library"] == "timm"
        ],
    ),
    "minutes on a GPU": (
        "speed.md",
        "measures times on a GPU in {} minutes",
        lambda: [ceil(sum(piece.seconds for piece in on_gpu.PIECES) / 60)],
    ),
    "recipes": ("README.md", "what {} projects decay", lambda: [len(RECIPES)]),
    "few large tensors": (
        "speed.md",
        "and {} to {} % less than torch's fused step",
        lambda: [-p for p in reversed(percent(*ratios(LARGE, OURS, FUSED)))],
    ),
    "many small tensors": (
        "speed.md",
        "Ours took {:.0f} to {:.0f} % of the time of torch's fused step",
        lambda: [100 * ratio for ratio in ratios(MANY, OURS, FUSED)],
    ),
    "first step": (
        "README.md",
        "With 1,000 small tensors and AdamW it takes {:.0f} ms, torch's {:.0f} ms",
        lambda: first_steps("small", "adamw"),
    ),
    "over the kernel": (
        "speed.md",
        "Ours took {} to {} % more than the bare kernel",
        lambda: percent(*ratios(LARGE, OURS, BARE)),
    ),
    "busy machine": (
        "speed.md",
        "the mean step of AdamW took {:.1f} ms. torch's took {:.0f} ms by default and "
        "{:.0f} ms fused",
        lambda: times("small_busy", "adamw", OURS, DEFAULT, FUSED, key="mean"),
    ),
    "owners": (
        "policies.md",
        "We took {} other libraries, from graph networks to forecasting, and read the "
        'sources of their {} vectors in {} classes. `"no_bias_norm"` decides {} of '
        "these vectors wrongly, 13 of them biases that decay. Another {} can be called",
        owners,
    ),
    "norms of all models": (
        "policies.md",
        "It differs in {} attributes",
        lambda: [len(judgement.REASONS)],
    ),
}


@pytest.mark.parametrize(("page", "text", "numbers"), FIGURES.values(), ids=FIGURES)
def test_figure_is_that_of_the_saved_result(page, text, numbers):
    assert text.format(*numbers()) in TEXTS[page]


def test_error_texts_are_as_many_as_the_readme_says():
    assert "more than 60 error texts" in TEXTS["README.md"]
    assert len(test_errors.CASES) + len(test_errors.MISWRITTEN) > 60


def test_calls_on_a_gpu_are_those_that_were_counted():
    for groups, each, _, mine, theirs in test_cuda_calls.STEADY:
        told = {False: "with one setting", True: "with a rate each"}[each]
        row = f"| {groups:,} {told}" if groups > 1 else "| 1"
        if groups != 2:
            assert f"{row} | {mine:,} | {theirs:,} |" in TEXTS["speed.md"]


def test_digits_of_half_precision_are_in_the_page():
    for norm in (46.7, 42.3, 43.9, 46.8):
        assert f"| {norm} |" in TEXTS["differences.md"]


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
    results = newest("digits_effect*.json")["results"]
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
