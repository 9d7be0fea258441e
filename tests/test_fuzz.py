"""Random sequences of edits, applied to ours and to torch's class split by hand."""

import pytest

from tests.fuzz import EDITS, STEPS, run


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_random_edits_leave_no_difference(seed):
    for each in range(seed, seed + 10):
        run(each)


def test_every_kind_of_edit_is_drawn():
    drawn = [edit for seed in range(20) for edit in run(seed, STEPS)]
    assert set(drawn) == {*EDITS, "step"}
