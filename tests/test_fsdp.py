"""Fully sharded training on two processes equals training in one."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from selective_optim import AdamW
from selective_optim.policies import exclude, is_norm, is_vector, only
from tests.support.compare import assert_same
from tests.support.data_parallel import (
    DECAYED,
    FSDP2_DIVISOR,
    SETUPS,
    make_net,
    names_that_decay,
    reference,
    train,
    values_of,
)
from tests.support.distributed import Ranks

pytestmark = pytest.mark.distributed
each_setup = pytest.mark.parametrize("setup", SETUPS, ids=lambda s: s.id)


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def shard(model):
    """FSDP2: parameters become DTensors, their module types stay."""
    for module in (model.embed, model.first):
        fully_shard(module)
    return fully_shard(model)


def flatten(model, use_orig_params=True):
    """FSDP1: parameters become pieces of flat ones."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Embedding, nn.Linear}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


# FSDP2


def train_fsdp2(rank, setup):
    model = shard(make_net())
    train(model, setup.make(model.parameters()), rank)
    return values_of(model)


@each_setup
def test_fsdp2_equals_one_process(ranks, setup):
    expected = reference(setup, divisor=FSDP2_DIVISOR)
    for actual in ranks(train_fsdp2, setup):
        assert_same(actual, expected, **setup.on_shards)


def train_fsdp2_beside_torch(rank, setup):
    ours, torchs = shard(make_net()), shard(make_net())
    train(ours, setup.make(ours.parameters()), rank)
    train(torchs, setup.make_torchs(torchs), rank)
    assert_same(values_of(ours), values_of(torchs))


@pytest.mark.parametrize(
    "setup",
    # torch's fused SGD has no sharding rule, so there is nothing to stand beside.
    [setup for setup in SETUPS if setup.id != "sgd"],
    ids=lambda s: s.id,
)
def test_fsdp2_equals_torch_bit_for_bit(ranks, setup):
    ranks(train_fsdp2_beside_torch, setup)


def train_fsdp2_resharded(rank, setup):
    model = shard(make_net())
    optimizer = setup.make(model.parameters())
    for step in range(5):
        train(model, optimizer, rank, [step])
        model.unshard()
        model.reshard()
    return values_of(model)


def test_fsdp2_plan_survives_unshard_and_reshard(ranks):
    setup = SETUPS[1]
    for actual in ranks(train_fsdp2_resharded, setup):
        assert_same(actual, reference(setup, divisor=FSDP2_DIVISOR))


def train_fsdp2_in_double(rank, setup):
    ours, torchs = shard(make_net()), shard(make_net())
    for model, optimizer in (
        (ours, setup.make(ours.parameters())),
        (torchs, setup.make_torchs(torchs)),
    ):
        model.to(torch.float64)  # swaps every DTensor, which must not be held weakly
        train(model, optimizer, rank)
    assert_same(values_of(ours), values_of(torchs))


def test_fsdp2_model_may_change_dtype_after_construction(ranks):
    ranks(train_fsdp2_in_double, SETUPS[1])


def decide_fsdp2(rank, policy):
    model = shard(make_net())
    return names_that_decay(AdamW(model.parameters(), wd_policy=policy))


# What is known of a sharded parameter: its whole shape, its modules, its name.
POLICIES = [
    ("no_bias_norm", ["embed.weight", "first.weight", "last.weight"]),
    ("matrices", ["embed.weight", "first.weight", "last.weight", *
                  ("norm.bias", "norm.weight")]),
    (only(is_vector), ["first.bias", "last.bias"]),
    (exclude(nn.Linear, is_norm), ["embed.weight"]),
    ({"*.bias": 0, "embed.*": 0}, ["first.weight", "last.weight", "norm.weight"]),
]  # fmt: skip
each_policy = pytest.mark.parametrize(
    ("policy", "expected"), POLICIES, ids=lambda value: str(value)[:20]
)


@each_policy
def test_fsdp2_decides_as_before_wrapping(ranks, policy, expected):
    assert ranks(decide_fsdp2, policy) == [expected, expected]


def train_made_before_sharding(rank, point_again):
    """Make the optimizer first, and tell which weights a step then moves."""
    model = make_net()
    optimizer = AdamW(model.parameters(), lr=0.1, wd_policy="no_bias_norm")
    decayed = names_that_decay(optimizer)
    shard(model)
    if point_again:
        (group,) = optimizer.param_groups
        group["params"] = list(model.parameters())
    before = {name: value.clone() for name, value in values_of(model).items()}
    train(model, optimizer, rank, range(2))
    after = values_of(model)
    moved = any(not torch.equal(before[name], after[name]) for name in before)
    return moved, decayed == names_that_decay(optimizer)


