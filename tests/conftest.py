"""One thread: these tensors are tiny, and machines that run tests are shared."""

import pytest
import torch

from tests.support.devices import CPU, CUDA

torch.set_num_threads(1)


@pytest.fixture(params=[CPU, CUDA])
def device(request):
    """Name each device in turn."""
    return request.param
