"""What is known of a parameter, from every source and through every wrapper."""

import copy
import gc
from dataclasses import FrozenInstanceError
from itertools import chain, count, islice
from operator import itemgetter

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from selective_optim import SGD, AdamW, ParameterInfo, _torch
from selective_optim._text import shape_text
from selective_optim._torch import canonical_name
from selective_optim.parameters import ModuleIndex, wanted


def make_net():
    body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    return nn.ModuleDict({"body": body, "head": nn.Linear(4, 2, bias=False)})


NAMES = [
    "body.0.weight",
    "body.0.bias",
    "body.1.weight",
    "body.1.bias",
    "head.weight",
]


def seen_by(params, **arguments):
    infos = {}  # a callable is asked twice

    def policy(info):
        infos.setdefault(id(info.parameter), info)
        return True

    AdamW(params, wd_policy=policy, **arguments)
    # A policy sees a strict view, which raises for what is not known.
    return [ParameterInfo(**vars(info)) for info in infos.values()]


SOURCES = {
    "model=": lambda m: (list(m.parameters()), {"model": m}),
    "model= of modules": lambda m: (list(m.parameters()), {"model": [m, m.head]}),
    "module": lambda m: (m, {}),
    "modules": lambda m: ([m], {}),
    "tuple of modules": lambda m: ((m,), {}),
    "parameters()": lambda m: (m.parameters(), {}),
    "named_parameters()": lambda m: (m.named_parameters(), {}),
    "started generator": lambda m: (islice(m.parameters(), 5), {"model": m}),
    "expression": lambda m: ((p for p in m.parameters() if p.requires_grad), {}),
    "filter": lambda m: (filter(lambda p: p.requires_grad, m.parameters()), {}),
    "map": lambda m: (map(itemgetter(1), m.named_parameters()), {}),
    "chain": lambda m: (chain(m.parameters(), ()), {}),
    "chain of expressions": lambda m: (
        chain.from_iterable(part.parameters() for part in (m,)),
        {},
    ),
    "groups": lambda m: ([{"params": m.parameters()}], {}),
    "groups of named": lambda m: ([{"params": m.named_parameters()}], {}),
    "groups of modules": lambda m: ([{"params": m}], {}),
    "names of a generator": lambda m: (((n, p) for n, p in m.named_parameters()), {}),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_source_that_leads_to_a_module_gives_names_owners_and_paths(source):
    model = make_net()
    params, arguments = source(model)
    infos = seen_by(params, **arguments)
    assert [info.name for info in infos] == NAMES
    assert [info.leaf for info in infos] == [n.rpartition(".")[2] for n in NAMES]
    first = infos[0]
    assert first.names == ("body.0.weight",)
    assert first.owner is model.body[0]
    assert first.path == (model, model.body, model.body[0])
    assert first.parameter is model.body[0].weight
    assert (first.shape, first.ndim, first.group) == (torch.Size((4, 3)), 2, 0)


NAMED = {
    "pairs": lambda m: list(m.named_parameters()),
    "pairs in a group": lambda m: [{"params": list(m.named_parameters())}],
    "param_names": lambda m: [
        {"params": list(m.parameters()), "param_names": list(NAMES)}
    ],
}


@pytest.mark.parametrize("source", NAMED.values(), ids=NAMED)
def test_names_alone_give_names_and_no_module(source):
    infos = seen_by(source(make_net()))
    assert [info.name for info in infos] == NAMES
    assert infos[0].names == ("body.0.weight",)
    assert infos[0].leaf == "weight"
    assert (infos[0].owner, infos[0].path) == (None, ())


def test_bare_tensors_give_shapes_alone():
    (info, _, _, _, _) = seen_by(list(make_net().parameters()))
    assert (info.name, info.names, info.leaf) == (None, (), None)
    assert (info.owner, info.path) == (None, ())
    assert (info.shape, info.ndim) == (torch.Size((4, 3)), 2)


def test_shapes_that_deepspeed_took_away_are_those_it_noted():
    """As ``deepspeed.zero.Init`` does, which the tests with DeepSpeed itself run."""
    model = make_net()
    for param in model.parameters():
        param.ds_shape, param.data = param.shape, torch.empty(0)
    assert [info.ndim for info in seen_by(model.parameters())] == [2, 1, 1, 1, 2]
    assert [info.ndim for info in seen_by(list(model.parameters()))] == [2, 1, 1, 1, 2]


def test_model_goes_before_the_generator():
    model = make_net()
    infos = seen_by(chain(model.head.parameters(), [model.body[0].bias]), model=model)
    assert [info.name for info in infos] == ["head.weight", "body.0.bias"]


def test_module_known_first_names_a_part_that_comes_later():
    model = make_net()
    head = model.head.weight
    optimizer = AdamW(
        (p for p in model.parameters() if p is not head), wd_policy="no_bias_norm"
    )
    optimizer.add_param_group({"params": model.head.parameters()})
    assert optimizer.decay_report().rows[-1].name == "head.weight"


def test_group_generators_each_give_their_own_module():
    model = make_net()
    groups = [{"params": model.body.parameters()}, {"params": model.head.parameters()}]
    infos = seen_by(groups)
    assert [info.name for info in infos][-2:] == ["1.bias", "weight"]
    assert [info.group for info in infos] == [0, 0, 0, 0, 1]
    assert infos[-1].owner is model.head


WRAPPED = {
    "module.": ("module.body.0.weight", "body.0.weight"),
    "_orig_mod.": ("_orig_mod.head.weight", "head.weight"),
    "inner _orig_mod": ("body._orig_mod.0.weight", "body.0.weight"),
    "fsdp": ("_fsdp_wrapped_module.body.0._fsdp_wrapped_module.bias", "body.0.bias"),
    "checkpoint": ("body._checkpoint_wrapped_module.0.bias", "body.0.bias"),
    "all": ("module._orig_mod.a._fsdp_wrapped_module.w", "a.w"),
    "parametrized": ("a.parametrizations.weight.original", "a.weight"),
    "weight norm": ("a.parametrizations.weight.original1", "a.weight"),
    "parametrized root": ("parametrizations.weight.original0", "weight"),
    "inside": ("a.parametrizations.weight.0.u", "a.parametrizations.weight.0.u"),
    "leaf kept": ("module.module", "module"),
    "plain": ("original0", "original0"),
}


def test_what_is_known_of_a_parameter_cannot_be_written_to():
    model = nn.Linear(2, 3)
    info = ModuleIndex(model).everyone()[0]
    with pytest.raises(FrozenInstanceError):
        info.shape = torch.Size((1,))


@pytest.mark.parametrize(("name", "expected"), WRAPPED.values(), ids=WRAPPED)
def test_canonical_name_strips_what_wrappers_add(name, expected):
    assert canonical_name(name) == expected


def compiled(model):
    return torch.compile(model, backend="eager")


def wrapped_in_place(model):
    model.body[0] = checkpoint_wrapper(model.body[0])
    return model


WRAPPERS = {
    "data parallel": nn.DataParallel,
    "compile": compiled,
    "compile of data parallel": lambda m: compiled(nn.DataParallel(m)),
    "activation checkpoint": wrapped_in_place,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("read", ["parameters", "named_parameters"])
def test_wrapped_model_gives_the_names_of_the_bare_one(wrap, read):
    infos = seen_by(getattr(wrap(make_net()), read)())
    assert [info.name for info in infos] == NAMES
    assert isinstance(infos[0].owner, nn.Linear)


PARAMETRIZED = {"weight norm": weight_norm, "spectral norm": spectral_norm}


@pytest.mark.parametrize("parametrize", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_tensor_is_the_weight_of_its_layer(parametrize):
    model = nn.Sequential(parametrize(nn.Linear(3, 4)))
    infos = seen_by(model.parameters())
    assert {info.name for info in infos} == {"0.weight", "0.bias"}
    assert all(info.owner is model[0] for info in infos)
    assert all(info.path == (model, model[0]) for info in infos)


def test_tied_parameter_has_all_names_and_places():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    model["head"].weight = model["embed"].weight
    info = seen_by(model.parameters())[0]
    assert info.names == ("embed.weight", "head.weight")
    assert [place.owner for place in info.places] == [model["embed"], model["head"]]


def test_module_registered_twice_gives_both_names():
    block = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": block, "b": block})
    info = ModuleIndex(model).everyone()[0]
    assert info.names == ("a.weight", "b.weight")


def test_model_that_contains_itself_is_read():
    model = make_net()
    model.head.back = model
    assert [info.name for info in seen_by(model)] == NAMES


class OldSignature(nn.Module):
    """Overrides what torch calls, with the arguments that torch had then."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))

    def named_parameters(self, prefix="", recurse=True):
        yield from super().named_parameters(prefix, recurse)


def test_model_that_overrides_named_parameters_is_read():
    infos = seen_by(OldSignature().named_parameters())
    assert [info.name for info in infos] == ["weight", "bias"]


def test_lazy_parameters_are_taken_as_torch_takes_them():
    model = nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4))
    optimizer = SGD(model, lr=0.5, weight_decay=0.1, wd_policy="no_bias_norm")
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    decays = [row.weight_decay for row in optimizer.decay_report().rows]
    assert decays == [0.1, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="not set before the first forward pass"):
        SGD(nn.LazyLinear(4), lr=0.5, weight_decay=0.1, wd_policy="matrices")


def test_optimizer_keeps_no_module_alive():
    model = make_net()
    params = list(model.parameters())
    optimizer = AdamW(params, model=model, wd_policy="no_bias_norm")
    del model
    gc.collect()
    assert optimizer._decider.index.explicit is False
    late = nn.Linear(2, 2)
    optimizer.add_param_group({"params": late.parameters()})
    assert [row.weight_decay for row in optimizer.decay_report().rows[-2:]] == [0.01, 0]


def test_knowledge_survives_deepcopy_of_model_and_optimizer():
    model = make_net()
    pair = (model, AdamW(model.parameters(), wd_policy="no_bias_norm"))
    copied_model, copied = copy.deepcopy(pair)
    assert copied.param_groups[0]["params"][0] is copied_model.body[0].weight
    assert [row.name for row in copied.decay_report().rows] == NAMES


@pytest.mark.parametrize(
    ("shape", "expected"), [((10, 64), "10 x 64"), ((3,), "3"), ((), "scalar")]
)
def test_shape_text_reads_as_a_product(shape, expected):
    assert shape_text(shape) == expected


def test_model_may_be_given_by_a_generator_of_modules():
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    listed = {"wd_policy": "no_bias_norm", "model": (module for module in net)}
    optimizer = AdamW(list(net.parameters()), weight_decay=0.1, **listed)
    decays = [row.weight_decay > 0 for row in optimizer.decay_report().rows]
    assert decays == [True, False, False, False]


def take_out(model):
    model._modules["1"] = None


def drop(model):
    del model._modules["1"]


def exchange(model):
    model._modules["1"] = nn.Linear(3, 2)


def exchange_inside(model):
    model[1]._parameters["weight"] = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize("edit", [take_out, drop, exchange, exchange_inside])
def test_parameter_that_left_behind_torchs_back_is_not_found(edit):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    param = model[1].weight
    index = ModuleIndex(model)
    assert index.infos(wanted([param]))[0].name == "1.weight"
    edit(model)
    assert index.infos(wanted([param])) == [None]


def test_module_that_moved_behind_torchs_back_is_found_where_it_stands():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    index = ModuleIndex(model)
    model._modules["head"] = model._modules.pop("1")
    assert index.infos(wanted([model.head.weight]))[0].name == "head.weight"


def test_parameter_of_a_module_that_is_gone_is_not_found():
    module = nn.Linear(2, 3)
    index, param = ModuleIndex(module), module.weight
    del module
    assert index.infos(wanted([param])) == [None]


@pytest.mark.parametrize("name", ["registered", "children", "original_shapes"])
@pytest.mark.parametrize("call", [0, 2])
def test_reading_that_is_interrupted_is_done_again(name, call, monkeypatch):
    """Half of it would know a tied parameter under one of its names."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    real, calls = getattr(_torch, name), count()

    def interrupted(*args):
        if next(calls) == (0 if name == "original_shapes" else call):
            raise KeyboardInterrupt
        return real(*args)

    index = ModuleIndex(model)
    monkeypatch.setattr(_torch, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.everyone()
    monkeypatch.undo()
    assert [info.names for info in index.everyone()] == [
        ("0.weight", "1.weight"),
        ("0.bias",),
        ("1.bias",),
    ]
