"""Decay that no kernel does: a pass over the tensors before the step, or after it.

Small tensors are joined, so that a pass costs a few calls, and computed a chunk at a
time, which stays in the cache. Half precision is computed in float32 and rounded once,
as fused kernels do. Nothing waits for a device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.decay import is_zero
from selective_optim.step.setting import (
    PLAIN,
    Batch,
    Call,
    DecayPass,
    Direction,
    Scaling,
    lr_on_device,
    unless_dropped,
    unscale_,
)

# Elements that are at hand at a time. On ResNet-50 and two cores 2 ** 17 to 2 ** 19
# were level, and all at once took five to nine times as long. A GPU wants few launches.
CHUNK, CHUNK_ON_DEVICE = 2**18, 2**24


def pass_calls(
    decay_pass: DecayPass,
    lr: float | Tensor,
    maximize: bool,
    batch: Batch,
    direction: Direction | None,
    scaling: Scaling,
) -> tuple[list[Call], Scaling]:
    """Return the calls of a pass before the step, and what of the scale is left."""
    if decay_pass.applied == "l2":  # new gradients, which the kernel drops by itself
        rate, found_inf = decay_pass.wd if maximize else -decay_pass.wd, None
    else:
        rate = lr_on_device(lr, batch.params) * decay_pass.wd
        found_inf = scaling.found_inf
    if decay_pass.applied == "decoupled" and decay_pass.target == 0.0:
        return _shrinking(rate, batch.params, found_inf), scaling
    calls: list[Call] = []
    if decay_pass.applied != "decoupled" and scaling.grad_scale is not None:
        # The pass reads gradients, or writes to them, as they are without the scale.
        calls.append(partial(unscale_, batch.grads, scaling.grad_scale))
        scaling = scaling._replace(grad_scale=None)
    chunks = list(_chunks(batch))
    move = partial(_move_, decay_pass, rate, batch, chunks, direction, found_inf)
    return [*calls, move], scaling


def decay_agreeing_(
    decay_pass: DecayPass, rate: float | Tensor, batch: Batch, before: Sequence[Tensor]
) -> None:
    """Decay cautiously after a step by ``lr * wd``: what changed is the update."""
    for i, (param, old) in enumerate(zip(batch.params, before, strict=True)):
        joined, start = _joined([param]), _joined([old])
        offset = _offset(decay_pass, start, batch.targets[i : i + 1])
        param.copy_(_less(joined, _agreeing(offset, start - joined), rate))


def _shrinking(
    rate: float | Tensor, params: list[Tensor], found_inf: Tensor | None
) -> list[Call]:
    """Return the calls of decoupled decay towards 0: ``param = param * (1 - rate)``."""
    if is_zero(rate):
        return []
    factor = 1 - rate
    if isinstance(factor, Tensor):
        factor = factor.squeeze()
    if found_inf is not None:
        return [partial(_shrink_unless_, params, factor, found_inf)]
    # On the CPU foreach rounds the factor to half precision first, mul_ does not.
    halves = any(param.is_cpu and param.dtype in _torch.HALF for param in params)
    if halves or any(map(_is_view, params)):
        return [partial(torch.Tensor.mul_, param, factor) for param in params]
    first, dtypes = params[0], {param.dtype for param in params}
    if not isinstance(factor, Tensor) and first.is_cpu and len(dtypes) == 1:
        # foreach makes a tensor of a number for each: 1.4 ms for 1,000, and so 0.4.
        factor = torch.tensor(factor, dtype=first.dtype.to_real(), device="cpu")
    return [partial(_torch.foreach_mul_, params, factor)]


def _shrink_unless_(
    params: list[Tensor], factor: float | Tensor, found_inf: Tensor
) -> None:
    for param in params:
        param.copy_(unless_dropped(found_inf, param * factor, param))


def _move_(
    decay_pass: DecayPass,
    rate: float | Tensor,
    batch: Batch,
    chunks: Sequence[slice],
    direction: Direction | None,
    found_inf: Tensor | None,
) -> None:
    """Lower parameters, or new gradients for L2, by ``rate * (param - target)``."""
    if is_zero(rate):  # which would still turn -0.0 into 0.0
        return
    changes_grads = decay_pass.applied == "l2"
    for chunk in chunks:
        outputs = batch.params[chunk]
        if changes_grads:
            # Laid out as the gradients are: fused kernels walk their memory.
            outputs = list(map(torch.empty_like, batch.grads[chunk]))
        for into, params, grads, targets, *moments in _pieces(batch, chunk, outputs):
            joined = _joined(params)
            offset = _offset(decay_pass, joined, targets)
            if decay_pass.applied == "cautious":
                assert direction is not None  # else decay comes after the step
                joined_moments = [m[0] if m[0] is None else _joined(m) for m in moments]
                offset = _agreeing(offset, direction(_joined(grads), joined_moments))
            moved = _less(_joined(grads) if changes_grads else joined, offset, rate)
            if found_inf is not None:
                moved = unless_dropped(found_inf, moved, joined)
            _write_(into, moved)
        if changes_grads:  # those of the parameters stay
            batch.grads[chunk] = outputs


def _offset(decay_pass: DecayPass, joined: Tensor, targets: Sequence[Tensor]) -> Tensor:
    if isinstance(decay_pass.target, str):
        return joined - _joined(targets)
    return joined - decay_pass.target if decay_pass.target else joined


def _pieces(
    batch: Batch, chunk: slice, outputs: list[Tensor]
) -> Iterator[list[list[Any]]]:
    """Cut a chunk that is one large tensor into pieces, which stay in the cache."""
    # Memory in large blocks is also new at every step, and cleared by the system.
    columns: list[Any] = [batch.params, batch.grads, batch.targets, *batch.moments]
    columns = [outputs, *(column[chunk] for column in columns)]
    size, limit = outputs[0].numel(), _limit(outputs[0])
    firsts = [column[0] for column in columns if column and column[0] is not None]
    # Autograd follows whole tensors.
    cut = len(outputs) == 1 and size > limit and not torch.is_grad_enabled()
    plain = all(type(t) in PLAIN and not _is_view(t) for t in firsts)
    if not (cut and plain and all(map(Tensor.is_contiguous, firsts))):
        yield columns
        return
    for start in range(0, size, limit):
        piece = slice(start, start + limit)
        yield [[t if t is None else t.view(-1)[piece] for t in c] for c in columns]


def _limit(tensor: Tensor) -> int:
    return CHUNK if tensor.is_cpu else CHUNK_ON_DEVICE


def _is_view(tensor: Tensor) -> bool:
    """Tell whether it negates or conjugates as it is read, which foreach refuses."""
    return tensor.is_neg() or tensor.is_conj()


def _less(joined: Tensor, offset: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``joined - rate * offset``, in one walk over memory where it can be."""
    if isinstance(rate, Tensor):
        return joined - rate * offset
    return torch.sub(joined, offset, alpha=rate)


