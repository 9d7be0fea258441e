"""Every error and warning: its type, its whole text, and that nothing was changed."""

import copy
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW, Decay
from selective_optim.policies import (
    exclude,
    first_match,
    fixed,
    form,
    is_norm,
    is_vector,
    only,
    scale,
    towards,
)

OPTIMIZERS = [SGD, Adam, AdamW]
WAYS_OUT = (
    "Pass model=model or model.named_parameters(); where "
    "a framework makes the optimizer, write with selective_optim.deciding_for(model): "
    "around it."
)
FORMS = '"l2", "decoupled", "independent", "corrected", "cautious"'
MULTIPLIER = "Return 0 to exempt a parameter, 1 to decay it in full."


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def lora():
    layers = {name: nn.Linear(2, 2, bias=False) for name in ("lora_A", "lora_B")}
    head = nn.Linear(2, 2, bias=False)
    return nn.ModuleDict({"base": nn.ModuleDict(layers), "lm_head": head})


def bare():
    return list(net().parameters())


def pairs():
    return list(net().named_parameters())


def container():
    return nn.ParameterList(bare())


def flat():
    """Stand in for FSDP1's flat parameter, by the mark that torch puts on it."""
    param = nn.Parameter(torch.ones(9))
    param._is_flat_param = True
    return [param]


def flattened():
    """Stand in for a piece of a flat parameter under ``use_orig_params=True``."""
    params = [("w", nn.Parameter(torch.ones(9)))]
    params[0][1]._fsdp_flattened = True
    return params


def reads_owner(info):
    return not isinstance(info.owner, nn.LayerNorm)


def reads_names(info):
    return not any(name.endswith("bias") for name in info.names)


def reads_path(info):
    return len(info.path) > 1


def reads_leaf(info):
    return info.leaf != "bias"


def reads_shape(info):
    return info.shape != (9,)


def compares_ndim(info):
    return info.ndim > 1


def asks_is_norm(info):
    return not is_norm(info)


def reads_misspelt(info):
    return info.nmae != "bias"


def searches_info(info):
    return "bias" not in info


def forgets(info):
    pass


def raises(info):
    raise KeyError("gain")


@dataclass(frozen=True)
class Case:
    params: Any
    policy: Any
    kind: type[Exception]
    text: str


def returns(value):
    def policy(info):
        return value

    return policy


def at_weight(value, rule):
    kind = ValueError if "finite" in rule else TypeError
    return Case(
        pairs,
        returns(value),
        kind,
        f"`wd_policy` returned {value!r} for '0.weight' (shape 4 x 3); {rule}. "
        f"{MULTIPLIER}",
    )


NUMBER = "a multiplier must be a number"
FINITE = "a multiplier must be finite and >= 0"
FIXED = 'Write for example fixed(0.05, "head.*") or Decay(fixed=0.05).'

