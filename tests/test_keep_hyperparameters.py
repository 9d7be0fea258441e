"""Resuming with a new rate or decay, where the checkpoint's would win."""

import copy
from functools import partial

import pytest
import torch

import selective_optim
from selective_optim import AdamW, Routed, policies, selective
from selective_optim.checkpoint import fit, keep_hyperparameters
from tests.support.compare import assert_same
from tests.support.resuming import hand_split, make_net, through_file, train
from tests.test_any_class import Counting

FIRST, SECOND = range(1, 4), range(4, 7)
KINDS = {
    "torch": lambda model, **hyper: torch.optim.AdamW(model.parameters(), **hyper),
    "ours": partial(AdamW, wd_policy="no_bias_norm"),
    "ours, unlike the saved one": partial(AdamW, wd_policy=None),
}


def run(kind, **hyper):
    model = make_net()
    optimizer = KINDS[kind](model, **hyper)
    train(model, optimizer, FIRST)
    return model, optimizer


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_what_is_kept_wins_and_all_else_is_the_checkpoints(kind):
    model, saved = run(kind, lr=0.1, weight_decay=0.1, betas=(0.8, 0.9))
    whole, edited = copy.deepcopy((model, saved))
    new = KINDS[kind](model, lr=0.02, weight_decay=0.3)
    state_dict = through_file(saved.state_dict())
    before = copy.deepcopy(state_dict)

    kept = keep_hyperparameters(new, state_dict, "weight_decay", "lr")
    assert_same(state_dict, before)
    new.load_state_dict(kept)

    # The long way, by hand.
    for group in edited.param_groups:
        group |= {"lr": 0.02, "weight_decay": 0.3}
    train(model, new, SECOND)
    train(whole, edited, SECOND)
    assert_same(model, whole)
    assert_same(new.state_dict(), edited.state_dict())


@pytest.mark.parametrize("scheduled", [False, True])
def test_rate_of_schedules_goes_with_the_rate(scheduled):
    _, saved = run("torch", lr=0.1)
    saved.param_groups[0]["initial_lr"] = 0.1
    new = KINDS["torch"](make_net(), lr=0.02)
    new.param_groups[0] |= {"initial_lr": 0.04} if scheduled else {}
    [group] = keep_hyperparameters(new, saved.state_dict(), "lr")["param_groups"]
    assert group.get("initial_lr") == (0.04 if scheduled else None)


@pytest.mark.parametrize(
    ("key", "strength"), [("lr", 0.02 / 0.02), ("weight_decay", 0.05 / 0.1)]
)
def test_independent_decay_divides_by_the_rate_that_counts(key, strength):
    policy = policies.form("independent")
    model = make_net()
    saved = AdamW(model, lr=0.1, weight_decay=0.1, wd_policy=policy)
    saved.param_groups[0]["lr"] = 0.05
    new = AdamW(model, lr=0.02, weight_decay=0.1, wd_policy=policy)
    new.load_state_dict(keep_hyperparameters(new, saved.state_dict(), key))

    lr, lr0 = new.param_groups[0]["lr"], new.state_dict()["decay"][0][0][2]["lr0"]
    assert lr / lr0 == strength


def test_policy_that_changed_still_warns():
    _, saved = run("ours", lr=0.1, weight_decay=0.1)
    new = KINDS["ours, unlike the saved one"](make_net(), lr=0.02, weight_decay=0.1)
    with pytest.warns(UserWarning, match="another weight decay policy"):
        new.load_state_dict(keep_hyperparameters(new, saved.state_dict(), "lr"))


class Tuned(Counting):
    """Writes the decay of each group anew, as some classes do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["weight_decay"] *= 0.5


def test_decay_that_a_class_wrote_for_a_part_is_not_kept_beside():
    model = make_net()
    made = partial(selective(Tuned), model, wd_policy="no_bias_norm")
    saved = made(lr=0.1, weight_decay=0.4)
    train(model, saved, FIRST)
    parts = [part.get("weight_decay") for part in saved.state_dict()["parts"][0]]
    new = made(lr=0.1, weight_decay=0.3)
    kept = keep_hyperparameters(new, saved.state_dict(), "weight_decay")
    assert any(parts)
    assert all("weight_decay" not in part for part in kept["parts"][0])
    assert (
        kept["parts"][0][0]["positions"]
        == saved.state_dict()["parts"][0][0]["positions"]
    )
    new.load_state_dict(kept)
    rows = new.decay_report().rows
    assert {row.weight_decay for row in rows} == {0.3, 0.0}


def named(model):
    return torch.optim.AdamW(model.named_parameters(), lr=0.5)


PAIR = torch.nn.Linear(4, 4)


def routed(params):
    routes = {
        "body": (lambda info: info.ndim > 1, torch.optim.RMSprop, {"lr": 0.02}),
        "rest": (lambda info: True, AdamW, {"lr": 0.01}),
    }
    groups = [{"params": [param]} for param in params]
    return Routed(groups, routes, weight_decay=0.1, model=PAIR)


def test_routes_in_another_order_are_refused_with_a_line_that_helps():
    """Loading goes by name there, and rates by the places of groups."""
    params = list(PAIR.parameters())
    saved, new = routed(params), routed(params[::-1])
    train(PAIR, saved, FIRST)
    told = (
        r"groups of \['body', 'rest'\] routes, and the optimizer of \['rest', 'body'\]"
    )
    with pytest.raises(ValueError, match=told):
        keep_hyperparameters(new, saved.state_dict(), "lr")
    new.load_state_dict(fit(saved.state_dict(), new).state_dict)
    rates = [(group["route"], group["lr"]) for group in new.param_groups]
    assert rates == [("rest", 0.01), ("body", 0.02)]
    assert_same(dict(new.state), dict(saved.state))


ERRORS = {
    "misspelt": (
        lambda saved, new: keep_hyperparameters(new, saved, "weigth_decay"),
        ValueError,
        r"no group of this AdamW has 'weigth_decay'\. Did you mean 'weight_decay'\?",
    ),
    "other groups": (
        lambda saved, new: keep_hyperparameters(
            torch.optim.AdamW(hand_split(make_net())), saved, "lr"
        ),
        ValueError,
        r"the state dict has groups of \[11\] parameters, and the optimizer of \[7, 4\]"
        r"\. Load fit\(state_dict, optimizer\)\.state_dict, which keeps all",
    ),
    "no state dict": (
        lambda saved, new: keep_hyperparameters(saved, new, "lr"),
        TypeError,
        r"`state_dict` must be a dict, not AdamW\. Pass what optimizer\.state_dict\(\)",
    ),
    "no key": (
        lambda saved, new: keep_hyperparameters(new, saved),
        TypeError,
        r"missing 1 required positional argument: 'key'",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_kept_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call(named(make_net()).state_dict(), named(make_net()))


def test_lines_that_the_errors_give_lead_there():
    model = make_net()
    saved = named(model)
    train(model, saved, FIRST)
    new = torch.optim.AdamW([{"params": [pair]} for pair in model.named_parameters()])
    new.load_state_dict(fit(saved.state_dict(), new).state_dict)
    assert {group["lr"] for group in new.param_groups} == {1e-3}
    assert_same(list(new.state.values()), list(saved.state.values()))
    keep_hyperparameters(saved, saved.state_dict(), "weight_decay")
    assert selective_optim.checkpoint.fit is fit
