"""One thread: these tensors are tiny, and machines that run tests are shared."""

import gc
import os

import pytest
import torch

from selective_optim.fused import stepper
from tests.support.devices import CPU, CUDA

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave 10,000 collected cases out of what the collector walks from now on."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the example of Muon where torch has none (before 2.9)."""
    for item in items:
        if item.name.endswith("routed.Muon") and not hasattr(torch.optim, "Muon"):
            item.add_marker(pytest.mark.skip(reason="this torch has no Muon"))


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    """Name each device in turn."""
    return request.param


# Every result is the same without a plan; CI runs the tests of bits both ways.
if os.environ.get("WITHOUT_PLAN"):
    stepper.PLANNING = False
