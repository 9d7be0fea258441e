"""Saving, loading and copying: training goes on as if nothing had happened."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import policies
from selective_optim.checkpoint import group_names, merge_groups
from tests.support import twins
from tests.support.compare import assert_same
from tests.support.problems import IMPLEMENTATIONS
from tests.support.resuming import (
    CLASSES,
    OPTIMIZERS,
    assert_same_run,
    hand_split,
    make_net,
    snapshot,
    state_by_name,
    through_file,
    train,
)

FIRST, SECOND = range(1, 5), range(5, 9)
PAIRS = [(a, b) for a in ("ours", "torch") for b in ("ours", "torch")]
LAYOUTS = {"one": lambda model: list(model.parameters()), "many": hand_split}

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def make(whose, optimizer, implementation, layout):
    """Build a model and an optimizer of ours or of torch."""
    model = make_net()
    name, arguments = OPTIMIZERS[optimizer]
    params = LAYOUTS[layout](model)
    choice = IMPLEMENTATIONS[implementation]
    return model, CLASSES[name][whose](params, weight_decay=0.1, **arguments, **choice)


def make_selective(
    optimizer="adamw", wd_policy="no_bias_norm", device="cpu", **arguments
):
    model = make_net(device)
    name, own = OPTIMIZERS[optimizer]
    arguments = {"weight_decay": 0.1, "wd_policy": wd_policy, **own, **arguments}
    return model, CLASSES[name]["ours"](model.parameters(), **arguments)


def resume(saved, target):
    """Load what one run saved into another that has already gone its own way."""
    model, optimizer = target
    train(model, optimizer, range(100, 102))
    model.load_state_dict(through_file(saved[0].state_dict()))
    optimizer.load_state_dict(through_file(saved[1].state_dict()))
    return target


@each_optimizer
@each_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_training_continues_across_every_pair(
    optimizer, implementation, layout, saver, loader
):
    saved = make(saver, optimizer, implementation, layout)
    train(*saved, FIRST)
    resumed = resume(saved, make(loader, optimizer, implementation, layout))
    train(*resumed, SECOND)
    whole = make("torch", optimizer, implementation, layout)
    train(*whole, [*FIRST, *SECOND])
    assert_same_run(*resumed, *whole)


@each_optimizer
@pytest.mark.parametrize("choice", [{}, *IMPLEMENTATIONS.values()])
def test_training_continues_under_a_policy(optimizer, choice):
    saved = make_selective(optimizer, **choice)
    train(*saved, FIRST)
    resumed = resume(saved, make_selective(optimizer, **choice))
    train(*resumed, SECOND)
    whole = make_selective(optimizer, **choice)
    train(*whole, [*FIRST, *SECOND])
    assert_same_run(*resumed, *whole)


def test_loading_before_the_first_step_resets_the_state():
    fresh, trained = make_selective(), make_selective()
    empty = through_file(fresh[1].state_dict())
    start = copy.deepcopy(fresh[0].state_dict())
    train(*trained, FIRST)
    trained[0].load_state_dict(start)
    trained[1].load_state_dict(empty)
    assert not trained[1].state
    train(*trained, SECOND)
    train(*fresh, SECOND)
    assert_same_run(*trained, *fresh)


# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
}
POLICIES = {
    "none": None,
    "name": "no_bias_norm",
    "mapping": {"head.*": 0.5, nn.LayerNorm: 0},
    "algebra": policies.exclude(policies.is_bias) * policies.form("l2", "head.*"),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("wd_policy", POLICIES.values(), ids=POLICIES)
@each_optimizer
def test_copy_continues_like_the_original(copied, wd_policy, optimizer, device):
    original = make_selective(optimizer, wd_policy, device)
    train(*original, FIRST)
    twin = copied(original)
    train(*original, SECOND)
    train(*twin, SECOND)
    assert_same_run(*twin, *original)
    assert twin[1].decay_report().rows == original[1].decay_report().rows


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_shares_nothing_with_the_original(copied):
    original = make_selective()
    train(*original, FIRST)
    before = snapshot(*original)
    train(*copied(original), SECOND)
    assert_same(snapshot(*original), before)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_of_a_copy_continues(copied):
    original = make_selective("adam")
    twin = copied(copied(original))
    train(*original, FIRST)
    train(*twin, FIRST)
    assert_same_run(*twin, *original)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_decides_for_groups_added_later(copied):
    model, optimizer = copied(make_selective(wd_policy="no_bias"))
    train(model, optimizer, FIRST)
    later = nn.Linear(2, 2)
    optimizer.add_param_group({"params": later.parameters()})
    multipliers = optimizer.state_dict()["decay"][1]
    assert [entry[:2] for entry in multipliers] == [
        [1.0, "decoupled"],
        [0.0, "decoupled"],
    ]


# Keys and entries are torch's


@each_optimizer
@each_implementation
def test_groups_and_state_have_exactly_the_keys_of_torch(optimizer, implementation):
    ours = make("ours", optimizer, implementation, "many")
    torchs = make("torch", optimizer, implementation, "many")
    for run in (ours, torchs):
        train(*run, FIRST)
    for actual, expected in zip(ours[1].param_groups, torchs[1].param_groups):
        assert list(actual) == list(expected)
    assert_same(state_by_name(*ours), state_by_name(*torchs))


def step_counters(model, optimizer):
    return {n: s["step"] for n, s in state_by_name(model, optimizer).items()}


VIEWS = {
    "live": lambda run: run,
    "loaded": lambda run: resume(run, make_selective("adam")),
    **COPIES,
}


@pytest.mark.parametrize("choice", [{}, *IMPLEMENTATIONS.values()])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_step_counters_are_scalars_as_in_torch(choice, view):
    ours = make_selective("adam", **choice)
    train(*ours, FIRST)
    name, arguments = OPTIMIZERS["adam"]
    model = make_net()
    optimizer = CLASSES[name]["torch"](model.parameters(), **arguments, **choice)
    train(model, optimizer, FIRST)
    assert_same(step_counters(*view(ours)), step_counters(model, optimizer))


def test_saved_counter_takes_no_more_room_than_in_torch():
    file_sizes = []
    for whose in ("ours", "torch"):
        run = make(whose, "adam", "for-loop", "one")
        train(*run, FIRST)
        state_dict = run[1].state_dict()
        for own in ("decay", "decay_policies"):
            state_dict.pop(own, None)
        torch.save(state_dict, file := io.BytesIO())
        file_sizes.append(len(file.getvalue()))
    assert file_sizes[0] <= file_sizes[1]


# What is recorded


PLAIN = (torch.Tensor, int, float, str, bool, type(None))


def leaves(tree):
    if type(tree) in (dict, list, tuple):
        values = tree.values() if type(tree) is dict else tree
        return [leaf for value in values for leaf in leaves(value)]
    return [tree]


@pytest.mark.parametrize("wd_policy", POLICIES.values(), ids=POLICIES)
def test_state_dict_holds_plain_values_only(wd_policy):
    model, optimizer = make_selective(wd_policy=wd_policy)
    train(model, optimizer, FIRST)
    assert {type(leaf) for leaf in leaves(optimizer.state_dict())} <= set(PLAIN)


def test_state_dict_records_multiplier_and_form():
    wd_policy = policies.as_policy({"*.bias": 0, "head.*": 0.5})
    wd_policy = wd_policy * policies.form("l2", "scale")
    model, optimizer = make_selective(wd_policy=wd_policy)
    [record] = through_file(optimizer.state_dict())["decay"]
    names = [name for name, _ in model.named_parameters()]
    assert [entry[2] for entry in record] == [{"name": name} for name in names]
    records = {name: entry[:2] for name, entry in zip(names, record, strict=True)}
    assert records["body.0.weight"] == [1.0, "decoupled"]
    assert records["body.0.bias"] == [0.0, "decoupled"]
    assert records["head.weight"] == [0.5, "decoupled"]
    assert records["scale"] == [1.0, "l2"]


@each_implementation
def test_state_dict_shares_what_torchs_shares(implementation):
    for whose in ("ours", "torch"):
        run = make(whose, "adamw", implementation, "one")
        train(*run, FIRST)
        state_dict = run[1].state_dict()
        own = run[1].state[run[1].param_groups[0]["params"][0]]
        assert state_dict["state"][0] is own
        assert state_dict["state"][0]["exp_avg"] is own["exp_avg"]
        assert state_dict["param_groups"][0] is not run[1].param_groups[0]


# Another policy than the checkpoint's


def load_with(saved_policy, policy):
    saved, loaded = (
        make_selective(wd_policy=saved_policy),
        make_selective(wd_policy=policy),
    )
    loaded[1].load_state_dict(through_file(saved[1].state_dict()))
    return loaded


def test_changed_policy_warns_once_and_names_the_first_parameters():
    with pytest.warns(UserWarning, match="weight decay policy") as caught:
        load_with("no_bias_norm", "all")
    [warning] = caught
    for part in ("another weight decay policy", "'body.0.bias'", "and 1 more"):
        assert part in str(warning.message)
    assert warning.filename == __file__


def test_changed_policy_keeps_that_of_the_constructor():
    with pytest.warns(UserWarning, match="weight decay policy"):
        resumed = load_with("no_bias_norm", "all")
    whole = make_selective(wd_policy="all")
    for run in (resumed, whole):
        train(*run, FIRST)
    assert_same_run(*resumed, *whole)


QUIET = [
    ("no_bias_norm", "no_bias_norm"),
    (
        "no_bias_norm",
        lambda info: "bias" not in info.name and "body.1" not in info.name,
    ),
    ("all", None),
]


@pytest.mark.parametrize(("saved_policy", "policy"), QUIET)
def test_same_decisions_do_not_warn(saved_policy, policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_with(saved_policy, policy)


# The implementation


@each_optimizer
@each_implementation
def test_automatic_choice_is_made_again_after_loading(optimizer, implementation):
    saved = make_selective(optimizer, **IMPLEMENTATIONS[implementation])
    train(*saved, FIRST)
    resumed = resume(saved, make_selective(optimizer))
    whole = make_selective(optimizer)
    for entry in ("foreach", "fused"):
        assert resumed[1].param_groups[0][entry] is None
    for run in (resumed, whole):
        run[0].load_state_dict(saved[0].state_dict())
    whole[1].load_state_dict(through_file(saved[1].state_dict()))
    whole[1].param_groups[0].update(foreach=None, fused=None)
    for run in (resumed, whole):
        train(*run, SECOND)
    assert_same_run(*resumed, *whole)


def test_stated_choice_of_a_checkpoint_is_loaded_as_in_torch():
    saved, target = (
        make("ours", "adamw", "for-loop", "one"),
        make("ours", "adamw", "foreach", "one"),
    )
    target[1].load_state_dict(saved[1].state_dict())
    torchs = make("torch", "adamw", "foreach", "one")
    torchs[1].load_state_dict(make("torch", "adamw", "for-loop", "one")[1].state_dict())
    for entry in ("foreach", "fused"):
        group, expected = target[1].param_groups[0], torchs[1].param_groups[0]
        assert group[entry] == expected[entry]


# Hooks


def test_load_hooks_may_adapt_what_is_loaded():
    saved, target = make("torch", "adamw", "foreach", "many"), make_selective()
    train(*saved, FIRST)
    names = group_names(saved[1].param_groups, saved[0])
    order = [name for name, _ in saved[0].named_parameters()]

    def adapt(_, state_dict):
        return merge_groups(state_dict, names, order=order)

    target[1].register_load_state_dict_pre_hook(adapt)
    target[1].load_state_dict(through_file(saved[1].state_dict()))
    assert_same(state_by_name(*target), state_by_name(*saved))


def test_hooks_around_saving_and_loading_run_once():
    run, calls = make_selective(), []
    run[1].register_state_dict_pre_hook(lambda *_: calls.append("pre"))
    run[1].register_state_dict_post_hook(lambda *_: calls.append("post"))
    run[1].register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    run[1].register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    run[1].load_state_dict(run[1].state_dict())
    assert calls == ["pre", "post", "load pre", "load post"]


# Bad input


def without(key):
    return lambda state_dict: state_dict.pop(key)


def first_group(**changes):
    return lambda state_dict: state_dict["param_groups"][0].update(changes)


def first_state(**changes):
    return lambda state_dict: state_dict["state"][0].update(changes)


def replaced_by(make_other):
    def replace(state_dict):
        other = make_other()
        state_dict.clear()
        state_dict.update(other)

    return replace


def state_dict_of(whose, optimizer, layout="one"):
    run = make(whose, optimizer, "for-loop", layout)
    train(*run, FIRST)
    return run[1].state_dict()


BAD_STATE_DICTS = {
    "empty": replaced_by(dict),
    "of the model": replaced_by(lambda: make_net().state_dict()),
    "no groups": without("param_groups"),
    "no state": without("state"),
    "no learning rate": lambda state_dict: state_dict["param_groups"][0].pop("lr"),
    "no parameters": lambda state_dict: state_dict["param_groups"][0].pop("params"),
    "another class, ours": replaced_by(lambda: state_dict_of("ours", "momentum")),
    "another class, torch": replaced_by(lambda: state_dict_of("torch", "momentum")),
    "other groups": replaced_by(lambda: state_dict_of("ours", "adamw", "many")),
    "fewer parameters": lambda state_dict: state_dict["param_groups"][0][
        "params"
    ].pop(),
    "other order": lambda state_dict: state_dict["param_groups"][0]["params"].reverse(),
    "moment of another shape": first_state(exp_avg=torch.ones(7)),
    "None for a moment": first_state(exp_avg=None),
    "scalar moment": lambda state_dict: state_dict["state"][2].update(
        exp_avg_sq=torch.tensor(1.0)
    ),
    "no moment": lambda state_dict: state_dict["state"][1].pop("exp_avg"),
    "no counter": lambda state_dict: state_dict["state"][1].pop("step"),
    "vector counter": first_state(step=torch.ones(3)),
}


@pytest.mark.parametrize("spoil", BAD_STATE_DICTS.values(), ids=BAD_STATE_DICTS)
def test_bad_state_dict_changes_nothing_and_can_be_retried(spoil):
    run, twin = make_selective(), make_selective()
    for each in (run, twin):
        train(*each, FIRST)
    good = through_file(run[1].state_dict())
    bad = copy.deepcopy(good)
    spoil(bad)
    for each in (run, twin):
        train(*each, SECOND)
    with pytest.raises(ValueError, match=r"state.dict|loaded"):
        run[1].load_state_dict(bad)
    assert_same_run(*run, *twin)
    for each in (run, twin):
        each[1].load_state_dict(copy.deepcopy(good))
        train(*each, SECOND)
    assert_same_run(*run, *twin)


@pytest.mark.parametrize("kind", twins.KINDS)
def test_buffer_that_is_none_in_a_checkpoint_begins_as_in_torch(kind):
    def load_without_buffers(optimizer, _):
        saved = copy.deepcopy(optimizer.state_dict())
        for own in saved["state"].values():
            begun = own["momentum_buffer"]
            own["momentum_buffer"] = begun if begun.ndim < 2 else None
        optimizer.load_state_dict(saved)

    twins.both("SGD", kind, load_without_buffers)


@pytest.mark.parametrize("record", [None, "x", [], [[1.0]], [[[]]]])
def test_unreadable_record_does_not_stop_loading(record):
    run = make_selective()
    train(*run, FIRST)
    state_dict = through_file(run[1].state_dict())
    resumed = make_selective()
    resumed[0].load_state_dict(run[0].state_dict())
    resumed[1].load_state_dict({**state_dict, "decay": record})
    assert_same_run(*resumed, *run)


KEYS = [
    (name, key)
    for name in ("SGD", "Adam", "AdamW")
    for key in getattr(torch.optim, name)(make_net().parameters()).param_groups[0]
    if key != "fused"  # without it ours chooses anew
]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_state_dict_that_lacks_a_key_loads_where_torch_fills_it_in(name, key):
    """As those of older versions do; what torch cannot do without is refused."""
    left = []
    for package in (selective_optim, torch.optim):
        model, more = make_net(), {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(package, name)(
            model.parameters(), lr=0.1, fused=True, **more
        )
        train(model, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][key]
        try:
            optimizer.load_state_dict(saved)
            train(model, optimizer, range(2, 4))
        except (KeyError, ValueError):
            left.append(None)
        else:
            left.append([param.tolist() for param in model.parameters()])
    assert left[0] == left[1]


def test_truncated_file_changes_nothing():
    run = make_selective()
    train(*run, FIRST)
    before = snapshot(*run)
    torch.save(run[1].state_dict(), file := io.BytesIO())
    with pytest.raises(Exception, match=r"(?i)archive|file|eof|pickle"):
        run[1].load_state_dict(torch.load(io.BytesIO(file.getvalue()[:999])))
    assert_same(snapshot(*run), before)
