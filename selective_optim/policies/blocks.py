"""Find the repeated blocks of a model, by a glob or by how they repeat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real

from torch import nn

from selective_optim import _torch
from selective_optim._module_tree import canonical_name
from selective_optim._text import received
from selective_optim.policies.recognition import norm_module

NUMBERED = re.compile(r"(.*?)\d+$")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# A convolution with its norm is a piece of a block, a linear layer not even that.
PARTS_OF_A_BLOCK = 3
# Blocks that hold a tenth of what the largest run holds could be meant as well.
RIVAL = 10


def named_modules(roots: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """List every module once with its canonical name, parents before children."""
    return [
        (canonical_name(f"{name}.leaf").removesuffix("leaf").strip("."), module)
        for root in roots
        for name, module in root.named_modules()
    ]


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _may_be_block(module: nn.Module) -> bool:
    parts = [m for m in module.modules() if any(True for _ in m.parameters(False))]
    return len(parts) >= PARTS_OF_A_BLOCK


@dataclass(frozen=True)
class Run:
    """Modules that stand side by side under names that only count, as blocks do.

    Args:
        glob: Matches their names.
        items: The modules, in order.
    """

    glob: str
    items: tuple[nn.Module, ...]

    @property
    def size(self) -> int:
        """Number of elements of all parameters inside."""
        return sum(map(_size, self.items))

    @property
    def uniform(self) -> bool:
        """Tell whether most items have the parameter shapes of another."""
        shapes = {tuple(p.shape for p in item.parameters()) for item in self.items}
        return 2 * len(shapes) <= len(self.items)

    @property
    def of_one_class(self) -> bool:
        """Tell whether all items are of the same class."""
        return len(set(map(type, self.items))) == 1


def runs_in(module: nn.Module, name: str = "") -> list[Run]:
    """List the outermost runs inside a module, each of two items or more."""
    runs: dict[str, list[nn.Module]] = {}
    paths: dict[nn.Module, str] = {}
    for key, child in module.named_children():
        paths[child] = name if key in _torch.WRAPPERS else f"{name}.{key}".lstrip(".")
        if (numbered := NUMBERED.match(key)) and _may_be_block(child):
            glob = f"{name}.{numbered[1]}*".lstrip(".")
            runs.setdefault(glob, []).append(child)
    found = [Run(glob, tuple(run)) for glob, run in runs.items() if len(run) > 1]
    taken = {item for run in found for item in run.items}
    outside = [child for child in paths if child not in taken]
    return found + [run for child in outside for run in runs_in(child, paths[child])]


def _inside_stage(stage: nn.Module) -> tuple[nn.Module, ...]:
    """Return the blocks that a stage consists of; none if it is a block itself."""
    if type(stage) in CONTAINERS:
        return tuple(filter(_may_be_block, stage.children()))
    runs = [run for run in runs_in(stage) if run.of_one_class]
    largest = max(runs, key=lambda run: run.size, default=None)
    return largest.items if largest and 2 * largest.size >= _size(stage) else ()


def _blocks_in(run: Run) -> list[nn.Module]:
    """Return the items of a run or, where the items are stages, the blocks inside.

    Stages differ in width; blocks that stand side by side are mostly alike, even
    where each holds a list of experts.
    """
    inner = {item: _inside_stage(item) for item in run.items}
    staged = {type(item) for item, blocks in inner.items() if blocks}
    if not staged or (run.uniform and staged.isdisjoint(CONTAINERS)):
        return list(run.items)
    return [
        block
        for item, blocks in inner.items()
        for block in blocks or ((item,) if type(item) in staged else ())
    ]


def require_arguments(rate: float, layers: object) -> None:
    """Check what layerwise rates are made of.

    Raises:
        TypeError: ``rate`` is no number, or ``layers`` neither string nor ``None``.
        ValueError: ``rate`` is negative, infinite or NaN.
    """
    if layers is not None and not isinstance(layers, str):
        raise TypeError(
            f"`layers` must be a glob on module names, not {received(layers)}. "
            f'Write for example layers="blocks.*".'
        )
    if not isinstance(rate, (int, float, Real)):
        raise TypeError(
            f"`rate` must be a number, not {received(rate)}. "
            f"Pass for example rate=0.75."
        )
    if not 0 <= rate < math.inf:
        raise ValueError(
            f"`rate` must be finite and >= 0, not {rate}. Pass for example rate=0.75."
        )


def find_blocks(roots: Sequence[nn.Module], layers: str | None) -> list[nn.Module]:
    """Return the repeated blocks that hold parameters, in the order of the model.

    Args:
        roots: Where to look.
        layers: Glob on module names; of nested matches the outer counts, and the
            name of one container stands for what it contains. ``None`` takes the
            run of blocks that holds most of the parameters.

    Raises:
        ValueError: ``layers`` matches none or names a single module, or is ``None``
            and no run of blocks, or no single one, holds most of the parameters.
    """
    if layers is not None:
        return _matching(roots, layers)
    runs = sorted((r for root in roots for r in runs_in(root)), key=lambda r: -r.size)
    # A tower of text beside one of images is smaller and no stem; it must be named.
    rivals = [run.glob for run in runs if RIVAL * run.size >= runs[0].size]
    if len(rivals) == 1:
        return _blocks_in(runs[0])
    models = ", ".join(type(root).__name__ for root in roots)
    if rivals:
        several = ", ".join(map(repr, rivals))
        raise ValueError(
            f"`layers` must say which blocks of {models} to count by; {several} all "
            f'hold many parameters. Name one, as in layers="{rivals[-1]}".'
        )
    lists = list(dict.fromkeys(map(repr, _counting_globs(roots))))[:8] or ["none"]
    raise ValueError(
        f"`layers` must name the repeated blocks of {models}, where none were found; "
        f"numbered modules in it: {', '.join(lists)}. "
        f'Write for example layers="blocks.*".'
    )


def _counting_globs(roots: Sequence[nn.Module]) -> Iterator[str]:
    for name, module in named_modules(roots):
        if (numbered := NUMBERED.match(name)) and _holds(module):
            yield f"{numbered[1]}*"


def _matching(roots: Sequence[nn.Module], layers: str) -> list[nn.Module]:
    named = [(n, m) for n, m in named_modules(roots) if n and _holds(m)]
    inside: set[nn.Module] = set()
    blocks = []
    for name, module in named:
        if fnmatchcase(name, layers) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    if len(blocks) == 1:
        return _in_single_match([(n, m) for n, m in named if m in inside], layers)
    if blocks:
        return blocks
    names = list(dict.fromkeys(name for name, _ in named))
    close = ", ".join(map(repr, get_close_matches(layers, names, n=3, cutoff=0.0)))
    raise ValueError(
        f"`layers` {layers!r} matches none of {len(names)} modules with parameters; "
        f'the closest are {close}. Write for example layers="blocks.*".'
    )


def _in_single_match(
    named: Sequence[tuple[str, nn.Module]], layers: str
) -> list[nn.Module]:
    """Return the layers that a glob means which matches one module, named first."""
    name, block = named[0]
    if name != layers and NUMBERED.match(name):
        return [block]  # a model of one block, and a glob on its number
    unwrapped = next(m for n, m in reversed(named) if n == name)
    if isinstance(unwrapped, CONTAINERS):
        return list(filter(_holds, unwrapped.children()))
    runs = sorted(runs_in(unwrapped, name), key=lambda run: -run.size)
    numbered = NUMBERED.match(name)
    stem = numbered[1] if numbered else "blocks."
    raise ValueError(
        f"`layers` {layers!r} matches one {type(unwrapped).__name__} and no list of "
        f"blocks, so there is nothing to count. Write for example "
        f'layers="{runs[0].glob if runs else f"{stem}*"}".'
    )


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def final_norm(modules: Sequence[nn.Module], last: nn.Module) -> nn.Module | None:
    """Return the norm that comes right after the last block, if one does.

    Args:
        modules: All modules, parents before children.
        last: The block.
    """
    inside = set(last.modules())
    after = iter(modules[modules.index(last) :])
    following = next((m for m in after if m not in inside), None)
    while following is not None and _is_wrapper(following):
        following = next(after, None)
    return following if norm_module(following) else None


def _is_wrapper(module: nn.Module) -> bool:
    return any(name in _torch.WRAPPERS for name, _ in module.named_children())
