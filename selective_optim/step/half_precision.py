"""Decay that half precision rounds away, told from one look at the weights.

A weight moves by whole units in the last place. The fused kernels of Adam round decay
and update together, so that noise of the update carries a decay over that alone is too
small. Elsewhere decay is rounded alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import FORMS, Decision, is_zero
from selective_optim.step.adam_kernel import AdamKernel
from selective_optim.step.implementation import fused_choice, wants_fused
from selective_optim.step.kernel import Kernel
from selective_optim.step.setting import PLAIN, Group, Groups

SAMPLE = 512  # weights of a parameter that are looked at
NOISE = 0.25  # of the rate: the deviation of Adam's update under gradients of noise
UNITS = 6  # in the last place; noise of one hardly ever moves a weight so far

LOSS = "hardly decays"  # what every text of it says


def loss_of(
    kernel: Kernel | None, groups: Groups, decided: Iterable[Sequence[Decision]]
) -> str:
    """Name the first parameter of which less than half of the decay will arrive."""
    if not isinstance(kernel, AdamKernel):
        return ""
    for index, (group, decisions) in enumerate(zip(groups, decided)):
        for position, (param, decision) in enumerate(zip(group["params"], decisions)):
            if _loses(kernel, group, param, decision):
                return (
                    f"{decision.label(index, position)} {LOSS}: {param.dtype} "
                    f"rounds more than half of it away at this rate. Keep master "
                    f"weights in float32, or wrap a class with stochastic rounding or "
                    f"Kahan summation, as of torchao or optimi: selective(cls)."
                )
    return ""


def _loses(kernel: Kernel, group: Group, param: Tensor, decision: Decision) -> bool:
    if param.dtype not in _torch.HALF or type(_torch.shard_of(param)) not in PLAIN:
        return False
    decay, lr0 = decision.decay_key
    form, wd = FORMS[decay.form or kernel.default_form(group)], group["weight_decay"]
    if param.is_meta or decay.target or form.applied == "l2":
        return False
    # A warm-up begins low, and ends where a schedule says that it began.
    rate = max(float(group["lr"]), float(group.get("initial_lr", 0.0)))
    if is_zero(decay.of(wd)) or rate <= 0:
        return False
    strength = rate * float(form.strength(decay.of(wd), rate, lr0 or rate))
    fused = wants_fused(kernel, fused_choice(kernel, group), param)
    noise = NOISE * rate if fused and form.applied == "decoupled" else 0.0
    # An odd stride meets every column of a matrix whose rows are a power of 2.
    weights = _torch.shard_of(param.detach()).reshape(-1)
    weights = weights[:: weights.numel() // SAMPLE | 1].abs().cpu()
    due = strength * weights.double()
    moves = _moves(weights, due, noise)
    return bool((weights * moves).sum() < (weights * due).sum() / 2)


def _moves(weights: Tensor, due: Tensor, noise: float) -> Tensor:
    """Return how far towards 0 decay moves weights in a step, on average."""
    exact, info = weights.double(), torch.finfo(weights.dtype)
    if not noise:
        return exact - (exact - due).to(weights.dtype).double()
    unit = info.eps * exact.clamp(min=info.smallest_normal).log2().floor().exp2()
    edges = (torch.arange(UNITS).unsqueeze(1) + 0.5) * unit
    # Noise exceeds an edge on the side of decay more often than on the other.
    there, back = (torch.special.ndtr((d - edges) / noise) for d in (due, -due))
    # Nothing is rounded away of what is a unit and more.
    return torch.where((noise > unit) | (due > unit), due, unit * (there - back).sum(0))
