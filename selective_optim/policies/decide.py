"""What a policy says of each parameter, or the error that tells why it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from torch import nn
from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim.decay import FULL, REMEDY, Decision, Verdict
from selective_optim.parameters import ParameterInfo, owner_kinds, shape_now
from selective_optim.policies.base import Policy, unmatched
from selective_optim.policies.callables import UnknownError
from selective_optim.policies.rules import AnswerError
from selective_optim.policies.selectors import NamePattern, Need, Selector

WAYS_OUT = 'Pass model=model or model.named_parameters(), or use wd_policy="matrices".'


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
        return [_decision(info, Verdict(FULL, "no policy")) for info in infos]
    needs = policy.needs
    verdicts = []
    for position, info in zip(places or range(len(infos)), infos):
        _require_knowledge(policy, needs, info, position)
        verdicts.append(_decision(info, _ask(policy, info, position)))
    return verdicts


def _decision(info: ParameterInfo, verdict: Verdict) -> Decision:
    shape = shape_now(info.parameter) if info.shape is None else info.shape
    return Decision(*verdict, info.name, shape, owner_kinds(info))


def _ask(policy: Policy, info: ParameterInfo, position: int) -> Verdict:
    try:
        return policy.decide(info)
    except Exception as error:
        raise _explained(error, policy, info, position) from error


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
    policy: Policy, needs: frozenset[Need], info: ParameterInfo, position: int
) -> None:
    if info.shape is None and _torch.is_flat_parameter(info.parameter):
        raise ValueError(
            f"{info.describe(position)} is FSDP's flat parameter, of which no single "
            f"decay is right. Wrap with use_orig_params=True."
        )
    known = {"names": info.name, "modules": info.owner, "shapes": info.shape}
    lacking = [need for need in needs if known[need] is None]
    if "shapes" in lacking:
        raise ValueError(
            f"`wd_policy` {policy!r} needs the shape of {info.describe(position)}, "
            f"which is {_lost(info)}"
        )
    if lacking:
        wanted = "module types" if "modules" in lacking else "names"
        raise ValueError(
            f"`wd_policy` {policy!r} needs {wanted}, and of {info.describe(position)} "
            f"only {'the name' if info.name else 'the tensor'} is known. {WAYS_OUT}"
        )


def _lost(info: ParameterInfo) -> str:
    if is_lazy(info.parameter):
        return "not set before the first forward pass. Run model(batch) once before."
    return (
        "lost where FSDP flattened it. Wrap with use_orig_params=True and pass "
        "model=model, or decide before wrapping."
    )


def require_matches(
    policy: Policy,
    infos: Sequence[ParameterInfo],
    elsewhere: Callable[[Selector], bool],
    everyone: Callable[[], Sequence[ParameterInfo]],
) -> None:
    """Check that every glob, regular expression and object matches some parameter.

    Args:
        policy: The policy that decides for ``infos``.
        infos: What is known of the optimizer's parameters.
        elsewhere: Tells whether a selector matches any parameter of the model, a
            frozen part included.
        everyone: Gives what is known of the model's parameters.

    Raises:
        ValueError: One matches none; the message gives the closest names.
    """
    for selector in unmatched(policy, infos):
        if elsewhere(selector):
            continue
        infos = [*infos, *everyone()]
        names = list(dict.fromkeys(name for info in infos for name in info.names))
        # A pattern without names to search in: deciding raises and says so.
        if names or not isinstance(selector, NamePattern):
            count = len({id(info.parameter) for info in infos})
            raise ValueError(
                f"{selector!r} in `wd_policy` matches none of {count} parameters"
                f"{_closest(selector, names)}. Correct it, or pass missing_ok=True to "
                f"its policy."
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


def _closest(selector: Selector, names: Sequence[str]) -> str:
    if not isinstance(selector, NamePattern):
        return ""
    pattern = selector.pattern
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    close = get_close_matches(text, names, n=3, cutoff=0.0)
    return f"; the closest names are {', '.join(map(repr, close))}"
