"""One thread: these tensors are tiny, and machines that run tests are shared."""

import gc

import pytest
import torch

from tests.support.devices import CPU, CUDA

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave 10,000 collected cases out of what the collector walks from now on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    """Name each device in turn."""
    return request.param
