"""Engines that shard, saved in the middle and resumed: the bits of hand-split groups.

Each trains torch's optimizer, and ours in two parts with all made anew between them.
Where an engine asks for a GPU, a subclass leaves out that question, and what of devices
follows.
"""

import os
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from selective_optim import AdamW, param_groups
from tests.support.compare import assert_same
from tests.support.data_parallel import (
    DECAYED,
    SETUPS,
    loss_of,
    make_net,
    values_of,
)
from tests.support.distributed import Ranks
from tests.test_fsdp import flatten

pytestmark = [pytest.mark.distributed, pytest.mark.integration]
SETUP = SETUPS[0]
HYPER = {**SETUP.hyperparameters}
WHOLE, FIRST, SECOND = (0, 4), (0, 2), (2, 4)


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def ours(model):
    return SETUP.make(model.parameters())


def torchs(model):
    named = [name for name, _ in model.named_parameters()]
    decayed = [n for n in named if n.replace("_fsdp_wrapped_module.", "") in DECAYED]
    return SETUP.make_torchs(model, decayed)


def split(model):
    return AdamW(param_groups(model, "no_bias_norm", weight_decay=0.2), **HYPER)


def torchs_split(model):
    groups = param_groups(model, "no_bias_norm", weight_decay=0.2)
    return torch.optim.AdamW([dict(g) for g in groups], **HYPER, fused=True)


