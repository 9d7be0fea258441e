"""torch.distributed.checkpoint: its state dicts, by name, between ours and torch."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from selective_optim.checkpoint import merge_groups, split_groups
from tests.support.compare import assert_same
from tests.support.distributed import Ranks, gathers_objects
from tests.support.problems import IMPLEMENTATIONS
from tests.support.resuming import (
    CLASSES,
    OPTIMIZERS,
    assert_same_run,
    state_by_name,
)

FIRST, SECOND = range(3), range(3, 6)
FORMS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}
PAIRS = [("ours", "torch"), ("torch", "ours"), ("ours", "ours")]

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_optimizer = pytest.mark.parametrize(
    "optimizer", ["sgd", "momentum", "amsgrad", "adamw"]
)
each_implementation = pytest.mark.parametrize(
    "choice", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS
)


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()  # as before a checkpoint: torch then makes state of its own


def make(whose, optimizer, layout="one", **choice):
    model = make_model()
    name, arguments = OPTIMIZERS[optimizer]
    params = list(model.parameters())
    groups = [{"params": params[:2], "weight_decay": 0.3}, {"params": params[2:]}]
    chosen = CLASSES[name][whose](
        params if layout == "one" else groups, weight_decay=0.1, **arguments, **choice
    )
    return model, chosen


def load(saved, target, form):
    """Hand over the state dicts of one run to another, as DCP would."""
    states = get_state_dict(*saved, options=form)
    states = copy.deepcopy(states)
    options = StateDictOptions(
        flatten_optimizer_state_dict=form.flatten_optimizer_state_dict
    )
    set_state_dict(
        *target,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=options,
    )
    return target


@each_optimizer
@each_implementation
@each_form
@pytest.mark.parametrize("layout", ["one", "many"])
@pytest.mark.parametrize(("saver", "loader"), PAIRS)
def test_training_continues_from_dcp_state_dicts(
    optimizer, choice, form, layout, saver, loader
):
    saved = make(saver, optimizer, layout, **choice)
    train(*saved, FIRST)
    resumed = load(saved, make(loader, optimizer, layout, **choice), form)
    whole = make("torch", optimizer, layout, **choice)
    train(*whole, FIRST)
    for run in (resumed, whole):
        train(*run, SECOND)
    assert_same_run(*resumed, *whole)


@each_optimizer
@each_form
def test_dcp_state_dict_has_what_that_of_torch_has(optimizer, form):
    states = []
    for whose in ("ours", "torch"):
        run = make(whose, optimizer, foreach=True)
        train(*run, FIRST)
        states.append(get_optimizer_state_dict(*run, options=form))
    assert_same(*states)


WEIGHT_DECAYS = {
    "l2": ("adam", {}),
    "decoupled": ("adamw", {}),
    "l2-sgd": ("momentum", {}),
    "decoupled-sgd": ("momentum", {"decoupled_weight_decay": True}),
}


def make_decaying(optimizer, arguments, wd_policy=None, **choice):
    model = make_model()
    name, own = OPTIMIZERS[optimizer]
    arguments = {**own, **arguments, **choice, "weight_decay": 0.9}
    return model, CLASSES[name]["ours"](
        model.parameters(), wd_policy=wd_policy, **arguments
    )


@each_form
@pytest.mark.parametrize(
    ("optimizer", "arguments"), WEIGHT_DECAYS.values(), ids=WEIGHT_DECAYS
)
@pytest.mark.parametrize("choice", [{}, *IMPLEMENTATIONS.values()])
def test_taking_a_state_dict_before_the_first_step_changes_no_parameter(
    form, optimizer, arguments, choice
):
    model, chosen = make_decaying(optimizer, arguments, "no_bias_norm", **choice)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, chosen, options=form)
    set_optimizer_state_dict(
        model, chosen, get_optimizer_state_dict(model, chosen, options=form),
        options=form,
    )  # fmt: skip
    assert_same(model.state_dict(), before)
    assert all(param.grad is None for param in model.parameters())


@each_form
@pytest.mark.parametrize(
    ("optimizer", "arguments"), WEIGHT_DECAYS.values(), ids=WEIGHT_DECAYS
)
def test_taking_a_state_dict_in_training_changes_nothing(form, optimizer, arguments):
    run = make_decaying(optimizer, arguments, "no_bias_norm")
    whole = make_decaying(optimizer, arguments, "no_bias_norm")
    train(*run, FIRST)
    train(*whole, FIRST)
    get_optimizer_state_dict(*run, options=form)
    assert_same_run(*run, *whole)
    for each in (run, whole):
        train(*each, SECOND)
    assert_same_run(*run, *whole)


@each_optimizer
def test_state_made_for_a_state_dict_is_that_of_torch(optimizer):
    ours, torchs = (make(whose, optimizer, foreach=True) for whose in ("ours", "torch"))
    for run in (ours, torchs):
        get_optimizer_state_dict(*run)
        train(*run, FIRST)
    assert_same_run(*ours, *torchs)


@each_form
def test_policy_stays_the_constructors_and_an_open_choice_stays_open(form):
    saved = make_decaying("adamw", {}, "all", foreach=True)
    target = make_decaying("adamw", {}, "no_bias_norm")
    train(*saved, FIRST)
    load(saved, target, form)
    rows = target[1].decay_report().rows
    assert [row.weight_decay for row in rows] == [0.9, 0.0, 0.0, 0.0, 0.9, 0.0]
    assert target[1].param_groups[0]["foreach"] is None


# Hand-split groups


def make_hand_split():
    model = make_model()
    params = dict(model.named_parameters())
    decayed = [n for n in params if n in ("0.weight", "2.weight")]
    exempt = [n for n in params if n not in decayed]
    groups = [
        {"params": [params[n] for n in decayed], "weight_decay": 0.9},
        {"params": [params[n] for n in exempt], "weight_decay": 0.0},
    ]
    layout = [dict(g, params=own) for g, own in zip(groups, (decayed, exempt))]
    return (model, torch.optim.AdamW(groups, lr=0.01, fused=True)), layout


def test_hand_split_dcp_state_dict_is_merged_by_name():
    saved, layout = make_hand_split()
    train(*saved, FIRST)
    state_dict = get_optimizer_state_dict(*saved)
    merged = merge_groups(state_dict, order=[n for n, _ in saved[0].named_parameters()])
    assert_same(split_groups(merged, layout), state_dict)
    target = make_decaying("adamw", {}, "no_bias_norm", fused=True)
    target[0].load_state_dict(saved[0].state_dict())
    set_optimizer_state_dict(*target, copy.deepcopy(merged))
    whole, _ = make_hand_split()
    train(*whole, [*FIRST])
    for run in (target, whole):
        train(*run, SECOND)
    assert_same_run(*target, *whole)


# Two processes


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def make_plain(whose, arguments, model=None):
    model = model or make_model()
    chosen = CLASSES["AdamW"][whose]
    return model, chosen(model.parameters(), lr=0.01, weight_decay=0.9, **arguments)


def train_sharded(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
        optimizer.step()


def save_from_rank(rank, whose, arguments, folder, options):
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    run = make_plain(whose, arguments, model)
    train_sharded(*run, FIRST)
    model_state, optim_state = get_state_dict(*run, options=options)
    with quiet():
        dcp.save({"model": model_state, "optim": optim_state}, checkpoint_id=folder)


@contextmanager
def quiet():
    """Leave out what torch's own code warns about: no process group, old storages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_into(run, folder, options):
    """Load as ``torch.distributed.checkpoint`` does: in place, then set."""
    model_state, optim_state = get_state_dict(*run, options=options)
    states = {"model": model_state, "optim": optim_state}
    with quiet():
        dcp.load(states, checkpoint_id=folder)
    set_state_dict(
        *run,
        model_state_dict=states["model"],
        optim_state_dict=states["optim"],
        options=options,
    )


