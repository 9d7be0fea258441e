"""Random sequences of edits to `Routed` leave no difference."""

import pytest

from tests.fuzz_routes import run


@pytest.mark.filterwarnings("ignore::UserWarning")  # others look at those
@pytest.mark.parametrize("seed", range(0, 20, 5))
def test_random_edits_leave_no_difference(seed):
    for each in range(seed, seed + 5):
        assert "step" in run(each)