@pytest.mark.parametrize("point_again", [False, True])
def test_optimizer_made_before_sharding_trains_once_it_holds_the_new_parameters(
    ranks, point_again
):
    """As in torch; decisions follow into the shards."""
    assert ranks(train_made_before_sharding, point_again) == [(point_again, True)] * 2


def accelerate_fsdp2(rank):
    """Let Accelerate shard on the CPU, which it otherwise does on accelerators only."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # unused: we joined
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def train_with_accelerate(rank, setup):
    accelerator, model = accelerate_fsdp2(rank), make_net()
    optimizer = setup.make(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    train(model, optimizer, rank)
    assert names_that_decay(optimizer.optimizer) == list(DECAYED)
    return values_of(model)


@pytest.mark.integration
@each_setup
def test_accelerate_keeps_decisions_while_it_shards(ranks, setup):
    pytest.importorskip("accelerate")
    expected = reference(setup, divisor=FSDP2_DIVISOR)
    for actual in ranks(train_with_accelerate, setup):
        assert_same(actual, expected, **setup.on_shards)


# FSDP1


def train_fsdp1(rank, setup):
    model = flatten(make_net())
    train(model, setup.make(model.parameters()), rank)
    with FullyShardedDataParallel.summon_full_params(model):
        return values_of(model)


@each_setup
def test_fsdp1_equals_one_process(ranks, setup):
    for actual in ranks(train_fsdp1, setup):
        assert_same(actual, reference(setup), **setup.on_shards)


def decide_fsdp1(rank, policy):
    model = flatten(make_net())
    return names_that_decay(AdamW(model.parameters(), wd_policy=policy))


@each_policy
def test_fsdp1_decides_as_before_wrapping(ranks, policy, expected):
    assert ranks(decide_fsdp1, policy) == [expected, expected]


def make_fsdp1_with_model(rank, policy):
    model = flatten(make_net())
    return names_that_decay(
        AdamW(list(model.parameters()), wd_policy=policy, model=model)
    )


@each_policy
def test_fsdp1_decides_bare_tensors_with_model(ranks, policy, expected):
    assert ranks(make_fsdp1_with_model, policy) == [expected, expected]


SOURCES = {
    "tensors": lambda model: list(model.parameters()),
    "pairs": lambda model: list(model.named_parameters()),
    "groups": lambda model: [{"params": list(model.parameters()), "lr": 0.1}],
}


def refuse_fsdp1(rank, source, policy, use_orig_params):
    model = flatten(make_net(), use_orig_params)
    with pytest.raises(ValueError, match="use_orig_params=True") as caught:
        AdamW(SOURCES[source](model), wd_policy=policy)
    return str(caught.value)


def wants_matrices(info):
    return info.ndim >= 2


@pytest.mark.parametrize("policy", ["matrices", exclude(is_vector)], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_fsdp1_lost_shapes_are_refused(ranks, source, policy):
    for message in ranks(refuse_fsdp1, source, policy, True):
        assert "flattened" in message


def decide_fsdp1_callable(rank):
    model = flatten(make_net())
    return names_that_decay(AdamW(list(model.parameters()), wd_policy=wants_matrices))


def test_fsdp1_tells_a_callable_the_shapes_of_bare_tensors(ranks):
    expected = ["embed.weight", "first.weight", "last.weight"]
    expected += ["norm.bias", "norm.weight"]  # of two dimensions
    assert ranks(decide_fsdp1_callable) == [expected, expected]


def decide_fsdp1_by_name(rank):
    model = flatten(make_net())
    optimizer = AdamW(list(model.named_parameters()), wd_policy="no_bias")
    return names_that_decay(optimizer)


def test_fsdp1_names_decide_where_shapes_are_lost(ranks):
    expected = ["embed.weight", "first.weight", "last.weight", "norm.weight"]
    assert ranks(decide_fsdp1_by_name) == [expected, expected]


@pytest.mark.parametrize("policy", ["no_bias_norm", "matrices", "none", wants_matrices])
@pytest.mark.parametrize("source", SOURCES)
def test_fsdp1_flat_parameters_are_refused(ranks, source, policy):
    for message in ranks(refuse_fsdp1, source, policy, False):
        assert "flat" in message


def train_fsdp1_flat(rank, setup):
    ours, torchs = flatten(make_net(), False), flatten(make_net(), False)
    train(ours, setup.make(ours.parameters(), wd_policy=None), rank)
    train(torchs, setup.make_torchs(torchs, dict(torchs.named_parameters())), rank)
    assert_same(values_of(ours), values_of(torchs))


def test_fsdp1_flat_parameters_without_policy_train_as_in_torch(ranks):
    ranks(train_fsdp1_flat, SETUPS[0])
