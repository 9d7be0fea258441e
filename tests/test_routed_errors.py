"""What is wrong with routes is said at construction, with the line to type."""

import copy
import re

import pytest
import torch
from torch import nn

from selective_optim import AdamW, Muon, Routed, param_groups
from selective_optim.policies import is_hidden_matrix
from tests.support.compare import assert_same
from tests.support.routes import (
    ADAMW,
    MUON,
    Body,
    Net,
    loss_of,
    needs_muon,
    routed,
    routes,
    twins,
)

EXAMPLE = '"adamw": ("*", selective_optim.AdamW, dict(lr=3e-4))'
BODY = {"muon": (is_hidden_matrix, Body, MUON)}


def model():
    torch.manual_seed(0)
    return Net()


def bare():
    return [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]


WRONG = {
    "no mapping": (
        lambda: Routed(model(), [("*", AdamW)]),
        TypeError,
        "`routes` must be a mapping from names to selector, class and arguments, not ",
    ),
    "empty": (
        lambda: Routed(model(), {}),
        ValueError,
        f"`routes` is empty. Write for example {{{EXAMPLE}}}.",
    ),
    "no class": (
        lambda: Routed(model(), {"adamw": "*"}),
        TypeError,
        "route 'adamw' must be a name with a selector, a class and its arguments, not "
        f"'*' (str). Write for example {EXAMPLE}.",
    ),
    "arguments": (
        lambda: Routed(model(), {"adamw": ("*", AdamW, 3e-4)}),
        TypeError,
        "the arguments of route 'adamw' must be a dict, not 0.0003 (float). Write for "
        f"example {EXAMPLE}.",
    ),
    "misspelt argument": (
        lambda: Routed(model(), {"adamw": ("*", AdamW, {"beta": (0.9, 0.95)})}),
        TypeError,
        "route 'adamw' has an argument 'beta', which AdamW does not take. Did you mean "
        "'betas'?",
    ),
    "text for a number": (
        lambda: Routed(model(), {"adamw": ("*", AdamW, {"lr": "3e-4"})}),
        TypeError,
        "`lr` of route 'adamw' must be a number, not '3e-4' (str). Pass lr=0.0003; "
        "YAML reads a number with e and without a dot as a text.",
    ),
    "no optimizer": (
        lambda: Routed(model(), {"adamw": ("*", nn.Linear)}),
        TypeError,
        "`optimizer_class` must be a subclass of torch.optim.Optimizer, not ",
    ),
    "no route": (
        lambda: Routed(model(), BODY),
        ValueError,
        "no route takes 'embed.weight' (shape 7 x 6). Let the last route take the "
        f"rest: {EXAMPLE}.",
    ),
    "empty route": (
        lambda: Routed(model(), {"adamw": ("*", AdamW, ADAMW), **BODY}),
        ValueError,
        "route 'muon' takes none of 11 parameters: is_hidden_matrix matches none that "
        "'*' leave. Leave the route out, or correct its selector.",
    ),
    "glob without a match": (
        lambda: Routed(model(), routes(muon=("block.*", Body, MUON))),
        ValueError,
        "'block.*' in `routes` matches none of 11 parameters; the closest names are "
        "'blocks.0.0.weight', 'blocks.0.0.bias', 'blocks.0.1.weight'. A glob is for "
        'whole names: write "*block*".',
    ),
    "refused parameter": (
        lambda: Routed(model(), routes(muon=("blocks.*", Body, MUON))),
        ValueError,
        "route 'muon' gives 'blocks.0.0.bias' (shape 6) to Muon, which refuses it: ",
    ),
    "bare tensors": (
        lambda: Routed(bare(), routes()),
        ValueError,
        "`routes` {'muon': is_hidden_matrix, 'adamw': '*'} needs module types, and of "
        "parameter 0 of group 0 (shape 2 x 2) only the tensor is known. ",
    ),
    "policy that matches nothing": (
        lambda: routed(model(), wd_policy={"bais": 0}),
        ValueError,
        "'bais' in `wd_policy` matches none of 11 parameters; the closest names are ",
    ),
    "route of a group": (
        lambda: Routed([{"params": model(), "route": "lion"}], routes()),
        ValueError,
        "a group has the route 'lion', and the routes are 'muon', 'adamw'. Leave it "
        "out to have it decided.",
    ),
    "rest": (
        lambda: Muon(model(), rest={"momentum": 0.9}),
        TypeError,
        "route 'adamw' has an argument 'momentum', which AdamW does not take. Did you "
        "mean ",
    ),
    "no key": (
        lambda: param_groups(model(), "all", 0.1, routes={"muon": "*"}),
        ValueError,
        "what '' holds is not known; known keys are 'use_muon', 'use_fallback', "
        "'algorithm', 'kind'. Pass one of these, or say what your optimizer reads "
        "there: values={'muon': True, ...}.",
    ),
    "values": (
        lambda: param_groups(
            model(), "all", 0.1, routes={"a": "embed.*", "b": "*"}, values={"a": 1}
        ),
        ValueError,
        "`values` has none for route 'b'. Write one for each route.",
    ),
    "rate of one route": (
        lambda: param_groups(
            *(model(), "all", 0.1, {"a": 1.0}),
            routes={"a": "embed.*", "b": "*"},
            key="kind",
        ),
        ValueError,
        "`lr` has no number for route 'b'. Write lr={'b': ..., ...}, one for each "
        "route.",
    ),
}


