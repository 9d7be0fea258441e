"""Any settings of AdamW in four launches: a Triton kernel reads them per tensor.

torch's fused kernel takes one rate and one decay, so that 26 layer rates cost 52
launches and 1,000 rates 1,000. Here each tensor has its own column in a table on the
device: counters advance, are gathered, raise the betas to their power, and all is
stepped. Off unless ``SELECTIVE_OPTIM_TRITON=1`` is set before the first step, as it
has not been measured; what it does not take goes to torch's kernel as before.

The order of operations is that of torch's kernel in float32, read from its machine
code for sm_90 (2.11 and 2.15, the same): where the compiler contracted a product and
a sum there, the product is not rounded here, either. Not so for L2 decay: of four
neighbors it contracts three, so Adam's calls are left to torch. The powers are
torch's, too: Triton's are rounded otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from selective_optim import _torch
from selective_optim.step.setting import Call

SWITCH = "SELECTIVE_OPTIM_TRITON"
DEVICES = {"cuda"}
FEWEST = 8  # calls that are worth a table
SIZE = 1024  # elements that one program steps
WIDE = 4  # elements of 4 bytes that a thread loads at once, where all lie so
# Places of the lists in a call of torch's kernel.
PARAMS, EXP_AVG, EXP_AVG_SQ, GRADS, STEPS = 0, 2, 3, 1, 5
STATE = PARAMS, EXP_AVG, EXP_AVG_SQ
WALKED = *STATE, GRADS  # as the rows of the table

tl: Any = None  # Triton's language, once `kernels` has imported it


def gather(
    pointers: tl.tensor, values: tl.tensor, count: tl.tensor, size: tl.constexpr
) -> None:
    """Read one number from each address; runs on the device."""
    places = tl.program_id(0) * size + tl.arange(0, size)
    mask = places < count
    addresses = tl.load(pointers + places, mask=mask, other=0)
    value = tl.load(addresses.to(tl.pointer_type(tl.float32)), mask=mask)
    tl.store(values + places, value, mask=mask)


def updated(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    numbers: tl.tensor,
    powers: tl.tensor,
    count: tl.tensor,
) -> tuple[Any, Any, Any]:
    """Return parameter and moments after a step; runs on the device.

    Per element, ``fma`` rounding once::

        param = fma(param, -(lr * weight_decay), param)
        exp_avg = fma(exp_avg, beta1, fma(grad, -beta1, grad))
        exp_avg_sq = fma(exp_avg_sq, beta2, fma(grad * grad, -beta2, grad * grad))
        denom = sqrt(exp_avg_sq) / sqrt(1 - beta2 ** step) + eps
        param = param - exp_avg * (lr / (1 - beta1 ** step)) / denom
    """
    lr, wd = tl.load(numbers), tl.load(numbers + count)
    beta1, beta2 = tl.load(numbers + 2 * count), tl.load(numbers + 3 * count)
    eps = tl.load(numbers + 4 * count)
    step_size = tl.div_rn(lr, 1.0 - tl.load(powers))
    correction = tl.sqrt_rn(1.0 - tl.load(powers + count))
    # Triton's minus subtracts from 0.0, of which a zero loses its sign: hence -1.0.
    # Not where there is no decay: infinity times zero is no number.
    param = tl.where(wd != 0, tl.fma(param, lr * wd * -1.0, param), param)
    square = grad * grad
    exp_avg = tl.fma(exp_avg, beta1, tl.fma(grad, beta1 * -1.0, grad))
    exp_avg_sq = tl.fma(exp_avg_sq, beta2, tl.fma(square, beta2 * -1.0, square))
    denom = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction) + eps
    return param - tl.div_rn(exp_avg * step_size, denom), exp_avg, exp_avg_sq


def adamw(
    pointers: tl.tensor,  # rows of `count`: parameters, both moments, gradients
    numbers: tl.tensor,  # rows of `count`: lr, weight_decay, beta1, beta2, eps
    powers: tl.tensor,  # rows of `count`: of beta1 and of beta2
    chunks: tl.tensor,  # three columns: tensor, its chunk, elements left in the tensor
    count: tl.tensor,
    maximize: tl.constexpr,
    wide: tl.constexpr,  # elements that are loaded at once
    size: tl.constexpr,
) -> None:
    """Step a chunk of one tensor; runs on the device."""
    row = chunks + 3 * tl.program_id(0)
    tensor, chunk, left = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    offsets = chunk * size + tl.arange(0, size)
    mask = tl.arange(0, size) < tl.multiple_of(left, wide)
    at = pointers + tensor
    params = tl.load(at).to(tl.pointer_type(tl.float32))
    exp_avgs = tl.load(at + count).to(tl.pointer_type(tl.float32))
    exp_avg_sqs = tl.load(at + 2 * count).to(tl.pointer_type(tl.float32))
    grads = tl.load(at + 3 * count).to(tl.pointer_type(tl.float32))
    params = tl.multiple_of(params, 4 * wide) + offsets
    exp_avgs = tl.multiple_of(exp_avgs, 4 * wide) + offsets
    exp_avg_sqs = tl.multiple_of(exp_avg_sqs, 4 * wide) + offsets
    grad = tl.load(tl.multiple_of(grads, 4 * wide) + offsets, mask=mask, other=0.0)
    if maximize:
        grad = grad * -1.0
    param, exp_avg, exp_avg_sq = updated(
        tl.load(params, mask=mask, other=0.0),
        grad,
        tl.load(exp_avgs, mask=mask, other=0.0),
        tl.load(exp_avg_sqs, mask=mask, other=0.0),
        *(numbers + tensor, powers + tensor, count),
    )
    tl.store(params, param, mask=mask)
    tl.store(exp_avgs, exp_avg, mask=mask)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=mask)


def switched_on() -> bool:
    """Tell whether the user asked for this kernel and can have it."""
    asked = os.environ.get(SWITCH) == "1"
    return asked and _torch.FUSED_IN_FLOAT32 and find_spec("triton") is not None


@cache
def kernels() -> tuple[Any, Any]:
    """Have Triton compile them, which it does when they are first called."""
    jit = import_module("triton").jit
    # What their source names.
    globals().update(tl=import_module("triton.language"), updated=jit(updated))
    return jit(gather), jit(adamw)


class OneLaunch:
    """Some calls of torch's fused AdamW kernel, made as one.

    Args:
        calls: Bound to lists of tensors, of which the gradients are filled anew at
            every step.
    """

    def __init__(self, calls: Sequence[partial[Any]]) -> None:
        self._calls = calls
        self._place = calls[0].args[0][0].device
        self._maximize = calls[0].keywords["maximize"]
        self._pointers: list[int] = []
        self._sizes = [param.numel() for param in self._all(PARAMS)]
        self._count = len(self._sizes)
        self._even = all(size % WIDE == 0 for size in self._sizes)
        self._made = False

    def _make(self) -> None:
        """Make the tables that stay; not during a capture, which would only record it.

        A schedule has them made at every step, so the long one, of chunks, is made on
        the device: on the host it took 0.14 s for ViT-L.
        """
        counts = [-(-size // SIZE) for size in self._sizes]
        numbers = [
            [call.keywords[name] for call in self._calls for _ in call.args[PARAMS]]
            for name in ("lr", "weight_decay", "beta1", "beta2", "eps")
        ]
        self._grid = (sum(counts),)
        self._numbers = self._on_device(numbers, torch.float32)
        sizes, many = self._on_device([self._sizes, counts], torch.int64)
        places = {"device": self._place, "dtype": torch.int64}
        # Told the size, the host does not wait to learn it.
        tensors = torch.arange(self._count, **places).repeat_interleave(
            many, output_size=self._grid[0]
        )
        first = many.cumsum(0) - many
        chunks = torch.arange(self._grid[0], **places) - first.index_select(0, tensors)
        left = sizes.index_select(0, tensors) - chunks * SIZE
        self._chunks = torch.stack([tensors, chunks, left], 1)
        self._made = True

    def _all(self, which: int) -> list[Tensor]:
        return [tensor for call in self._calls for tensor in call.args[which]]

    def _on_device(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        """Copy without waiting, from memory that is not given out again before."""
        made = torch.tensor(values, dtype=dtype)
        if self._place.type == "cpu":
            return made
        return made.pin_memory().to(self._place, non_blocking=True)

    def _point(self) -> None:
        """Make the table of addresses, unless all tensors lie where they lay."""
        lists = map(self._all, (*WALKED, STEPS))
        pointers = [tensor.data_ptr() for each in lists for tensor in each]
        if pointers != self._pointers:
            self._pointers = pointers
            self._table = self._on_device(pointers, torch.int64)
            walked = pointers[: -self._count]
            apart = any(pointer % (4 * WIDE) for pointer in walked)
            self._wide = WIDE if self._even and not apart else 1

    def __call__(self) -> None:
        if _torch.is_capturing(self._place):
            for call in self._calls:  # a graph would read a table that changes
                call()
        elif any(self._sizes):
            if not self._made:
                self._make()
            self._point()
            on_cuda = self._place.type == "cuda"
            with torch.cuda.device(self._place) if on_cuda else nullcontext():
                self._launch()

    def _launch(self) -> None:
        collect, step = kernels()
        count = self._count
        counters = torch.empty(count, dtype=torch.float32, device=self._place)
        programs = (-(-count // SIZE),)
        # Where it rounds is written out; and Triton 3.9 warns who does not say.
        as_written = {"size": SIZE, "enable_fp_fusion": False}
        collect[programs](self._table[-count:], counters, count, **as_written)
        step[self._grid](
            *(self._table, self._numbers, torch.pow(self._numbers[2:4], counters)),
            *(self._chunks, count),
            maximize=self._maximize,
            wide=self._wide,
            **as_written,
        )


def _kind(call: Call) -> tuple[Any, ...] | None:
    """Return what calls must share to become one, or ``None``: not this call."""
    if not (isinstance(call, partial) and call.func is _torch.fused_adamw_):
        return None
    own, params = call.keywords, call.args[0]
    numbers = (own["lr"], own["weight_decay"], own["beta1"], own["beta2"], own["eps"])
    plain = (
        all(isinstance(number, (int, float)) for number in numbers)
        and not own["amsgrad"]
        and own["found_inf"] is own["grad_scale"] is None
        and params[0].device.type in DEVICES
        and all(t.dtype == torch.float32 for i in STATE for t in call.args[i])
    )
    return (params[0].device, own["maximize"]) if plain else None


def join(
    calls: Sequence[Call],
    ends: Sequence[int],
    one: Callable[[Sequence[Any]], Call] = OneLaunch,
) -> tuple[list[Call], list[int]]:
    """Make one call of calls in a row, where these are many.

    Args:
        calls: Of one step.
        ends: How many of them have run when a bucket is done, bucket by bucket.
        one: Makes the one call.

    Returns:
        The calls, and their ends.
    """
    joined: list[Call] = []
    now = [0]  # how many of the joined calls have run, by how many of the others
    for kind, run in groupby(calls, _kind):
        mine = list(run)
        if kind is None or len(mine) < FEWEST:
            joined += mine
            now += range(now[-1] + 1, now[-1] + 1 + len(mine))
        else:
            joined.append(one(mine))
            now += [now[-1] + 1] * len(mine)
    return joined, [now[end] for end in ends]
