"""Decay that no kernel does: a pass over the tensors before the step, or after it.

Small tensors are joined into one, so that the formula is written once, in plain
operations on one tensor, and its cost is that of a few calls. No more than a chunk is
at hand at a time: what a pass needs stays in the cache, and small. Half precision is
computed in float32 and rounded once, as fused kernels do.

Nothing waits for a device: whether a ``GradScaler`` drops the step is asked there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

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


def _limit(param: Tensor) -> int:
    return CHUNK if param.is_cpu else CHUNK_ON_DEVICE


def pass_calls(
    decay_pass: DecayPass,
    lr: float | Tensor,
    maximize: bool,
    batch: Batch,
    direction: Direction | None,
    scaling: Scaling,
) -> tuple[list[Call], Scaling]:
    """Return the calls of a pass before the step, and what of the scale is left.

    Gradients are read when the calls run, and written to. ``"cautious"`` alone asks
    for the direction.
    """
    lr = lr_on_device(lr, batch.params)
    if decay_pass.applied == "decoupled" and decay_pass.target == 0.0:
        rate = lr * decay_pass.wd
        return _shrinking(rate, batch.params, scaling.found_inf), scaling
    parts = list(_chunks(batch))
    calls: list[Call] = []
    if decay_pass.applied != "decoupled" and scaling.grad_scale is not None:
        # The pass reads gradients, or writes to them, as they are without the scale.
        calls.append(partial(unscale_, batch.grads, scaling.grad_scale))
        scaling = scaling._replace(grad_scale=None)
    if decay_pass.applied == "l2":
        wd = -decay_pass.wd if maximize else decay_pass.wd
        pull = partial(_pull_gradients_, decay_pass, wd, batch, parts)
        return [*calls, pull], scaling
    rate = lr * decay_pass.wd
    move = partial(_move_, decay_pass, rate, batch, parts, direction)
    return [*calls, partial(move, scaling.found_inf)], scaling


def decay_agreeing_(
    decay_pass: DecayPass, rate: float | Tensor, batch: Batch, before: Sequence[Tensor]
) -> None:
    """Decay cautiously after a step: the update is what has changed since before.

    The rate is ``lr * wd``.
    """
    for i, (param, old) in enumerate(zip(batch.params, before, strict=True)):
        piece = Piece([param], [old], [], batch.targets[i : i + 1], [])
        joined, start = _joined([param]), _joined([old])
        offset = _agreeing(_offset(decay_pass, start, piece), start - joined)
        param.copy_(_less(joined, offset, rate))


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
    if halves or any(_are_views(params)):
        return [partial(torch.Tensor.mul_, param, factor) for param in params]
    given = not isinstance(factor, Tensor)
    if given and params[0].is_cpu and len({param.dtype for param in params}) == 1:
        # foreach makes a tensor of a number for each: 1.4 ms for 1,000, and so 0.4.
        real = params[0].dtype.to_real()
        factor = torch.tensor(factor, dtype=real, device="cpu")
    return [partial(_torch.foreach_mul_, params, factor)]


def _shrink_unless_(
    params: list[Tensor], factor: float | Tensor, found_inf: Tensor
) -> None:
    for param in params:
        param.copy_(unless_dropped(found_inf, param * factor, param))


class Piece(NamedTuple):
    """Tensors that are computed at once, parameter by parameter in every list."""

    into: Sequence[Tensor]  # where results go: the parameters, or new gradients
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    targets: Sequence[Tensor]
    moments: Sequence[Sequence[Tensor | None]]


def _move_(
    decay_pass: DecayPass,
    rate: float | Tensor,
    batch: Batch,
    parts: Sequence[slice],
    direction: Direction | None,
    found_inf: Tensor | None,
) -> None:
    """Move parameters towards their targets: ``param -= rate * (param - target)``."""
    if is_zero(rate):  # which would still turn -0.0 into 0.0
        return
    for part in parts:
        for piece in _pieces(batch, part, batch.params[part]):
            joined = _joined(piece.params)
            offset = _offset(decay_pass, joined, piece)
            if decay_pass.applied == "cautious":
                assert direction is not None  # else decay comes after the step
                moments = [_joined_moments(moment) for moment in piece.moments]
                offset = _agreeing(offset, direction(_joined(piece.grads), moments))
            moved = _less(joined, offset, rate)
            if found_inf is not None:
                moved = unless_dropped(found_inf, moved, joined)
            _write_(piece.into, moved)


def _pull_gradients_(
    decay_pass: DecayPass, wd: float | Tensor, batch: Batch, parts: Sequence[slice]
) -> None:
    """Add ``wd * (param - target)`` to gradients; those of the parameters stay."""
    for part in parts:
        # Laid out as the gradients are: fused kernels walk their memory.
        pulled = list(map(torch.empty_like, batch.grads[part]))
        for piece in _pieces(batch, part, pulled):
            offset = _offset(decay_pass, _joined(piece.params), piece)
            _write_(piece.into, _less(_joined(piece.grads), offset, -wd))
        batch.grads[part] = pulled


def _offset(decay_pass: DecayPass, joined: Tensor, piece: Piece) -> Tensor:
    if isinstance(decay_pass.target, str):
        return joined - _joined(piece.targets)
    return joined - decay_pass.target if decay_pass.target else joined


def _pieces(batch: Batch, part: slice, into: Sequence[Tensor]) -> Iterator[Piece]:
    """Cut a part that is one large tensor into pieces, which stay in the cache.

    Memory that is asked for in large blocks is also new at every step, and the system
    clears it first.
    """
    params, grads, targets = batch.params[part], batch.grads[part], batch.targets[part]
    moments = [moment[part] for moment in batch.moments]
    limit = _limit(params[0])
    whole = [into, params, grads, targets, *moments]
    first = [each[0] for each in whole if each and each[0] is not None]
    # Autograd follows whole tensors.
    cut = len(params) == 1 and params[0].numel() > limit
    if torch.is_grad_enabled() or not cut or not all(map(_cuttable, first)):
        yield Piece(into, params, grads, targets, moments)
        return
    for start in range(0, params[0].numel(), limit):
        own = [_cut(each, slice(start, start + limit)) for each in whole]
        mine, own_params, own_grads, own_targets, *own_moments = own
        yield Piece(mine, own_params, own_grads, own_targets, own_moments)


def _cuttable(tensor: Tensor) -> bool:
    plain = type(tensor) in PLAIN and not any(_are_views([tensor]))
    return plain and tensor.is_contiguous()


def _cut(tensors: Sequence[Any], part: slice) -> list[Any]:
    return [None if each is None else each.view(-1)[part] for each in tensors]


def _less(joined: Tensor, offset: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``joined - rate * offset``, in one walk over memory where it can be."""
    if isinstance(rate, Tensor):
        return joined - rate * offset
    return torch.sub(joined, offset, alpha=rate)


