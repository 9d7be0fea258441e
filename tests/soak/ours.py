"""The selective optimizer of a configuration, built as users build theirs.

The one file of the soak that imports the package: what judges borrows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import selective_optim
from selective_optim import Decay
from selective_optim.policies import as_policy, exclude, first_match, form, scale
from tests.soak.config import KINDS, Config, Param

Settings = Sequence[dict[str, Any]]  # hyperparameters by group, as they are now


def decay_of(param: Param) -> Decay:
    """Say what the policy is to decide."""
    return Decay(param.multiplier, param.form)  # type: ignore[arg-type]  # drawn


@dataclass(frozen=True)
class Table:
    """A policy as a callable that pickles."""

    decays: tuple[Decay, ...]

    def __call__(self, info: Any) -> Decay:
        return self.decays[int(info.name[1:])]


def policy_of(config: Config) -> Any:
    """Write the same verdicts as a callable, a mapping, or a product of policies."""
    decays = {f"p{i}": decay_of(p) for i, p in enumerate(config.params)}
    if config.policy in ("callable", "by group"):
        return Table(tuple(decays.values()))
    late = {"missing_ok": True}  # groups may join later
    if config.policy == "mapping":
        return first_match(decays, **late)
    product = as_policy("all")
    for name, decay in decays.items():
        by = decay.multiplier
        product *= scale(name, by=by, **late) if by else exclude(name, **late)
        if decay.form:
            product *= form(decay.form, name, **late)
    return product


def group_dict(
    config: Config, params: Sequence[nn.Parameter], settings: Settings, group: int
) -> dict[str, Any]:
    """Write a group as a user would."""
    named = [(f"p{i}", params[i]) for i in config.members(group)]
    bare = config.source == "model"
    own = {"wd_policy": policy_of(config)} if _by_group(config) else {}
    return {
        "params": [param for _, param in named] if bare else named,
        **settings[group],
        **KINDS[config.groups[group].kind],
        **own,
    }


def _by_group(config: Config) -> bool:
    return config.policy == "by group" and config.source in ("pairs", "model")


def build(
    config: Config,
    params: Sequence[nn.Parameter],
    settings: Settings,
    joined: Sequence[int],
) -> tuple[Any, nn.ParameterDict]:
    """Build the optimizer over these groups, and the module that names all."""
    arguments = {**settings[0], **KINDS[config.groups[0].kind]}
    if config.name != "AdamW":
        arguments["decoupled_weight_decay"] = config.decoupled
    if not _by_group(config):
        arguments["wd_policy"] = policy_of(config)
    module = nn.ParameterDict({f"p{i}": p for i, p in enumerate(params)})
    given: Any = [group_dict(config, params, settings, group) for group in joined]
    if config.source == "model":
        arguments["model"] = module
    elif config.source == "module":
        given = module
    elif config.source == "generator":
        given = module.parameters()
    return getattr(selective_optim, config.name)(given, **arguments), module
