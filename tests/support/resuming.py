"""A small model, assigned gradients and exact comparison for the tests of resuming."""

import copy
import io

import torch

import selective_optim
from tests.support.compare import assert_same
from tests.support.nets import OddNet

CLASSES = {
    name: {"ours": getattr(selective_optim, name), "torch": getattr(torch.optim, name)}
    for name in ("SGD", "Adam", "AdamW")
}
OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01}),
}


def make_net(device="cpu"):
    torch.manual_seed(0)
    return OddNet().to(device)


def train(model, optimizer, steps):
    """Step on gradients of the step's number; ``idle`` has none, ``late`` not on 4."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            grad = torch.empty_like(param).copy_(
                torch.randn(param.shape, generator=generator)
            )
            without = name == "idle" or (name == "late" and step == 4)
            param.grad = None if without else grad
        optimizer.step()


def names_by_decay(model):
    """Names of the decayed and of the exempt under ``no_bias_norm``."""
    exempt = [n for n, _ in model.named_parameters() if "bias" in n or "body.1" in n]
    return [n for n, _ in model.named_parameters() if n not in exempt], exempt


def hand_split(model, wd=0.1):
    """Two groups as users write them."""
    params = dict(model.named_parameters())
    decayed, exempt = names_by_decay(model)
    return [
        {"params": [params[n] for n in decayed], "weight_decay": wd},
        {"params": [params[n] for n in exempt], "weight_decay": 0.0},
    ]


def through_file(state_dict):
    """Save and load as a resumed process would."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(model, optimizer):
    """All bits that a step may change, apart from what is live."""
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()))


def state_by_name(model, optimizer):
    return {
        name: dict(optimizer.state[param])
        for name, param in model.named_parameters()
        if optimizer.state.get(param)  # looking one up in torch leaves an empty one
    }


def assert_same_run(model, optimizer, other_model, other_optimizer):
    """Compare two runs: parameters and state, each by name."""
    assert_same(model.state_dict(), other_model.state_dict())
    assert_same(
        state_by_name(model, optimizer), state_by_name(other_model, other_optimizer)
    )
