"""Training on two processes, and frameworks that exchange tensors or groups."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import selective_optim
from selective_optim import AdamW
from selective_optim.policies import exclude, is_norm
from tests.support.compare import assert_same
from tests.support.data_parallel import (
    DECAYED,
    FSDP2_DIVISOR,
    SETUPS,
    loss_of,
    make_net,
    names_that_decay,
    one_thread,
    reference,
    train,
    train_alone,
    values_of,
)
from tests.support.distributed import RankError, Ranks, gathers_objects

pytestmark = pytest.mark.distributed
each_setup = pytest.mark.parametrize("setup", SETUPS, ids=lambda s: s.id)
FOR_LOOP = [setup for setup in SETUPS if setup.ours]


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


# The harness itself


def add_up(rank, amount):
    total = torch.tensor(rank + amount)
    dist.all_reduce(total)
    return total.item()


def raise_on_second(rank):
    if rank == 1:
        raise KeyError("lost")
    dist.barrier()


def end_on_second(rank):
    if rank == 1:
        raise SystemExit
    dist.barrier()


def test_ranks_talk_to_each_other(ranks):
    assert ranks(add_up, 10) == [21, 21]


@pytest.mark.parametrize(
    ("function", "message"),
    [(raise_on_second, "KeyError: 'lost'"), (end_on_second, "SystemExit")],
)
def test_ranks_report_the_one_that_raised_and_recover(ranks, function, message):
    with pytest.raises(RankError, match=message):
        ranks(function)
    assert ranks(add_up, 1) == [3, 3]


# DDP


def train_ddp(rank, setup, gradient_as_bucket_view):
    model = DistributedDataParallel(
        make_net(), gradient_as_bucket_view=gradient_as_bucket_view
    )
    train(model, setup.make(model.parameters()), rank)
    return values_of(model)


@pytest.mark.parametrize("as_bucket_view", [False, True])
@each_setup
def test_ddp_equals_one_process(ranks, setup, as_bucket_view):
    for actual in ranks(train_ddp, setup, as_bucket_view):
        assert_same(actual, reference(setup))


# ZeroRedundancyOptimizer


def zero(params, **arguments):
    # Imported here: on torch 2.13 importing it warns, which pytest makes an error.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, **arguments)


def make_zero_with_partial(setup, model):
    """The library's arguments stay out of the groups of the outer optimizer."""
    cls = getattr(selective_optim, setup.name)
    return zero(
        model.parameters(),
        optimizer_class=partial(cls, model=model, wd_policy="no_bias_norm"),
        **setup.hyperparameters,
        **setup.ours,
    )


def make_zero_of_views(setup, model):
    """Parameters become views of one buffer for each rank."""
    cls = getattr(selective_optim, setup.name)
    return zero(
        model.parameters(),
        optimizer_class=partial(cls, model=model, wd_policy="no_bias_norm"),
        parameters_as_bucket_view=True,
        **setup.hyperparameters,
        **setup.ours,
    )


def make_zero_with_keywords(setup, model):
    """The outer optimizer keeps every keyword in its groups, ours among them."""
    return zero(
        model.parameters(),
        optimizer_class=getattr(selective_optim, setup.name),
        model=model,
        wd_policy="no_bias_norm",
        **setup.hyperparameters,
        **setup.ours,
    )


def make_zero_with_groups(setup, model):
    """Two groups, one with a policy of its own, split among the ranks."""
    embed, rest = [*model.embed.parameters()], [*model.parameters()][1:]
    cls = getattr(selective_optim, setup.name)
    return zero(
        [{"params": embed, "wd_policy": "all"}, {"params": rest}],
        optimizer_class=partial(cls, model=model, wd_policy="no_bias_norm"),
        **setup.hyperparameters,
        **setup.ours,
    )


def train_zero(rank, setup, make):
    model = DistributedDataParallel(make_net())
    train(model, make(setup, model.module), rank)
    return values_of(model)


MAKERS = [
    *(make_zero_with_partial, make_zero_of_views),
    *(make_zero_with_keywords, make_zero_with_groups),
]


@pytest.mark.parametrize("make", MAKERS)
@each_setup
def test_zero_equals_one_process(ranks, setup, make):
    for actual in ranks(train_zero, setup, make):
        assert_same(actual, reference(setup))


def look_into_zero(rank, make):
    model = make_net()
    optimizer = make(SETUPS[0], model)
    train(DistributedDataParallel(model), optimizer, rank)
    torchs = SETUPS[0].make_torchs(model)
    optimizer.consolidate_state_dict(to=0)
    keys = [set(group) for group in optimizer.optim.state_dict()["param_groups"]]
    return keys, [set(group) for group in torchs.state_dict()["param_groups"]][:1]


@gathers_objects
@pytest.mark.parametrize("make", [make_zero_with_partial, make_zero_with_keywords])
def test_zero_local_state_dict_has_torchs_keys(ranks, make):
    for keys, expected in ranks(look_into_zero, make):
        assert keys == expected