CASES = {
    "name needs modules": Case(
        bare,
        "no_bias_norm",
        ValueError,
        "`wd_policy` exclude(is_bias, is_norm) needs module types, and of parameter 0 "
        "of group 0 (shape 4 x 3) only the tensor is known. Pass model=model or "
        'model.named_parameters(), or use wd_policy="matrices", which decays whatever '
        "has two or more dimensions; where " + WAYS_OUT.partition("; where ")[2],
    ),
    "container": Case(
        container,
        "no_norm",
        ValueError,
        "`wd_policy` exclude(is_norm) needs module types, and of '0' (shape 4 x 3) "
        f"only a place in nn.ParameterList is known. {WAYS_OUT}",
    ),
    "name needs modules, has names": Case(
        pairs,
        "no_norm",
        ValueError,
        "`wd_policy` exclude(is_norm) needs module types, and of '0.weight' "
        f"(shape 4 x 3) only the name is known. {WAYS_OUT}",
    ),
    "glob needs names": Case(
        bare,
        exclude("*.bias"),
        ValueError,
        "`wd_policy` exclude('*.bias') needs names, and of parameter 0 of group 0 "
        f"(shape 4 x 3) only the tensor is known. {WAYS_OUT}",
    ),
    "mapping needs modules": Case(
        pairs,
        {nn.LayerNorm: 0},
        ValueError,
        "`wd_policy` first_match({nn.LayerNorm: 0}) needs module types, and of "
        f"'0.weight' (shape 4 x 3) only the name is known. {WAYS_OUT}",
    ),
    "callable reads the owner": Case(
        bare,
        reads_owner,
        ValueError,
        "`wd_policy` reads_owner read `owner` of parameter 0 of group 0 (shape 4 x 3), "
        f"which is not known. {WAYS_OUT}",
    ),
    "callable reads the names": Case(
        bare,
        reads_names,
        ValueError,
        "`wd_policy` reads_names read `names` of parameter 0 of group 0 (shape 4 x 3), "
        f"which is not known. {WAYS_OUT}",
    ),
    "callable reads the leaf": Case(
        bare,
        reads_leaf,
        ValueError,
        "`wd_policy` reads_leaf read `leaf` of parameter 0 of group 0 (shape 4 x 3), "
        f"which is not known. {WAYS_OUT}",
    ),
    "callable reads the path": Case(
        pairs,
        reads_path,
        ValueError,
        "`wd_policy` reads_path read `path` of '0.weight' (shape 4 x 3), which is not "
        f"known. {WAYS_OUT}",
    ),
    "callable asks a predicate": Case(
        pairs,
        asks_is_norm,
        ValueError,
        "`wd_policy` asks_is_norm read `owner` of '0.weight' (shape 4 x 3), which is "
        f"not known. {WAYS_OUT}",
    ),
    "selector reads the owner": Case(
        pairs,
        exclude(reads_owner),
        ValueError,
        "`wd_policy` exclude(reads_owner) read `owner` of '0.weight' (shape 4 x 3), "
        f"which is not known. {WAYS_OUT}",
    ),
    "unknown name": Case(
        net,
        "no_bias_nrom",
        ValueError,
        "`wd_policy` 'no_bias_nrom' is not the name of a policy; known are ... "
        'Did you mean wd_policy="no_bias_norm"?',
    ),
    "wrong kind": Case(
        net,
        3,
        TypeError,
        "`wd_policy` must be a name, a mapping, a callable or a policy, not 3 (int). "
        'Write for example wd_policy="no_bias_norm".',
    ),
    "selector as policy": Case(
        net,
        is_norm,
        TypeError,
        "`wd_policy` must be a name, a mapping, a callable or a policy, not is_norm "
        "(Predicate). Write wd_policy=exclude(is_norm) to exempt it, or "
        "only(is_norm) to decay no other.",
    ),
    "class as policy": Case(
        net,
        nn.LayerNorm,
        TypeError,
        "`wd_policy` must be a name, ... not <class 'torch.nn.modules.normalization."
        "LayerNorm'> (type). Write wd_policy=exclude(nn.LayerNorm) to exempt it, or "
        "only(nn.LayerNorm) to decay no other.",
    ),
    "regex as policy": Case(
        net,
        re.compile("bias$"),
        TypeError,
        "`wd_policy` must be a name, ... not re.compile('bias$') (Pattern). Write "
        "wd_policy=exclude(re.compile('bias$')) to exempt it, or "
        "only(re.compile('bias$')) to decay no other.",
    ),
    "glob as policy": Case(
        net,
        "*.bias",
        ValueError,
        "`wd_policy` '*.bias' is a selector and not the name of a policy. Write "
        "wd_policy=exclude('*.bias') to exempt it, or only('*.bias') to decay no "
        "other.",
    ),
    "path as policy": Case(
        net,
        "0.bias",
        ValueError,
        "`wd_policy` '0.bias' is a selector and not the name of a policy. Write "
        "wd_policy=exclude('0.bias') to exempt it, or only('0.bias') to decay no "
        "other.",
    ),
    "names as policy": Case(
        net,
        ("no_bias", "no_norm"),
        TypeError,
        "`wd_policy` must be a name, ... not ('no_bias', 'no_norm') (tuple). Write "
        'wd_policy=named("no_bias") * named("no_norm").',
    ),
    "names beside others as policy": Case(
        net,
        ["no_bias", nn.LayerNorm, "head.*"],
        TypeError,
        "`wd_policy` must be a name, ... not ['no_bias', <class ... (list). Write "
        'wd_policy=named("no_bias") * exclude(nn.LayerNorm, "head.*").',
    ),
    "words as policy": Case(
        net,
        ["bias", "LayerNorm.weight"],
        TypeError,
        "`wd_policy` must be a name, ... not ['bias', 'LayerNorm.weight'] (list). "
        'Write wd_policy="no_bias_norm", which knows norms by their class: a word such '
        "as 'LayerNorm.weight' misses those that a model calls otherwise.",
    ),
    "words beside others as policy": Case(
        net,
        ["bias", "ln_", "pos_embed"],
        TypeError,
        "`wd_policy` must be a name, ... not ['bias', 'ln_', 'pos_embed'] (list). "
        'Write wd_policy=named("no_bias_norm") * exclude("*pos_embed*"), which knows '
        "norms by their class: a word such as 'ln_' misses those that a model calls "
        "otherwise.",
    ),
    "words beside a number as policy": Case(
        net,
        ["bias", "LayerNorm.weight", 3],
        TypeError,
        "`wd_policy` must be a name, ... not ['bias', 'LayerNorm.weight', 3] (list). "
        'Write for example wd_policy="no_bias_norm".',
    ),
    "words without norms as policy": Case(
        net,
        ["bias", "pos_embed"],
        TypeError,
        "`wd_policy` must be a name, ... not ['bias', 'pos_embed'] (list). Write "
        'wd_policy=exclude("*bias*", "*pos_embed*").',
    ),
    "selectors as policy": Case(
        net,
        (is_norm, "*.bias", nn.Embedding),
        TypeError,
        "`wd_policy` must be a name, ... (tuple). Write "
        'wd_policy=exclude(is_norm, "*.bias", nn.Embedding).',
    ),
    "set as policy": Case(
        net,
        {"pos_embed", "*.bias"},
        TypeError,
        "`wd_policy` must be a name, ... (set). Write "
        'wd_policy=exclude("*.bias", "*pos_embed*").',
    ),
    "numbers as policy": Case(
        net,
        (0.1, 0.0),
        TypeError,
        "`wd_policy` must be a name, ... not (0.1, 0.0) (tuple). Write for example "
        'wd_policy="no_bias_norm".',
    ),
    "selector that cannot be typed as policy": Case(
        net,
        [nn.Linear(2, 2)],
        TypeError,
        "`wd_policy` must be a name, ... not [Linear(...)] (list). Write for example "
        'wd_policy="no_bias_norm".',
    ),
    "selectors of which one cannot be typed as policy": Case(
        net,
        [is_norm, nn.Linear(2, 2)],
        TypeError,
        "`wd_policy` must be a name, ... not [is_norm, Linear(...)] (list). Write for "
        'example wd_policy="no_bias_norm".',
    ),
    "nothing as policy": Case(
        net,
        (),
        TypeError,
        "`wd_policy` must be a name, ... not () (tuple). Write for example "
        'wd_policy="no_bias_norm".',
    ),
    "module as policy": Case(
        net,
        net()[0],
        TypeError,
        "`wd_policy` must be a name, a mapping, a callable or a policy, not a Linear. "
        'Write for example wd_policy="no_bias_norm".',
    ),
    "uncalled": Case(
        net,
        exclude,
        TypeError,
        "`wd_policy` must be a policy, and exclude is what makes one. Write for "
        'example wd_policy=exclude("*.bias").',
    ),
    "misspelt attribute": Case(
        net,
        reads_misspelt,
        ValueError,
        "`wd_policy` reads_misspelt failed for '0.weight' (shape 4 x 3): "
        "AttributeError: ParameterInfo has no attribute 'nmae'. Read one of name, "
        "names, leaf, owner, path, parameter, shape, ndim, group, elsewhere, own_name.",
    ),
    "searched as a text": Case(
        net,
        searches_info,
        TypeError,
        "`wd_policy` searches_info failed for '0.weight' (shape 4 x 3): TypeError: "
        "... 'StrictInfo' is not ...iterable",
    ),
    "glob matches nothing": Case(
        net,
        exclude("0.wieght"),
        ValueError,
        "'0.wieght' in `wd_policy` matches none of 4 parameters; the closest names are "
        "'0.weight', '1.weight', '...'. Correct it, or pass missing_ok=True to its "
        "policy.",
    ),
    "last word alone": Case(
        net,
        exclude("bias"),
        ValueError,
        "'bias' in `wd_policy` matches none of 4 parameters; the closest names are "
        "'0.bias', '1.bias'. A glob is for whole names: write \"*.bias\", or pass "
        "missing_ok=True to its policy.",
    ),
    "a part of a name in another case": Case(
        lora,
        exclude("*lora_a*"),
        ValueError,
        "'*lora_a*' in `wd_policy` matches none of 3 parameters; the closest names are "
        "'base.lora_A.weight'. Case counts: write \"*lora_A*\", or pass "
        "missing_ok=True to its policy.",
    ),
    "a misspelt part of a name": Case(
        lora,
        exclude("*.lroa_B.*"),
        ValueError,
        "'*.lroa_B.*' in `wd_policy` matches none of 3 parameters; the closest names "
        "are 'base.lora_B.weight', 'base.lora_A.weight', 'lm_head.weight'. Correct it, "
        "or pass missing_ok=True to its policy.",
    ),
    "regex matches nothing": Case(
        net,
        exclude(re.compile(r"0\.wieght$")),
        ValueError,
        r"re.compile('0\\.wieght$') in `wd_policy` matches none of 4 parameters; the "
        "closest names are '0.weight', '1.weight', '...'. Correct it, or pass "
        "missing_ok=True to its policy.",
    ),
    "second glob of a mapping matches nothing": Case(
        pairs,
        {"*.bias": 0, "1.gain": 0},
        ValueError,
        "'1.gain' in `wd_policy` matches none of 4 parameters; the closest names are "
        "'1.bias', '...', '...'. Correct it, or pass missing_ok=True to its policy.",
    ),
    "glob of a product matches nothing": Case(
        net,
        exclude("*.bias") * scale("1.gain", by=0.5),
        ValueError,
        "'1.gain' in `wd_policy` matches none of 4 parameters; the closest names are "
        "'1.bias', '...', '...'. Correct it, or pass missing_ok=True to its policy.",
    ),
    "module matches nothing": Case(
        net,
        exclude(nn.Linear(2, 2)),
        ValueError,
        "<Linear instance> in `wd_policy` matches none of 4 parameters. Correct it, or "
        "pass missing_ok=True to its policy.",
    ),
    "parameter matches nothing": Case(
        bare,
        only(nn.Parameter(torch.ones(7))),
        ValueError,
        "<parameter of shape (7,)> in `wd_policy` matches none of 4 parameters. "
        "Correct it, or pass missing_ok=True to its policy.",
    ),
    "negative": at_weight(-0.1, FINITE),
    "infinite": at_weight(math.inf, FINITE),
    "nan": at_weight(math.nan, FINITE),
    "string": at_weight("decay", NUMBER),
    "None": at_weight(None, NUMBER),
    "list": at_weight([1], NUMBER),
    "tensor": at_weight(torch.tensor(0.5), NUMBER),
    "negative of a bare tensor": Case(
        bare,
        returns(-1),
        ValueError,
        "`wd_policy` returned -1 for parameter 0 of group 0 (shape 4 x 3); "
        f"{FINITE}. {MULTIPLIER}",
    ),
    "form returned is unknown": Case(
        pairs,
        lambda info: Decay(1, "L2"),
        ValueError,
        "`wd_policy` <lambda at test_errors.py:...> failed for '0.weight' (shape 4 x "
        f"3): ValueError: `form` must be {FORMS} or None, not 'L2'. Write "
        'for example Decay(1, "l2").',
    ),
    "callable raises": Case(
        pairs,
        raises,
        ValueError,
        "`wd_policy` raises failed for '0.weight' (shape 4 x 3): KeyError: 'gain'",
    ),
    "callable raises TypeError on the unknown": Case(
        flattened,
        compares_ndim,
        ValueError,
        "`wd_policy` compares_ndim read `ndim` of 'w' (shape 9), which is lost where "
        "FSDP flattened it. Wrap with use_orig_params=True and pass model=model, or "
        "decide before wrapping.",
    ),
    "selector forgets to return": Case(
        pairs,
        exclude(forgets),
        TypeError,
        "`wd_policy` exclude(forgets) failed for '0.weight' (shape 4 x 3): TypeError: "
        "the selector forgets must return True or False, not None (NoneType). Write "
        "for example return bool(...).",
    ),
    "flat parameter": Case(
        flat,
        "all",
        ValueError,
        "parameter 0 of group 0 (shape 9) is FSDP's flat parameter, of which no single "
        "decay is right. Wrap with use_orig_params=True.",
    ),
    "lost shape": Case(
        flattened,
        exclude(is_vector),
        ValueError,
        "`wd_policy` exclude(is_vector) needs the shape of 'w' (shape 9), which is "
        "lost where FSDP flattened it. Wrap with use_orig_params=True and pass "
        "model=model, or decide before wrapping.",
    ),
    "callable reads a lost shape": Case(
        flattened,
        reads_shape,
        ValueError,
        "`wd_policy` reads_shape read `shape` of 'w' (shape 9), which is lost where "
        "FSDP flattened it. Wrap with use_orig_params=True and pass model=model, or "
        "decide before wrapping.",
    ),
}
TABLE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def whole(text):
    """Match the whole message; three dots stand for any text."""
    return rf"^{re.escape(text).replace(re.escape('...'), '.*')}$"


