"""What says nothing is no knowledge, and living modules tell what nobody gave."""

import copy
import gc
import re
import weakref
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from selective_optim import SGD, AdamW, param_groups, parameters, selective
from selective_optim.decisions import knowledge
from selective_optim.policies import exclude, is_norm

RIGHT = ["0.weight", "2.weight"]  # of those, by name or place, decay
SIZES = [4 * 8, 8 * 3]


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def decayed(optimizer):
    return [row.numel for row in optimizer.decay_report() if row.weight_decay]


def make(params, wd_policy="no_bias_norm", **arguments):
    return AdamW(params, weight_decay=0.1, wd_policy=wd_policy, **arguments)


def alone():
    """Return tensors of the shapes of :func:`net` that no module holds."""
    return [nn.Parameter(torch.ones_like(p)) for p in net().parameters()]


class Holder(nn.Module):
    """Holds parameters under mangled names, and does nothing."""

    def __init__(self, params):
        super().__init__()
        for name, param in params:
            self.register_parameter(name.replace(".", "__"), param)


class Functional(Holder):
    """The same, and it runs another module with them."""

    def forward(self, x, module):
        named = {n.replace("__", "."): p for n, p in self.named_parameters()}
        return torch.func.functional_call(module, named, x)


class Learner(nn.Module):
    """Keeps all parameters in a list, as code of meta-learning does."""

    def __init__(self, params):
        super().__init__()
        self.vars = nn.ParameterList(params)

    def forward(self, x):
        return x @ self.vars[0]


class Compares(Holder, Mapping):
    """As ``TensorDictParams``: a mapping, and equal to another by what it holds."""

    def __getitem__(self, name):
        return self.get_parameter(name)

    def __iter__(self):
        return (name for name, _ in self.named_parameters())

    def __len__(self):
        return len([*self])

    def __eq__(self, other):
        raise RuntimeError("no truth value")

    __hash__ = nn.Module.__hash__


def dictionary(params):
    return nn.ParameterDict({n.replace(".", "_"): p for n, p in params})


def tensors_of(params):
    return [param for _, param in params]


# What says nothing of the parameters in it; made of pairs.
CONTAINERS = {
    "ParameterList": lambda pairs: nn.ParameterList(tensors_of(pairs)),
    "ParameterDict": dictionary,
    "holder": Holder,
    "holder that runs": Functional,
    "mapping": Compares,
    "learner": lambda pairs: Learner(tensors_of(pairs)),
    "list in a list": lambda pairs: nn.ModuleList(
        [nn.ParameterList(tensors_of(pairs))]
    ),
}
each_container = pytest.mark.parametrize("box", CONTAINERS.values(), ids=CONTAINERS)

