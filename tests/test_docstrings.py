"""Docstrings of public names: the sections that they need, in plain sentences."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator

import pytest

import selective_optim
from benchmarks.pages import ROOT
from selective_optim import audit, checkpoint, policies, report
from tests.support.pages import UNCLEAR, sentences

PLACES = {
    selective_optim: selective_optim.__all__,
    policies: policies.__all__,
    audit: ("audit", "model_report", "find_mistakes", "find_hints", "Audit", "Finding"),
    checkpoint: (
        *("group_names", "merge_groups", "split_groups", "fit", "Fit"),
        *("keep_hyperparameters", "split_routes"),
    ),
    report: ("Row",),
}
PUBLIC = {
    f"{place.__name__}.{name}": getattr(place, name)
    for place, names in PLACES.items()
    for name in names
    if callable(getattr(place, name))
}
OWN = {
    name: each
    for name, each in PUBLIC.items()
    if (inspect.isclass(each) or inspect.isfunction(each))
    and each.__module__.startswith("selective_optim")
}
API = "".join(
    path.read_text("utf-8") for path in (ROOT / "selective_optim/docs/api").glob("*.md")
)
SECTION = re.compile(r"^(\w+):\n((?:\n?    .*\n?)+)", re.MULTILINE)


def told(each: object) -> str:
    """Return a docstring without examples and formulas, its entries as paragraphs."""
    text = inspect.getdoc(each) or ""
    text = SECTION.sub(lambda found: "" if found[1] == "Example" else found[0], text)
    text = re.sub(r"::\n\n(?:    .*\n|\n)+", ".\n\n", text)
    text = re.sub(r"\n *\*{0,2}\w+: ", "\n\n", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


@pytest.mark.parametrize(
    "name", sorted({name for names in PLACES.values() for name in names})
)
def test_public_name_is_in_the_reference(name):
    module = f"selective_optim.{name}" in sys.modules
    assert module or re.search(rf"^::: \S*\.{name}$|`{name}`", API, re.MULTILINE)


@pytest.mark.parametrize("name", OWN)
def test_public_name_has_a_docstring(name):
    assert OWN[name].__doc__


@pytest.mark.parametrize("name", OWN)
def test_sentences_of_a_docstring_are_plain(name):
    for sentence in sentences(told(OWN[name])):
        assert len(sentence.split()) <= 25, sentence
        assert not UNCLEAR.search(sentence), sentence


def undescribed(name: str) -> Iterator[str]:
    """List the arguments of a function that its docstring says nothing of."""
    text = inspect.getdoc(OWN[name]) or ""
    for argument in inspect.signature(OWN[name]).parameters:
        if not re.search(rf"^    \**{argument}: ", text, re.MULTILINE):
            yield argument


# Their arguments are those of another function, which they name.
AS_ANOTHER = {
    "selective_optim.policies.only": "exclude",
    "selective_optim.audit.find_mistakes": "audit",
    "selective_optim.audit.find_hints": "audit",
}
FUNCTIONS = [name for name, each in OWN.items() if inspect.isfunction(each)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_a_function_are_described(name):
    if name in AS_ANOTHER:
        assert AS_ANOTHER[name] in (inspect.getdoc(OWN[name]) or "")
    else:
        assert list(undescribed(name)) == []


@pytest.mark.parametrize("name", OWN)
def test_docstring_has_no_roles_of_sphinx(name):
    assert ":func:" not in (inspect.getdoc(OWN[name]) or "")
    assert ":class:" not in (inspect.getdoc(OWN[name]) or "")
