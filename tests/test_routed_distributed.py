"""`Routed` on two processes does what separate optimizers do there, bit for bit."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from selective_optim import SGD, AdamW
from selective_optim.policies import is_hidden_matrix
from tests.support.compare import assert_same
from tests.support.data_parallel import names_that_decay, one_thread, values_of
from tests.support.distributed import Ranks, gathers_objects
from tests.support.routes import (
    ADAMW,
    MUON,
    Body,
    loss_of,
    routed,
    separate,
    twins,
)
from tests.test_dcp import FORMS, quiet
from tests.test_fsdp import accelerate_fsdp2

FIRST, SECOND = range(4), range(4, 8)
SGDS = {"lr": 0.05, "momentum": 0.9}
# The first route, and its class by hand.
PAIRS = {
    "muon": ((Body, MUON), (Body, MUON)),
    "sgd": ((SGD, {**SGDS, "foreach": True}), (torch.optim.SGD, SGDS)),
    "nadam": ((torch.optim.NAdam, {"lr": 1e-2}),) * 2,
}
each_pair = pytest.mark.parametrize("pair", PAIRS)
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def one_object(model, pair):
    first = {"first": (is_hidden_matrix, *PAIRS[pair][0])}
    return [routed(model, routes={**first, "rest": ("*", AdamW, ADAMW)})]


def by_hand(model, pair):
    return separate(
        model, PAIRS[pair][1], (torch.optim.AdamW, {**ADAMW, "fused": True})
    )


def train(model, optimizers, rank, steps=FIRST):
    for number in steps:
        loss_of(model, 10 * number + rank).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def train_alone(model, optimizers, steps=FIRST):
    """Train in one process on the shares of both ranks."""
    params = list(model.parameters())
    for number in steps:
        losses = [loss_of(model, 10 * number + rank) for rank in range(2)]
        shares = [torch.autograd.grad(loss, params) for loss in losses]
        for param, *grads in zip(params, *shares):
            param.grad = sum(grads) / 2
        for optimizer in optimizers:
            optimizer.step()


def shard(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": shard}


def train_beside_separate(rank, pair, wrap):
    model, twin = twins()
    ours, theirs = WRAPPERS[wrap](model), WRAPPERS[wrap](twin)
    one, others = one_object(ours, pair), by_hand(twin, pair)
    train(ours, one, rank)
    train(theirs, others, rank)
    assert_same(values_of(ours), values_of(theirs))
    mine = [one[0].state[param] for param in model.parameters()]
    found = others[0].state | others[1].state
    assert_same(local(mine), local([found[param] for param in twin.parameters()]))
    return values_of(ours)


def local(states):
    """Take this rank's part of every tensor."""
    return [
        {k: v.to_local() if isinstance(v, DTensor) else v for k, v in own.items()}
        for own in states
    ]


@pytest.mark.distributed
@each_pair
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_bits_are_those_of_separate_optimizers(ranks, pair, wrap):
    """torch's own Muon takes the DTensors of FSDP2 as they are."""
    values = ranks(train_beside_separate, pair, wrap)
    assert_same(*values)
    if wrap == "fsdp2" and not hasattr(torch.optim, "Muon"):
        return  # torch 2.7 adds gradients up on gloo, and does not average them
    alone, _ = twins()
    with one_thread():
        train_alone(alone, by_hand(alone, pair))
    # Muon iterates in bfloat16, over shards in another order. Were each shard iterated
    # by itself, the difference would be more than 0.02.
    torch.testing.assert_close(values[0], values_of(alone), rtol=0, atol=8e-3)


def made_before(rank, pair):
    model, twin = twins()
    one, others = one_object(model, pair), by_hand(twin, pair)
    train(DistributedDataParallel(model), one, rank)
    train(DistributedDataParallel(twin), others, rank)
    assert_same(values_of(model), values_of(twin))


@pytest.mark.distributed
@each_pair
def test_ddp_may_wrap_after_the_optimizer_was_made(ranks, pair):
    ranks(made_before, pair)


def swapped(rank, pair):
    """Hand the optimizer the sharded parameters, as Accelerate does."""
    model, twin = twins()
    [one], names = one_object(model, pair), [n for n, _ in model.named_parameters()]
    positions = {p: names[i] for i, p in enumerate(model.parameters())}
    shard(model)
    new = dict(model.named_parameters())
    for group in one.param_groups:
        group["params"] = [new[positions[param]] for param in group["params"]]
    others = by_hand(shard(twin), pair)
    train(model, [one], rank)
    train(twin, others, rank)
    assert_same(values_of(model), values_of(twin))
    assert names_that_decay(one) == sorted(
        ["blocks.0.0.weight", "blocks.1.0.weight", "embed.weight", "head.weight"]
    )


@pytest.mark.distributed
@each_pair
def test_parameters_that_are_sharded_afterwards_keep_their_routes(ranks, pair):
    ranks(swapped, pair)


# torch.distributed.checkpoint


def fresh(wrap=None):
    model, _ = twins()
    if wrap is not None:
        wrap(model)
    return model, one_object(model, "muon")[0]