MUONS = ("refused parameter", "rest")  # what torch's Muon says, or ours


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=[needs_muon] * (n in MUONS)) for n in WRONG]
)
def test_errors(case):
    make, kind, told = WRONG[case]
    with pytest.raises(kind, match="^" + re.escape(told)):
        make()


def test_a_refused_parameter_is_given_a_route_by_the_advice():
    one = Routed(model(), routes(muon=(is_hidden_matrix, Body, MUON)))
    assert [group["route"] for group in one.param_groups] == ["muon", "adamw"]
    before = {"norms": ("blocks.*.1.*", AdamW, ADAMW), "bias": ("*.bias", AdamW, ADAMW)}
    whole = {**before, **routes(muon=("blocks.*", Body, MUON))}
    one = Routed(model(), whole)
    assert [g["route"] for g in one.param_groups] == ["norms", "bias", "muon", "adamw"]


def grad(net):
    loss_of(net, 0).backward()


def written(one):
    one.param_groups[0]["wd_policy"] = "none"


def replaced(one):
    one.param_groups[0]["route"] = "adamw"


def stranger(one):
    del one.param_groups[0]["route"]


LATER = {
    "policy written": (written, "a `wd_policy` was written into group 0"),
    "route written": (
        replaced,
        "a group of route 'adamw' has no 'amsgrad': it was made for another class. "
        "Make a new optimizer with other routes, and load this one's state_dict() into "
        "it.",
    ),
    "route removed": (
        stranger,
        "group 0 has the route None, and the routes are 'muon', 'adamw'. Add a group "
        "by optimizer.add_param_group(dict(params=...)).",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), LATER.values(), ids=LATER)
def test_what_is_written_into_groups_is_told_and_nothing_is_stepped(spoil, told):
    net, _ = twins()
    one = routed(net)
    grad(net)
    before = copy.deepcopy(net)
    spoil(one)
    with pytest.raises(ValueError, match="^" + re.escape(told)):
        one.step()
    assert_same(net, before)


@needs_muon
def test_a_group_that_is_refused_leaves_everything_as_it_was():
    net, _ = twins()
    one = routed(net)
    groups = list(one.param_groups)
    layer = nn.Linear(3, 3)
    given = {"params": layer, "model": layer, "route": "muon", "wd_policy": "none"}
    kept = dict(given)
    with pytest.raises(ValueError, match="which refuses it: Muon only supports 2D"):
        one.add_param_group(given)
    assert given == kept
    assert list(map(id, one.param_groups)) == list(map(id, groups))
    with pytest.raises(ValueError, match="module types"):
        one.add_param_group({"params": bare()})
    assert list(map(id, one.param_groups)) == list(map(id, groups))
    grad(net)
    one.step()


def test_every_exempt_is_told_once_for_all_routes(recwarn):
    routed(model(), wd_policy="none")
    assert [str(w.message)[:40] for w in recwarn] == [
        "`wd_policy` exclude(everything) exempts "
    ]


def test_exempt_in_one_route_alone_is_no_reason_to_warn(recwarn):
    routed(model(), wd_policy={"embed.*": 0, "head.*": 0, "*.bias": 0, "*.1.*": 0})
    assert not list(recwarn)


class Picky(torch.optim.SGD):
    def __init__(self, params, lr=0.1, weight_decay=0.0):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    def add_param_group(self, group):
        super().add_param_group(group)
        assert all(p.ndim == 2 for p in self.param_groups[-1]["params"]), "no matrix"


def test_class_that_refuses_a_later_group_by_another_error_is_named():
    named = [("0.weight", bare()[0]), ("1.weight", bare()[0])]
    split = {"picky": ("1.*", Picky, {}), "adamw": ("*", AdamW, {})}
    optimizer = Routed(named, split, weight_decay=0.1)
    group = {"params": [("7.weight", bare()[1])], "route": "picky"}
    told = r"route 'picky' gives a parameter \(shape 2\) to Picky, .*: no matrix"
    with pytest.raises(AssertionError, match=told):
        optimizer.add_param_group(group)


def test_selector_of_a_route_is_asked_once():
    asked = []

    def matrices(info):
        asked.append(info.name)
        return info.ndim > 1

    Routed(model(), {"body": (matrices, Body, {}), "adamw": ("*", AdamW, {})})
    assert len(asked) == len(set(asked))