def _agreeing(offset: Tensor, update: Tensor) -> Tensor:
    """Keep the elements that the update does not push the other way.

    Source:
        Chen et al. 2025, "Cautious Weight Decay", Algorithm 1. The sign stands for
        the update, since a product of two small numbers may round to 0.
    """
    if offset.is_complex():  # its parts are parameters of their own, as in torch
        pairs = torch.view_as_real(offset), torch.view_as_real(update)
        return torch.view_as_complex(_agreeing(*pairs))
    # Bounds of 0 on the side that the update pushes to, and of all numbers elsewhere.
    # `torch.where` takes thirty times as long as an addition on the CPU (2.13).
    largest = torch.finfo(offset.dtype).max
    bound = update.sign().mul_(largest)
    return offset.maximum(bound - largest).minimum(bound + largest)


def _chunks(batch: Batch) -> Iterator[slice]:
    """Part a batch: neighbors that together are a chunk, and have begun alike."""
    limit = _limit(batch.params[0])
    start = size = 0
    unjoinable = _unjoinable(batch.params)
    for i, param in enumerate(batch.params):
        size += param.numel()
        first = batch.params[start]
        apart = unjoinable[i] or unjoinable[start]
        apart |= (param.dtype, param.device) != (first.dtype, first.device)
        apart |= any((m[i] is None) is not (m[start] is None) for m in batch.moments)
        if i > start and (size > limit or apart):
            yield slice(start, i)
            start, size = i, param.numel()
    yield slice(start, len(batch.params))


def _unjoinable(params: Sequence[Tensor]) -> list[bool]:
    """Tell which may not be joined: sharded ones, other subclasses, and views.

    One that is listed twice moves twice, and the second time from where it is then.
    """
    times = Counter(map(id, params))
    return [
        not _torch.CAN_JOIN or type(param) not in PLAIN or view or times[id(param)] > 1
        for param, view in zip(params, _are_views(params))
    ]


def _are_views(params: Sequence[Tensor]) -> list[bool]:
    """Tell which negate or conjugate as they are read.

    Operations on lists refuse them (torch 2.7 to 2.15).
    """
    return [param.is_neg() or param.is_conj() for param in params]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors into one, wide enough to compute in; a single one as it is."""
    flat = tensors[0] if len(tensors) == 1 else _torch.flatten(tensors)
    return flat.float() if flat.dtype in _torch.HALF else flat


def _joined_moments(moments: Sequence[Tensor | None]) -> Tensor | None:
    known = [moment for moment in moments if moment is not None]
    return _joined(known) if known else None


def _parted(joined: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(like) == 1:
        return [joined]
    # torch 2.7 gives what has no elements another shape.
    parts = zip(_torch.unflatten(joined, like), like, strict=True)
    return [part if tensor.numel() else tensor for part, tensor in parts]


def _write_(params: Sequence[Tensor], joined: Tensor) -> None:
    if len(params) == 1 or torch.is_grad_enabled():  # where autograd follows
        for param, new in zip(params, _parted(joined, params)):
            param.copy_(new)
    else:
        _torch.foreach_copy_(params, _parted(joined, params))
