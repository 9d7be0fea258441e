"""Who may import whom, and that private names of torch stand in one file."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import re
import statistics
from pathlib import Path
from tokenize import COMMENT, generate_tokens

import pytest
import torch

import selective_optim

ROOT = Path(selective_optim.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
# From the ground up; a room imports from lower floors, and from its own wing.
FLOORS = [
    ("_torch", "_text", "decay"),
    ("parameters", "step", "schedules"),
    ("fused", "policies"),
    ("decisions",),
    ("_state_entries", "report"),
    ("_optimizer", "audit"),
    ("sgd", "adam", "adamw"),
    ("any_class",),
    ("routes",),
    ("groups", "checkpoint"),
    ("__init__",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


WINGS = ("policies", "step", "fused", "decisions", "routes")


def room_of(name: str) -> str:
    return name.split(".")[0] or "__init__"


def imports_of(path: Path) -> set[str]:
    """List the modules of this package that a file imports, relative to its root."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, rest = node.module.partition(".")
            names = [f"{rest}.{alias.name}".lstrip(".") for alias in node.names]
            if package == "selective_optim":
                found |= {name if name in FILES else rest for name in names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                found |= {rest} if package == "selective_optim" else set()
    return found


def test_every_file_has_a_floor():
    assert {room_of(name) for name in FILES} == set(FLOOR)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_and_never_between_the_wings(name):
    room = room_of(name)
    for other in map(room_of, imports_of(FILES[name])):
        below = FLOOR[other] < FLOOR[room]
        assert below or other == room in WINGS, f"{name}: {other}"


@functools.cache
def height(name: str) -> int:
    """Count the floors below a file and its own, by what it imports."""
    return 1 + max(map(height, imports_of(FILES[name]) & FILES.keys()), default=0)


def function_lengths() -> dict[str, int]:
    """Measure every function, without its docstring."""
    lengths = {}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                told = first.end_lineno - first.lineno + 1
                whole = node.end_lineno - node.lineno + 1
                lengths[f"{name}.{node.name}:{node.lineno}"] = whole - (
                    told if ast.get_docstring(node) else 0
                )
    return lengths


def counts() -> dict[str, float]:
    """Count what makes the package easy or hard to hold in the head."""
    texts = [path.read_text() for path in FILES.values()]
    lines = sum(len(text.splitlines()) for text in texts)
    tokens = [generate_tokens(io.StringIO(text).readline) for text in texts]
    comments = sum(token.type == COMMENT for each in tokens for token in each)
    lengths = sorted(function_lengths().values())
    return {
        "lines": lines,
        "files": len(FILES),
        "files in the root": sum(path.parent == ROOT for path in FILES.values()),
        "floors": max(map(height, FILES)),
        "comments in %": 100 * comments / lines,
        "lines of the median function": statistics.median(lengths),
        "lines of nine functions in ten": lengths[len(lengths) * 9 // 10],
        "lines of the longest function": lengths[-1],
    }


# No count may grow but that of comments, or for a repair of what was silently wrong.
# Lower a limit when you have reached less.
MOST = {
    "lines": 14_591,
    "files": 53,
    "files in the root": 17,
    "floors": 9,
    "lines of the median function": 6,
    "lines of nine functions in ten": 20,
    "lines of the longest function": 45,
}
LEAST = {"comments in %": 6.0}


def test_the_house_stays_small():
    found = counts()
    print(", ".join(f"{round(n, 1):,} {key}" for key, n in found.items()))
    assert {key: n for key, n in found.items() if n > MOST.get(key, n)} == {}
    assert {key: n for key, n in found.items() if n < LEAST.get(key, n)} == {}


@pytest.mark.parametrize("wing", ["policies", "step", "fused"])
def test_a_wing_knows_only_the_vocabulary_that_both_share(wing):
    about_parameters = {"parameters", "_text"}
    known = {"policies": about_parameters, "step": {"_text"}, "fused": {"step"}}[wing]
    own = [path for name, path in FILES.items() if room_of(name) == wing]
    imported = {room_of(other) for path in own for other in imports_of(path)}
    assert imported - {wing} <= {"decay", "_torch"} | known


def names_bound(path: Path) -> set[str]:
    """List what a file defines itself, with classes, functions and assignments."""
    bound = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {n.id for t in targets for n in ast.walk(t) if hasattr(n, "id")}
        elif isinstance(node, ast.With | ast.If):
            bound |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return bound


@pytest.mark.parametrize("name", FILES)
def test_names_are_imported_from_where_they_live(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        package, _, home = node.module.partition(".")
        if package != "selective_optim" or home not in FILES:
            continue
        if FILES[home].name == "__init__.py":
            continue  # a page that gives users their names
        modules = {n.rpartition(".")[2] for n in FILES if n.startswith(f"{home}.")}
        wanted = {alias.name for alias in node.names} - modules
        assert wanted <= names_bound(FILES[home]), f"{name} <- {home}: {wanted}"


# Private names of torch.

PRIVATE = re.compile(r"_[^_]")


def is_private(name: str) -> bool:
    return any(PRIVATE.match(part) for part in name.split("."))


def names_in_torch() -> set[str]:
    """List the private names in torch's files that the package has to do with."""
    root = Path(torch.__file__).parent
    files = [*(root / "optim").glob("*.py"), root / "amp" / "grad_scaler.py"]
    files += [root / "nn" / "modules" / "module.py", root / "_tensor.py"]
    return {n for path in files for n in re.findall(r"\b_[a-z]\w+", path.read_text())}


# Words that torch happens to use in those files for something else.
HOMONYMS = {"_functional", "_indices", "_params"}


@functools.cache
def own_names() -> set[str]:
    """List what the package defines under a name that is none of torch's."""
    own = {part for name in FILES for part in name.split(".")}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
    return own - (names_in_torch() - HOMONYMS)


def foreign_private_names(path: Path) -> set[str]:
    """List private attributes and names that are not the package's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= set((node.module or "").split("."))
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant):
            found.add(str(node.value))  # as in getattr(torch, "_foreach_add_")
    return {n for n in found if is_private(n) and n.isidentifier()} - own_names()


# Of Python, of authors who mark or name parameters, and keys that we write.
OTHERS = {
    "_asdict",
    "_replace",
    "_getframe",
    "_no_weight_decay",
    "_optim",
    "_repr_html_",
}
KEYS = {"_w1", "_w2", "_copied", "_decay_schedule", "_decay_tie", "_lr"}
# Overridden where torch looks for it: `torch.compile`, and `GradScaler`.
TRACED = {"_init_group", "_step_supports_amp_scaling"}


@pytest.mark.parametrize("name", [name for name in FILES if name != "_torch"])
def test_private_names_of_torch_stand_in_one_file(name):
    assert foreign_private_names(FILES[name]) <= OTHERS | KEYS | TRACED
    assert not re.search(r"__mro__\s*\[", FILES[name].read_text())


def test_the_finder_of_private_names_finds_them(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("torch._C.f()\ngetattr(x, '_opt_called')\nfrom torch._six import a")
    assert foreign_private_names(path) == {"_C", "_opt_called", "_six"}


@pytest.mark.parametrize("name", FILES)
def test_every_module_can_be_imported_by_itself(name):
    importlib.import_module(f"selective_optim.{name}".removesuffix(".__init__"))
