"""Which parameters well-known projects decay, by the project's name."""

from __future__ import annotations

from selective_optim._rules import Policy

RECIPES: dict[str, Policy] = {}
