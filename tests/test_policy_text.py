"""Policies as text: what ``repr`` prints is read back; errors point at the place."""

import pickle
import re
import sys

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, policies
from selective_optim.__main__ import main
from selective_optim.policies import (
    Decay,
    diff,
    exclude,
    first_match,
    form,
    is_bias,
    is_embedding,
    is_norm,
    is_vector,
    layerwise,
    marked,
    named,
    only,
    parse,
    scale,
    towards,
)
from selective_optim.policies.named import NAMED, PolicyTextError
from selective_optim.policies.selectors import Selector, as_selector
from tests.test_errors import whole


class LlamaStyleNorm(nn.Module):
    """A class of a model's own, known by its name alone."""


def twin_classes():
    """Make two classes of one name, as libraries do with LayerNorm2d."""
    return [type("TwinNorm", (nn.Module,), {"__module__": m}) for m in ("one", "two")]


POLICIES = [
    *NAMED.values(),
    exclude("*.bias", is_norm),
    only("head.*", nn.LayerNorm, LlamaStyleNorm, missing_ok=True),
    scale(is_bias, by=0.1),
    scale("*", by=1e-05),
    form("l2"),
    form("decoupled", "*.weight", missing_ok=True),
    form("cautious") * towards(0.5, is_norm, nn.Linear) * towards(-1e-3, "*.a"),
    towards("init", missing_ok=True) * form("independent") * form("corrected", "b"),
    first_match({is_norm: Decay(1, target=1), "*": Decay(2, "l2", target="init")}),
    layerwise(0.75),
    layerwise(0.5, layers="blocks.*"),
    marked(),
    first_match({"*.bias": 0, is_norm: 0.5, nn.Linear: Decay(2, "l2")}),
    first_match({re.compile(r"\.bias$"): True}, missing_ok=True),
    exclude(re.compile("Bias|NORM", re.IGNORECASE | re.VERBOSE)),
    exclude(re.compile("x" * 300)),
    exclude("it's", 'a "b"', "back\\slash", "é*"),
    exclude(is_bias) * layerwise(0.75) * form("l2"),
    exclude(is_bias) * (layerwise(0.75) * form("l2")),
    exclude(is_bias | is_norm, is_vector & ~is_embedding, ~(is_bias | nn.Linear)),
    only(("head.*" | is_bias) & "*.weight", "a" | (is_bias & is_norm)),
    named("timm") * marked() * scale(nn.Embedding, by=0.5),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_what_repr_prints_is_read_back(policy):
    assert parse(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy


READ = {
    "a mapping": (
        "{'*.bias': 0, is_norm: 0.5}",
        first_match({"*.bias": 0, is_norm: 0.5}),
    ),
    "names": ("no_bias * timm", named("no_bias") * named("timm")),
    "a name": (" no_bias\n", named("no_bias")),
    "lines": ("exclude(\n    is_bias,\n)\n", exclude(is_bias)),
    "a name in a call": ("named('timm')", named("timm")),
    "torch's path": ("exclude(torch.nn.LayerNorm)", exclude(nn.LayerNorm)),
    "own class": ("exclude(LlamaStyleNorm)", exclude(LlamaStyleNorm)),
    "globs joined": (
        "exclude('a' | ~'b')",
        exclude(as_selector("a") | ~as_selector("b")),
    ),
    "flags": (
        "exclude(re.compile('a', re.I))",
        exclude(re.compile("a", re.IGNORECASE)),
    ),
}


@pytest.mark.parametrize(("text", "expected"), READ.values(), ids=READ)
def test_text_reads_as(text, expected):
    assert parse(text) == expected


def test_class_that_shares_its_name_is_named_by_its_path(monkeypatch):
    one, two = twin_classes()
    for cls in (one, two):
        module = type(sys)(cls.__module__)
        module.TwinNorm = cls
        monkeypatch.setitem(sys.modules, cls.__module__, module)
    assert repr(exclude(two)) == "exclude(two.TwinNorm)"
    assert parse("exclude(two.TwinNorm)") == exclude(two)
    with pytest.raises(
        ValueError, match=r"the name of 2 classes\. Write one\.TwinNorm"
    ):
        parse("exclude(TwinNorm)")


EXAMPLE = "Write for example exclude('*.bias', is_norm) * layerwise(0.75)."
WRONG = {
    "unpacked": ("{**{}}", "1: {**{}} is no selector, number or text.", None),
    "misspelt predicate": (
        "exclude(is_nrom)",
        "9: is_nrom is no selector, and no module class that is loaded.",
        "Did you mean is_norm? Else import the module of the class.",
    ),
    "misspelt class": (
        "exclude(nn.LayerNrom)",
        "9: nn.LayerNrom is no selector, and no module class that is loaded.",
        "Did you mean nn.LayerNorm? Else import the module of the class.",
    ),
    "misspelt function": (
        "exclude('*.bias') * exlude(is_norm)",
        "21: 'exlude' is the function of no policy.",
        "Did you mean exclude?",
    ),
    "misspelt name": (
        "nobias * no_norm",
        "1: 'nobias' is the name of no policy.",
        "Did you mean no_bias?",
    ),
    "not called": (
        "exclude",
        "1: exclude is what makes a policy, and not called.",
        EXAMPLE,
    ),
    "predicate called": (
        "exclude(is_bias())",
        "9: is_bias is a selector and takes nothing.",
        "Write is_bias.",
    ),
    "selector as policy": (
        "is_bias | is_norm",
        "1: is_bias | is_norm is a selector, and no policy.",
        "Write exclude(is_bias | is_norm) to exempt it, or only(is_bias | is_norm) to "
        "decay no other.",
    ),
    "predicate as policy": (
        "is_bias",
        "1: is_bias is a selector, and no policy.",
        "Write exclude(is_bias) to exempt it, or only(is_bias) to decay no other.",
    ),
    "another sign": (
        "exclude('*.bias') + no_norm",
        "1: exclude('*.bias') + no_norm joins policies with no `*`.",
        EXAMPLE,
    ),
    "a number": (
        "no_bias * 0.5",
        "11: 0.5 is a number, and no policy.",
        "Write scale(everything, by=0.5).",
    ),
    "what the function refuses": (
        "no_bias * scale('*', by=-1)",
        "11: a multiplier must be finite and >= 0, not -1. Use 0 to exempt a "
        "parameter, 1 "
        "to decay it in full.",
        None,
    ),
    "unknown keyword": (
        "layerwise(0.75, layer='x')",
        "1: layerwise() got an unexpected keyword argument 'layer'.",
        EXAMPLE,
    ),
    "after an accent": (
        "exclude('é', is_nrom)",
        "14: is_nrom is no selector, and no module class that is loaded.",
        "Did you mean is_norm? Else import the module of the class.",
    ),
    "code": (
        "exclude(__import__('os').getcwd())",
        "9: __import__('os').getcwd() is no selector, number or text.",
        EXAMPLE,
    ),
    "attribute of a class": (
        "exclude(nn.Linear.__init__)",
        "9: nn.Linear.__init__ is no selector, and no module class that is loaded.",
        None,
    ),
    "comprehension": (
        "exclude(*[x for x in ()])",
        "9: *[x for x in ()] is no selector, number or text.",
        EXAMPLE,
    ),
    "f-string": (
        "exclude(f'{x}')",
        "9: f'{x}' is no selector, number or text.",
        EXAMPLE,
    ),
    "bytes": ("exclude(b'x')", "9: b'x' is no selector, number or text.", EXAMPLE),
    "stars": ("exclude(**{'a': 1})", "11: `**` cannot stand here.", EXAMPLE),
    "regex": (
        "exclude(re.compile('('))",
        "9: missing ), unterminated subpattern at position 0.",
        EXAMPLE,
    ),
    "regex of nothing": (
        "exclude(re.compile())",
        "9: re.compile takes a text and flags.",
        r"Write for example re.compile('\\.bias$').",
    ),
    "regex of a selector": (
        "exclude(re.compile(is_bias))",
        "9: re.compile takes a text and flags.",
        r"Write for example re.compile('\\.bias$').",
    ),
    "regex with too much": (
        "exclude(re.compile('a', re.I, re.M))",
        "9: re.compile takes a text and flags.",
        r"Write for example re.compile('\\.bias$').",
    ),
    "regex flags": (
        "exclude(re.compile('a', os.O_RDONLY))",
        "25: os.O_RDONLY is no flag.",
        "Write for example re.IGNORECASE.",
    ),
    "form": (
        "form('l3')",
        '1: `form` takes one of "l2", "decoupled", "independent", "corrected", '
        '"cautious" first, not \'l3\'. Write for example form("l2", "*.weight").',
        None,
    ),
    "no name": (
        "named(0.5)",
        "1: `named` takes a name, not 0.5 (float). Write for example "
        'named("no_bias_norm").',
        None,
    ),
    "target": (
        "towards('start')",
        "1: a target must be a finite number or \"init\", not 'start'. Write for "
        "example towards(1.0, is_norm).",
        None,
    ),
}


@pytest.mark.parametrize(("text", "told", "rest"), WRONG.values(), ids=WRONG)
def test_error_points_at_the_place(text, told, rest):
    with pytest.raises(PolicyTextError) as caught:
        parse(text)
    message, shown, pointer, *last = str(caught.value).split("\n")
    assert message == f"`wd_policy` cannot be read at character {told}"
    assert shown == f"    {text}"
    place = int(told.partition(":")[0])
    assert pointer == f"    {' ' * (place - 1)}^"
    assert last == ([rest] if rest else last[:1])


# Python's own words for what its grammar refuses differ between its versions.
SYNTAX = {
    "exclude(is_bias": 8,
    "exclude(is_bias) exclude(is_norm)": 18,
    "no_bias * (": 11,
}


@pytest.mark.parametrize(("text", "place"), SYNTAX.items(), ids=SYNTAX)
def test_syntax_error_points_at_the_place(text, place):
    with pytest.raises(
        PolicyTextError, match=rf"cannot be read at character {place}: "
    ):
        parse(text)


def test_long_text_is_cut_around_the_place():
    text = " * ".join(["no_bias"] * 30 + ["no_bais"] + ["no_norm"] * 30)
    with pytest.raises(PolicyTextError) as caught:
        parse(text)
    _, shown, pointer, _ = str(caught.value).split("\n")
    assert shown[pointer.index("^") :].startswith("no_bais")
    assert len(shown) == 4 + 76  # as a traceback is indented


ENDLESS = {  # the last is too deep for the reader, and not for Python's parser
    "signs": "~" * 90_000 + "x",
    "names": " * ".join(["no_bias"] * 9_000),
    "fewer names": " * ".join(["no_bias"] * 1_500),
}


@pytest.fixture
def _a_thousand_calls():
    """Python's own limit, which compilers raise for all that comes after them."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("_a_thousand_calls")
@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_text_without_end_is_refused(text):
    with pytest.raises(PolicyTextError) as caught:
        parse(text)
    told, shown, *_, rest = str(caught.value).split("\n")
    assert told.startswith("`wd_policy` cannot be read at character 1: ")
    assert (shown, rest) == (f"    {text[:76]}", EXAMPLE)


@pytest.mark.parametrize("text", [None, 3, is_bias])
def test_parse_takes_a_text(text):
    with pytest.raises(TypeError, match=r"^`parse` takes a text, not .*\. Write for"):
        parse(text)


# Wherever a name is.


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def exempt(optimizer):
    return [row.name for row in optimizer.decay_report().rows if not row.weight_decay]


TEXT = "exclude('2.*') * scale(is_bias, by=0.5)"


def test_text_stands_wherever_a_name_does(capsys):
    model = net()
    optimizer = AdamW(model.parameters(), weight_decay=0.1, wd_policy=TEXT)
    assert optimizer.wd_policy == exclude("2.*") * scale(is_bias, by=0.5)
    assert exempt(optimizer) == ["2.weight", "2.bias"]
    optimizer.wd_policy = "no_norm * exclude('2.bias')"
    assert exempt(optimizer) == ["1.weight", "1.bias", "2.bias"]
    group = {"params": list(model.parameters()), "wd_policy": "{'0.weight': 0}"}
    assert exempt(SGD([group], lr=0.1, weight_decay=0.1, model=model)) == ["0.weight"]
    assert len(diff(model, "all", TEXT)) == 4


def test_text_is_refused_before_anything_changes():
    optimizer = AdamW(net().parameters(), weight_decay=0.1, wd_policy="no_bias")
    with pytest.raises(PolicyTextError):
        optimizer.wd_policy = "exclude(is_bais)"
    assert repr(optimizer.wd_policy) == "exclude(is_bias)"


def test_command_takes_texts(capsys):
    target = f"{__name__.removeprefix('issue.')}:net"
    texts = ["--policy", "exclude(is_bias | is_norm)", "--against", "{'*.bias': 0}"]
    assert main(["audit", target, *texts]) == 0
    printed = capsys.readouterr().out
    assert "exclude(is_bias | is_norm) on Sequential" in printed
    assert "1 parameter differs" in printed


def test_command_shows_the_place_of_an_error(capsys):
    assert main(["audit", "torch.nn:Tanh", "--policy", "exclude(is_nrom)"]) == 2
    assert capsys.readouterr().err == (
        "selective_optim: `wd_policy` cannot be read at character 9: is_nrom is no "
        "selector, and no module class that is loaded.\n"
        "    exclude(is_nrom)\n            ^\n"
        "Did you mean is_norm? Else import the module of the class.\n"
    )


# Selectors and policies joined in Python.

JOINED = {
    "or": (is_bias | is_norm, "is_bias | is_norm", [0, 1, 1, 1, 0, 1]),
    "and": (is_bias & is_norm, "is_bias & is_norm", [0, 0, 0, 1, 0, 0]),
    "not": (~is_norm, "~is_norm", [1, 1, 0, 0, 1, 1]),
    "glob first": ("0.*" & is_bias, "'0.*' & is_bias", [0, 1, 0, 0, 0, 0]),
    "class first": (
        nn.LayerNorm | is_bias,
        "nn.LayerNorm | is_bias",
        [0, 1, 1, 1, 0, 1],
    ),
    "nested": (
        (is_bias | is_norm) & ~as_selector("1.bias"),
        "(is_bias | is_norm) & ~'1.bias'",
        [0, 1, 1, 0, 0, 1],
    ),
    "flat": (
        is_bias | is_norm | "2.weight",
        "is_bias | is_norm | '2.weight'",
        [0, 1, 1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize(("selector", "text", "expected"), JOINED.values(), ids=JOINED)
def test_selectors_join(selector, text, expected):
    assert isinstance(selector, Selector)
    assert repr(selector) == text
    model = net()
    rows = AdamW(model, weight_decay=1.0, wd_policy=exclude(selector)).decay_report()
    assert [int(not row.weight_decay) for row in rows.rows] == expected
    assert pickle.loads(pickle.dumps(selector)) == selector


def test_a_glob_inside_must_match_something():
    with pytest.raises(ValueError, match="'haed' in `wd_policy` matches none"):
        AdamW(
            net(), weight_decay=1.0, wd_policy=exclude(is_bias & ~as_selector("haed"))
        )


def test_needs_of_the_parts_are_needs_of_the_whole():
    with pytest.raises(ValueError, match="needs names"):
        AdamW([nn.Parameter(torch.ones(2))], wd_policy=exclude(~(is_vector & is_bias)))


def test_tied_parameter_matches_a_negation_at_no_place():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 2)
            self.head = nn.Linear(2, 4)
            self.head.weight = self.embed.weight

    optimizer = AdamW(Tied(), weight_decay=1.0, wd_policy=exclude(~is_embedding))
    assert exempt(optimizer) == ["head.bias"]


TRIED = {
    "selector called": (
        lambda: is_bias(),
        "`is_bias` is a selector as it stands, and not what makes one. Write for "
        "example "
        "exclude(is_bias).",
    ),
    "times a number": (
        lambda: exclude(is_bias) * 0.5,
        "policies multiply with policies, not exclude(is_bias) (Rule) * 0.5 (float). "
        "Write "
        "exclude(is_bias) * scale(everything, by=0.5).",
    ),
    "number times": (
        lambda: 2 * exclude(is_bias),
        "policies multiply with policies, not 2 (int) * exclude(is_bias) (Rule). Write "
        "exclude(is_bias) * scale(everything, by=2).",
    ),
    "times a name": (
        lambda: exclude(is_bias) * "no_norm",
        "policies multiply with policies, not exclude(is_bias) (Rule) * 'no_norm' "
        "(str). "
        "Write exclude(is_bias) * named('no_norm').",
    ),
    "times a selector": (
        lambda: exclude(is_bias) * is_norm,
        "policies multiply with policies, not exclude(is_bias) (Rule) * is_norm "
        "(Predicate). Write exclude(is_bias) * exclude(is_norm) to exempt it, or "
        "only(is_norm) to decay no other.",
    ),
    "plus": (
        lambda: exclude(is_bias) + named("timm"),
        "policies are joined with `*`, not with `+`. Write exclude(is_bias) * "
        "named('timm').",
    ),
    "or": (
        lambda: exclude(is_bias) | marked(),
        "policies are joined with `*`, not with `|`. Write exclude(is_bias) * "
        "marked().",
    ),
    "and": (
        lambda: exclude(is_bias) & {"*": 1},
        "policies are joined, not exclude(is_bias) (Rule) & {'*': 1} (dict). Write "
        "exclude(is_bias) * as_policy(...).",
    ),
    "named with a list": (
        lambda: named(["no_bias"]),
        "`named` takes a name, not ['no_bias'] (list). Write for example "
        'named("no_bias_norm").',
    ),
    "selector or policy": (
        lambda: is_bias | exclude("a"),
        "`|` joins selectors: a selector must be a glob, a compiled regular "
        "expression, a module class, a module, a parameter or a callable, not "
        "exclude('a') (Rule). Write for example \"*.bias\" or nn.LayerNorm.",
    ),
    "selector or number": (
        lambda: is_bias | 3,
        "`|` joins selectors: a selector must be a glob, a compiled regular "
        "expression, a "
        "module class, a module, a parameter or a callable, not 3 (int). Write for "
        'example "*.bias" or nn.LayerNorm.',
    ),
}


@pytest.mark.parametrize(("tried", "text"), TRIED.values(), ids=TRIED)
def test_what_people_try_is_answered(tried, text):
    with pytest.raises(TypeError, match=whole(text)):
        tried()


def test_parse_is_public():
    assert policies.parse is parse
    assert dir(policies) == sorted(policies.__all__)
