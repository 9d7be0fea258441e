"""What decays under an optimizer that has no policy, as of groups split by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from selective_optim._model_index import ModelIndex
from selective_optim._text import received
from selective_optim.decay import FULL, Decision, Form
from selective_optim.parameters import ParameterInfo, owner_kinds, shape_now
from selective_optim.policies.selectors import kind_of
from selective_optim.report import DecayReport, Row, amount, make_row

PLURALS = {"norm": "norms", "bias": "biases", "weight": "weights"}
# Classes of torch whose decay is L2, and those whose groups do not say otherwise.
L2_CLASSES = ("SGD", "Adam", "Adagrad", "Adadelta", "Adamax", "ASGD", "RMSprop")
DECOUPLED_CLASSES = ("AdamW", "Adafactor", "Muon")


class Groups(Protocol):
    """What a report needs of an optimizer."""

    param_groups: Any


def decay_report(
    optimizer: Groups, model: nn.Module | Sequence[nn.Module] | None = None
) -> DecayReport:
    """Tell what really decays in a training, whatever the optimizer.

    The reason of a row is what the parameter is: ``norm``, ``bias``, ``embedding``,
    ``vector`` (fewer than two dimensions) or ``weight``. The last line tells norms
    and biases that decay, weights that do not beside others that do, and parameters
    of the model that train and are in no group.

    Args:
        optimizer: One whose groups have a ``"weight_decay"``: of torch, of another
            library, or of this one, which then tells its own reasons.
        model: The module, or modules, that the parameters live in. Without it, names
            are those of ``named_parameters()`` if the optimizer was given any.

    Returns:
        The report, as that of ``optimizer.decay_report()``.

    Raises:
        TypeError: ``optimizer`` has no groups.
        ValueError: A group of it has no weight decay.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        >>> no_decay = ["bias", "norm.weight"]  # is this list right for the model?
        >>> named = list(model.named_parameters())
        >>> parts = {}
        >>> for name, param in model.named_parameters():
        ...     exempt = any(word in name for word in no_decay)
        ...     parts.setdefault(exempt, []).append(param)
        >>> groups = [{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}]
        >>> optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
        >>> print(decay_report(optimizer, model))
        group  reason    lr  decay  form         timescale  tensors  elements
            0  weight  0.01    0.1  decoupled  1,000 steps        1         6
            0  norm    0.01    0.1  decoupled  1,000 steps        1         2
            1  bias    0.01      0  exempt                        1         2
            1  norm    0.01      0  exempt                        1         2
        decayed: 2 tensors, 8 elements; exempt: 2 tensors, 4 elements
        looks wrong: 1 norm decays ('1.weight')
    """
    optimizer = _with_groups(optimizer)
    own = getattr(optimizer, "decay_report", None)
    if own is not None:
        report: DecayReport = own()
        return report
    index = ModelIndex(model)
    rows: list[Row] = []
    known: set[int] = set()
    for number, group in enumerate(optimizer.param_groups):
        form = _form_of(optimizer, group)
        infos = index.infos(group["params"], group.get("param_names"), number)
        known.update(id(info.parameter) for info in infos)
        rows += [_row_without_policy(number, group, form, info) for info in infos]
    trained = [i for i in index.everyone() if i.parameter.requires_grad]
    left_out = [
        info.telling_name for info in trained if id(info.parameter) not in known
    ]
    return DecayReport(tuple(rows), _remark(rows, left_out))


def _with_groups(optimizer: Any) -> Any:
    """Find the optimizer inside wrappers such as Accelerate's."""
    while not hasattr(optimizer, "decay_report"):
        inner = getattr(optimizer, "optimizer", getattr(optimizer, "opt", None))
        if inner is None:
            break
        optimizer = inner
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"`optimizer` must have param_groups, and {received(optimizer)} has none. "
            f"Pass the optimizer first, then the model: decay_report(optimizer, model)."
        )
    for index, group in enumerate(optimizer.param_groups):
        if "weight_decay" not in group:
            raise ValueError(
                f"group {index} of `optimizer` ({type(optimizer).__name__}) has no "
                f"weight_decay to report. Pass one that decays: "
                f"torch.optim.AdamW(model.parameters())."
            )
    return optimizer


def _form_of(optimizer: Any, group: dict[str, Any]) -> Form | None:
    """Tell the form of torch's classes; others do not say theirs."""
    if "decoupled_weight_decay" in group:
        return "decoupled" if group["decoupled_weight_decay"] else "l2"
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith("torch.optim"):
            if cls.__name__ in DECOUPLED_CLASSES:
                return "decoupled"
            return "l2" if cls.__name__ in L2_CLASSES else None
    return None


def _row_without_policy(
    index: int, group: dict[str, Any], form: Form | None, info: ParameterInfo
) -> Row:
    shape = shape_now(info.parameter) if info.shape is None else info.shape
    kinds, name = owner_kinds(info), info.telling_name
    decision = Decision(FULL, kind_of(info), name, shape, kinds)
    return make_row(index, group, decision, form, info.parameter)


def _remark(rows: Sequence[Row], left_out: Sequence[str | None]) -> str:
    """Say in one line what looks wrong with groups that were split by hand."""
    decayed = [row for row in rows if row.fate == "decayed"]
    wrong = [
        (kind, "decays", "decay", [row.name for row in decayed if row.reason == kind])
        for kind in ("norm", "bias")
    ]
    if decayed:
        exempt = [r.name for r in rows if r.fate == "exempt" and r.reason == "weight"]
        wrong.append(("weight", "does not decay", "do not decay", exempt))
    told = [
        f"{amount(len(names), kind, PLURALS[kind])} "
        f"{one if len(names) == 1 else several} ({_first_names(names)})"
        for kind, one, several, names in wrong
        if names
    ]
    if left_out:
        verb = "trains and is" if len(left_out) == 1 else "train and are"
        told.append(
            f"{amount(len(left_out), 'parameter')} {verb} in no group "
            f"({_first_names(left_out)})"
        )
    return f"looks wrong: {'; '.join(told)}" if told else ""


def _first_names(names: Sequence[str | None]) -> str:
    first = repr(names[0]) if names[0] else "without a name"
    return first if len(names) == 1 else f"{first} and {len(names) - 1:,} more"
