"""Policies of what authors wrote on their own models, and the mark to write there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from operator import contains
from typing import TypeVar

from torch import Tensor, nn

from selective_optim._text import received
from selective_optim.decay import EXEMPT, FULL, Answer, Decay, number_text
from selective_optim.parameters import ParameterInfo
from selective_optim.policies.base import Policy
from selective_optim.policies.lists import MARK, Lists, relative_names
from selective_optim.policies.selectors import MODULES, NAMES, Need

# S4 and what follows it write a parameter's own settings there.
SETTINGS = "_optim"
Target = TypeVar("Target", nn.Module, Tensor)


def exempt_(target: Target) -> Target:
    """Mark a parameter, or every parameter of a module, as exempt for ``marked``.

    Sets ``_no_weight_decay = True``, the attribute that Mamba and others set, on
    the parameters. A module is marked, too, so that its mark outlives a wrapper
    that makes new parameters.

    Args:
        target: Marked in place.

    Returns:
        ``target``.

    Raises:
        TypeError: ``target`` is neither a parameter nor a module.

    Example:
        >>> layer = exempt_(nn.Linear(2, 2))
        >>> layer.weight._no_weight_decay
        True
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(
            f"`exempt_` takes a module or a parameter, not {target!r} "
            f"({type(target).__name__}). Write for example exempt_(model.head)."
        )
    setattr(target, MARK, True)
    if isinstance(target, nn.Module):
        for param in target.parameters():
            setattr(param, MARK, True)
    return target


@dataclass(frozen=True, repr=False)
class Marked(Policy):
    """Exempts what the model's author marked; see :func:`marked`."""

    weight_decay: float | None = None
    lists: Lists | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        own = self.weight_decay
        return "marked()" if own is None else f"marked(weight_decay={own!r})"

    @property
    def needs(self) -> frozenset[Need]:
        return NAMES | MODULES

    def bind(self, roots: Sequence[nn.Module]) -> Policy:
        return replace(self, lists=Lists())

    def decide(self, info: ParameterInfo) -> Answer:
        if getattr(info.parameter, MARK, False):
            return Answer(EXEMPT, MARK)
        lists = self.lists or Lists()
        for place in info.places:
            for module, name in relative_names(place):
                if reason := _mark(module, name, lists):
                    return Answer(EXEMPT, reason)
        settings = getattr(info.parameter, SETTINGS, None)
        own = settings.get("weight_decay") if isinstance(settings, Mapping) else None
        return Answer(FULL, "not marked") if own is None else self._by_own(float(own))

    def _by_own(self, own: float) -> Answer:
        told = f"{SETTINGS} has weight_decay {number_text(own)}"
        if own == 0:
            return Answer(EXEMPT, told)
        if not self.weight_decay:
            raise ValueError(
                f"its {told}, which scales the optimizer's own, and that is not "
                f"known. Write marked(weight_decay=...) with the optimizer's."
            )
        return Answer(Decay(own / self.weight_decay), told)


def _mark(module: nn.Module, name: str, lists: Lists) -> str | None:
    who = type(module).__name__
    # Not getattr: wrappers answer for the module inside, which is asked itself.
    if vars(module).get(MARK) is True:
        return f"{MARK} of {who}"
    told = (
        lists.told(module, "no_weight_decay", name)
        or lists.told(module, "no_weight_decay_patterns", name)
        or lists.told(module, "no_weight_decay_keywords", name, contains)
    )
    return f"{who}.{told}" if told else None


def marked(weight_decay: float | None = None) -> Policy:
    """Exempt what the model's author marked, and decay the rest.

    A parameter is marked if one of these holds:

    - Its attribute ``_no_weight_decay`` is true.
    - ``no_weight_decay()`` or ``no_weight_decay_patterns()`` of a module above it
      returns its name, or a glob that matches it, as seen from that module.
    - Its name contains one of such a module's ``no_weight_decay_keywords()``.
    - Its attribute ``_optim`` is ``{"weight_decay": 0}``.

    Modules inside DDP, FSDP and ``torch.compile`` wrappers are asked too.

    Args:
        weight_decay: The optimizer's own, above 0. It is needed if an ``_optim`` states
            another decay than 0: 0.05 there decays half as much if this is 0.1.
            Without it such a parameter raises.

    Raises:
        TypeError: ``weight_decay`` is no number.
        ValueError: ``weight_decay`` is not above 0, infinite or NaN.

    Example:
        >>> marked() * marked(weight_decay=0.1)
        marked() * marked(weight_decay=0.1)
    """
    if weight_decay is not None and not isinstance(weight_decay, Real):
        raise TypeError(
            f"`weight_decay` must be a number, not {received(weight_decay)}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    if weight_decay is not None and not 0 < float(weight_decay) < math.inf:
        raise ValueError(
            f"`weight_decay` must be finite and > 0, not {weight_decay}. "
            f"Write for example marked(weight_decay=0.1)."
        )
    return Marked(weight_decay)
