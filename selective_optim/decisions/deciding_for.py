"""For frameworks that call the constructor themselves, and know no ``model=``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import nn

from selective_optim.parameters import as_modules
from selective_optim.policies.named import WdPolicy, as_policy


class Given(NamedTuple):
    """What a block of :func:`deciding_for` gives the optimizers made inside."""

    wd_policy: object = None
    model: object = None
    insists: bool = True  # that every parameter lives in the model


# Not a global: two threads, or two async tasks, may build two models.
_given: ContextVar[Given | None] = ContextVar("selective_optim", default=None)


@contextmanager
def deciding_for(
    model: nn.Module | Sequence[nn.Module] | Callable[[], nn.Module],
    *,
    wd_policy: WdPolicy = None,
) -> Iterator[None]:
    """Give ``model`` to every optimizer of this library that is made inside.

    For factories that own the constructor and hand over bare tensors: peft's LoRA+,
    the ``Trainer`` of transformers, containers of optimizers. Put the block around
    the call that makes the optimizer, or around the training that does.

    Args:
        model: As for the optimizers; or, where the framework makes the model too,
            a function that returns it, asked when an optimizer is made.
        wd_policy: Who decays where the constructor is given no policy.

    Raises:
        TypeError: ``model`` is none of these, or ``wd_policy`` no policy.
        ValueError: ``wd_policy`` is not known.

    Example:
        >>> import torch
        >>> from selective_optim import AdamW, deciding_for
        >>> def factory(model):  # as frameworks write them
        ...     return AdamW([p for p in model.parameters()], weight_decay=0.1)
        >>> model = torch.nn.Linear(2, 1)
        >>> with deciding_for(model, wd_policy="no_bias"):
        ...     optimizer = factory(model)
        >>> [(row.name, row.weight_decay) for row in optimizer.decay_report().rows]
        [('weight', 0.1), ('bias', 0.0)]
    """
    policy = None if wd_policy is None else as_policy(wd_policy)
    if isinstance(model, nn.Module) or not callable(model):
        as_modules(model)
    token = _given.set(Given(policy, model))
    try:
        yield
    finally:
        _given.reset(token)


def given(model: object, wd_policy: object) -> Given:
    """Fill in what a constructor was not given, from the block around it.

    Without a policy nothing is to decide, and nothing of a model needs to be known.
    """
    around = _given.get() or Given()
    wd_policy = around.wd_policy if wd_policy is None else wd_policy
    if model is not None or wd_policy is None:
        return Given(wd_policy, model)
    model = around.model
    if callable(model) and not isinstance(model, nn.Module):
        model = model()
    # What is made inside may be a copy of tensors, which shapes decide.
    return Given(wd_policy, model, as_policy(wd_policy).needs != {"shapes"})
