"""Every optimizer class of the installed libraries: exact, refused or not run."""

from __future__ import annotations

import pytest
import torch

from tests.any_class_survey import (
    LIBRARIES,
    Survey,
    flag_in,
    forms_are_computed,
    judge,
)

# What cannot be served, with a part of the reason.
REFUSED = {
    "pytorch_optimizer-adalomo": "takes 'model'",
    "pytorch_optimizer-adammini": "takes 'model'",
    "pytorch_optimizer-asgd": "the class itself has set it",
    "pytorch_optimizer-lomo": "takes 'model'",
    "pytorch_optimizer-magma": "another optimizer",
}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and the classes many
    yield
    torch.set_num_threads(threads)


def classes_of(library: str) -> list[Survey]:
    try:
        return list(LIBRARIES[library]())
    except ImportError:
        pytest.skip(f"{library} is not installed")


# What other packages say of themselves.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.integration
@pytest.mark.parametrize("library", LIBRARIES)
def test_class_equals_itself_over_groups_split_by_hand(library):
    cases = classes_of(library)
    outcomes = {case.id: judge(case) for case in cases}
    different = [name for name, each in outcomes.items() if each.kind == "different"]
    refused = {n: each.reason for n, each in outcomes.items() if each.kind == "refused"}
    assert different == []
    assert set(refused) <= set(REFUSED)
    assert all(REFUSED[name] in reason for name, reason in refused.items())
    assert any(each.kind == "exact" for each in outcomes.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.integration
@pytest.mark.parametrize("library", LIBRARIES)
def test_forms_are_those_that_the_class_computes_for_a_group(library):
    choosing = [case for case in classes_of(library) if flag_in(case) is not None]
    served = [case for case in choosing if case.id not in REFUSED]
    wrong = [case.id for case in served if not forms_are_computed(case)]
    assert wrong == []