POLICY = {"wd_policy": "no_bias_norm"}
ACROSS = [("ours", "ours", POLICY), ("ours", "torch", {}), ("torch", "ours", {})]


@pytest.mark.distributed
@gathers_objects
@each_form
@pytest.mark.parametrize(("saver", "loader", "arguments"), ACROSS)
def test_saved_on_two_processes_and_loaded_on_one(
    ranks, form, saver, loader, arguments, tmp_path
):
    ranks(save_from_rank, saver, arguments, str(tmp_path), form)
    resumed, whole = make_plain(loader, arguments), make_plain(saver, arguments)
    read_into(resumed, str(tmp_path), form)
    train(*whole, FIRST)
    for run in (resumed, whole):
        train(*run, SECOND)
    # Shards end elsewhere, and vectorized code rounds its remainder differently.
    torch.testing.assert_close(resumed[0].state_dict(), whole[0].state_dict())
    torch.testing.assert_close(state_by_name(*resumed), state_by_name(*whole))


# Full state dicts, as they are broadcast from rank 0.

FULL = {"full_state_dict": True}
FLAT = {"flatten_optimizer_state_dict": True}
FROM_0 = {**FULL, "broadcast_from_rank0": True}


def trained_and_taken(whose, options):
    run = make_plain(whose, POLICY if whose == "ours" else {})
    train(*run, FIRST)
    return run, get_optimizer_state_dict(*run, options=StateDictOptions(**options))


