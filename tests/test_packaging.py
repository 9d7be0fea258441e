"""What an installed package and its page on an index show."""

import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import selective_optim
from selective_optim import audit, policies
from selective_optim.policies import PolicyName
from selective_optim.policies.named import NAMED

ROOT = Path(__file__).parents[1]


def project():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_help_lists_the_public_names():
    told = pydoc.plain(pydoc.render_doc(selective_optim))
    for name in selective_optim.__all__:
        assert re.search(rf"\b{name}\b", told), name
    classes = re.search(r"^CLASSES\n(.*?)^\S", told, re.M | re.S)[1]
    assert all(name in classes for name in ("SGD", "Adam", "AdamW", "DecayReport"))
    functions = re.search(r"^FUNCTIONS\n(.*)", told, re.M | re.S)[1]
    assert all(name in functions for name in ("decay_report", "deciding_for"))


def test_a_star_gives_every_public_name():
    given = {}
    exec("from selective_optim import *", given)
    code = (ROOT / "selective_optim" / "__init__.py").read_text()
    imported = re.findall(r"^from \S+ import (\w+) as \1$", code, re.M)
    assert len(imported) > 15
    assert given.keys() - {"__builtins__"} == set(imported)


def test_dir_of_policies_lists_the_public_names_alone():
    assert dir(policies) == sorted(policies.__all__)
    assert not [name for name in dir(policies) if name.startswith("_")]


def test_modules_are_reachable_as_attributes():
    names = "audit", "checkpoint", "policies", "schedules"
    code = f"import selective_optim as s; print([getattr(s, n) for n in {names}])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert selective_optim.audit is audit


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
def test_every_argument_of_a_constructor_is_in_its_docstring(cls):
    cls = getattr(selective_optim, cls)
    code = cls.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    section = re.search(r"\n    Args:\n(.*?)\n    \w+:\n", cls.__doc__, re.S)[1]
    described = re.findall(r"^        (\w+): ", section, re.M)
    assert len(names) >= 12
    assert sorted(described) == sorted(names)


def test_names_for_type_checkers_are_those_that_are_known():
    assert list(get_args(PolicyName)) == list(NAMED)


def test_command_is_the_package():
    [(name, entry)] = project()["project"]["scripts"].items()
    assert name == "selective_optim"
    module, _, function = entry.partition(":")
    code = f"import {module} as m; raise SystemExit(m.{function}(['--version']))"
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True
    )
    version = selective_optim.__version__
    assert told.stdout.decode() == f"selective_optim {version}\n"


def test_metadata_name_nothing_that_does_not_exist():
    told = project()["project"]
    assert "urls" not in told
    assert {"pytorch", "weight decay", "optimizer"} <= set(told["keywords"])
    assert "Typing :: Typed" in told["classifiers"]
    assert (Path(selective_optim.__file__).parent / "py.typed").exists()


def test_readme_in_the_metadata_leads_nowhere_else():
    text = (ROOT / "README.md").read_text()
    tool = project()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for rule in tool["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    assert "Coming from hand-split groups,\n" in text


def test_wheel_has_the_package_and_no_pages():
    wheel = project()["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["exclude"] == ["/selective_optim/docs"]
    docs = ROOT / "selective_optim" / "docs"
    assert not list(docs.rglob("*.py"))


def test_site_is_built_strictly_and_names_no_repository():
    assert re.search(r"^mkdocs build --strict ", (ROOT / ".ci/run").read_text(), re.M)
    site = (ROOT / ".mkdocs.yml").read_text()
    assert "repo_url" not in site
    assert "site_url" not in site
