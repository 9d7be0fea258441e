"""Random configurations run clean, and what goes wrong is told and can be replayed."""

from __future__ import annotations

import re

import pytest
import torch

from tests.soak import __main__ as soak
from tests.soak.draw import draw
from tests.soak.tensors import Mismatch, require_same
from tests.soak.twin import Twin


@pytest.fixture(autouse=True)
def _threads_are_restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_configurations_run_clean(capsys):
    assert soak.main(["--configurations", "100", "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"100 configurations, \d{3} steps, 0 mismatches in ", printed)


def test_steps_bound_a_run(capsys):
    soak.main(["--steps", "30", "--seed", "7"])
    found = re.match(r"(\d+) configurations, (\d+) steps", capsys.readouterr().out)
    # The last configuration is not cut short, and has seven rounds at most.
    assert int(found[1]) < 30 <= int(found[2]) < 37


def test_seed_draws_the_same_configuration_again():
    assert draw("7:3") == draw("7:3") != draw("7:4")


@pytest.fixture
def _judge_decays_more(monkeypatch):
    def step(self, settings, kind, own=Twin.step):
        own(self, {**settings, "lr": 0.1, "weight_decay": 0.2}, kind)

    monkeypatch.setattr(Twin, "step", step)


@pytest.mark.usefixtures("_judge_decays_more")
def test_mismatch_is_counted_and_names_its_seed(capsys):
    assert soak.main(["--configurations", "5", "--seed", "7"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"configuration 7:\d: Mismatch: parameter \d", printed)
    assert re.search(r"  replay it with: python -m .*soak --replay 7:\d\n", printed)
    assert re.search(r"5 configurations, \d+ steps, [1-5] mismatches", printed)


@pytest.mark.usefixtures("_judge_decays_more")
def test_replay_of_a_mismatch_fails_alike(capsys):
    soak.main(["--configurations", "5", "--seed", "7"])
    [seed, *_] = re.findall(r"--replay (\S+)", capsys.readouterr().out)
    assert soak.main(["--replay", seed]) == 1
    told = capsys.readouterr()
    assert "Mismatch: parameter" in told.err
    assert "Param(shape=" in told.out


def test_replay_of_a_clean_run_says_so(capsys):
    assert soak.main(["--replay", "7:0"]) == 0
    assert "no mismatch" in capsys.readouterr().out


DIFFERENT = {
    "value": (torch.ones(2), torch.tensor([1.0, 1.0000001])),
    "sign of zero": (torch.zeros(2), -torch.zeros(2)),
    "dtype": (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "shape": (torch.ones(2), torch.ones(1, 2)),
    "one is NaN": (torch.ones(2), torch.tensor([1.0, torch.nan])),
}


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT)
def test_comparison_sees_every_bit(a, b):
    with pytest.raises(Mismatch, match=r"^what: "):
        require_same(a, b, "what")


def test_comparison_takes_two_nans_as_the_same():
    nan = torch.tensor([torch.nan, 1.0])
    require_same(nan, nan.clone().neg_().abs_(), "what")
