import subprocess
from signal import SIGKILL

import pytest
import torch

from tests import resume

ARGUMENTS = ["--network", "conv net", "--epochs", "1", "--every", "3"]


@pytest.fixture
def children(monkeypatch):
    """Collect the processes that a test starts, and see that none outlives it."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield started
    assert all(child.returncode is not None for child in started)


def test_killed_and_resumed_training_ends_with_the_same_bits(
    children, monkeypatch, capsys
):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    monkeypatch.setattr(resume, "KILLS", 1)

    status = resume.main([*ARGUMENTS, "--times", "1"])

    out = capsys.readouterr().out
    assert status == 0, out
    assert "1 of 1 runs ended with the bits of an uninterrupted one." in out
    # One killed, one resumed.
    assert [child.returncode for child in children] == [-SIGKILL, 0]


def test_other_bits_are_an_error(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn has the digits")
    runs = [("first run", []), ("second run", ["head.bias"])]
    monkeypatch.setattr(resume, "compare", lambda options, base: iter(runs))

    assert resume.main(["--times", "2"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "first run: same bits",
        "second run: other bits, first in 'head.bias'",
        "1 of 2 runs ended with the bits of an uninterrupted one.",
    ]


def test_child_that_takes_too_long_is_killed(children, tmp_path):
    options = resume.parse([*ARGUMENTS, "--timeout", "0.1"])
    with pytest.raises(RuntimeError, match=r"status -9.*--timeout 0\.1"):
        resume.run_until(options, tmp_path, last_step=1)
    assert len(children) == 1


def test_checkpoint_stays_whole_when_writing_stops(monkeypatch, tmp_path):
    path = tmp_path / "checkpoint.pt"
    resume.save({"step": 3}, path)

    def die(value, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        resume.save({"step": 6}, path)

    assert torch.load(path, weights_only=True) == {"step": 3}
