"""DeepSpeed's ZeRO on two processes: hand-split groups are exact, policies refused.

Stages 1 to 3 put one flat tensor in the place of a group's parameters.
"""

import os
import warnings

import pytest
import torch
from torch import nn

from selective_optim import AdamW, param_groups
from tests.support.distributed import Ranks

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.integration
HYPER = {"lr": 0.1, "weight_decay": 0.5}


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def ours(model):
    return AdamW(param_groups(model, "no_bias_norm", weight_decay=0.5), lr=0.1)


def torchs(model):
    groups = param_groups(model, "no_bias_norm", weight_decay=0.5)
    return torch.optim.AdamW([dict(group) for group in groups], lr=0.1, fused=True)


def deciding(model, policy="no_bias_norm"):
    return AdamW(model.parameters(), **HYPER, wd_policy=policy)


def matrices(model):
    return deciding(model, "matrices")


def begin(rank):
    """Import DeepSpeed on a rank, as its launcher does."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    warnings.simplefilter("ignore")  # of many kinds, none of them ours
    import deepspeed

    # Without this it runs a compiler, for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def train(rank, make, stage, dtype):
    """Take three steps and return the parameters, whole."""
    deepspeed = begin(rank)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(model), config=config, dist_init_required=False
    )
    torch.manual_seed(rank)
    for _ in range(3):
        loss = engine(torch.randn(4, 4, dtype=dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=stage == 3):
        return [param.detach().float().clone() for param in params]


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_dtype
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hand_split_groups_are_exact(ranks, stage, dtype):
    (actual, _), (expected, _) = (
        ranks(train, make, stage, dtype) for make in (ours, torchs)
    )
    assert all(map(torch.equal, actual, expected))


@each_dtype
def test_policy_is_exact_where_tensors_stay_whole(ranks, dtype):
    (actual, _), (expected, _) = (
        ranks(train, make, 0, dtype) for make in (deciding, torchs)
    )
    assert all(map(torch.equal, actual, expected))


def refusal(rank, *arguments):
    """Return what the training raises; processes that fail are slow to begin again."""
    with pytest.raises(ValueError, match="wd_policy") as caught:
        train(rank, *arguments)
    return str(caught.value)


@pytest.mark.parametrize("make", [deciding, matrices])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_policy_over_flat_tensors_is_refused_with_the_line(ranks, stage, make):
    for message in ranks(refusal, make, stage, torch.float32):
        assert 'AdamW(param_groups(model, "exclude(' in message
        assert '="matrices"' not in message


def split_where_nothing_is_left(rank):
    """Let DeepSpeed take the elements away before anything is decided."""
    deepspeed = begin(rank)
    deepspeed.init_distributed("gloo")
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = net()
    assert not any(param.numel() for param in model.parameters())
    return [g["param_names"] for g in param_groups(model, "matrices", weight_decay=0.5)]


def test_shapes_decide_under_zero_init(ranks):
    matrices = ["0.weight", "2.weight"]
    vectors = ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert ranks(split_where_nothing_is_left) == [[matrices, vectors]] * 2
