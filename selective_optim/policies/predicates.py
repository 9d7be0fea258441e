"""Ready-made selectors: bias, norm, embedding, weight of a layer, output layer.

A layer is known as the output where an accessor or a tie to an embedding says so, or
where name and order agree: each alone is wrong for some models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

from torch import nn

from selective_optim._text import warn
from selective_optim.parameters import ParameterInfo, index_of
from selective_optim.policies.recognition import (
    TELLING,
    bias_part,
    embedding_part,
    holder,
    layer_weight,
    norm_part,
    says_nothing,
    telling_places,
    token_leaf,
    whole,
)
from selective_optim.policies.selectors import (
    KINDS,
    LEAVES,
    MODULES,
    NAMES,
    SHAPES,
    Need,
    Selector,
    StrictInfo,
    UnknownError,
    UnsureError,
)

ACCESSORS = ("get_output_embeddings", "get_classifier")
# Names of the last of several layers in a head.
LAST = re.compile(TELLING.pattern + r"|out_proj$|decoder$|dense_out$")
NUMBERED = re.compile(r".*\d$")


class Outputs(NamedTuple):
    """The output layers of a model by the names of their weights."""

    names: tuple[str, ...]  # all candidates; where `sure`, the outputs and no others
    sure: bool
    visible: frozenset[str]  # all names of what is not hidden


def is_weight(place: ParameterInfo) -> bool:
    """Tell whether a place is that of a matrix or more that embeds nothing."""
    # Of a tie the embedding may stand elsewhere, and the tie is then an output.
    wide = place.ndim is not None and place.ndim >= 2
    return wide and layer_weight(place) and not embedding_part(place)


def is_output_of(place: ParameterInfo) -> bool:
    """Tell whether a parameter belongs to the output layer; raises UnsureError."""
    names, sure, _ = _outputs(place.path[0])
    if not sure:
        message = (
            f"of {type(place.path[0]).__name__} it is not sure which layer is the "
            f"output; candidates are {', '.join(map(repr, names))}"
        )
        raise UnsureError(message, names[-1])
    layers = {name.rpartition(".")[0] for name in names}
    return (place.name or "").rpartition(".")[0] in layers


def is_hidden(place: ParameterInfo) -> bool:
    """Tell whether a weight is no candidate for the output; warns of several once."""
    if not is_weight(place):
        return False
    root = place.path[0]
    names, sure, visible = _outputs(root)
    if not sure:
        message = (
            f"it is not certain which layer of {type(root).__name__} is its output, so "
            f"{', '.join(map(repr, names))} {'count' if names[1:] else 'counts'} not "
            f"as hidden. Select by name what is, as in "
            f"is_hidden_matrix | {names[-1]!r}, or pass Muon output={names[-1]!r}."
        )
        index_of(root).remember("told", lambda: warn(message))
    return place.name not in visible


def _outputs(root: nn.Module) -> Outputs:
    def look() -> Outputs:
        everyone = index_of(root).everyone()
        weights = [info for info in everyone if any(map(is_weight, info.places))]
        names, sure = _find_outputs(root, weights)
        # A tie is one with an embedding, wherever it is met first; and what is called
        # an output may be that of a part, of which no accessor tells.
        visible = [
            info.names
            for info in weights
            if not all(map(is_weight, info.places))
            or not set(names).isdisjoint(info.names)
            or any(map(_head, info.places))
        ]
        return Outputs(names, sure, frozenset(chain(*visible)))

    return index_of(root).remember("outputs", look)


def _find_outputs(
    root: nn.Module, weights: list[ParameterInfo]
) -> tuple[tuple[str, ...], bool]:
    """Name the output weights, or all candidates, and tell whether it is sure."""
    by_accessor = _from_accessors(root, weights)
    if by_accessor is not None:
        return by_accessor, True
    tied = [
        info.names
        for info in weights
        if any(isinstance(place.owner, nn.Embedding) for place in info.places)
    ]
    if tied or not weights:
        return tuple(chain(*tied)), True
    candidates = [i for i in weights if i is weights[-1] or _head(i)]
    names = tuple(str(info.name) for info in candidates)
    sure = _last_is_output(candidates)
    return names[-1:] if sure else names, sure


def _from_accessors(
    root: nn.Module, weights: list[ParameterInfo]
) -> tuple[str, ...] | None:
    for (_, module), accessor in product(whole(root), ACCESSORS):
        if not hasattr(type(module), accessor):  # wrappers answer for one inside
            continue
        try:
            answer = getattr(module, accessor)()
        except Exception:  # inherited and not served
            continue
        layers = list(_modules_in(answer))
        names = [name for layer in layers for name in _last_in(layer, weights)]
        # A classifier that was taken off leaves nothing: every weight is hidden.
        if names or (layers and accessor == "get_classifier"):
            return tuple(names)
    return None


def _modules_in(answer: object) -> Iterator[nn.Module]:
    if isinstance(answer, (list, tuple, nn.ModuleList)):
        for item in answer:
            yield from _modules_in(item)
    elif isinstance(answer, nn.Module):
        yield answer


def _last_in(layer: nn.Module, weights: list[ParameterInfo]) -> list[str]:
    """Name the weights with telling names inside a head; else the last inside."""
    paths: dict[nn.Module | None, str] = {m: name for name, m in layer.named_modules()}
    places = [p for info in weights for p in info.places if p.owner in paths]
    telling = [p for p in places if any(map(TELLING.match, paths[p.owner].split(".")))]
    return [str(place.name) for place in telling or places[-1:]]


def _head(info: ParameterInfo) -> str:
    """Return a name up to its first part that tells of an output; "" if none does."""
    parts = (info.name or "").split(".")[:-1]
    for i, part in enumerate(parts):
        if TELLING.match(part):
            return ".".join(parts[: i + 1])
        if NUMBERED.match(part) and (i or not part.isdigit()):
            break  # inside one of several blocks, and not a sequence of all
    return ""


def _last_is_output(candidates: list[ParameterInfo]) -> bool:
    head = _head(candidates[-1])
    if not head or any(_head(info) != head for info in candidates):
        return False
    layers = [str(i.name).rpartition(".")[0].removeprefix(head) for i in candidates]
    if len(layers) == 1 or all(re.fullmatch(r"\.\d+", layer) for layer in layers):
        return True
    *others, last = [LAST.match(layer.rpartition(".")[2]) for layer in layers]
    return bool(last) and not any(others)


@dataclass(frozen=True, repr=False)
class Predicate(Selector):
    """A ready-made selector that pickles and prints as its name."""

    name: str
    # Tells by a text how it was recognized, where that is not plain to see.
    question: Callable[[ParameterInfo], str | bool]
    needs: frozenset[Need] = frozenset()

    def __repr__(self) -> str:
        return self.name

    def told(self, info: ParameterInfo) -> str:
        answers = map(self.question, telling_places(info))
        how = next((answer for answer in answers if isinstance(answer, str)), None)
        return f"{self.name}: {how}" if how else self.name

    def __reduce__(self) -> str:
        return self.name

    def __call__(self, *infos: ParameterInfo) -> bool:
        if len(infos) != 1 or not isinstance(infos[0], ParameterInfo):
            raise TypeError(
                f"`{self.name}` is a selector as it stands, and not what makes one. "
                f"Write for example exclude({self.name})."
            )
        (info,) = infos
        # A callable that asks has not said before what it must know.
        if isinstance(info, StrictInfo) and self.needs & KINDS:
            lenient = ParameterInfo(**vars(info))
            if lenient.owner is not None and says_nothing(lenient):
                raise UnknownError("owner")
        return self.matches(info)

    def matches(self, info: ParameterInfo) -> bool:
        # A list beside the module that uses a parameter does not say what it is.
        return any(map(self.at, telling_places(info)))

    def at(self, place: ParameterInfo) -> bool:
        return bool(self.question(place))


# A bias is added to what its module computes, whatever its shape.
is_bias = Predicate("is_bias", bias_part, LEAVES)
# What belongs to a norm scales or shifts what has just been normalized.
is_norm = Predicate("is_norm", norm_part, MODULES)
# An embedding is a learned row for an index, a position or a special token: lookup
# tables, tables of positions and of relative ones, and all that is_token selects.
is_embedding = Predicate("is_embedding", embedding_part, MODULES)
# A token is a learned row that stands in the input for no index: class, mask and
# register tokens, separators, queries.
is_token = Predicate("is_token", lambda p: token_leaf(holder(p)[1]), LEAVES)
# The weight of a linear, convolution, attention, recurrent or embedding layer.
is_layer_weight = Predicate("is_layer_weight", layer_weight, MODULES | SHAPES)
KNOWN = NAMES | MODULES | SHAPES
# The layer that yields the model's answer, its bias included.
is_output = Predicate("is_output", is_output_of, KNOWN)
# A weight of two dimensions between embedding and output: what Muon is made for.
is_hidden_matrix = Predicate(
    "is_hidden_matrix", lambda place: place.ndim == 2 and is_hidden(place), KNOWN
)
# The same of two or more, convolutions and stacked experts included.
is_hidden_weight = Predicate("is_hidden_weight", is_hidden, KNOWN)
is_matrix = Predicate("is_matrix", lambda p: p.ndim == 2 and layer_weight(p), KNOWN)
# Of no shape, as of a lazy parameter, nothing is known.
is_vector = Predicate("is_vector", lambda place: place.ndim in (0, 1), SHAPES)
everything = Predicate("everything", lambda place: True)