def _agreeing(offset: Tensor, update: Tensor) -> Tensor:
    """Keep the elements that the update does not push the other way."""
    if offset.is_complex():  # its parts are parameters of their own, as in torch
        pairs = torch.view_as_real(offset), torch.view_as_real(update)
        return torch.view_as_complex(_agreeing(*pairs))
    # The sign stands for the update: a product of small numbers may round to 0.
    # Bounds of 0 on the side that the update pushes to, and of all numbers elsewhere.
    # `torch.where` takes thirty times as long as an addition on the CPU (2.13).
    largest = torch.finfo(offset.dtype).max
    bound = update.sign().mul_(largest)
    return offset.maximum(bound - largest).minimum(bound + largest)


def _chunks(batch: Batch) -> Iterator[slice]:
    """Part a batch: neighbors that together are a chunk, and have begun alike."""
    # One that is listed twice moves twice, the second time from where it is then.
    times, limit = Counter(map(id, batch.params)), _limit(batch.params[0])
    start = size = 0
    last = None
    for i, param in enumerate(batch.params):
        joins = type(param) in PLAIN and times[id(param)] == 1 and not _is_view(param)
        missing = [moment[i] is None for moment in batch.moments]
        place = (param.dtype, param.device, missing)
        kind = place if joins and _torch.CAN_JOIN else None
        size += param.numel()
        if i > start and (size > limit or kind is None or kind != last):
            yield slice(start, i)
            start, size = i, param.numel()
        last = kind
    yield slice(start, len(batch.params))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one, wide enough to compute in; a single one as it is."""
    flat = tensors[0] if len(tensors) == 1 else _torch.flatten(tensors)
    return flat.float() if flat.dtype in _torch.HALF else flat


def _write_(tensors: Sequence[Tensor], joined: Tensor) -> None:
    if len(tensors) == 1:
        tensors[0].copy_(joined)
        return
    # torch 2.7 gives what has no elements another shape.
    pairs = zip(_torch.unflatten(joined, tensors), tensors, strict=True)
    values = [value if tensor.numel() else tensor for value, tensor in pairs]
    if torch.is_grad_enabled():  # where autograd follows
        for tensor, value in zip(tensors, values):
            tensor.copy_(value)
    else:
        _torch.foreach_copy_(tensors, values)