def refuse_zero(rank):
    params = make_net().parameters()
    with pytest.raises(ValueError, match="model=model"):
        zero(params, optimizer_class=AdamW, wd_policy="no_bias_norm")


def test_zero_without_modules_is_refused(ranks):
    ranks(refuse_zero)


def make_zero_of_two(rank, policy):
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(2))
    optimizer = zero(
        model.parameters(),
        optimizer_class=partial(AdamW, model=model, wd_policy=policy),
    )
    return names_that_decay(optimizer.optim)


def test_zero_rank_without_decayed_parameters_is_silent(ranks):
    first, second = ranks(make_zero_of_two, "no_bias_norm")
    assert sorted(first + second) == ["0.weight"]


def test_zero_rank_without_a_match_of_the_glob_is_silent(ranks):
    first, second = ranks(make_zero_of_two, exclude("0.bias", "1.*"))
    assert sorted(first + second) == ["0.weight"]


def refuse_functional(rank):
    """Torch's functional classes have one decay for all parameters."""
    with pytest.raises(ValueError, match="no supported functional optimizer equi"):
        zero(make_net().parameters(), optimizer_class=AdamW, overlap_with_ddp=True)
    from torch.distributed.optim import as_functional_optim

    with pytest.raises(ValueError, match="does not have a functional counterpart"):
        as_functional_optim(AdamW, lr=0.1)


def test_torchs_functional_optimizers_refuse_a_class_with_a_policy(ranks):
    ranks(refuse_functional)


def test_an_optimizer_per_parameter_in_hooks_equals_one_that_steps_all():
    """What the documentation gives in their place."""
    runs = []
    for hooked in (True, False):
        model = make_net()
        arguments = {"model": model, "lr": 0.1, "wd_policy": "no_bias_norm"}
        named = [*model.named_parameters()]
        pairs = [[pair] for pair in named] if hooked else [named]
        optimizers = [AdamW(own, weight_decay=0.5, **arguments) for own in pairs]
        owners = dict(zip(model.parameters(), optimizers * len(named)))
        for param in model.parameters() if hooked else ():
            param.register_post_accumulate_grad_hook(lambda p, o=owners: o[p].step())
        for step in range(3):
            model.zero_grad()
            loss_of(model, step, 0).backward()
            if not hooked:
                optimizers[0].step()
        runs.append(values_of(model))
    assert_same(*runs)


# Tensor parallelism: two meshes, and plain parameters beside them, in one group


def parallelize(model):
    apart = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    whole = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, apart, {"first": whole})
    rows = RowwiseParallel(input_layouts=Replicate())
    return parallelize_module(model, other["ep"], {"embed": rows})


def train_parallel(rank, setup, before):
    model = make_net()
    early = setup.make(model.parameters())
    parallelize(model)
    early.param_groups[0]["params"] = list(model.parameters())
    optimizer = early if before else setup.make(model.parameters())
    train(model, optimizer, rank=0)
    meshes = {getattr(param, "device_mesh", None) for param in model.parameters()}
    assert len(meshes) == 3
    return values_of(model)


@each_setup
def test_tensor_parallel_on_two_meshes_equals_one_process(ranks, setup):
    model = make_net()
    with one_thread():
        train(model, setup.make_torchs(model), rank=0)
    after, before = (ranks(train_parallel, setup, early) for early in (False, True))
    assert_same(before, after)
    for actual in after:
        # Shards of a product are summed up in another order.
        assert_same(actual, values_of(model), rtol=1e-4, atol=1e-5)


# Saved on two processes, resumed on one


def save_zero(rank, setup, path):
    model = DistributedDataParallel(make_net())
    optimizer = make_zero_with_partial(setup, model.module)
    train(model, optimizer, rank, range(2))
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        states = model.module.state_dict(), optimizer.state_dict()
        torch.save(states, path)


def save_ddp(rank, setup, path):
    model = DistributedDataParallel(make_net())
    optimizer = setup.make(model.parameters())
    train(model, optimizer, rank, range(2))
    if rank == 0:
        torch.save((model.module.state_dict(), optimizer.state_dict()), path)


@pytest.mark.parametrize(
    "save", [save_ddp, pytest.param(save_zero, marks=gathers_objects)]
)
@each_setup
def test_resume_on_one_process_from_a_file_of_two(ranks, setup, save, tmp_path):
    ranks(save, setup, tmp_path / "two.pt")
    model = make_net()
    optimizer = setup.make(model.parameters())
    values, state = torch.load(tmp_path / "two.pt", weights_only=True)
    model.load_state_dict(values)
    optimizer.load_state_dict(state)
    with one_thread():
        train_alone(model, optimizer, range(2, 5))
    assert_same(values_of(model), reference(setup))


def save_fsdp2(rank, setup, path, options):
    model = make_net()
    fully_shard(model.first)
    fully_shard(model)
    optimizer = setup.make(model.parameters())
    train(model, optimizer, rank, range(2))
    values, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": values, "optimizer": state}, checkpoint_id=path)


