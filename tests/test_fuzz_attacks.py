"""Random sequences with attacks, and of compiled steps, leave no difference."""

from functools import cache, partial

import pytest

from tests.fuzz import ATTACKS, COMPILED_EDITS, EDITS, run, run_compiled
from tests.soak import __main__ as soak

attacked = cache(partial(run, attacks=True))

pytestmark = [
    # torch says so of its own optimizers, once per process.
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_attacks_leave_no_difference(seed):
    for each in range(seed, seed + 10):
        attacked(each)


@pytest.mark.parametrize("seed", range(4))
def test_compiled_steps_leave_no_difference(seed):
    assert set(run_compiled(seed)) <= {*COMPILED_EDITS, "step"}


def test_every_kind_of_attack_is_drawn():
    drawn = [edit for seed in range(40) for edit in attacked(seed)]
    assert set(drawn) == {*EDITS, *ATTACKS, "step"}


def test_configurations_with_attacks_run_clean(capsys):
    assert soak.main(["--configurations", "200", "--seed", "7", "--attacks"]) == 0
    assert "0 mismatches" in capsys.readouterr().out
