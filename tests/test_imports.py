"""Tests may import benchmarks, never the reverse; what judges borrows nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOAK = ROOT / "tests/soak"
OURS = SOAK / "ours.py"  # builds what is judged
# What expected values come from.
JUDGES = [
    *(path for path in SOAK.glob("*.py") if path != OURS),
    ROOT / "tests/support/reference.py",
    ROOT / "tests/support/kernels.py",
    ROOT / "tests/support/others.py",
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path, package: str) -> set[str]:
    """List the modules of a package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = ROOT.joinpath(*node.module.split("."))
            names = [alias.name for alias in node.names]
            inside = [n for n in names if (folder / f"{n}.py").exists()]
            found |= {f"{node.module}.{name}" for name in inside} or {node.module}
    return {name for name in found if name.split(".")[0] == package}


@pytest.mark.parametrize("path", JUDGES, ids=module_of)
def test_judge_borrows_nothing_from_the_package(path):
    assert not imports_of(path, "selective_optim")
    # Nor by way of a helper that does.
    assert imports_of(path, "tests") <= {module_of(p) for p in (*JUDGES, OURS)}


def test_benchmarks_and_package_import_no_tests():
    for folder in ("benchmarks", "selective_optim"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not imports_of(path, "tests"), path
