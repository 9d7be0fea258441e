"""Draw a configuration from a seed."""

from __future__ import annotations

import random
from typing import Any

from tests.soak.config import (
    DTYPES,
    FORMS,
    GRADS,
    KINDS,
    LAYOUTS,
    MULTIPLIERS,
    POLICIES,
    SHAPES,
    SOURCES,
    WAYS,
    Config,
    Event,
    Group,
    Param,
    Round,
    settings_of,
    settled,
)
from tests.soak.events import ATTACKS, EVENTS

NAMES = ["SGD", "Adam", "AdamW"]


def draw(seed: str, attacks: bool = False) -> Config:
    """Draw the configuration of this seed; the same seed gives the same one."""
    rng = random.Random(seed)
    events = [*EVENTS, *ATTACKS] if attacks else [*EVENTS]
    name = rng.choice(NAMES)
    kinds = [rng.choice([*KINDS]) for _ in range(rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.7:
        kinds = kinds[:1] * len(kinds)
    dtypes = [rng.choice(DTYPES) for _ in range(rng.choice((1, 1, 2)))]
    plain = rng.random() < 0.4
    rounds = rng.randrange(2, 8)
    alike = rng.random() < 0.5
    base = _settings(rng, name)
    count = rng.randrange(1, 7)
    return settled(
        Config(
            name,
            rng.random() < 0.3,
            tuple(_param(rng, len(kinds), dtypes, plain) for _ in range(count)),
            tuple(
                Group(
                    kind,
                    base if alike else _settings(rng, name),
                    rng.choice((0, 0, 0, rng.randrange(rounds))),
                )
                for kind in kinds
            ),
            tuple(_round(rng, count, events) for _ in range(rounds)),
            rng.choice(POLICIES),
            rng.choice(SOURCES),
            rng.randrange(2**31),
            rng.choice((1.0, 1.0, 1e-4, 1e3)),
        )
    )


def _settings(rng: random.Random, name: str) -> dict[str, Any]:
    """Mostly the common value of each hyperparameter, so that groups merge."""
    return {
        key: values[0] if rng.random() < 0.5 else rng.choice(values)
        for key, values in settings_of(name).items()
    }


def _param(rng: random.Random, groups: int, dtypes: list[str], plain: bool) -> Param:
    return Param(
        rng.choice(SHAPES),
        rng.choice(dtypes),
        "contiguous" if plain else rng.choice(LAYOUTS),
        "alike" if plain else rng.choice(GRADS),
        rng.choice(MULTIPLIERS),
        rng.choice(FORMS),
        rng.randrange(groups),
    )


def _round(rng: random.Random, params: int, events_of: list[str]) -> Round:
    events = [
        Event(rng.choice(events_of), rng.randrange(8), rng.random())
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))
    ]
    absent = [i for i in range(params) if rng.random() < 0.3]
    return Round(
        tuple(events),
        tuple(absent if rng.random() < 0.4 else ()),
        rng.choice((*WAYS, *["plain"] * 6)),
        rng.random() < 0.3,
    )