@TABLE
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_constructor_refuses_with_the_whole_text(optimizer, case):
    with pytest.raises(case.kind, match=whole(case.text)) as caught:
        optimizer(case.params(), lr=0.1, weight_decay=0.1, wd_policy=case.policy)
    assert type(caught.value) is case.kind


def test_message_gives_three_of_the_closest_names():
    with pytest.raises(ValueError, match="matches none of 4 parameters") as caught:
        SGD(net(), lr=0.1, wd_policy=exclude("0.wieght"))
    _, told, _ = re.split(r"closest names are |\. Correct it", str(caught.value))
    assert len(told.split(", ")) == 3


# torch wants names in every group or in none.
READ = {pairs: "named_parameters", flattened: "named_parameters"}


@TABLE
def test_refused_group_changes_nothing_and_can_be_added_again(case):
    read = READ.get(case.params, "parameters")
    kept, late = net(), nn.Linear(2, 2)
    optimizer = AdamW(
        getattr(kept, read)(), weight_decay=0.1, wd_policy="no_bias_norm", foreach=False
    )
    before = copy.deepcopy(optimizer.state_dict())
    report = str(optimizer.decay_report())
    group = {"params": case.params(), "wd_policy": case.policy, "lr": 0.5}
    with pytest.raises(case.kind, match=r"wd_policy|flat parameter"):
        optimizer.add_param_group(group)
    assert optimizer.state_dict() == before
    assert str(optimizer.decay_report()) == report
    optimizer.add_param_group({"params": getattr(late, read)(), "wd_policy": "no_bias"})
    assert [row.weight_decay for row in optimizer.decay_report().rows[-2:]] == [0.1, 0]


