"""What a policy says of each parameter, or the error that tells why it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from functools import cache
from itertools import product, repeat
from typing import Any

from torch.nn.parameter import is_lazy

from selective_optim import _torch
from selective_optim._text import SHOWN, class_text, warn
from selective_optim.decay import FULL, REMEDY, Answer, Decision
from selective_optim.parameters import ParameterInfo, owner_kinds, shape_now
from selective_optim.policies.recognition import (
    WORDS,
    kind_known,
    kind_of,
    says_norm,
    says_nothing,
)
from selective_optim.policies.selectors import (
    KINDS,
    AnswerError,
    InsideClass,
    NamePattern,
    Policy,
    Selector,
    UnknownError,
    UnsureError,
    lacking,
)

Infos = Sequence[ParameterInfo]
NO_POLICY = "no policy"


def decide(
    policy: Policy | None,
    infos: Infos,
    places: Sequence[int] | None = None,
    lr0s: Iterable[float | None] = repeat(None),
) -> list[Decision]:
    """Ask the policy about every parameter; raise with its name where that fails."""
    places = places or range(len(infos))  # in the group, for messages
    by_kind = policy is not None and not KINDS.isdisjoint(policy.needs)
    unsure = [
        by_kind and info.owner is not None and not kind_known(info) for info in infos
    ]
    if policy is not None:
        _require_knowledge(policy, infos, places, unsure)
    decisions = []
    for info, place, lr0, kind_unsure in zip(infos, places, lr0s, unsure):
        try:
            answer = policy.decide(info) if policy else Answer(FULL, NO_POLICY)
        except Exception as error:
            raise _explained(error, policy, info, place) from error
        reason = f"{answer.reason} (kind unknown)" if kind_unsure else answer.reason
        shape = shape_now(info.parameter) if info.shape is None else info.shape
        about = (info.name, shape, owner_kinds(info), info.own_name, lr0)
        decisions.append(Decision(answer.decay.settled, reason, *about))
    return decisions


def _explained(
    error: Exception, policy: Policy | None, info: ParameterInfo, place: int
) -> Exception:
    kind: Any = TypeError if isinstance(error, TypeError) else ValueError
    parameter = info.describe(place)
    problem = f"{policy!r} failed for {parameter}: {type(error).__name__}: {error}"
    if isinstance(error, AnswerError):
        value, kind, rule = error.args
        advice = REMEDY.replace("Use", "Return")
        problem = f"returned {value!r} for {parameter}; {rule}. {advice}"
    elif isinstance(error, UnknownError):
        field = error.args[0]
        is_shape = field in ("shape", "ndim")
        why = _lost(info) if is_shape else f"not known. {_ways_out(policy, [])}"
        problem = f"{policy!r} read `{field}` of {parameter}, which is {why}"
    elif isinstance(error, UnsureError):
        written = repr(policy).replace("is_output", repr(error.args[1]))
        problem = (
            f"{policy!r} asks for the output layer, and {error}. "
            f'Write wd_policy="{written}" if that is the one.'
        )
    explained: Exception = kind(f"`wd_policy` {problem}")
    return explained


def _require_knowledge(
    policy: Policy, infos: Infos, places: Sequence[int], unsure: Sequence[bool]
) -> None:
    for info, place, kind_unsure in zip(infos, places, unsure):
        if info.shape is None and _torch.is_flat_parameter(info.parameter):
            raise ValueError(
                f"{info.describe(place)} is FSDP's flat parameter, of which no single "
                f"decay is right. Wrap with use_orig_params=True."
            )
        if "shapes" in policy.needs and info.shape is None:
            raise ValueError(
                f"`wd_policy` {policy!r} needs the shape of {info.describe(place)}, "
                f"which is {_lost(info)}"
            )
        wanted = lacking(policy.needs, info)
        if kind_unsure and says_nothing(info):
            wanted = wanted or "module types"
        if wanted:
            known = "the name" if info.name else "the tensor"
            if info.owner is not None:
                known = f"a place in {class_text(type(info.owner))}"
            raise ValueError(
                f"`wd_policy` {policy!r} needs {wanted}, and of {info.describe(place)} "
                f"only {known} is known. {_ways_out(policy, infos)}"
            )


def _ways_out(policy: Policy | None, infos: Infos) -> str:
    # Of other policies "matrices" would change what was asked for, and of vectors
    # alone, as engines flatten them, it would decay nothing.
    matrices = any(info.ndim is not None and info.ndim > 1 for info in infos)
    by_shape = ""
    if matrices and repr(policy) == "exclude(is_bias, is_norm)":
        by_shape = ', or use wd_policy="matrices", which decays whatever has two or '
        by_shape += "more dimensions"
    return (
        f"Pass model=model or model.named_parameters(){by_shape}; "
        f"where a framework makes the optimizer, write with "
        f"selective_optim.deciding_for(model): around it."
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
    infos: Infos,
    elsewhere: Callable[[Selector], bool],
    everyone: Callable[[], Infos],
) -> None:
    """Raise if a glob or object matches nothing; warn if what a class means decays."""
    asked = [s for s in policy.required if s.by_name or isinstance(s, InsideClass)]
    missing = [s for s in asked if not any(map(s.matches, infos)) and not elsewhere(s)]
    if not missing:
        return
    _warn_of_class(policy, [s for s in missing if isinstance(s, InsideClass)], infos)
    for selector in (s for s in missing if s.by_name):
        # A policy for the whole model may be used with an optimizer of a part.
        infos = [*infos, *everyone()]
        names = list(dict.fromkeys(name for info in infos for name in info.names))
        # A pattern without names to search in: deciding raises and says so.
        if names or not isinstance(selector, NamePattern):
            count = len({id(info.parameter) for info in infos})
            closest, way_out = _advice(selector, names)
            raise ValueError(
                f"{selector!r} in `wd_policy` matches none of {count} parameters"
                f"{closest}. {way_out}, or pass missing_ok=True to its policy."
            )


def _warn_of_class(
    policy: Policy, missing: Sequence[InsideClass], infos: Infos
) -> None:
    roots = {id(i.path[0]): i.path[0] for i in infos if i.path}
    bound = policy.bind(list(roots.values())) if missing else policy
    for selector, info in product(missing, infos):
        if info.owner is None:
            continue
        # It is meant for any norm, or for a class whose name has more words.
        cls: Any = selector.cls  # mypy holds that classes of modules have no hash
        norm = kind_of(info) == "norm"
        words = set(WORDS.findall(cls.__name__))
        longer = words <= set(WORDS.findall(type(info.owner).__name__))
        if (norm if says_norm(cls) else longer) and _decays(bound, info):
            owner = class_text(type(info.owner))
            written = repr(policy).replace(repr(selector), "is_norm" if norm else owner)
            warn(
                f"{selector!r} in `wd_policy` matches none of {len(infos)} parameters, "
                f"and {info.name!r}, held by {owner}, decays. Write wd_policy="
                f'"{written}", or pass missing_ok=True to its policy.'
            )
            return


def _decays(policy: Policy, info: ParameterInfo) -> bool:
    try:
        return policy(info).multiplier > 0
    except Exception:  # told where it is decided for
        return False


def _advice(selector: Selector, names: Sequence[str]) -> tuple[str, str]:
    if not isinstance(selector, NamePattern):
        return "", "Correct it"
    pattern = selector.pattern
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    word = text.strip("*.^$\\")
    holders = [name for name in names if word and word.lower() in name.lower()]
    close = (holders or _closest(word, names))[:SHOWN]
    closest = f"; the closest names are {', '.join(map(repr, close))}"
    if isinstance(pattern, str) and holders:
        start = holders[0].lower().index(word.lower())
        word = holders[0][start : start + len(word)]
        glob = f"*.{word}" if holders[0].endswith(f".{word}") else f"*{word}*"
        if fnmatchcase(holders[0], glob):
            why = "Case counts" if pattern[:1] == "*" else "A glob is for whole names"
            return closest, f'{why}: write "{glob}"'
    return closest, "Correct it"


def _closest(text: str, names: Sequence[str]) -> list[str]:
    # A name is long, and what was misspelt is a word of it: its likest part counts.
    size = text.count(".") + 1

    @cache
    def likeness(part: str) -> float:
        return SequenceMatcher(None, text.lower(), part.lower()).ratio()

    def best_likeness(name: str) -> float:
        parts = name.split(".")
        starts = range(max(1, len(parts) - size + 1))
        return max(likeness(".".join(parts[i : i + size])) for i in starts)

    return sorted(names, key=best_likeness, reverse=True)
