"""Tensors of every layout, and their comparison bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.soak.config import Param

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mismatch(AssertionError):
    """Ours and a judge disagree."""


def require_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Compare dtype, shape and every bit; NaN may carry any payload.

    Raises:
        Mismatch: They differ.
    """
    if (actual.dtype, actual.shape) != (expected.dtype, expected.shape):
        raise Mismatch(f"{what}: {actual.dtype} {actual.shape}, not {expected}")
    pair = [
        t.detach().to_dense() if t.is_sparse else t.detach() for t in (actual, expected)
    ]
    if pair[0].is_complex():
        pair = [torch.view_as_real(t) for t in pair]
    bits = BITS[pair[0].element_size()]
    if torch.equal(pair[0].view(bits), pair[1].view(bits)):
        return
    if not pair[0].is_floating_point() or not torch.equal(*map(_printed_nan, pair)):
        raise Mismatch(f"{what}: {actual.tolist()}, not {expected.tolist()}")


def _printed_nan(tensor: Tensor) -> Tensor:
    """Give every NaN the same bits and keep the others'."""
    tensor = tensor.where(~tensor.isnan(), torch.full((), torch.nan).to(tensor))
    return tensor.contiguous().view(BITS[tensor.element_size()])


def make_param(spec: Param, generator: torch.Generator) -> nn.Parameter:
    """Make a parameter with this layout in memory."""
    dtype = torch.complex128 if spec.torch_dtype.is_complex else torch.float64
    values = torch.randn(spec.shape, generator=generator, dtype=dtype)
    return nn.Parameter(laid_out(values.to(spec.torch_dtype), spec.layout))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Copy values into memory that is walked in another order, or with gaps."""
    if layout == "contiguous" or values.ndim == 0:
        return values
    if layout == "transposed":
        backwards = range(values.ndim - 1, -1, -1)
        tensor = values.new_empty(values.shape[::-1]).permute(*backwards)
    elif layout == "gapped":
        tensor = values.new_empty((*values.shape, 2))[..., 0]
    else:
        tensor = values.new_empty(values.numel() + 3)[3:].view(values.shape)
    return tensor.copy_(values)