GIVEN = {
    "module": lambda box: box,
    "generator": lambda box: box.parameters(),
    "names": lambda box: box.named_parameters(),
    "group": lambda box: [{"params": box.parameters()}],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@each_container
def test_container_goes_by_the_living_module_around_its_tensors(box, given):
    model = net()
    optimizer = make(given(box([*model.named_parameters()])))
    assert decayed(optimizer) == SIZES
    assert "note: known from Sequential" in optimizer.decay_report().remark


@each_container
def test_container_of_tensors_that_no_module_uses_is_refused(box):
    box = box([(n, nn.Parameter(p.detach())) for n, p in net().named_parameters()])
    owner = next(m for m in box.modules() if [*m.parameters(recurse=False)])
    with pytest.raises(ValueError, match="needs module types") as caught:
        make(box.parameters())
    name = type(owner).__name__
    assert re.search(rf"only a place in \S*{name} is known\. Pass", str(caught.value))


@each_container
def test_every_module_that_is_given_counts(box):
    model = net()
    box = box([*model.named_parameters()])
    for modules in ([box, model], [model, box]):
        optimizer = make(model.parameters(), model=modules)
        assert decayed(optimizer) == SIZES
    assert decayed(make([box, model])) == SIZES


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own
def test_exported_program_goes_by_the_model_that_it_was_made_of():
    model = net()
    exported = torch.export.export(model, (torch.ones(2, 4),)).module()
    assert decayed(make(exported.parameters())) == SIZES

    lone = copy.deepcopy(exported)
    with pytest.raises(ValueError, match="needs module types"):
        make(lone.parameters())


class Lit(nn.Module):
    """As a LightningModule: a model, and the parameters of its loss in a list."""

    def __init__(self, shared=()):
        super().__init__()
        self.loss_params = nn.ParameterList([*shared, nn.Parameter(torch.ones(5))])
        self.model = net()

    def training_step(self, batch):
        return self.model(batch).sum() * self.loss_params[0]


def test_under_a_module_that_speaks_names_decide_and_the_report_says_so():
    lit = Lit()
    optimizer = make(lit.parameters())
    rows = {row.name: row for row in optimizer.decay_report()}
    assert rows["loss_params.0"].weight_decay == 0.1
    assert rows["loss_params.0"].reason == "decays in full (kind unknown)"
    told = [name for name, row in rows.items() if "kind unknown" in row.reason]
    assert told == ["loss_params.0"]


def test_list_beside_the_module_that_uses_a_parameter_does_not_say_what_it_is():
    lit = Lit()
    lit.bias_free = nn.ParameterList(lit.model.parameters())  # called after biases
    optimizer = make(lit.parameters(), wd_policy="no_bias")
    assert decayed(optimizer) == [5, 32, 8, 24]


def test_other_module_decides_for_a_list_under_a_module_that_speaks():
    norm = nn.LayerNorm(7)
    lit = Lit(norm.parameters())
    rows = {row.name: row.weight_decay for row in make(lit.parameters()).decay_report()}
    assert (rows["weight"], rows["bias"], rows["loss_params.2"]) == (0, 0, 0.1)


def test_callable_that_asks_a_predicate_is_refused_where_nothing_speaks():
    box = nn.ParameterList(alone())
    with pytest.raises(ValueError, match="read `owner` of '0'"):
        make(box, wd_policy=lambda info: not is_norm(info))
    assert decayed(make(box, wd_policy=lambda info: info.ndim > 1)) == SIZES


# Bare tensors.

BARE = {
    "list": lambda m: [*m.parameters()],
    "those that train": lambda m: [p for p in m.parameters() if p.requires_grad],
    "groups": lambda m: [{"params": [p]} for p in m.parameters()],
    "started": lambda m: iter([*m.parameters()]),
    "names": lambda m: [*m.named_parameters()],
}
each_bare = pytest.mark.parametrize("bare", BARE.values(), ids=BARE)


@pytest.mark.parametrize("cls", [SGD, AdamW, selective(torch.optim.NAdam)])
@each_bare
def test_bare_tensors_go_by_the_living_module(bare, cls):
    model = net()
    optimizer = cls(bare(model), lr=0.1, weight_decay=0.1, wd_policy="no_bias_norm")
    report = optimizer.decay_report()
    assert [row.name for row in report] == [
        name for name, _ in model.named_parameters()
    ]
    assert [row.name for row in report if row.weight_decay] == RIGHT


POLICIES = {
    "glob": exclude("*.bias", "1.*"),
    "class": {nn.LayerNorm: 0, "*.bias": 0},
    "recipe": "huggingface",
    "callable": lambda info: info.leaf == "weight" and not is_norm(info),
    "owner": lambda info: isinstance(info.owner, nn.Linear) and info.ndim > 1,
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_every_policy_is_served(policy):
    model = net()
    assert decayed(make([*model.parameters()], policy)) == SIZES


def test_param_groups_are_split_by_the_living_module():
    model = net()
    groups = param_groups([*model.parameters()], "no_bias_norm", weight_decay=0.1)
    assert groups[0]["param_names"] == RIGHT


def test_group_that_comes_later_and_an_assigned_policy_are_served():
    model = net()
    params = [*model.parameters()]
    optimizer = AdamW(params[:2], weight_decay=0.1)
    optimizer.add_param_group({"params": params[2:], "wd_policy": "no_bias_norm"})
    assert decayed(optimizer) == [32, 8, 24]
    optimizer.wd_policy = "no_bias_norm"
    assert decayed(optimizer) == SIZES


def test_part_of_a_model_is_no_reason_to_say_that_the_rest_is_left_out():
    model = net()
    report = make([*model[2].parameters()]).decay_report()
    assert report.remark.startswith("note: known from Sequential")
    assert report.rows[0].name == "2.weight"


def test_nothing_is_looked_for_where_nothing_is_needed(monkeypatch):
    monkeypatch.setattr(knowledge, "outermost_owners", None)
    model = net()
    params = [*model.parameters()]
    AdamW(params)
    make(params, "matrices")
    make(params, "all")
    make(model.parameters())
    make(params, model=model)
    make([*model.named_parameters()], exclude("*.bias"))


def test_tensors_that_no_module_holds_are_refused():
    with pytest.raises(ValueError, match="only the tensor is known"):
        make(alone())


def test_module_that_died_tells_nothing():
    params = [*net().parameters()]
    with pytest.raises(ValueError, match="only the tensor is known"):
        make(params)


# Several outermost modules.


class Around(nn.Module):
    """Wraps a model under a name of its own."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def forward(self, x):
        return self.inside(x)


def test_two_that_name_otherwise_tell_kinds_alone():
    model = net()
    around, beside = Around(model), nn.ModuleList([model])
    optimizer = make([*model.parameters()])
    assert decayed(optimizer) == SIZES
    assert {row.name for row in optimizer.decay_report()} == {None}
    with pytest.raises(ValueError, match="needs names"):
        make([*model.parameters()], exclude("*.bias"))
    del around, beside


def test_two_that_name_alike_tell_names():
    model = net()
    around = nn.ModuleDict({"module": model})
    again = nn.ModuleDict({"module": nn.ModuleDict({"module": model})})
    optimizer = make([*model.parameters()], exclude("*.bias", "1.*"))
    assert decayed(optimizer) == SIZES
    del around, again


def test_two_that_disagree_on_kinds_tell_nothing():
    table, layer = nn.Embedding(4, 4), nn.Linear(4, 4)
    layer.weight = table.weight
    with pytest.raises(ValueError, match="only the tensor is known"):
        make([table.weight])


def test_one_that_died_and_was_not_collected_does_not_count():
    model = net()
    gc.disable()
    try:
        dead = Around(model)
        dead.itself = [dead]
        del dead
        optimizer = make([*model.parameters()], exclude("*.bias", "1.*"))
    finally:
        gc.enable()
    assert decayed(optimizer) == SIZES
    assert optimizer.decay_report().rows[0].name == "0.weight"


def test_names_that_were_given_stay():
    model = net()
    pairs = [(f"net.{name}", param) for name, param in model.named_parameters()]
    optimizer = make(pairs, exclude("net.*.bias", is_norm))
    assert decayed(optimizer) == SIZES
    assert optimizer.decay_report().rows[0].name == "net.0.weight"


def test_nothing_that_was_found_is_kept_alive():
    model = net()
    optimizer = make([*model.parameters()])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert decayed(optimizer) == SIZES


def test_copy_of_model_and_optimizer_knows_the_copied_model():
    model = net()
    optimizer = make([*model.parameters()])
    model, optimizer = copy.deepcopy((model, optimizer))
    assert optimizer._decider.index.discovered == [model]


# The cost.


def test_optimizer_per_parameter_looks_once(monkeypatch):
    looks, found, model = [], gc.get_objects, net()
    monkeypatch.setattr(
        parameters.gc, "get_objects", lambda: looks.append(0) or found()
    )
    for param in model.parameters():
        make([param])
    assert len(looks) == 1


@pytest.mark.parametrize("change", ["registered", "assigned", "moved"])
def test_module_that_comes_later_is_found(change):
    model = net()
    make([*model.parameters()])
    if change == "registered":
        model.append(nn.LayerNorm(5))
    elif change == "assigned":
        model[1].weight = nn.Parameter(torch.ones(8))
    else:
        inside, model = model, Around(model)
        del model.inside
        model.inside = inside
    last = [*model.parameters()]
    assert len(decayed(make(last))) == 2


def test_stranger_beside_a_lazy_module_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    params = [*model[0].parameters(), nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"parameter 2 of group 0 \(shape 3\).*none"):
        AdamW(params, model=model)


class Forwarding(nn.Module):
    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_module_that_is_being_made_is_not_asked():
    half = Forwarding.__new__(Forwarding)
    model = nn.Linear(2, 2)
    optimizer = AdamW(list(model.parameters()), weight_decay=0.1, wd_policy="no_bias")
    assert [row.weight_decay for row in optimizer.decay_report()] == [0.1, 0.0]
    del half