def test_other_tensors_in_place_of_a_removed_group_are_decided_anew():
    optimizer = SGD(net().parameters(), lr=0.1, weight_decay=1.0, wd_policy="no_bias")
    optimizer.param_groups.pop()
    strangers = [nn.Parameter(torch.ones(n, 7)) for n in range(4)]
    with pytest.raises(ValueError, match="only the tensor is known"):
        optimizer.add_param_group({"params": strangers})


def test_refused_dict_can_be_mended_and_added():
    optimizer = SGD(net(), lr=0.1, weight_decay=1.0, wd_policy="no_bias_norm")
    head = nn.Linear(2, 2)
    group = {"params": head.parameters(), "wd_policy": exclude("gain")}
    with pytest.raises(ValueError, match="closest names are 'bias', 'weight'"):
        optimizer.add_param_group(group)
    optimizer.add_param_group({**group, "wd_policy": exclude("weight")})
    assert [row.weight_decay for row in optimizer.decay_report().rows[-2:]] == [0, 1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", [None, "all", "no_bias_norm"])
def test_parameter_in_none_of_the_modules_is_refused(optimizer, policy):
    strangers = [nn.Parameter(torch.ones(2, 3))]
    model = net()
    with pytest.raises(
        ValueError,
        match=whole(
            "parameter 4 of group 0 (shape 2 x 3), at position 4 of group 0, is in "
            "none of the modules given as `model`. Pass every module that holds "
            "parameters: model=[model, ...]."
        ),
    ):
        optimizer(
            [*model.parameters(), *strangers], lr=0.1, model=model, wd_policy=policy
        )


@pytest.mark.parametrize("model", [3, "net", [nn.Linear(2, 2), 3], {"net": 1}], ids=str)
def test_model_of_another_kind_is_refused(model):
    with pytest.raises(TypeError, match=r"^`model` must be a module or a sequence of"):
        AdamW(bare(), model=model, wd_policy="no_bias_norm")


MISWRITTEN = {
    "selector": (
        lambda: exclude(3),
        TypeError,
        "a selector must be a glob, a compiled regular expression, a module class, a "
        "module, a parameter or a callable, not 3 (int). Write for example "
        '"*.bias" or nn.LayerNorm.',
    ),
    "another class": (
        lambda: only(dict),
        TypeError,
        "a selector must be a glob, a compiled regular expression, a module class, a "
        "module, a parameter or a callable, not <class 'dict'> (type). Write for "
        'example "*.bias" or nn.LayerNorm.',
    ),
    "no selector": (
        lambda: exclude(),
        ValueError,
        '`exclude` needs at least one selector. Write for example exclude("*.bias").',
    ),
    "scale by": (
        lambda: scale("*", by=-1),
        ValueError,
        "a multiplier must be finite and >= 0, not -1. Use 0 to exempt a parameter, 1 "
        "to decay it in full.",
    ),
    "scale by text": (
        lambda: scale("*", by="0.1"),
        TypeError,
        "a multiplier must be a number, not '0.1'. Use 0 to exempt a parameter, 1 to "
        "decay it in full.",
    ),
    "form": (
        lambda: form("L2"),
        ValueError,
        f"`form` takes one of {FORMS} first, not 'L2'. Write for example "
        'form("l2", "*.weight").',
    ),
    "Decay form": (
        lambda: Decay(1, "adamw"),
        ValueError,
        f"`form` must be {FORMS} or None, not 'adamw'. Write for example "
        'Decay(1, "l2").',
    ),
    "target": (
        lambda: towards("start"),
        ValueError,
        "a target must be a finite number or \"init\", not 'start'. Write for example "
        "towards(1.0, is_norm).",
    ),
    "target that is no number": (
        lambda: towards([1.0], is_norm),
        TypeError,
        'a target must be a finite number or "init", not [1.0]. Write for example '
        "towards(1.0, is_norm).",
    ),
    "infinite target": (
        lambda: Decay(1, target=math.inf),
        ValueError,
        'a target must be a finite number or "init", not inf. Write for example '
        "towards(1.0, is_norm).",
    ),
    "fixed decay that is no number": (
        lambda: fixed("*.bias", 0.1),
        TypeError,
        f"a fixed decay must be a number, not '*.bias'. {FIXED}",
    ),
    "fixed decay that is left out": (
        lambda: fixed(None, "*.bias"),
        TypeError,
        f"a fixed decay must be a number, not None. {FIXED}",
    ),
    "negative fixed decay": (
        lambda: fixed(-0.1),
        ValueError,
        f"a fixed decay must be finite and >= 0, not -0.1. {FIXED}",
    ),
    "fixed decay that is NaN": (
        lambda: Decay(fixed=math.nan),
        ValueError,
        f"a fixed decay must be finite and >= 0, not nan. {FIXED}",
    ),
    "mapping value": (
        lambda: first_match({"*.bias": math.nan}),
        ValueError,
        "`wd_policy` at '*.bias': a multiplier must be finite and >= 0, not nan. Use 0 "
        "to exempt a parameter, 1 to decay it in full.",
    ),
    "mapping value of another kind": (
        lambda: first_match({nn.LayerNorm: None}),
        TypeError,
        "`wd_policy` at nn.LayerNorm: a multiplier must be a number, not None. Use 0 "
        "to exempt a parameter, 1 to decay it in full.",
    ),
}


@pytest.mark.parametrize(("make", "kind", "text"), MISWRITTEN.values(), ids=MISWRITTEN)
def test_miswritten_policy_is_refused_where_it_is_written(make, kind, text):
    with pytest.raises(kind, match=whole(text)):
        make()


TEXTS_FOR_NUMBERS = {
    "rate": ({"lr": "1e-3"}, "`lr` must be a number, not '1e-3' (str). Pass lr=0.001"),
    "decay": (
        {"lr": 0.1, "weight_decay": "1e-2"},
        "`weight_decay` must be a number, not '1e-2' (str). Pass weight_decay=0.01",
    ),
}
YAML = "; YAML reads a number with e and without a dot as a text."


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("given", "text"), TEXTS_FOR_NUMBERS.values(), ids=TEXTS_FOR_NUMBERS
)
def test_text_for_a_number_is_told(optimizer, given, text):
    with pytest.raises(TypeError, match=whole(text + YAML)):
        optimizer(net().parameters(), **given)
    group = {"params": list(net().parameters()), **given}
    text = text.replace("` must", "` of a group must")
    with pytest.raises(TypeError, match=whole(text + YAML)):
        optimizer([group], lr=0.1)


