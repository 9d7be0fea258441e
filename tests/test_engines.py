"""Engines around an optimizer on two processes: the bits of groups split by hand."""

import copy
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from selective_optim import AdamW, decay_report
from selective_optim.policies import exclude, is_bias
from tests.support.compare import assert_same
from tests.support.data_parallel import (
    DECAYED,
    SETUPS,
    loss_of,
    make_net,
    train,
    values_of,
)
from tests.support.distributed import Ranks, gathers_objects
from tests.test_fsdp import flatten

pytestmark = pytest.mark.distributed
SETUP = SETUPS[0]
HYPER = {**SETUP.hyperparameters}


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def ours(model):
    return SETUP.make(model.parameters())


def decays(optimizer, model):
    report = decay_report(optimizer, model)
    assert report.agrees
    return {row.name for row in report if row.weight_decay}


# Each trains a network with an optimizer that `make` makes of it, and returns both.


def by_accelerate(rank, make):
    environment(rank)
    from accelerate import Accelerator

    model = make_net()
    model, optimizer = Accelerator(cpu=True).prepare(model, make(model))
    assert isinstance(model, DistributedDataParallel)
    train(model, optimizer, rank)
    return model, optimizer


def by_accelerate_later(rank, make):
    environment(rank)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(make_net())
    optimizer = accelerator.prepare(make(model.module))
    train(model, optimizer, rank)
    return model, optimizer


def by_lightning(rank, make):
    environment(rank)
    warnings.simplefilter("ignore")  # of its loaders, none of them ours
    import lightning
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            return loss_of(self.net, index, rank)

        def configure_optimizers(self):
            return make(self.net)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(3), batch_size=1)

    place = TorchElasticEnvironment()
    strategy = DDPStrategy(cluster_environment=place, process_group_backend="gloo")
    silent = dict.fromkeys(("logger", "enable_checkpointing"), False)
    silent |= dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=3, **silent,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module)
    return module.net, trainer.optimizers[0]


def environment(rank):
    """Name the group that we joined, as a launcher does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


class Manager:
    """Stands in for torchft's, and drops the second step."""

    votes = 0

    def start_quorum(self):
        pass

    def should_commit(self):
        self.votes += 1
        return self.votes != 2


