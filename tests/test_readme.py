"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from selective_optim.__main__ import parser

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


SHOWN = re.compile(r"^```python\n([^`]*?)^```\n\n```text\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("index", range(2))
def test_readme_shows_what_its_block_prints(index, capsys):
    shown = SHOWN.findall(README.read_text("utf-8"))
    assert len(shown) == 2
    block, text = shown[index]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == text


def test_contents_lead_to_headings():
    text = README.read_text("utf-8")
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", plain, re.M)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", text))
    sections = {h.lower() for h in re.findall(r"^## (.*)$", plain, re.M)}
    assert links <= headings
    assert len(links) == len(sections)


def test_commands_of_the_readme_work(capsys):
    text = README.read_text("utf-8")
    commands = re.findall(
        r"^selective_optim ((?:audit|policies|recipes).*)$", text, re.M
    )
    assert len(commands) == 6
    for command in commands:
        parser().parse_args(shlex.split(command))
