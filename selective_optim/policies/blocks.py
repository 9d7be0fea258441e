"""Find the repeated blocks of a model, by a glob or by how they repeat."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import combinations
from numbers import Real

from torch import nn

from selective_optim import _torch
from selective_optim._text import received
from selective_optim._torch import without_wrappers
from selective_optim.parameters import has_parameters

Layers = str | Sequence[str] | None
Modules = list[nn.Module]
NamedModules = list[tuple[str, nn.Module]]
NUMBERED = re.compile(r"(.*?)\d+$")
LISTS = (nn.ModuleList, nn.ModuleDict)
CONTAINERS = (nn.Sequential, *LISTS)
# A convolution with its norm is a piece of a block, a linear layer not even that.
PARTS_OF_A_BLOCK = 3
DOWN, UP = re.compile(r"down(?!_?stream)"), re.compile(r"up(?!date|per)")
# Blocks that hold a tenth of what the largest run holds could be meant as well.
RIVAL = 10


def named_modules(roots: Sequence[nn.Module]) -> NamedModules:
    """List every module once with its canonical name, parents before children."""
    return [
        (without_wrappers(f"{name}.").removesuffix("."), module)
        for root in roots
        for name, module in root.named_modules()
    ]


def _size(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def _may_be_block(module: nn.Module) -> bool:
    # Modules that hold parameters themselves; containers and activations do not count.
    parts = [m for m in module.modules() if has_parameters(m, recurse=False)]
    return len(parts) >= PARTS_OF_A_BLOCK


@dataclass(frozen=True)
class Run:
    """Modules that stand side by side under names that only count, as blocks do."""

    glob: str  # matches their names
    items: tuple[nn.Module, ...]

    def __str__(self) -> str:
        return f"{self.glob!r} ({len(self.items)} modules, {self.size:,} elements)"

    @property
    def size(self) -> int:
        return sum(map(_size, self.items))

    @property
    def uniform(self) -> bool:
        """Tell whether most items have the parameter shapes of another."""
        shapes = {tuple(p.shape for p in item.parameters()) for item in self.items}
        return 2 * len(shapes) <= len(self.items)


def runs_in(module: nn.Module, name: str = "") -> list[Run]:
    """List the outermost runs inside a module, each of two items or more."""
    items: dict[str, list[nn.Module]] = {}
    names: dict[nn.Module, str] = {}
    for key, child in module.named_children():
        names[child] = name if key in _torch.WRAPPERS else f"{name}.{key}".lstrip(".")
        if (numbered := NUMBERED.match(key)) and _may_be_block(child):
            glob = f"{name}.{numbered[1]}*".lstrip(".")
            items.setdefault(glob, []).append(child)
    runs = [Run(glob, tuple(run)) for glob, run in items.items() if len(run) > 1]
    in_runs = {item for run in runs for item in run.items}
    outside = [child for child in names if child not in in_runs]
    return runs + [run for child in outside for run in runs_in(child, names[child])]


def _blocks_in_run(run: Run) -> Modules:
    # Stages differ in width; blocks beside each other are mostly alike, experts or not.
    inner = {item: _blocks_in_stage(item, run.uniform) for item in run.items}
    stages = {type(item) for item, blocks in inner.items() if blocks}
    # A plain container never is a block itself, however alike its neighbors are.
    if not stages or (run.uniform and stages.isdisjoint(CONTAINERS)):
        _require_no_runs_alike(run)
        return list(run.items)
    stack: Modules = []
    for item, blocks in inner.items():
        if blocks or type(item) in stages:
            stack += blocks or [item]
    return stack


def _blocks_in_stage(stage: nn.Module, alike: bool = False) -> tuple[nn.Module, ...]:
    """Return the blocks that a stage consists of; none if it is a block itself."""
    parts = list(filter(has_parameters, stage.children()))
    # An attention and a feed-forward in a list are one layer, also if both branch.
    branch = [bool(runs_in(part)) for part in parts]
    one_layer = not any(branch) or (alike and all(branch))
    if isinstance(stage, LISTS) and _are_pieces(parts) and one_layer:
        return ()
    if type(stage) in CONTAINERS:
        blocks = tuple(filter(_may_be_block, stage.children()))
        if len(blocks) == 1:  # an embedding, and a transformer of its own depth
            return _blocks_in_stage(blocks[0]) or blocks
        # Of blocks most have the parameters of another; what has not is pieces of one.
        kinds = Counter(tuple(n for n, _ in b.named_parameters()) for b in blocks)
        return blocks if 2 * max(kinds.values(), default=0) >= len(blocks) else ()
    largest = max(runs_in(stage), key=lambda run: run.size, default=None)
    if largest is None or 2 * largest.size < _size(stage):
        return ()
    # A list in a list is the one layer of this stage.
    listed = re.search(r"\d\.\*$", largest.glob)
    return () if listed and _are_pieces(largest.items) else largest.items


def _are_pieces(parts: Sequence[nn.Module]) -> bool:
    """Tell whether parts are as different as those of one block are."""
    kinds = {tuple(type(m) for m in p.modules() if has_parameters(m)) for p in parts}
    return 1 < len(parts) == len(kinds) <= 3


def _require_no_runs_alike(run: Run) -> None:
    # Where each consists of further modules that are all alike, and these are no
    # experts, either could be meant; the rest of a stage is a norm or a projection.
    block = run.items[0]
    inner = [run for run in runs_in(block) if "expert" not in run.glob]
    alike = (r for r in inner if r.uniform and len(set(map(type, r.items))) == 1)
    if any(r.size >= 0.9 * _size(block) for r in alike):
        deeper = f"{run.glob}.{inner[0].glob}"
        raise ValueError(
            f"`layers` must say what counts as a block; {run} are alike, and so are "
            f'{deeper!r} inside. Write layers="{deeper}" or layers="{run.glob}".'
        )


def require_arguments(rate: float, layers: object) -> None:
    """Check what layerwise rates are made of; raises TypeError or ValueError."""
    globs = layers if isinstance(layers, (list, tuple)) else [layers]
    if layers is not None and not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"`layers` must be a glob on module names, or a list of globs, not "
            f'{received(layers)}. Write for example layers="blocks.*".'
        )
    if not globs:
        raise ValueError(
            "`layers` is an empty list, and names no blocks. "
            'Write for example layers=["text.blocks.*", "image.blocks.*"].'
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


def find_stacks(roots: Sequence[nn.Module], layers: Layers) -> list[Modules]:
    """Return the stacks of blocks with parameters: one per glob, or the largest."""
    if layers is None:
        return [_main_stack(roots)]
    globs = [layers] if isinstance(layers, str) else layers
    stacks = [_matching(roots, glob) for glob in globs]
    inside = [{module for m in stack for module in m.modules()} for stack in stacks]
    for (glob, modules), (other, others) in combinations(zip(globs, inside), 2):
        if modules & others:
            raise ValueError(
                f"`layers` {glob!r} and {other!r} match some of the same modules, and "
                f"a block is in one stack. Leave one of them out."
            )
    return stacks


def _main_stack(roots: Sequence[nn.Module]) -> Modules:
    _require_no_way_back(roots)
    every = [run for root in roots for run in runs_in(root)]
    # Patches may be embedded by a stack of blocks, which is a stem.
    main = [run for run in every if "patch_embed" not in run.glob] or every
    runs = sorted(main, key=lambda run: -run.size)
    # A tower of text beside one of images is smaller and no stem; it must be named.
    rivals = [run for run in runs if RIVAL * run.size >= runs[0].size]
    if len(rivals) == 1:
        return _blocks_in_run(runs[0])
    models = ", ".join(type(root).__name__ for root in roots)
    if rivals:
        several = ", ".join(map(str, rivals))
        globs = ", ".join(f'"{run.glob}"' for run in rivals[:2])
        raise ValueError(
            f"`layers` must say which blocks of {models} to count by; {several} all "
            f'hold many parameters. Name one, as in layers="{rivals[0].glob}", or '
            f"several stacks of their own depth, as in layers=[{globs}]."
        )
    counts = Counter(_counting_globs(named_modules(roots)))
    # A message with 1,000 globs cannot be read.
    numbered = ", ".join(map(repr, list(counts)[:8])) or "none"
    raise ValueError(
        f"`layers` must name the repeated blocks of {models}, where none were found; "
        f"numbered modules in it: {numbered}. "
        f"{_way_out([glob for glob, _ in counts.most_common(1)])}"
    )


def _way_out(globs: Sequence[str]) -> str:
    if globs:
        return f'Write for example layers="{globs[0]}".'
    return "Name modules that repeat; this model has none that are numbered."


def _require_no_way_back(roots: Sequence[nn.Module]) -> None:
    """Check that no lists beside each other go down and up again, as in a U-Net."""
    for name, module in named_modules(roots):
        lists = [key for key, m in module.named_children() if isinstance(m, CONTAINERS)]
        pair = [next(filter(way.match, lists), None) for way in (DOWN, UP)]
        if None not in pair:
            globs = ", ".join(f'"{name}.{key}"'.replace('".', '"') for key in pair)
            raise ValueError(
                f"`layers` must say which blocks of {type(roots[0]).__name__} to count "
                f"by: it goes down and up again. Write the stacks, each of its own "
                f"depth: layers=[{globs}]."
            )


def _counting_globs(named: NamedModules) -> list[str]:
    matches = [NUMBERED.match(name) for name, m in named if has_parameters(m)]
    return [f"{match[1]}*" for match in matches if match]


def _matching(roots: Sequence[nn.Module], glob: str) -> Modules:
    named = [(n, m) for n, m in named_modules(roots) if n and has_parameters(m)]
    inside: set[nn.Module] = set()
    blocks = []
    for name, module in named:
        if fnmatchcase(name, glob) and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    if len(blocks) == 1:
        return _in_single_match([(n, m) for n, m in named if m in inside], glob)
    if blocks:
        return blocks
    names = list(dict.fromkeys(name for name, _ in named))
    close = ", ".join(map(repr, get_close_matches(glob, names, n=3, cutoff=0.0)))
    globs = [other for other in dict.fromkeys(_counting_globs(named)) if other != glob]
    raise ValueError(
        f"`layers` {glob!r} matches none of {len(names)} modules with parameters; "
        f"the closest are {close}. "
        f"{_way_out(get_close_matches(glob, globs, n=1, cutoff=0.0))}"
    )


def _in_single_match(named: NamedModules, glob: str) -> Modules:
    name, block = named[0]
    numbered = NUMBERED.match(name)
    if name != glob and numbered:
        return [block]  # a model of one block, and a glob on its number
    unwrapped = next(m for n, m in reversed(named) if n == name)
    if isinstance(unwrapped, CONTAINERS):
        return list(filter(has_parameters, unwrapped.children()))
    stem = numbered[1] if numbered else "blocks."
    largest = max(runs_in(unwrapped, name), key=lambda run: run.size, default=None)
    raise ValueError(
        f"`layers` {glob!r} matches one {type(unwrapped).__name__} and no list of "
        f"blocks, so there is nothing to count. Write for example "
        f'layers="{largest.glob if largest else f"{stem}*"}".'
    )