def broadcast(rank, whose, form):
    """Return the error of loading what rank 0 took, or the state that came."""
    run, taken = trained_and_taken(whose, FULL | form)
    expected = copy.deepcopy(state_by_name(*run))
    resumed = make_plain(whose, POLICY if whose == "ours" else {})
    options = StateDictOptions(**FROM_0, **form)
    try:
        set_optimizer_state_dict(*resumed, taken if rank == 0 else {}, options=options)
    except (KeyError, ValueError) as error:
        return str(error)
    assert_same(state_by_name(*resumed), expected)
    return None


@pytest.mark.distributed
def test_flattened_state_dict_cannot_be_broadcast_and_the_message_says_how(ranks):
    """torch itself fails with a KeyError on every rank."""
    assert ranks(broadcast, "torch", FLAT) == ["'state'", "'param_groups'"]
    ours, _ = ranks(broadcast, "ours", FLAT)
    assert ours == (
        "`state_dict` is flattened, and a full one must be plain to be loaded or "
        "converted. Save and load it with flatten_optimizer_state_dict=False."
    )
    assert ranks(broadcast, "ours", {}) == [None, None]


def test_flattened_state_dict_is_not_converted():
    _, taken = trained_and_taken("ours", FLAT)
    with pytest.raises(ValueError, match="Save and load it with flatten_optimizer_"):
        merge_groups(taken)


def decay_by_hand(rank, taking, loading, split_first):
    """Load a state dict of ours into torch's hand-split groups."""
    _, taken = trained_and_taken("ours", taking)
    (model, optimizer), layout = make_hand_split()
    taken = split_groups(taken, layout) if split_first else taken
    options = StateDictOptions(**loading)
    set_optimizer_state_dict(model, optimizer, taken, options=options)
    return [group["weight_decay"] for group in optimizer.param_groups]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("taking", "loading"), [(FLAT, FLAT), (FULL, FULL), (FULL, FROM_0)]
)
def test_exempt_group_of_torch_takes_full_decay_from_flat_and_full_ones(
    ranks, taking, loading
):
    for actual in ranks(decay_by_hand, taking, loading, False):
        assert actual == [0.9, 0.9]
    if taking != FLAT:  # the way that the documentation gives
        for actual in ranks(decay_by_hand, taking, loading, True):
            assert actual == [0.9, 0.0]
