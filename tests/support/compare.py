"""Comparing what two runs hold, bit for bit unless a test gives a reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def assert_same(
    actual: Any,
    expected: Any,
    rtol: float = 0,
    atol: float = 0,
    *,
    strides: bool = True,
    where: str = "",
) -> None:
    """Compare modules, tensors, and trees of them and of other values.

    Tensors have the same dtype, device, shape, strides and values; NaN equals NaN.
    """
    how = {"rtol": rtol, "atol": atol, "strides": strides}
    if isinstance(expected, nn.Module):
        actual, expected = actual.state_dict(), expected.state_dict()
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, **how, where=f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, (one, other) in enumerate(zip(actual, expected)):
            assert_same(one, other, **how, where=f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(
            actual.detach(),
            expected.detach(),
            rtol=rtol,
            atol=atol,
            equal_nan=True,
            check_stride=strides,
            msg=lambda text: f"{where}: {text}",
        )
    else:
        both_nan = actual != actual and expected != expected
        assert actual == expected or both_nan, where
