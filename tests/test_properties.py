"""What tables cannot cover: any parameters, policy, split, order and interruption."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim.checkpoint import merge_groups, split_groups
from tests.soak import config as drawn
from tests.soak.__main__ import run
from tests.soak.config import Config, Event, Group, Param, Round, settled
from tests.soak.draw import NAMES
from tests.soak.events import EVENTS
from tests.soak.ours import Table, decay_of
from tests.soak.tensors import make_param, require_same

pytest.importorskip("hypothesis", reason="hypothesis draws these cases")
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.support.compare import assert_same

# No deadline: the machine may be busy. No database: a failure prints its example.
bounded = settings(
    deadline=None,
    max_examples=300,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
multipliers = st.sampled_from([0.0, 1.0]) | st.floats(0, 4, width=32)
forms = st.sampled_from(drawn.FORMS)


# Strategies are kept: hypothesis looks into every new one before it draws from it.
@cache
def params_in(groups: int) -> st.SearchStrategy[Any]:
    return st.lists(
        st.builds(
            Param,
            shape=shapes,
            dtype=st.sampled_from(drawn.DTYPES),
            layout=st.sampled_from(drawn.LAYOUTS),
            grad=st.sampled_from(drawn.GRADS),
            multiplier=multipliers,
            form=forms,
            group=st.integers(0, groups - 1),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple)


@cache
def groups_of(name: str, count: int) -> st.SearchStrategy[Any]:
    """Draw as many groups of a class."""
    free = {"lr": st.floats(0, 0.5), "weight_decay": st.floats(0, 0.9)}
    table = drawn.settings_of(name)
    own = {key: st.sampled_from(values) for key, values in table.items()}
    group = st.builds(
        Group,
        kind=st.sampled_from([*drawn.KINDS]),
        settings=st.fixed_dictionaries({**own, **free}),
        joins=st.sampled_from([0, 0, 1, 2]),
    )
    return st.lists(group, min_size=count, max_size=count).map(tuple)


events = st.builds(
    Event, st.sampled_from([*EVENTS]), st.integers(0, 7), st.floats(0, 1, width=32)
).filter(lambda event: event.value < 1)
rounds = st.lists(
    st.builds(
        Round,
        events=st.lists(events, max_size=2).map(tuple),
        absent=st.sets(st.integers(0, 4), max_size=3).map(tuple),
        way=st.sampled_from(drawn.WAYS),
        in_place=st.booleans(),
    ),
    min_size=1,
    max_size=6,
).map(tuple)


@st.composite
def configs(draw: Any) -> Config:
    name = draw(st.sampled_from(NAMES))
    count = draw(st.integers(1, 3))
    return settled(
        Config(
            name,
            decoupled=draw(st.booleans()),
            params=draw(params_in(count)),
            groups=draw(groups_of(name, count)),
            rounds=draw(rounds),
            policy=draw(st.sampled_from(drawn.POLICIES)),
            source=draw(st.sampled_from(drawn.SOURCES)),
            values=draw(st.integers(0, 1000)),
        )
    )


@bounded
@given(configs())
def test_any_run_equals_hand_split_torch_and_the_formulas(config):
    run(config)


INTERRUPTIONS = [
    "state_dict_is_saved",
    "state_dict_is_loaded",
    "run_is_resumed_from_a_file",
    "copy_takes_over",
    "unpickled_takes_over",
]


@bounded
@given(configs(), st.lists(st.sampled_from(INTERRUPTIONS), min_size=6, max_size=6))
def test_checkpoint_at_any_moment_continues_as_torch_does(config, kinds):
    interrupted = [
        replace(each, events=(Event(kind),)) for each, kind in zip(config.rounds, kinds)
    ]
    run(replace(config, rounds=tuple(interrupted)))


@st.composite
def problems(draw: Any) -> tuple[str, tuple[Param, ...], dict[str, Any], str]:
    name = draw(st.sampled_from(NAMES))
    config = settled(
        Config(
            name,
            decoupled=False,
            params=draw(params_in(1)),
            groups=draw(groups_of(name, 1)),
            rounds=(),
        )
    )
    return name, config.params, config.groups[0].settings, config.groups[0].kind


def train(
    problem: tuple[Any, ...], split: list[list[int]], steps: int = 3
) -> list[torch.Tensor]:
    """Train with the parameters in these groups; return them in their own order."""
    name, specs, arguments, kind = problem
    generator = torch.Generator().manual_seed(0)
    params = [make_param(spec, generator) for spec in specs]
    optimizer = getattr(selective_optim, name)(
        [{"params": [(f"p{i}", params[i]) for i in part]} for part in split],
        wd_policy=Table(tuple(decay_of(spec) for spec in specs)),
        **arguments,
        **drawn.KINDS[kind],
    )
    for _ in range(steps):
        for param, spec in zip(params, specs):
            grad = make_param(spec, generator).detach()
            param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()
    return params


# Drawn policies may exempt everything, and drawn decay may round away.
quiet = pytest.mark.filterwarnings(
    "ignore:.*(exempts all|is 0 in every group|hardly decays):UserWarning"
)


@quiet
@bounded
@given(problems(), st.data())
def test_split_into_groups_and_order_do_not_matter(problem, data):
    everyone = list(range(len(problem[1])))
    order = data.draw(st.permutations(everyone))
    cuts = data.draw(st.sets(st.integers(1, max(1, len(order) - 1))))
    bounds = [0, *sorted(cuts - {len(order)}), len(order)]
    split = [order[a:b] for a, b in pairwise(bounds)]
    assume(all(split))
    for i, (a, b) in enumerate(zip(train(problem, split), train(problem, [everyone]))):
        require_same(a, b, f"parameter {i}")


@quiet
@bounded
@given(problems(), st.floats(0, 4, width=32))
def test_multiplier_on_everything_is_that_weight_decay(problem, by):
    name, specs, arguments, kind = problem
    scaled = (name, [replace(s, multiplier=by) for s in specs], arguments, kind)
    wd = {**arguments, "weight_decay": arguments["weight_decay"] * by}
    full = (name, [replace(s, multiplier=1.0) for s in specs], wd, kind)
    everyone = [list(range(len(specs)))]
    for i, (a, b) in enumerate(zip(train(scaled, everyone), train(full, everyone))):
        require_same(a, b, f"parameter {i}")


@settings(bounded, max_examples=60)
@given(st.data())
def test_any_split_of_a_checkpoint_comes_back_from_any_order(data):
    names = data.draw(st.lists(st.text("abc.", min_size=1), unique=True, min_size=1))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(names)), max_size=3)))
    parts = [names[i:j] for i, j in zip([0, *cuts], [*cuts, len(names)]) if i < j]
    model = [nn.Parameter(torch.zeros(2)) for _ in names]
    params = dict(zip(names, model))
    wds = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.3]), min_size=4, max_size=4))
    groups = [
        {"params": [(n, params[n]) for n in part], "weight_decay": wd, "tag": part[0]}
        for part, wd in zip(parts, wds)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for number, param in enumerate(data.draw(st.permutations(model))):
        param.grad = torch.full((2,), float(number)) if number % 3 else None
    optimizer.step()
    order = data.draw(st.permutations(names))
    original = optimizer.state_dict()
    for group in original["param_groups"]:
        del group["tag"]
    merged = merge_groups(original, order=order)
    assert merged["param_groups"][0]["param_names"] == order
    layout = [{"params": part, "weight_decay": wd} for part, wd in zip(parts, wds)]
    assert_same(split_groups(merged, layout), original)
