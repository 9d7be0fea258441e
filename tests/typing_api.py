"""Checked by mypy and never run: an error that is expected must be there."""

import torch
from torch import nn

from selective_optim import SGD, Adam, AdamW, Decay, ParameterInfo, deciding_for
from selective_optim.policies import Policy, exclude, first_match, is_bias, named, parse

model = nn.Linear(2, 2)


def matrices(info: ParameterInfo) -> bool:
    return len(info.parameter.shape) > 1


def halved(info: ParameterInfo) -> Decay:
    return Decay(0.5, "l2")


def accepted_and_refused() -> Policy | None:
    # What a policy may be.
    AdamW(model.parameters(), wd_policy="no_bias_norm")
    AdamW(model, wd_policy=None, model=[model])
    Adam(model.named_parameters(), wd_policy={"*.bias": 0, nn.LayerNorm: False})
    Adam(model.parameters(), wd_policy={is_bias: Decay(0.1)})
    SGD(model.parameters(), lr=torch.tensor(0.1), wd_policy=matrices)
    SGD(model.parameters(), wd_policy=halved)
    SGD(model.parameters(), wd_policy=lambda info: 0.5)
    AdamW(model.parameters(), wd_policy=exclude(is_bias | nn.LayerNorm) * named("timm"))
    AdamW(model.parameters(), wd_policy="exclude('*.bias') * layerwise(0.75)")
    AdamW(model.parameters(), wd_policy=parse("exclude('*.bias') * layerwise(0.75)"))
    optimizer = AdamW(model.parameters())
    optimizer.wd_policy = exclude("*.bias")
    with deciding_for(lambda: model, wd_policy="huggingface"):
        pass

    # What it may not be.
    AdamW(model.parameters(), wd_policy=3)  # type: ignore[arg-type]
    Adam(model.parameters(), wd_policy=["bias"])  # type: ignore[arg-type]
    SGD(model.parameters(), wd_policy=nn.LayerNorm)  # type: ignore[arg-type]
    SGD(model.parameters(), wd_policy=lambda info: "no")  # type: ignore[arg-type,return-value]
    AdamW(model.parameters(), wd_polcy="all")  # type: ignore[call-arg]
    Decay(1, "adamw")  # type: ignore[arg-type]
    first_match(["bias"])  # type: ignore[arg-type]
    parse(3)  # type: ignore[arg-type]
    with deciding_for(3):  # type: ignore[arg-type]
        pass
    return optimizer.wd_policy
