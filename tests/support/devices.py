"""The devices that tests run on; a test with an argument ``device`` runs on each.

Where there is no CUDA device its cases skip; ``pytest -m cuda`` runs them alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

MARKS: dict[str, Any] = {
    "cpu": (),
    "cuda": (
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
}
CPU, CUDA = (pytest.param(name, marks=marks) for name, marks in MARKS.items())
on_cuda = pytest.mark.parametrize("device", [CUDA])
