"""Give a model and a policy to optimizers that a framework makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from selective_optim._text import warn
from selective_optim.decisions.decider import Block, current_block
from selective_optim.parameters import as_modules
from selective_optim.policies.named import WdPolicy, as_policy


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
    outer, made = current_block.get(), list[bool]()
    token = current_block.set(Block(policy, model, made))
    try:
        yield
    finally:
        current_block.reset(token)
        if outer is not None:
            outer.made.extend(made)
    if policy is not None and not made:
        warn(
            f"no optimizer of selective_optim was made inside deciding_for, so its "
            f"`wd_policy` {policy!r} decides nothing. Make selective_optim.AdamW or "
            f"selective_optim.selective(cls)(...) inside, or give the framework that "
            f"class."
        )
