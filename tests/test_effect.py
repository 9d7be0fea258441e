"""The digits on which exempting norms and biases matters, in small."""

import json

import pytest

from benchmarks.digits import effect
from benchmarks.digits.arms import ALL, SELECTIVE
from benchmarks.digits.training import load, reproducible

pytest.importorskip("sklearn")


def test_decaying_norms_costs_certainty_on_unseen_digits():
    with reproducible():
        data = effect.few(load())
        losses = {
            arm: effect.one("conv net", 10.0, arm, data, 0, 15)[0]
            for arm in (SELECTIVE, ALL)
        }
    assert losses[SELECTIVE] < 0.8 * losses[ALL]


def test_command_prints_and_saves_what_it_measured(capsys, tmp_path):
    file = tmp_path / "effect.json"
    arguments = ["--seeds", "2", "--epochs", "1", "--decays", "0.5"]
    assert effect.main([*arguments, "--json", str(file)]) == 0
    first, headers, *lines = capsys.readouterr().out.splitlines()
    assert first == "256 images to train on, 1 epochs, 2 seeds:"
    assert headers.split("  ")[0] == "network"
    assert len(lines) == 4
    saved = json.loads(file.read_text())
    assert [len(result["losses"]) for result in saved["results"]] == [2] * 4
    assert effect.spread(saved["results"][0]["losses"]) in lines[0]


def test_spread_is_mean_and_deviation():
    assert effect.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert effect.spread([1.0]) == "1.000 ± 0.000"
