"""README and pages: blocks run, links lead somewhere, sentences are plain."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.pages import PAGES, ROOT, written
from selective_optim.__main__ import parser
from selective_optim.policies import Policy, parse
from tests.support.pages import (
    UNCLEAR,
    anchors,
    blocks,
    heavy_packages,
    links,
    page_id,
    prose,
    run,
    sentences,
)

README = ROOT / "README.md"
DOCS = ROOT / "selective_optim" / "docs"
EACH_PAGE = pytest.mark.parametrize("path", PAGES, ids=page_id)


def with_code(path: Path):
    marks = [pytest.mark.integration] if heavy_packages(path) else []
    return pytest.param(path, id=page_id(path), marks=marks)


# What other packages say of themselves, and torch of a scheduler's first step.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", [with_code(path) for path in PAGES if blocks(path)])
def test_blocks_of_a_page_run_and_print_what_is_shown(path, tmp_path, monkeypatch):
    for package in heavy_packages(path):
        pytest.importorskip(package)
    if "optim.Muon" in path.read_text("utf-8"):
        muon = hasattr(import_module("torch").optim, "Muon")
        muon or pytest.skip("torch has Muon from 2.9 on")
    monkeypatch.chdir(tmp_path)
    for block, printed in zip(blocks(path), run(path), strict=True):
        assert printed == (printed if block.text is None else block.text)


def test_readme_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1400


def test_first_blocks_are_four_lines_and_what_they_print():
    imports, *lines = blocks(README)[0].code.split("\n\n")
    assert "selective_optim" in imports
    assert blocks(README)[0].text.startswith("group  reason")
    assert len("".join(lines).splitlines()) <= 4


@EACH_PAGE
def test_links_and_anchors_lead_somewhere(path):
    for link in links(path):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.is_file(), link
        assert found.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(found), link


def test_readme_has_a_link_to_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    of_site = {DOCS / "index.md", DOCS / "changelog.md", README}
    of_frameworks = set((DOCS / "frameworks").glob("[!i]*.md"))
    assert set(PAGES) - linked == of_site | of_frameworks


def test_frameworks_have_a_page_with_a_link_to_each():
    page = DOCS / "frameworks" / "index.md"
    linked = {(page.parent / link).resolve() for link in links(page)}
    assert set(page.parent.glob("*.md")) - linked == {page}


def test_every_page_is_in_the_navigation_of_the_site():
    listed = re.findall(
        r"^ +- (?:\w+: )?([\w/]+\.md)$", (ROOT / ".mkdocs.yml").read_text(), re.M
    )
    pages = [path.relative_to(DOCS).as_posix() for path in PAGES if path != README]
    assert sorted(listed) == sorted(pages)


@EACH_PAGE
def test_tables_are_those_of_the_saved_results(path):
    text = path.read_text("utf-8")
    assert text == written(text)


def test_picture_is_that_of_the_newest_result():
    newest = max((ROOT / "benchmarks" / "results").glob("cpu_torch*.json"))
    for path in (README, DOCS / "speed.md"):
        [picture] = [link for link in links(path) if link.endswith(".png")]
        assert Path(picture).stem == newest.stem


def test_commands_of_the_pages_work():
    text = "".join(path.read_text("utf-8") for path in PAGES)
    commands = re.findall(
        r"^selective_optim ((?:audit|policies|recipes).*)$", text, re.M
    )
    assert len(commands) > 3
    for command in commands:
        parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("path", [README, DOCS / "policies.md"], ids=page_id)
def test_policies_that_the_tables_name_can_be_used(path):
    rows = re.findall(r"^\| .*\|$", path.read_text("utf-8"), re.M)
    named = [text for row in rows for text in re.findall(r'`"([^"]+)"`', row)]
    policies = [text for text in named if "." not in text]  # the others are globs
    assert len(policies) > 7
    for text in policies:
        assert isinstance(parse(text), Policy)


def test_main_job_and_tests_are_one_line_each():
    lines = README.read_text("utf-8").splitlines()
    assert "pip install -e '.[bench]' && python -m benchmarks" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def test_modules_that_pages_name_can_be_run():
    text = "".join(path.read_text("utf-8") for path in PAGES)
    named = set(re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text))
    assert len(named) > 8
    for name in named:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


GUIDES = [p for p in PAGES if p.parent.name != "api" and p.stem not in ("changelog",)]


@pytest.mark.parametrize("path", GUIDES, ids=page_id)
def test_page_begins_with_the_case_that_it_serves(path):
    text = re.sub(r"\A---\n.*?\n---\n\n", "", path.read_text("utf-8"), flags=re.DOTALL)
    title, _, first = text.partition("\n\n")
    assert title.startswith("# ")
    front = path in (README, DOCS / "index.md")
    assert front or first.startswith("For you, ")


WRITTEN = [path for path in PAGES if path.stem != "changelog"]


@pytest.mark.parametrize("path", WRITTEN, ids=page_id)
def test_sentences_are_plain(path):
    for sentence in sentences(prose(path.read_text("utf-8"))):
        assert len(sentence.split()) < 25, sentence
        assert not re.match(r"(?:What|Who|Whoever|Where)\b.*[^?]$", sentence), sentence
        assert not UNCLEAR.search(sentence), sentence


MYPY = (
    *("mypy", "--config-file=", "--follow-imports=silent"),
    "--disable-error-code=import-untyped",  # fastai, mmengine and others have no types
    f"--cache-dir={ROOT / '.mypy_cache' / 'pages'}",
)
PYRIGHT = {
    "extraPaths": [str(ROOT)],
    # timm and bitsandbytes document names that they import without `as`.
    "reportPrivateImportUsage": "none",
}
WRONGLY_TYPED = {
    "pyright": ("fastai",)  # it says that `opt_func` is an optimizer, and calls it
}


def write_code(folder: Path, checker: str, packages: bool) -> list[str]:
    """Write the code of pages into files: of those with or without other packages."""
    names = []
    for path in PAGES:
        code, heavy = (
            "".join(block.code for block in blocks(path)),
            heavy_packages(path),
        )
        left_out = not all(map(find_spec, heavy))
        left_out |= any(name in WRONGLY_TYPED.get(checker, ()) for name in heavy)
        if code and bool(heavy) == packages and not left_out:
            names.append(re.sub(r"\W", "_", page_id(path)) + ".py")
            (folder / names[-1]).write_text(code, "utf-8")
    return names


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize(
    "packages", [False, pytest.param(True, marks=pytest.mark.integration)]
)
def test_code_of_the_pages_passes_type_checkers(checker, packages, tmp_path):
    pytest.importorskip(checker)
    names = write_code(tmp_path, checker, packages)
    if packages and not names:
        pytest.skip("no framework is installed")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), "utf-8")
    given = ["pyright", "--pythonpath", sys.executable]
    command = [*MYPY, *names] if checker == "mypy" else given
    done = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout
    assert packages or len(names) > 8