def by_torchft(rank, make):
    # The package itself asks for a server, its wrapper does not.
    [folder] = importlib.util.find_spec("torchft").submodule_search_locations
    spec = importlib.util.spec_from_file_location("_ft", Path(folder, "optim.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = make_net()
    optimizer = module.OptimizerWrapper(Manager(), make(model))
    model = DistributedDataParallel(model)
    train(model, optimizer, rank)
    return model, optimizer


BY = {
    "accelerate": by_accelerate,
    "accelerate-later": by_accelerate_later,
    "lightning": by_lightning,
    "torchft": by_torchft,
}


def beside_torch(rank, package):
    model, optimizer = BY[package](rank, ours)
    twin, _ = BY[package](rank, SETUP.make_torchs)
    assert_same(values_of(model), values_of(twin))
    assert decays(optimizer, model) == set(DECAYED)


@pytest.mark.integration
@pytest.mark.parametrize("package", BY)
def test_engine_of_the_user_has_the_bits_of_groups_split_by_hand(ranks, package):
    if importlib.util.find_spec(package.partition("-")[0]) is None:
        pytest.skip(f"{package} is not installed")
    ranks(beside_torch, package)


# Engines that make the optimizer


def by_fairscale(rank, whole):
    from fairscale.optim.oss import OSS

    model = make_net()
    if whole:
        arguments = {**HYPER, "wd_policy": "no_bias_norm"}
        optimizer = OSS(model.parameters(), optim=AdamW, **arguments)
    else:
        groups = copy_of_groups(SETUP.make_torchs(model))
        optimizer = OSS(groups, optim=torch.optim.AdamW, **HYPER, fused=True)
    model = DistributedDataParallel(model)
    train(model, optimizer, rank)
    return model, optimizer.optim


def copy_of_groups(optimizer):
    keys = ("params", "weight_decay")
    return [{key: group[key] for key in keys} for group in optimizer.param_groups]


def beside_fairscale(rank):
    model, optimizer = by_fairscale(rank, True)
    twin, _ = by_fairscale(rank, False)
    assert_same(values_of(model), values_of(twin))
    return {row.name for row in optimizer.decay_report() if row.weight_decay}


@pytest.mark.integration
def test_fairscale_shards_state_with_one_group(ranks):
    pytest.importorskip("fairscale.optim.oss")
    first, second = ranks(beside_fairscale)
    assert first | second == set(DECAYED)


def torchtitan_run(model, whole):
    """Make torchtitan's container, of one group or of two."""
    optimizer = pytest.importorskip("torchtitan.components.optimizer")

    class Container(optimizer.OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return {"ours": AdamW, "torchs": torch.optim.AdamW}[name]

    def group(pattern, name, **arguments):
        arguments = {**HYPER, **arguments}
        return optimizer.ParamGroupConfig(
            pattern=pattern, optimizer_name=name, optimizer_kwargs=arguments
        )

    groups = [group(".*", "ours", wd_policy="no_bias_norm")]
    if not whole:
        groups = [group("bias|norm", "torchs", weight_decay=0.0), group(".", "torchs")]
    return Container(Container.Config(param_groups=groups), model_parts=[model])


def train_torchtitan(rank, model, container, steps):
    for step in steps:
        container.zero_grad()
        loss_of(model, step, rank).backward()
        container.step()


def beside_torchtitan(rank):
    model, twin, again = (fully_shard(make_net()) for _ in range(3))
    one, two = torchtitan_run(model, True), torchtitan_run(twin, False)
    train_torchtitan(rank, model, one, range(3))
    train_torchtitan(rank, twin, two, range(3))
    resumed = torchtitan_run(again, True)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(one.state_dict()))
    for each, container in ((model, one), (twin, two), (again, resumed)):
        train_torchtitan(rank, each, container, range(3, 5))
    assert_same(values_of(model), values_of(twin))
    assert_same(values_of(model), values_of(again))
    assert decays(one, model) == set(DECAYED)


@pytest.mark.integration
@gathers_objects
def test_torchtitans_container_shards_and_resumes(ranks):
    pytest.importorskip("torchtitan.components.optimizer")
    ranks(beside_torchtitan)


# FSDP1


def wrapped_later(rank, make):
    model = make_net()
    optimizer = make(model)
    model = flatten(model)
    train(model, optimizer, rank)
    with FullyShardedDataParallel.summon_full_params(model):
        return values_of(model)


def beside_wrapped_later(rank):
    assert_same(*(wrapped_later(rank, make) for make in (ours, SETUP.make_torchs)))


def test_fsdp1_may_wrap_after_the_optimizer_was_made(ranks):
    ranks(beside_wrapped_later)


# Pipeline stages


def stage_of(rank):
    torch.manual_seed(rank)
    layers = [nn.Linear(4, 4), nn.LayerNorm(4)]
    return nn.Sequential(*layers) if rank == 0 else nn.Sequential(layers[0])


def train_stages(rank, make, before):
    module = stage_of(rank)
    optimizer = make(module) if before else None
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
    optimizer = optimizer or make(module)
    inputs = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        schedule.step(*([inputs] if rank == 0 else []), target=torch.ones(4, 4))
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def beside_stages(rank, policy, before):
    def hand_split(module):
        decayed = {n for n, p in module.named_parameters() if p.ndim > 1}
        return SETUP.make_torchs(module, decayed)

    model, optimizer = train_stages(
        rank, lambda module: SETUP.make(module.parameters(), policy), before
    )
    twin, _ = train_stages(rank, hand_split, before)
    assert_same(model, twin)
    assert decays(optimizer, model) == {"0.weight"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "policy", ["no_bias_norm", exclude("1.*", is_bias, missing_ok=True)], ids=str
)
def test_each_stage_of_a_pipeline_decides_for_itself(ranks, policy, before):
    """A norm that lives in one stage alone is to be allowed to miss in the other."""
    ranks(beside_stages, policy, before)
