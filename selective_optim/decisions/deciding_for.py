"""Give a model and a policy to optimizers that a framework makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import nn

from selective_optim._warnings import warn
from selective_optim.parameters import as_modules
from selective_optim.policies.named import WdPolicy, as_policy


class Given(NamedTuple):
    """What a block of :func:`deciding_for` gives the optimizers made inside."""

    wd_policy: object = None
    model: object = None
    insists: bool = True  # that every parameter lives in the model


Block = tuple[Given, list[Given]]  # and what each optimizer was made with inside
# Not a global: two threads, or two async tasks, may build two models.
_block: ContextVar[Block | None] = ContextVar("selective_optim", default=None)


@contextmanager
def deciding_for(
    model: nn.Module | Sequence[nn.Module] | Callable[[], nn.Module],
    *,
    wd_policy: WdPolicy = None,
) -> Iterator[None]:
    """Give ``model`` to every optimizer of this library that is made inside.

    Use it if a framework calls the constructor with tensors without names: peft's
    LoRA+, the ``Trainer`` of transformers, containers of optimizers. Put the block
    around the call that makes the optimizer, or around the training that makes it. If
    you give a policy and no optimizer of this library was made inside, it warns.

    Args:
        model: As for the optimizers. If the framework makes the model too, a function
            that returns it; each constructor calls it.
        wd_policy: The policy for constructors that get none.

    Raises:
        TypeError: ``model`` is none of these, or ``wd_policy`` is no policy.
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
    around, made = _block.get(), list[Given]()
    token = _block.set((Given(policy, model), made))
    try:
        yield
    finally:
        _block.reset(token)
        if around is not None:
            around[1].extend(made)
    if policy is not None and not made:
        warn(
            f"no optimizer of selective_optim was made inside deciding_for, so its "
            f"`wd_policy` {policy!r} decides nothing. Make selective_optim.AdamW or "
            f"selective_optim.selective(cls)(...) inside, or give the framework that "
            f"class."
        )


def given(model: object, wd_policy: object) -> Given:
    """Fill in what a constructor was not given, from the block around it.

    Without a policy nothing is to decide, and nothing of a model needs to be known.
    """
    around, made = _block.get() or (Given(), [])
    wd_policy = around.wd_policy if wd_policy is None else wd_policy
    if model is not None or wd_policy is None:
        made.append(Given(wd_policy, model))
        return made[-1]
    model = around.model
    if callable(model) and not isinstance(model, nn.Module):
        model = model()
    # What is made inside may be a copy of tensors, which shapes decide.
    made.append(Given(wd_policy, model, as_policy(wd_policy).needs != {"shapes"}))
    return made[-1]
