"""Where torch's own fused kernels are right; elsewhere they are no oracle."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)
# Before 2.15, fused SGD in half precision is off by the size of the parameter on the
# CPU, and leaves uninitialized memory in the momentum buffers.
HALF_SGD_ON_CPU = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15)


def kernel_is_right(
    name: str, implementation: str, dtype: torch.dtype, device: str = "cpu"
) -> bool:
    """Tell whether torch's kernel for a class by name computes what it should."""
    wrong = (name, implementation, device) == ("SGD", "fused", "cpu") and dtype in HALF
    return HALF_SGD_ON_CPU or not wrong
