"""What a message says to type leads to what was asked for, or nothing is said."""

import re
import warnings

import pytest
import torch
from torch import nn

from selective_optim import AdamW
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import (
    as_policy,
    exclude,
    first_match,
    is_bias,
    is_norm,
    only,
    parse,
)
from selective_optim.policies.named import NAMED


class NearRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class NearLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


def llama():
    return nn.Sequential(nn.Linear(4, 4), NearRMSNorm())


def exempt(model, policy):
    infos = ModuleIndex(model).everyone()
    return {info.name for info in infos if not policy(info).multiplier}


# Classes that match nothing.

NEAR = {
    "mapping": ({nn.LayerNorm: 0}, llama, {"1.weight"}),
    "exclude": (exclude("*.bias", nn.LayerNorm), llama, {"0.bias", "1.weight"}),
    "two of torch's": (
        exclude(nn.LayerNorm, nn.BatchNorm1d),
        llama,
        {"1.weight"},
    ),
    "inside a product": (
        exclude(is_bias) * exclude(nn.GroupNorm),
        llama,
        {"0.bias", "1.weight"},
    ),
    "more words": ({nn.Linear: 0}, lambda: nn.Sequential(NearLinear()), {"0.weight"}),
}


@pytest.mark.parametrize("case", NEAR)
def test_class_that_is_near_to_one_that_decays_warns_once(case):
    policy, model, expected = NEAR[case]
    model = model()
    with pytest.warns(UserWarning, match="matches none of") as caught:
        AdamW(model.parameters(), weight_decay=0.1, wd_policy=policy)

    assert len(caught) == 1
    assert caught[0].filename == __file__
    advice = re.search(r'Write wd_policy="(.*)", or', str(caught[0].message))[1]
    assert exempt(model, parse(advice)) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(model.parameters(), weight_decay=0.1, wd_policy=advice)


def test_warning_of_a_class_reads_so():
    with pytest.warns(UserWarning, match="NearRMSNorm") as caught:
        AdamW(llama().parameters(), weight_decay=0.1, wd_policy={nn.LayerNorm: 0})
    assert str(caught[0].message) == (
        "nn.LayerNorm in `wd_policy` matches none of 3 parameters, and '1.weight', "
        "held by NearRMSNorm, decays. Write "
        'wd_policy="first_match({is_norm: 0})", or pass missing_ok=True to its policy.'
    )


def frozen():
    model = nn.ModuleDict({"text": llama(), "vision": nn.LayerNorm(4)})
    model["vision"].requires_grad_(False)
    return model


SILENT = {
    "norms that are exempt": (exclude(nn.LayerNorm, NearRMSNorm), llama),
    "list of norms shared among models": (exclude(nn.BatchNorm2d, is_norm), llama),
    "no norm in the model": (exclude(nn.LayerNorm), lambda: nn.Linear(4, 4)),
    "predicates": (exclude(is_bias, is_norm), lambda: nn.Sequential(NearLinear())),
    "another class": (exclude(nn.Conv2d), llama),
    "of another part": (exclude(nn.Embedding), llama),
    "missing_ok": (first_match({nn.LayerNorm: 0}, missing_ok=True), llama),
    "what is not matched is exempt": (
        only(nn.Linear, "*.weight_g", missing_ok=True),
        lambda: nn.Sequential(NearLinear(), nn.Linear(4, 4)),
    ),
    "elsewhere in the model": (
        exclude(nn.LayerNorm),
        frozen,
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_class_that_matches_nothing_is_else_not_worth_a_word(case):
    policy, model = SILENT[case]
    model = model()
    params = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(params, weight_decay=0.1, wd_policy=policy, model=model)


# Bare tensors.


@pytest.mark.parametrize("name", sorted(NAMED))
def test_bare_tensors_are_offered_matrices_for_no_bias_norm_alone(name):
    if not NAMED[name].needs & {"names", "modules"}:
        pytest.skip("needs shapes only")
    with pytest.raises(ValueError, match="is known") as caught:
        AdamW([nn.Parameter(torch.ones(2, 3))], weight_decay=0.1, wd_policy=name)

    assert ('"matrices"' in str(caught.value)) == (name == "no_bias_norm")


# Selectors by themselves.


@pytest.mark.parametrize(
    "text", ["is_bias", "'*.bias' | is_norm", "nn.Linear", "Linear"]
)
def test_selector_by_itself_is_answered_both_ways(text):
    with pytest.raises(ValueError, match="is a selector") as caught:
        parse(text)

    both = re.search(
        r"(exclude\(.*\)) to exempt it, or (only\(.*\)) to decay no other\.",
        str(caught.value),
    )
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert exempt(model, parse(both[1])).isdisjoint(exempt(model, parse(both[2])))


# Names.

MEANT = {
    "no_norm_bias": "no_bias_norm",
    "no_bias_and_norm": "no_bias_norm",
    "no-bias-norm": "no_bias_norm",
    "NO_BIAS_NORM": "no_bias_norm",
    "no_bais_norm": "no_bias_norm",
    "norm_no_bias": "no_bias_norm",
    "hugging_face": "huggingface",
    "nano_gpt": "nanogpt",
    "": None,
    "None": None,
    "False": None,
    "l1": None,
    "weight_decay": None,
    "adamw": None,
}


@pytest.mark.parametrize("name", MEANT)
def test_name_is_suggested_by_its_words_or_not_at_all(name):
    with pytest.raises(ValueError, match="is not the name of a policy") as caught:
        as_policy(name)

    found = re.search(r'Did you mean wd_policy="(\w*)"\?$', str(caught.value))
    assert (found and found[1]) == MEANT[name]
    assert str(caught.value).endswith(("?", f'"{list(NAMED)[-1]}".'))


def test_function_that_is_like_no_other_is_answered_by_an_example():
    with pytest.raises(ValueError, match="is the function of no policy") as caught:
        parse("decay_it(is_bias)")
    assert "Did you mean" not in str(caught.value)
    advice = re.search(r"Write for example (.*)\.$", str(caught.value))[1]
    assert parse(advice) == parse("exclude('*.bias', is_norm) * layerwise(0.75)")


@pytest.mark.parametrize("name", ["LayerNorm", "Linear", "Embedding", "nn.Linear"])
def test_bare_class_in_text_is_that_of_torch_nn(name):
    import torch.ao.nn.quantized  # noqa: F401  # namesakes that are loaded

    cls = getattr(nn, name.rpartition(".")[2])
    assert parse(f"exclude({name})") == exclude(cls)
