"""One thread: these tensors are tiny, and machines that run tests are shared."""

import torch

torch.set_num_threads(1)
