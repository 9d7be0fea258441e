"""README and pages: their blocks, what these print, headings and links.

``python -m tests.support.pages`` runs every page and rewrites what its blocks print.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import PAGES, ROOT

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# A block of Python, and what it prints if the page shows that right below.
SHOWN = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\n\n```text\n(?P<text>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
HEAVY = (
    *("transformers", "lightning", "accelerate", "fastai", "timm", "mmengine", "peft"),
    *("schedulefree", "bitsandbytes"),
)

# Nobody reads these once: a metaphor, or a claim without its number.
UNCLEAR = re.compile(
    r"\b(?:hardly|as a rule|nearly always|mostly|easily|simply|just|whoever"
    r"|goes? its way|verdicts?|lent|settles?|odd|spared?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Block:
    """Code of a page, and the text below that shows what it prints."""

    code: str
    text: str | None


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removeprefix("selective_optim/docs/")


def blocks(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    return [Block(found["code"], found["text"]) for found in SHOWN.finditer(text)]


def heavy_packages(path: Path) -> list[str]:
    """List what a page imports that the test extra does not bring."""
    code = "".join(block.code for block in blocks(path))
    return [p for p in HEAVY if re.search(rf"^(?:import|from) {p}\b", code, re.M)]


def run(path: Path) -> Iterator[str]:
    """Run the blocks of a page one after another, and yield what each prints."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(blocks(path)):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(block.code, f"{path.name}, block {number}", "exec"), names)
        yield printed.getvalue()


def prose(text: str) -> str:
    """Leave out fenced code."""
    return FENCED.sub("", text)


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of paragraphs and lists; a piece of code is one word."""
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    for part in re.split(r"\n\n|\n(?=(?:[-*]|\d\.) )", text):
        if not part.lstrip().startswith(("#", "|", ":::", "--8<--")):
            plain = " ".join(re.sub(r"^\s*(?:[-*]|\d\.) ", "", part).split())
            yield from filter(None, re.split(r"(?<=[.!?])\s+|(?<=:)\s", plain))


def anchors(path: Path) -> set[str]:
    """List what headings are linked as, on a Git host and on the site."""
    headings = re.findall(r"^#+ (.*)$", prose(path.read_text("utf-8")), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in plain}


def links(path: Path) -> list[str]:
    """List the targets of links and pictures."""
    text = re.sub(r"`[^`\n]*`", "", prose(path.read_text("utf-8")))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def _rewrite(path: Path) -> None:
    text = path.read_text("utf-8")
    printed = run(path)

    def updated(found: re.Match[str]) -> str:
        new = next(printed)
        shown = "" if found["text"] is None else f"\n\n```text\n{new}```"
        return f"```python\n{found['code']}```{shown}"

    path.write_text(SHOWN.sub(updated, text), "utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    for page in PAGES:
        if all(map(find_spec, heavy_packages(page))):
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)  # for what pages write
                _rewrite(page)
                os.chdir(ROOT)
