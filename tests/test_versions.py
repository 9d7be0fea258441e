"""A torch without a name that the library uses is refused when it is imported."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import selective_optim
from selective_optim import _torch

FILES = sorted(Path(selective_optim.__file__).parent.glob("*.py"))


def sentence(names):
    return re.escape(
        f"selective_optim uses {', '.join(names).replace(':', '.')}, which torch "
        f"{torch.__version__} does not have. Install torch 2.7 or later, or a newer "
        f"selective_optim."
    )


def take_away(name, monkeypatch):
    module, _, path = name.partition(":")
    holder = importlib.import_module(module)
    *owners, last = path.split(".")
    for owner in owners:
        holder = getattr(holder, owner)
    monkeypatch.delattr(holder, last)


def test_every_name_is_there():
    assert _torch.missing_names() == []
    _torch.require_names()


@pytest.mark.parametrize("name", _torch.NAMES)
def test_missing_name_is_refused_in_two_sentences(name, monkeypatch):
    take_away(name, monkeypatch)
    with pytest.raises(ImportError, match=f"^{sentence([name])}$"):
        _torch.require_names()


def test_all_missing_names_are_told_at_once(monkeypatch):
    names = ["torch:_fused_adam_", "torch.optim:SGD._init_group"]
    for name in names:
        take_away(name, monkeypatch)
    with pytest.raises(ImportError, match=f"^{sentence(names)}$"):
        _torch.require_names()


def test_missing_module_is_refused_like_a_missing_name():
    names = ["torch.gone:name", "torch:gone.name"]
    with pytest.raises(ImportError, match=sentence(names)):
        _torch.require_names(names)


def test_import_itself_fails_with_the_sentence_as_the_last_line():
    code = "import torch; del torch._fused_sgd_; import selective_optim"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(f"ImportError: {sentence(['torch._fused_sgd_'])}", last)
    assert done.returncode == 1


def is_private(path):
    return any(re.match(r"_[^_]", part) for part in path.split("."))


def dotted(node):
    """Write ``torch.a.b`` as it is read; anything else as an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imported(node):
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names]


def looked_up(node):
    return [a.value.replace(":", ".") for a in node.args if isinstance(a, ast.Constant)]


def torch_names(path):
    """List the names of torch that a file reads, imports or looks up."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.append(dotted(node))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += imported(node)
        elif isinstance(node, ast.Call) and dotted(node.func) == "_lookup":
            names += looked_up(node)
    return {name for name in names if name.startswith("torch.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_private_names_of_torch_are_listed(path):
    listed = {name.replace(":", ".") for name in _torch.NAMES}
    assert {name for name in torch_names(path) if is_private(name)} <= listed


def test_private_names_of_torch_stand_in_one_file():
    found = {path.name for path in FILES if any(map(is_private, torch_names(path)))}
    assert found == {"_torch.py"}
