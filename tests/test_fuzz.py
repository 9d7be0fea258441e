"""Random sequences of edits, applied to ours and to torch's class split by hand."""

from functools import cache

import pytest

from tests.fuzz import EDITS, run

run_once = cache(run)


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_random_edits_leave_no_difference(seed):
    for each in range(seed, seed + 10):
        run_once(each)


def test_every_kind_of_edit_is_drawn():
    drawn = [edit for seed in range(20) for edit in run_once(seed)]
    assert set(drawn) == {*EDITS, "step"}
