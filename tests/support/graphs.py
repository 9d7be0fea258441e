"""Recording a step in a CUDA graph; the CPU, which cannot, runs it each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def static_grads(params: Sequence[Tensor], step: int) -> None:
    """Fill the gradients in place, as a captured step reads them; the last has none."""
    generator = torch.Generator().manual_seed(100 + step)
    for param in params[:-1]:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        param.grad.copy_(torch.randn(param.shape, generator=generator))


@contextmanager
def side_stream(device: str) -> Iterator[None]:
    """Run on another stream, as warming up for a capture must."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(device: str, step: Callable[[], object]) -> Callable[[], object]:
    """Record a step, without running it; the CPU, which cannot, runs it each time."""
    if device == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
