"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEAVY = (
    *("transformers", "lightning", "accelerate", "fastai", "timm", "mmengine"),
    *("schedulefree", "bitsandbytes"),
)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))


def heavy_packages(block: str) -> list[str]:
    return [p for p in HEAVY if re.search(rf"^(?:import|from) {p}\b", block, re.M)]


def case(number: int, block: str):
    marks = [pytest.mark.integration] if heavy_packages(block) else []
    return pytest.param(block, id=f"block-{number}", marks=marks)


def test_readme_has_blocks():
    assert len(BLOCKS) > 10


# What other packages say of themselves, and torch of a scheduler's first step.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("block", [case(i, b) for i, b in enumerate(BLOCKS)])
def test_readme_block_runs(block, tmp_path, monkeypatch):
    for package in heavy_packages(block):
        pytest.importorskip(package)
    if "optim.Muon" in block and not hasattr(import_module("torch").optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    monkeypatch.chdir(tmp_path)
    import_module("torch").manual_seed(0)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_shows_the_report_that_its_block_prints(capsys):
    shown = re.search(
        r"^```text\n(group.*?)^```$", README.read_text("utf-8"), re.M | re.S
    )
    block = next(block for block in BLOCKS if "decay_report()" in block)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == shown.group(1)
