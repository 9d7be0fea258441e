"""Sharded parameters step on their local shards with torch's own results."""

import copy
import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import selective_optim
from selective_optim.policies import form, towards
from tests.support.compare import assert_same
from tests.support.distributed import Ranks

pytestmark = pytest.mark.distributed

STEPS = 7
# One row or three: on two ranks somebody has nothing, or more than the other.
SHAPES = [(5, 4), (1, 3), (6,), (3,), (), (0, 2), (2, 3, 4), (4, 2)]
ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.2}
SGD = {"lr": 0.02, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.2}
OPTIMIZERS = {
    "adamw": ("AdamW", ADAM),
    "adam": ("Adam", ADAM),
    "adam-amsgrad": ("Adam", {**ADAM, "amsgrad": True, "maximize": True}),
    "sgd": ("SGD", {**SGD, "momentum": 0.0, "dampening": 0.0}),
    "sgd-momentum": ("SGD", SGD),
    "sgd-nesterov": ("SGD", {**SGD, "dampening": 0.0, "nesterov": True}),
}
PLACEMENTS = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "replicated": ((2,), [Replicate()]),
    "two-dimensional": ((2, 1), [Shard(0), Shard(1)]),
    "hybrid": ((1, 2), [Replicate(), Shard(0)]),
}
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
each_adam = pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if "adam" in n])
each_placement = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@functools.cache  # making one takes longer than a test
def mesh_of(shape):
    return init_device_mesh("cpu", shape)


def place(tensors, placement):
    """Distribute tensors; along dimensions that they do not have they are whole.

    Every rank has drawn the same values, and none needs to be sent its shard.
    """
    shape, placements = PLACEMENTS[placement]
    placed = []
    for tensor in tensors:
        where = [Replicate() if getattr(p, "dim", -1) >= tensor.ndim else p
                 for p in placements]  # fmt: skip
        mesh = mesh_of(shape)
        placed.append(distribute_tensor(tensor, mesh, where, src_data_rank=None))
        # A shard would else be a view of the whole, which fused kernels misread
        # where it has gaps.
        local = placed[-1]._local_tensor
        placed[-1]._local_tensor = local.clone(memory_format=torch.contiguous_format)
    return placed


def params_at(placement):
    return [p.requires_grad_() for p in place(values(0), placement)]


def grads_at(placement, step):
    """Gradients: the second parameter has none in step four, the last never."""
    *grads, _ = place(values(step + 1), placement)
    return [None if i == 1 and step == 3 else g for i, g in enumerate(grads)] + [None]


def assign(params, grads):
    for param, grad in zip(params, grads):
        param.grad = grad


def make_ours(optimizer, params, **arguments):
    name, hyperparameters = OPTIMIZERS[optimizer]
    cls = getattr(selective_optim, name)
    return cls(params, wd_policy="matrices", **hyperparameters, **arguments)


def make_torchs(optimizer, params, **arguments):
    name, hyperparameters = OPTIMIZERS[optimizer]
    decayed = [p for p in params if p.ndim >= 2]
    exempt = [p for p in params if p.ndim < 2]
    groups = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    cls = getattr(torch.optim, name)
    return cls([g for g in groups if g["params"]], **hyperparameters, **arguments)


def shards(tensors):
    """The local tensors, as plain ones beside the sharded."""
    return [t if t is None else t.to_local().detach().clone() for t in tensors]


def local_state(optimizer, params):
    return [
        {key: getattr(value, "_local_tensor", value) for key, value in own.items()}
        for own in (dict(optimizer.state.get(p, {})) for p in params)
    ]


