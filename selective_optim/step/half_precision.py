"""Decay that half precision rounds away, told from one look at the weights.

A weight moves by whole units in the last place. The fused kernels of Adam round once
what decay and update come to, so the update, which is noise of about a quarter of the
rate, carries a decay over that alone is too small. Elsewhere decay is rounded alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FORMS, is_zero
from selective_optim.step.adam_kernel import AdamKernel
from selective_optim.step.implementation import fused_choice, is_dense, wants_fused
from selective_optim.step.kernel import Kernel
from selective_optim.step.parts import DecidedParam
from selective_optim.step.setting import PLAIN, Groups

SAMPLE = 512  # weights of a parameter that are looked at
NOISE = 0.25  # of the rate: the deviation of Adam's update under gradients of noise
# Of the decay: what is above is not told of, and in simulations 0.8 always was.
ENOUGH = 0.5
UNITS = 6  # in the last place; noise of more than one hardly ever moves a weight so far


def first_loser(
    kernel: Kernel | None, groups: Groups, params: Iterable[DecidedParam]
) -> DecidedParam | None:
    """Find the first parameter of which less than half of the decay will arrive.

    Args:
        kernel: Of the optimizer's class; of Adam and AdamW alone it is known.
        groups: The optimizer's groups.
        params: Every parameter, with what was decided for it.
    """
    if not isinstance(kernel, AdamKernel):
        return None
    return next((each for each in params if _loses(kernel, groups, each)), None)


def _loses(kernel: Kernel, groups: Groups, each: DecidedParam) -> bool:
    param, group, (decay, lr0) = each.param, groups[each.group], each.decision.decay_key
    form = decay.form or kernel.default_form(group)
    wd = decay.of(group["weight_decay"])
    known = param.dtype in _torch.HALF and type(_torch.shard_of(param)) in PLAIN
    if (
        not known
        or param.is_meta
        or decay.target
        or FORMS[form].applied == "l2"
        or is_zero(wd)
    ):
        return False
    # A warm-up begins low, and ends where a schedule says that it began.
    rate = max(float(group["lr"]), float(group.get("initial_lr", 0.0)))
    strength = rate * float(FORMS[form].strength(wd, rate, lr0 or rate or 1.0))
    weights = _sample(param)
    fused = wants_fused(kernel, fused_choice(kernel, group), param) and is_dense(param)
    noise = NOISE * rate if fused and FORMS[form].applied == "decoupled" else 0.0
    moves = _expected(weights, strength, noise)
    return bool((weights * moves).sum() < ENOUGH * strength * weights.square().sum())


def _sample(param: Tensor) -> Tensor:
    """Take the sizes of some weights, in their own dtype."""
    weights = _torch.shard_of(param.detach()).reshape(-1)
    # An odd stride meets every column of a matrix whose rows are a power of 2.
    return weights[:: weights.numel() // SAMPLE | 1].abs().cpu()


def _expected(weights: Tensor, strength: float, noise: float) -> Tensor:
    """Return how far towards 0 decay moves weights in a step, on average."""
    exact, info = weights.double(), torch.finfo(weights.dtype)
    due = exact * strength
    if not noise:
        return exact - (exact - due).to(weights.dtype).double()
    smallest = info.smallest_normal
    unit = info.eps * torch.exp2(exact.clamp(min=smallest).log2().floor())
    whole = (due / unit).round()
    rest = due - whole * unit
    for k in range(UNITS):
        edge = (k + 0.5) * unit
        whole = whole + _above(edge - rest, noise) - _above(edge + rest, noise)
    # Noise of a unit and more rounds nothing away.
    return torch.where(unit > noise, whole * unit, due)


def _above(edge: Tensor, noise: float) -> Tensor:
    """Return how likely noise exceeds each of these."""
    return torch.erfc(edge / (noise * math.sqrt(2))) / 2