@gathers_objects
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flatten", [False, True])
@each_setup
def test_resume_on_one_process_from_shards_of_two(ranks, setup, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    ranks(save_fsdp2, setup, tmp_path, options)
    model = make_net()
    optimizer = setup.make(model.parameters())
    values, state = get_state_dict(model, optimizer, options=options)
    saved = {"model": values, "optimizer": state}
    dcp.load(saved, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=options,
    )
    with one_thread():
        train_alone(model, optimizer, range(2, 5), divisor=FSDP2_DIVISOR)
    expected = reference(setup, divisor=FSDP2_DIVISOR)
    assert_same(values_of(model), expected, **setup.on_shards)


# Frameworks that give the optimizer other tensors


def swap_as_accelerate_does(model, optimizer, wrap):
    """Placeholders of one element while wrapping, then the wrapped tensors."""
    places = {param: name for name, param in model.named_parameters()}
    names = [[places[p] for p in g["params"]] for g in optimizer.param_groups]
    del places
    for group in optimizer.param_groups:
        for position in range(len(group["params"])):
            group["params"][position] = torch.empty(1)
    wrap(model)
    params = dict(model.named_parameters())
    for group, mine in zip(optimizer.param_groups, names):
        group["params"] = [params[name] for name in mine]


def swap_as_composer_does(model, optimizer, wrap):
    """Groups cleared and added again with the wrapped tensors."""
    places = {param: name for name, param in model.named_parameters()}
    names = [[places[p] for p in g["params"]] for g in optimizer.param_groups]
    wrap(model)
    params = dict(model.named_parameters())
    groups = [
        {**group, "params": [params[name] for name in mine]}
        for group, mine in zip(optimizer.param_groups, names)
    ]
    assert not optimizer.state
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def look_in_between(model, optimizer, wrap):
    """A report and a state dict while placeholders stand in the groups."""

    def look_and_wrap(model):
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.decay_report()
        wrap(model)

    swap_as_accelerate_does(model, optimizer, look_and_wrap)


def swap_in_another_order(model, optimizer, wrap):
    """The wrapped tensors, last first: by name each keeps its own decision."""
    swap_as_accelerate_does(model, optimizer, wrap)
    for group in optimizer.param_groups:
        group["params"].reverse()


def renew(model):
    """Give a model other tensors of the same values, as sharding it does."""
    for module in model.modules():
        for leaf, param in module.named_parameters(recurse=False):
            setattr(module, leaf, nn.Parameter(param.detach().clone()))


def one_group(model):
    return model.parameters()


def a_policy_per_group(model):
    norm = list(model.norm.parameters())
    rest = [p for name, p in model.named_parameters() if "norm" not in name]
    return [{"params": norm, "wd_policy": exclude(is_norm)}, {"params": rest}]


SWAPS = [
    swap_as_accelerate_does,
    swap_as_composer_does,
    look_in_between,
    swap_in_another_order,
]
each_swap = pytest.mark.parametrize("swap", SWAPS)
# The constructor's policy alone would decay the norm's weight in the second.
each_grouping = pytest.mark.parametrize(
    ("groups", "policy"),
    [(one_group, "no_bias_norm"), (a_policy_per_group, "no_bias")],
    ids=["one-group", "a-policy-per-group"],
)


@each_grouping
@each_swap
@each_setup
def test_decisions_follow_replaced_tensors(setup, swap, groups, policy):
    model = make_net()
    optimizer = setup.make(groups(model), model=model, wd_policy=policy)
    swap(model, optimizer, renew)
    with one_thread():
        train_alone(model, optimizer)
    assert_same(values_of(model), reference(setup))


def train_swapped(rank, setup, swap, groups, policy):
    model = make_net()
    optimizer = setup.make(groups(model), model=model, wd_policy=policy)
    swap(model, optimizer, fully_shard)
    train(model, optimizer, rank)
    assert names_that_decay(optimizer) == list(DECAYED)
    return values_of(model)


@each_grouping
@each_swap
@pytest.mark.parametrize("setup", [SETUPS[0], FOR_LOOP[-1]], ids=lambda s: s.id)
def test_decisions_follow_into_shards(ranks, setup, swap, groups, policy):
    expected = reference(setup, divisor=FSDP2_DIVISOR)
    for actual in ranks(train_swapped, setup, swap, groups, policy):
        assert_same(actual, expected, **setup.on_shards)


def test_decisions_follow_tensors_replaced_between_steps():
    setup = FOR_LOOP[0]
    model, twin = make_net(), make_net()
    optimizer = setup.make(model.parameters())
    torchs = setup.make_torchs(twin)
    for swapped, other in ((optimizer, model), (torchs, twin)):
        loss_of(other, 0, 0).backward()
        swapped.step()
        swapped.state.clear()
    swap_as_composer_does(model, optimizer, renew)
    for swapped, other in ((optimizer, model), (torchs, twin)):
        train(other, swapped, 0)
    assert_same(values_of(model), values_of(twin))
