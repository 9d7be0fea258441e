"""What a policy says of each parameter, or the error that tells why it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim.decay import FULL, REMEDY, Decision, Verdict
from selective_optim.parameters import ParameterInfo, owner_kinds, shape_now
from selective_optim.policies.base import Policy
from selective_optim.policies.callables import UnknownError
from selective_optim.policies.rules import AnswerError
from selective_optim.policies.unmatched import require_matches

NO_POLICY = "no policy"
WAYS_OUT = (
    'Pass model=model or model.named_parameters(), or use wd_policy="matrices"; where '
    "a framework makes the optimizer, write with selective_optim.deciding_for(model): "
    "around it."
)


def decide(
    policy: Policy | None,
    infos: Sequence[ParameterInfo],
    places: Sequence[int] | None = None,
) -> list[Decision]:
    """Ask the policy about every parameter.

    Args:
        policy: Who decides.
        infos: What is known of each parameter.
        places: Where each stands in its group, for messages; all in order if left out.

    Raises:
        ValueError: The policy needs what is not known of a parameter, or fails.
        TypeError: The policy yields something other than a decay.
    """
    if policy is None:
        verdicts = [Verdict(FULL, NO_POLICY)] * len(infos)
    else:
        verdicts = _verdicts(policy, infos, places or range(len(infos)))
    shapes = [shape_now(i.parameter) if i.shape is None else i.shape for i in infos]
    return [
        Decision(
            *(verdict.decay.settled, verdict.reason, info.name, shape),
            *(owner_kinds(info), info.own_name),
        )
        for verdict, info, shape in zip(verdicts, infos, shapes)
    ]


def _verdicts(
    policy: Policy, infos: Sequence[ParameterInfo], places: Sequence[int]
) -> list[Verdict]:
    _require_knowledge(policy, infos, places)
    verdicts = []
    for info, place in zip(infos, places):
        try:
            verdicts.append(policy.decide(info))
        # Whatever a user's callable raises is told with the parameter's name.
        except Exception as error:
            raise _explained(error, policy, info, place) from error
    return verdicts


def _explained(
    error: Exception, policy: Policy, info: ParameterInfo, position: int
) -> Exception:
    parameter = info.describe(position)
    if isinstance(error, AnswerError):
        return error.kind(
            f"`wd_policy` returned {error.value!r} for {parameter}; {error.rule}. "
            f"{REMEDY.replace('Use', 'Return')}"
        )
    if isinstance(error, UnknownError):
        of_shape = error.field in ("shape", "ndim")
        return ValueError(
            f"`wd_policy` {policy!r} read `{error.field}` of {parameter}, "
            f"which is {_lost(info) if of_shape else f'not known. {WAYS_OUT}'}"
        )
    kind = TypeError if isinstance(error, TypeError) else ValueError
    return kind(
        f"`wd_policy` {policy!r} failed for {parameter}: "
        f"{type(error).__name__}: {error}"
    )


def _require_knowledge(
    policy: Policy, infos: Sequence[ParameterInfo], places: Sequence[int]
) -> None:
    """Check that of every parameter all is known that the policy asks about.

    Raises:
        ValueError: It is not; the message gives the first such parameter.
    """
    needs = policy.needs
    for info, place in zip(infos, places):
        if info.shape is None and _torch.is_flat_parameter(info.parameter):
            raise ValueError(
                f"{info.describe(place)} is FSDP's flat parameter, of which no single "
                f"decay is right. Wrap with use_orig_params=True."
            )
        if "shapes" in needs and info.shape is None:
            raise ValueError(
                f"`wd_policy` {policy!r} needs the shape of {info.describe(place)}, "
                f"which is {_lost(info)}"
            )
        modules_lack = "modules" in needs and info.owner is None
        if modules_lack or ("names" in needs and info.name is None):
            wanted = "module types" if modules_lack else "names"
            raise ValueError(
                f"`wd_policy` {policy!r} needs {wanted}, and of {info.describe(place)} "
                f"only {'the name' if info.name else 'the tensor'} is known. {WAYS_OUT}"
            )


def _lost(info: ParameterInfo) -> str:
    if is_lazy(info.parameter):
        return "not set before the first forward pass. Run model(batch) once before."
    return (
        "lost where FSDP flattened it. Wrap with use_orig_params=True and pass "
        "model=model, or decide before wrapping."
    )


def decide_alone(
    policy: Policy, roots: Sequence[nn.Module], infos: Sequence[ParameterInfo]
) -> list[Decision]:
    """Decide for the parameters of modules where there is no optimizer.

    Raises:
        ValueError: The policy cannot decide, or a glob matches nothing.
    """
    require_matches(policy, infos, lambda selector: False, list)
    return decide(policy.bind(roots), infos)