def test_text_for_a_number_is_told_without_a_guess():
    with pytest.raises(TypeError, match=r"not 'small' \(str\)\. Pass for example lr="):
        SGD(net().parameters(), lr="small")
    with pytest.raises(TypeError, match=r"`betas` must be a number, .* Pass 0\.9;"):
        AdamW(net().parameters(), betas=("0.9", 0.95))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_exempt_warns_once(optimizer):
    with pytest.warns(UserWarning, match="exempts all") as caught:
        optimizer(net(), lr=0.1, weight_decay=0.1, wd_policy="none")
    (warning,) = caught
    assert str(warning.message) == (
        "`wd_policy` exclude(everything) exempts all 4 parameters. "
        "Pass weight_decay=0 instead if nothing is to decay."
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_decay_with_a_policy_warns_once(optimizer):
    with pytest.warns(UserWarning, match="has no effect") as caught:
        optimizer(net(), lr=0.1, weight_decay=0.0, wd_policy="no_bias")
    (warning,) = caught
    assert str(warning.message) == (
        "`weight_decay` is 0 in every group, so `wd_policy` exclude(is_bias) has no "
        "effect. Pass weight_decay=0.01, or the value you want."
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_policy_and_no_decay_is_silent(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer(net(), lr=0.1, weight_decay=0.0)
        optimizer(flat(), lr=0.1, weight_decay=0.1)


NAMES = [name for name, _ in net().named_parameters()]


def saved(wd_policy, **arguments):
    optimizer = SGD(net(), lr=0.1, weight_decay=0.1, wd_policy=wd_policy, **arguments)
    return optimizer, optimizer.state_dict()


def test_another_policy_on_resume_warns_once_and_names_what_changed():
    _, state_dict = saved("all")
    optimizer, _ = saved("no_bias_norm")
    with pytest.warns(UserWarning, match="another weight decay policy") as caught:
        optimizer.load_state_dict(state_dict)
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("'0.bias'", "'1.weight'"))
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("changed", "ending"), [(3, "decays in full (l2). The"), (4, " and 1 more. The")]
)
def test_another_policy_on_resume_names_three_parameters(changed, ending):
    _, state_dict = saved(dict.fromkeys(NAMES[:changed], 0.5))
    optimizer, _ = saved("all")
    with pytest.warns(UserWarning, match="another weight decay policy") as caught:
        optimizer.load_state_dict(state_dict)
    told = str(caught[0].message)
    changes, _, _ = told.partition(" policy of the constructor")
    assert [name in changes for name in NAMES] == [True] * 3 + [False]
    assert f"{ending} policy of the constructor is kept" in told


def test_same_policy_on_resume_is_silent():
    _, state_dict = saved("no_bias_norm")
    optimizer, _ = saved("no_bias_norm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state_dict)