def environment(rank):
    """Name the group that we joined, as a launcher does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_WORLD_SIZE="2", GROUP_RANK="0", TORCHELASTIC_RUN_ID="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", NODE_RANK="0")
    os.environ.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="1")
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="(?s).*(weight.decay|wd_policy)")


def zero_config(stage):
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }


def gathered(model, stage):
    import deepspeed

    params = list(model.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
        return values_of(model)


# Each trains steps from one to another, from what it saved if that is not the first.


def by_deepspeed(rank, make, folder, first, last, stage, empty=False):
    import deepspeed

    config = zero_config(stage)
    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=empty):
        model = make_net()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(model), config=config, dist_init_required=False
    )
    if first:
        engine.load_checkpoint(folder, tag="half")
    for step in range(first, last):
        engine.backward(loss_of(engine, step, rank))
        engine.step()
    engine.save_checkpoint(folder, tag="half")
    return gathered(engine.module, stage)


def accelerator_with(**arguments):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **arguments)


def train_under(accelerator, rank, make, folder, first, last):
    model = make_net()
    model, optimizer = accelerator.prepare(model, make(model))
    if first:
        accelerator.load_state(folder)
    for step in range(first, last):
        accelerator.backward(loss_of(model, step, rank))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder)
    return model


def by_accelerate_deepspeed(rank, make, folder, first, last, stage):
    from accelerate import DeepSpeedPlugin

    config = {**zero_config(stage), "gradient_accumulation_steps": 1}
    accelerator = accelerator_with(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)
    )
    model = train_under(accelerator, rank, make, folder, first, last)
    return gathered(model.module, stage)


def by_accelerate_fsdp2(rank, make, folder, first, last):
    from accelerate import FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = accelerator_with(fsdp_plugin=plugin)
    # As it does itself on accelerators.
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP
    model = train_under(accelerator, rank, make, folder, first, last)
    return values_of(model)


def lightning_fit(rank, make, folder, first, last, strategy, shard=lambda *_: None):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def configure_model(self):
            shard(self)

        def training_step(self, batch, index):
            return loss_of(self.net, self.global_step, rank)

        def configure_optimizers(self):
            return make(self.net)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(range(9), batch_size=1)

    silent = dict.fromkeys(("logger", "enable_checkpointing"), False)
    silent |= dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=last, **silent,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = Module()
    at = str(Path(folder, "half.ckpt"))
    trainer.fit(module, ckpt_path=at if first else None)
    trainer.save_checkpoint(at)
    return trainer


def place():
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    return TorchElasticEnvironment()


def by_lightning_fsdp2(rank, make, folder, first, last, whole):
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1,
        save_distributed_checkpoint=not whole, process_group_backend="gloo",
    )  # fmt: skip
    strategy.cluster_environment = place()

    def shard(module):
        mesh = module.device_mesh["data_parallel"]
        fully_shard(module.net.first, mesh=mesh)
        fully_shard(module.net, mesh=mesh)

    trainer = lightning_fit(rank, make, folder, first, last, strategy, shard)
    return values_of(trainer.lightning_module.net)


def by_lightning_fsdp1(rank, make, folder, first, last):
    from lightning.pytorch.strategies import FSDPStrategy

    class OnCPU(FSDPStrategy):
        """Not the very class, which the trainer refuses without a GPU."""

    strategy = OnCPU(
        cluster_environment=place(),
        process_group_backend="gloo",
        state_dict_type="sharded",
    )

    def shard(module):
        module.net = flatten(module.net)

    trainer = lightning_fit(rank, make, folder, first, last, strategy, shard)
    with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
        return values_of(trainer.lightning_module.net)


def by_lightning_deepspeed(rank, make, folder, first, last, stage):
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.strategies.ddp import DDPStrategy

    class OnCPU(DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)  # whose index it hands on

        def setup_environment(self):
            super(DDPStrategy, self).setup_environment()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    strategy = OnCPU(
        config=zero_config(stage), cluster_environment=place(),
        process_group_backend="gloo",
    )  # fmt: skip
    trainer = lightning_fit(rank, make, folder, first, last, strategy)
    return gathered(trainer.lightning_module.net, stage)


def by_composer(rank, make, folder, first, last):
    import composer
    from composer.utils.parallelism import FSDP2Config

    class Steps(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(9))

    class Model(composer.ComposerModel):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, batch):
            return loss_of(self.net, int(batch), rank)

        def loss(self, outputs, batch):
            return outputs

    model = Model()
    at = f"{folder}/at-{first}.pt" if first else None
    trainer = composer.Trainer(
        model=model, optimizers=make(model.net), device="cpu", precision="fp32",
        parallelism_config={"fsdp": FSDP2Config(state_dict_type="full")},
        train_dataloader=torch.utils.data.DataLoader(Steps(), batch_size=1),
        max_duration=f"{last}ba", save_folder=folder, save_interval=f"{last}ba",
        save_filename="at-{batch}.pt", load_path=at, progress_bar=False,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return values_of(model.net)


def by_colossalai(rank, make, folder, first, last, stage):
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    class WithoutStreams(CpuAccelerator):
        def stream(self, _):
            return nullcontext()

        Stream = current_stream = lambda *_: None
        get_current_device = lambda _: torch.device("cpu")  # noqa: E731

    class OnCPU(LowLevelZeroOptimizer):
        def _sanity_checks(self):
            pass

    set_accelerator(WithoutStreams())
    model = make_net()
    optimizer = OnCPU(make(model), partition_grad=stage == 2)
    at = Path(folder, f"{rank}.pt")
    if first:
        saved = torch.load(at)
        model.load_state_dict(saved["model"])
        optimizer.update_master_params(model)
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, last):
        optimizer.backward(loss_of(model, step, rank))
        optimizer.step()
        optimizer.zero_grad()
    at.parent.mkdir(exist_ok=True)
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, at)
    return values_of(model)


BY = {
    "deepspeed": by_deepspeed,
    "accelerate-deepspeed": by_accelerate_deepspeed,
    "accelerate-fsdp2": by_accelerate_fsdp2,
    "lightning-fsdp2": by_lightning_fsdp2,
    "lightning-fsdp1": by_lightning_fsdp1,
    "lightning-deepspeed": by_lightning_deepspeed,
    "composer": by_composer,
    "colossalai": by_colossalai,
}
PACKAGES = ("accelerate", "colossalai", "composer", "deepspeed", "lightning")


def train(rank, name, *arguments):
    environment(rank)
    return BY[name](rank, *arguments)


def compare(ranks, folder, makes, name, *arguments):
    for package in PACKAGES:
        if package in name and find_spec(package) is None:
            pytest.skip(f"{package} is not installed")

    def run(make, part, steps):
        return ranks(train, name, make, str(folder / part), *steps, *arguments)

    mine, theirs = makes
    expected = run(theirs, "theirs", WHOLE)
    run(mine, "ours", FIRST)
    assert_same(run(mine, "ours", SECOND), expected)


FLATTENED = [
    *(("deepspeed", stage) for stage in range(4)),
    ("deepspeed", 3, True),
    *(("accelerate-deepspeed", stage) for stage in range(4)),
    *(("lightning-deepspeed", stage) for stage in range(4)),
]
SHARDED = [
    ("accelerate-fsdp2",),
    ("lightning-fsdp2", True),
    ("lightning-fsdp2", False),
    ("lightning-fsdp1",),
    ("composer",),
    ("colossalai", 1),
    ("colossalai", 2),
]


def name_of(case):
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", FLATTENED, ids=name_of)
def test_groups_split_by_hand_are_exact_where_tensors_are_flattened(
    ranks, tmp_path, case
):
    compare(ranks, tmp_path, (split, torchs_split), *case)


@pytest.mark.parametrize("case", SHARDED, ids=name_of)
def test_policy_is_exact_where_each_tensor_is_sharded(ranks, tmp_path, case):
    compare(ranks, tmp_path, (ours, torchs), *case)