def train(optimizer, params, placement, steps=range(STEPS)):
    for step in steps:
        assign(params, grads_at(placement, step))
        optimizer.param_groups[0]["lr"] = 0.02 / (1 + step // 3)
        optimizer.param_groups[-1]["lr"] = 0.02 / (1 + step // 3)
        optimizer.step()


def assert_same_training(actual, expected):
    """Compare values and states, each a pair of optimizer and parameters."""
    (ours, params), (torchs, others) = actual, expected
    assert_same([p.to_local() for p in params], [p.to_local() for p in others])
    assert_same(local_state(ours, params), local_state(torchs, others))


# Against torch's own on the same DTensors


def step_beside_torch(rank, optimizer, placement, implementation, torchs):
    params, others = params_at(placement), params_at(placement)
    mine = make_ours(optimizer, params, **implementation)
    theirs = make_torchs(optimizer, others, **torchs)
    train(mine, params, placement)
    train(theirs, others, placement)
    assert_same_training((mine, params), (theirs, others))
    for param, other in zip(params, others):
        kinds = {key: type(value) for key, value in mine.state[param].items()}
        assert kinds == {k: type(value) for k, value in theirs.state[other].items()}
        for value in mine.state[param].values():
            if isinstance(value, DTensor):
                assert value.placements == param.placements


@each_placement
@each_adam
def test_automatic_choice_equals_torchs_fused(ranks, optimizer, placement):
    ranks(step_beside_torch, optimizer, placement, {}, {"fused": True})


LOOP = {"foreach": False, "fused": False}


@each_placement
@each_optimizer
@pytest.mark.parametrize("choice", [LOOP, {"foreach": True}], ids=["loop", "foreach"])
def test_explicit_choice_equals_torchs(ranks, optimizer, placement, choice):
    ranks(step_beside_torch, optimizer, placement, choice, choice)


# Against torch's fused kernel on plain tensors: the shards of one rank


def step_beside_plain_shards(rank, optimizer, placement):
    params = params_at(placement)
    plain = [p.requires_grad_() for p in shards(params)]
    mine = make_ours(optimizer, params)
    theirs = make_torchs(optimizer, plain, fused=True)
    for step in range(STEPS):
        grads = grads_at(placement, step)
        assign(params, grads)
        assign(plain, shards(grads))
        mine.step()
        theirs.step()
    assert_same([p.to_local() for p in params], plain)
    # A shard of columns keeps the strides of the whole, a plain tensor has its own.
    states = local_state(mine, params), local_state(theirs, plain)
    assert_same(*states, strides=False)


@each_placement
@each_optimizer
def test_shards_step_as_plain_tensors_do(ranks, optimizer, placement):
    ranks(step_beside_plain_shards, optimizer, placement)


def step_sgd_beside_for_loop(rank, optimizer, placement):
    params, others = params_at(placement), params_at(placement)
    mine, theirs = make_ours(optimizer, params), make_torchs(optimizer, others)
    train(mine, params, placement)
    train(theirs, others, placement)
    return shards(params), shards(others)


@each_placement
@pytest.mark.parametrize("optimizer", [n for n in OPTIMIZERS if "sgd" in n])
def test_sgd_is_near_torchs_for_loop(ranks, optimizer, placement):
    for actual, expected in ranks(step_sgd_beside_for_loop, optimizer, placement):
        # torch has no fused SGD for DTensors, and its for-loop rounds once more where
        # the kernel multiplies and adds at once.
        assert_same(actual, expected, rtol=1e-6, atol=2e-7)


# Without dispatch per operation


class DTensorCalls(TorchDispatchMode):
    """Counts the operations that are given a DTensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        self.count += any(isinstance(leaf, DTensor) for leaf in leaves)
        return func(*args, **(kwargs or {}))


def count_dispatch(rank, optimizer, placement):
    params = params_at(placement)
    mine = make_ours(optimizer, params)
    train(mine, params, placement, range(4))
    assign(params, grads_at(placement, 5))
    mine.step()
    with DTensorCalls() as calls:
        mine.step()
        mine.step()
    return calls.count


@each_placement
@each_optimizer
def test_replayed_step_dispatches_no_dtensor(ranks, optimizer, placement):
    assert ranks(count_dispatch, optimizer, placement) == [0, 0]


# What the shards cannot do goes torch's way


def spread(grad, mesh):
    """The same gradient, placed otherwise than the parameter."""
    return grad.redistribute(mesh, [Replicate()])


def pend(grad, mesh):
    """The same gradient on the first rank, still to be summed up."""
    whole = grad.full_tensor() * (mesh.get_rank() == 0)
    return DTensor.from_local(whole, mesh, [Partial()])


# Partial beside replicated: nothing but the placement tells them apart.
MISPLACED = [("rows", spread), ("rows", pend), ("replicated", pend)]
each_misplaced = pytest.mark.parametrize(("placement", "misplace"), MISPLACED)


def misplaced(placement, misplace, step):
    # torch itself cannot do it where a rank has no row of the parameter, and a
    # scalar has no other place to be.
    return [
        misplace(grad, mesh_of((2,)))
        if grad is not None and i not in (1, 4, 5)
        else None
        for i, grad in enumerate(grads_at(placement, step))
    ]


def step_misplaced(rank, optimizer, placement, misplace):
    params, others = params_at(placement), params_at(placement)
    mine, theirs = make_ours(optimizer, params), make_torchs(optimizer, others)
    for step in range(4):
        # One set for both, as the ranks wait for each other at every gradient that is
        # misplaced. torch steps first, so that an edit of ours would not reach it.
        grads = misplaced(placement, misplace, step)
        assign(others, grads)
        theirs.step()
        assign(params, grads)
        mine.step()
    assert_same_training((mine, params), (theirs, others))


@each_misplaced
@each_optimizer
def test_misplaced_gradients_go_torchs_way(ranks, optimizer, placement, misplace):
    ranks(step_misplaced, optimizer, placement, misplace)


def step_misplaced_at_times(rank, optimizer, placement, misplace):
    params, others = params_at(placement), params_at(placement)
    mine = make_ours(optimizer, params)
    theirs = make_ours(optimizer, others, **LOOP)
    for step in range(STEPS):
        odd = step in (2, 5)
        grads = misplaced(placement, misplace, step) if odd else None
        for own, each in ((theirs, others), (mine, params)):
            assign(each, grads or grads_at(placement, step))
            own.step()
    assert_same(shards(params), shards(others), rtol=1e-5, atol=1e-6)


@each_misplaced
@each_optimizer
def test_gradients_may_change_placement(ranks, optimizer, placement, misplace):
    ranks(step_misplaced_at_times, optimizer, placement, misplace)


def step_replaced(rank, optimizer, edit):
    """Against a twin that keeps no plan: it is made anew for every step."""
    params, others = params_at("rows"), params_at("rows")
    mine, theirs = make_ours(optimizer, params), make_ours(optimizer, others)
    for step in range(STEPS):
        for each, own in ((params, mine), (others, theirs)):
            if step == 4:
                edit(each, own)
            assign(each, grads_at("rows", step))
        mine.step()
        theirs = copy.deepcopy(theirs)
        for group in theirs.param_groups:
            others = group["params"]
        assign(others, grads_at("rows", step))
        theirs.step()
    assert_same_training((mine, params), (theirs, others))


def new_shards(params, optimizer):
    for param in params:
        param._local_tensor = param._local_tensor.clone().mul_(0.5)


def new_data(params, optimizer):
    for param in params:
        param.data = param.data * 0.5


def new_state(params, optimizer):
    for own in optimizer.state.values():
        for key, value in own.items():
            own[key] = value.clone()


def no_state(params, optimizer):
    optimizer.state.clear()


def loaded_state(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EDITS = [new_shards, new_data, new_state, no_state, loaded_state]


@each_optimizer
@pytest.mark.parametrize("edit", EDITS)
def test_edits_between_steps_are_noticed(ranks, optimizer, edit):
    ranks(step_replaced, optimizer, edit)


# One group with parameters here and there


def step_mixed(rank, optimizer, placements):
    parts = [params_at(placement) for placement in placements]
    others = [params_at(placement) for placement in placements]
    parts.append([p.requires_grad_() for p in values(0)])
    others.append([p.requires_grad_() for p in values(0)])
    mine = make_ours(optimizer, [p for part in parts for p in part])
    theirs = [make_ours(optimizer, part) for part in others]
    for step in range(STEPS):
        grads = [grads_at(placement, step) for placement in placements]
        for part, other, each in zip(parts, others, [*grads, values(step)]):
            assign(part, each)
            assign(other, each)
        for own in (mine, *theirs):
            own.step()
    for part, other, own in zip(parts, others, theirs):
        assert_same(local_state(mine, part), local_state(own, other))
        for param, twin in zip(part, other):
            assert torch.equal(
                getattr(param, "_local_tensor", param),
                getattr(twin, "_local_tensor", twin),
            )


@each_optimizer
def test_meshes_and_plain_tensors_share_a_group(ranks, optimizer):
    ranks(step_mixed, optimizer, list(PLACEMENTS))


# GradScaler


def step_scaled(rank, optimizer):
    params, others = params_at("rows"), params_at("rows")
    mine = make_ours(optimizer, params)
    theirs = make_ours(optimizer, others)
    train(mine, params, "rows", range(3))
    train(theirs, others, "rows", range(3))
    assign(others, grads_at("rows", 5))
    assign(params, grads_at("rows", 5))
    before = copy.deepcopy((local_state(theirs, others), shards(others)))
    mine.grad_scale = torch.tensor(4.0)
    mine.found_inf = torch.tensor(1.0)
    mine.step()
    assert_same((local_state(mine, params), shards(params)), before)
    mine.found_inf = torch.tensor(0.0)
    assign(params, [g if g is None else g * 4 for g in grads_at("rows", 5)])
    mine.step()
    theirs.step()
    assert_same_training((mine, params), (theirs, others))


@each_optimizer
def test_scaler_reaches_the_shards(ranks, optimizer):
    ranks(step_scaled, optimizer)


# Forms that are a pass of our own


def step_in_a_form(rank, optimizer, placement, policy, implementation):
    params = params_at(placement)
    plain = [p.requires_grad_() for p in shards(params)]
    name, hyperparameters = OPTIMIZERS[optimizer]
    make = functools.partial(
        getattr(selective_optim, name), **hyperparameters, wd_policy=policy
    )
    mine, theirs = make(params, **implementation), make(plain, **implementation)
    for step in range(STEPS):
        if step == 3:  # what training began with comes back sharded
            state_dict = mine.state_dict()
            mine = make(params, **implementation)
            mine.load_state_dict(state_dict)
        grads = grads_at(placement, step)
        assign(params, grads)
        assign(plain, shards(grads))
        mine.step()
        theirs.step()
    assert_same([p.to_local() for p in params], [p.detach() for p in plain])


@pytest.mark.parametrize("placement", ["rows", "two-dimensional"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd-nesterov"])
@pytest.mark.parametrize("implementation", [{}, LOOP], ids=["automatic", "loop"])
@pytest.mark.parametrize(
    "policy", [form("cautious"), towards("init"), form("l2") * towards(0.5)], ids=repr
)
def test_forms_are_those_of_the_shards(
    ranks, optimizer, placement, policy, implementation
):
    ranks(step_in_a_form, optimizer, placement, policy, implementation)


def shard_after_deciding(rank):
    """As Accelerate does with FSDP2: the tensors of a group are replaced."""
    whole = [p.detach().requires_grad_() for p in values(0)]
    policy = towards("init") * form("cautious")
    arguments = {**ADAM, "wd_policy": policy}
    mine = selective_optim.AdamW(whole, **arguments)
    params = params_at("rows")
    mine.param_groups[0]["params"] = params
    theirs = selective_optim.AdamW(plain := params_at("rows"), **arguments)
    train(mine, params, "rows")
    train(theirs, plain, "rows")
    assert_same_training((mine, params), (theirs, plain))
    inits = [entry[2]["init"] for entry in mine.state_dict()["decay"][0]]
    assert {type(init) for init in inits} == {DTensor}
    assert_same([init.full_tensor() for init in inits], values(0))


def test_init_is_sharded_with_its_parameter(ranks):
    ranks(shard_after_deciding)