def carried(saved, target, form):
    """Hand state dicts of one run to another, and return what was handed."""
    states = copy.deepcopy(get_state_dict(*saved, options=form))
    model_state, optim_state = states
    set_state_dict(
        *target,
        model_state_dict=model_state,
        optim_state_dict=copy.deepcopy(optim_state),
        options=form,
    )
    return optim_state


def assert_same_run(model, one, twin, other):
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(
        *(
            {n: o.state[p] for n, p in net.named_parameters()}
            for net, o in ((model, one), (twin, other))
        )
    )
    assert [g["route"] for g in one.param_groups] == [
        g["route"] for g in other.param_groups
    ]


@each_form
def test_training_goes_on_from_dcp_state_dicts(form):
    saved, target, whole = fresh(), fresh(), fresh()
    train(saved[0], [saved[1]], 0)
    optim_state = carried(saved, target, form)
    if form.flatten_optimizer_state_dict:
        assert optim_state["param_groups.blocks.0.0.weight.route"] == "first"
    else:
        routes_of = [group["route"] for group in optim_state["param_groups"]]
        assert routes_of == ["first", "rest"]
    train(whole[0], [whole[1]], 0)
    for model, one in (target, whole):
        train(model, [one], 0, SECOND)
    assert_same_run(*target, *whole)


@each_form
def test_a_dcp_state_dict_before_the_first_step_is_that_of_torch(form):
    """torch then steps with a rate of 0, which counts in every route."""
    (model, one), (twin, _) = fresh(), fresh()
    others = by_hand(twin, "muon")
    get_optimizer_state_dict(model, one, options=form)
    get_optimizer_state_dict(twin, others, options=form)
    assert_same(model, fresh()[0])
    set_optimizer_state_dict(
        *(model, one),
        get_optimizer_state_dict(model, one, options=form),
        options=form,
    )
    train(model, [one], 0)
    train(twin, others, 0)
    assert_same(model, twin)


@each_form
def test_taking_a_dcp_state_dict_in_training_changes_nothing(form):
    run, whole = fresh(), fresh()
    for steps in (FIRST, SECOND):
        for model, one in (run, whole):
            train(model, [one], 0, steps)
        get_optimizer_state_dict(*run, options=form)
    assert_same_run(*run, *whole)


@each_form
def test_two_optimizers_that_dcp_saved_load_by_way_of_two(form):
    (model, one), (twin, _) = fresh(), fresh()
    others, again = by_hand(twin, "muon"), by_hand(twin, "muon")
    train(twin, others, 0)
    saved = get_optimizer_state_dict(twin, others, options=form)
    with pytest.raises((ValueError, KeyError), match="route"):
        set_optimizer_state_dict(model, one, copy.deepcopy(saved), options=form)
    set_optimizer_state_dict(twin, again, saved, options=form)
    named = {id(param): name for name, param in twin.named_parameters()}
    states = [other.state_dict() for other in again]
    for other, state in zip(again, states):
        for group, mine in zip(state["param_groups"], other.param_groups):
            group["param_names"] = [named[id(param)] for param in mine["params"]]
    one.load_state_dict(states)
    theirs = others[0].state | others[1].state
    assert_same(
        [one.state[param] for param in model.parameters()],
        [theirs[param] for param in twin.parameters()],
    )


def save_from_rank(rank, folder, form):
    model, one = fresh(shard)
    train(model, [one], rank)
    states = get_state_dict(model, one, options=form)
    with quiet():
        dcp.save(dict(zip(("model", "optim"), states)), checkpoint_id=folder)
    values = [
        {
            k: v.full_tensor() if isinstance(v, DTensor) else v
            for k, v in one.state[param].items()
        }
        for param in model.parameters()
    ]
    return values_of(model), values


@pytest.mark.distributed
@gathers_objects
@each_form
def test_saved_on_two_processes_and_loaded_on_one(ranks, form, tmp_path):
    [(values, states), _] = ranks(save_from_rank, str(tmp_path), form)
    model, one = fresh()
    model_state, optim_state = get_state_dict(model, one, options=form)
    told = {"model": model_state, "optim": optim_state}
    with quiet():
        dcp.load(told, checkpoint_id=str(tmp_path))
    set_state_dict(
        *(model, one),
        model_state_dict=told["model"],
        optim_state_dict=told["optim"],
        options=form,
    )
    assert_same(values_of(model), values)
    assert_same([one.state[param] for param in model.parameters()], states)
    assert [group["lr"] for group in one.param_groups] == [0.02, 3e-3]
    train(model, [one], 0, SECOND)


def prepared_by_accelerate(rank, pair):
    """Accelerate takes the optimizer with the model, and shards both."""
    accelerator, (model, twin) = accelerate_fsdp2(rank), twins()
    names = {id(param): name for name, param in model.named_parameters()}
    [one] = one_object(model, pair)
    known = [names[id(p)] for group in one.param_groups for p in group["params"]]
    model, optimizer = accelerator.prepare(model, one)
    assert [row.name for row in one.decay_report()] == known
    others = by_hand(shard(twin), pair)
    train(model, [optimizer], rank)
    train(twin, others, rank)
    assert_same(values_of(model), values_of(twin))


@pytest.mark.distributed
@pytest.mark.integration
@each_pair
def test_accelerate_shards_it_with_the_model(ranks, pair):
    pytest.importorskip("accelerate")
    ranks(prepared_by_accelerate, pair)
