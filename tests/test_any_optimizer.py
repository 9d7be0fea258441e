"""The decay report through wrappers, of several optimizers, of what was saved."""

import copy
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from selective_optim import SGD, Adam, AdamW, WeightDecay, decay_report, selective
from selective_optim.policies import form, towards
from tests.support.nets import Net

POLICY = {"weight_decay": 0.5, "wd_policy": "no_bias_norm"}


def ours(model, **settings):
    return AdamW(model.parameters(), model=model, **{**POLICY, **settings})


# Wrappers: most skip the constructor of torch's class, and forward what is read.


class Forwarding(torch.optim.Optimizer):
    """As Opacus' and Accelerate's."""

    def __init__(self, optimizer):
        self.original_optimizer = optimizer

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    def step(self, closure=None):
        return self.original_optimizer.step(closure)


class Imitating(Forwarding):
    """As Lightning's: an instance of the class that it wraps."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        wrapped = type(optimizer)
        self.__class__ = type(f"My{wrapped.__name__}", (type(self), wrapped), {})

    def __getattr__(self, name):
        return getattr(self.original_optimizer, name)


class Sharpness(torch.optim.Optimizer):
    """As SAM: groups of its own making that the inner one then has, too."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {"lr": 1.0, "weight_decay": 7.0})
        self.base_optimizer = optimizer


class Container(torch.optim.Optimizer):
    """As torchtitan's: all parameters in one group that nobody steps."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)
        groups = [group for each in optimizers for group in each.param_groups]
        params = [param for group in groups for param in group["params"]]
        super().__init__(params, {"lr": 1.0, "weight_decay": 7.0})


class Slotted:
    __slots__ = ("_inner",)

    def __init__(self, optimizer):
        self._inner = optimizer

    def step(self):
        self._inner.step()


class Trainer:
    def __init__(self, optimizer):
        self.strategy = SimpleNamespace(optimizers=[optimizer])
        self.strategy.trainer = self


WRAPPERS = {
    "forwarding": Forwarding,
    "imitating": Imitating,
    "sharpness": Sharpness,
    "slotted": Slotted,
    "trainer": Trainer,
    "view": WeightDecay,
    "nested": lambda optimizer: Slotted(Imitating(Forwarding(optimizer))),
    "list of one": lambda optimizer: [optimizer],
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("inner", [AdamW, selective(torch.optim.NAdam)])
def test_report_through_a_wrapper_is_that_of_the_optimizer(wrap, inner):
    model = Net()
    optimizer = inner(model, **POLICY)
    wrapper = wrap(optimizer)
    assert decay_report(wrapper, model) == optimizer.decay_report()
    assert decay_report(wrapper) == optimizer.decay_report()


def test_report_of_a_container_is_of_all_that_it_holds():
    model = Net()
    rest = [model.scale, model.empty]
    parts = [AdamW(m, **POLICY) for m in (model.body, model.head)]
    rows = decay_report(Container(*parts, SGD(rest, lr=0.1)), model).rows
    assert [(row.route, row.group) for row in rows] == [
        *[("AdamW", 0)] * 4,
        *[("AdamW", 1)] * 2,
        *[("SGD", 2)] * 2,
    ]
    assert {row.weight_decay for row in rows} == {0.0, 0.5}


def test_report_is_of_optimizers_in_attributes_and_lists_alike():
    model = Net()
    parts = [AdamW(m, **POLICY) for m in (model.body, model.head)]
    wrapper = Container(*parts)
    wrapper.first = wrapper.optimizers.pop(0)
    assert {row.group for row in decay_report(wrapper, model)} == {0, 1}


def test_twin_over_the_same_parameters_counts_once():
    model = Net()
    optimizer, twin = ours(model), ours(model)
    wrapper = Slotted([optimizer, twin, optimizer])
    assert decay_report(wrapper, model) == optimizer.decay_report()


def test_optimizer_that_leads_to_another_one_far_away_is_itself():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25)
    optimizer.callback = SimpleNamespace(other=ours(model))
    assert {row.weight_decay for row in decay_report(optimizer, model)} == {0.25}


def test_optimizer_inside_that_steps_other_tensors_is_not_the_one():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25)
    optimizer.of_copies = AdamW(copy.deepcopy(model), **POLICY)
    rows = decay_report(optimizer, model).rows
    assert {(row.weight_decay, row.form) for row in rows} == {(0.25, "l2")}


@pytest.mark.parametrize("wrap", [Forwarding, Sharpness, Trainer])
def test_optimizer_that_refers_to_its_wrapper_is_the_one(wrap):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.25)
    expected = decay_report(optimizer, model)
    optimizer.around = wrap(optimizer)
    assert decay_report(optimizer.around, model) == expected
    if wrap is not Sharpness:  # whose own groups are the same ones
        assert decay_report(optimizer, model) == expected


def test_report_says_where_it_read_groups_alone():
    inner = torch.optim.SGD(Net().parameters(), weight_decay=0.1)

    class Closed:
        step = staticmethod(inner.step)  # leads nowhere that is searched
        param_groups = property(lambda self: inner.param_groups)

    remark = decay_report(Closed()).remark
    assert remark.splitlines()[-1] == "note: read from the groups of Closed alone"
    assert "note" not in decay_report(inner).remark


# Several optimizers.


def test_report_of_several_is_one_report():
    model = Net()
    matrices = [model.body[0].weight, model.head.weight]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    first = torch.optim.SGD([{"params": [m]} for m in matrices], weight_decay=0.5)
    several = [first, AdamW(rest, model=model, **POLICY)]
    report = decay_report(several, model)
    assert [(line[0], line[1], line[2], line[4]) for line in report.table()] == [
        ("group", "route", "reason", "decay"),
        ("0", "SGD", "weight", "0.5"),
        ("1", "SGD", "weight", "0.5"),
        ("2", "AdamW", "decays in full", "0.5"),
        ("2", "AdamW", "exclude is_bias", "0"),
        ("2", "AdamW", "exclude is_norm", "0"),
    ]
    assert report.remark == ""
    assert decay_report({"a": several[0], "b": several[1]}, model) == report
    assert decay_report(first, model).remark == ""  # the other steps what it does not


def test_weights_that_one_of_several_does_not_decay_are_no_mistake():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    several = [
        torch.optim.SGD(model[0].parameters(), weight_decay=0.1),
        torch.optim.AdamW(model[1].parameters(), weight_decay=0.0),
    ]
    assert decay_report(several, model).remark == ""


# What was saved, and groups.


def test_report_of_a_state_dict_is_what_was_decided():
    model = Net()
    optimizer = ours(model, lr=0.01, wd_policy="no_bias_norm * towards(1, 'scale')")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    told = decay_report(optimizer.state_dict())
    same = [(r.group, r.shape, r.lr, r.weight_decay, r.form, r.target) for r in told]
    assert same == [
        (r.group, r.shape, r.lr, r.weight_decay, r.form, r.target)
        for r in optimizer.decay_report()
    ]
    assert {row.reason for row in told} == {"recorded"}


def test_report_of_a_state_dict_has_the_names_that_were_saved():
    model = Net()
    optimizer = AdamW(model.named_parameters(), model=model, **POLICY)
    report = decay_report(optimizer.state_dict(), model)
    assert report["body.1.weight"].weight_decay == 0
    assert report["body.1.weight"].shape == (4,)
    assert [row.name for row in report] == [
        name for name, _ in model.named_parameters()
    ]


def test_report_of_a_state_dict_of_torch_knows_what_has_names():
    model = Net()
    optimizer = torch.optim.AdamW(model.named_parameters(), weight_decay=0.5)
    saved = json.loads(json.dumps(optimizer.state_dict()))
    assert decay_report(saved, model)["body.1.weight"].role == "norm"
    row = decay_report(saved)["body.0.bias"]
    assert (row.reason, row.weight_decay, row.numel) == ("bias", 0.5, 0)


def test_report_of_groups_needs_no_optimizer():
    model = Net()
    groups = [
        {"params": list(model.body.parameters()), "weight_decay": 0.5},
        {"params": [model.head.bias], "weight_decay": 0.0},
    ]
    report = decay_report(groups, model)
    assert report["body.0.weight"].weight_decay == 0.5
    assert report["head.bias"].fate == "exempt"
    assert math.isnan(report["head.bias"].lr)


# What is in no group.


def test_own_report_tells_a_parameter_that_came_later():
    model = Net()
    optimizer = ours(model)
    assert optimizer.decay_report().remark == ""
    model.head = nn.Linear(4, 2)  # as resize_token_embeddings does
    assert optimizer.decay_report().remark == (
        "looks wrong: 2 parameters train and are in no group ('head.weight' and 1 more)"
    )
    optimizer.add_param_group({"params": model.head})
    assert optimizer.decay_report().remark == ""


def test_bias_is_known_by_its_name_where_no_module_is():
    model = Net()
    twin = pickle.loads(pickle.dumps(ours(model)))
    assert twin.decay_report()["head.bias"].role == "bias"


def pruned(model):
    prune.l1_unstructured(model.body[0], "weight", amount=0.5)
    # torch keeps the parameter under a new name; it is the same one.
    model.body[0].weight_orig = nn.Parameter(model.body[0].weight_orig.detach())


def emptied(model):
    model.to_empty(device="cpu")


STALE = {"pruned": (pruned, 1), "emptied": (emptied, 8)}


@pytest.mark.parametrize(("change", "count"), STALE.values(), ids=STALE)
def test_own_report_tells_of_stale_tensors(change, count):
    with torch.device("meta"):
        model = Net()
    optimizer = ours(model)
    change(model)
    assert f"{count} parameter" in optimizer.decay_report().remark
    assert "in no group" in optimizer.decay_report().remark


@pytest.mark.parametrize("cls", [AdamW, selective(torch.optim.NAdam)])
def test_what_another_optimizer_steps_is_not_missing(cls):
    model = Net()
    parts = [cls(p, model=model, **POLICY) for p in (model.body, model.head)]
    others = ("2 parameters train and are in no group ('scale' and 1 more)",) * 2
    told = tuple(p.decay_report().remark.partition(": ")[2] for p in parts)
    assert told == others


def test_flat_tensors_of_an_engine_are_not_missing():
    model = Net()
    flat = nn.Parameter(torch.ones(sum(p.numel() for p in model.parameters())))
    assert "no group" not in decay_report(torch.optim.SGD([flat]), model).remark


def test_second_model_that_nobody_steps_is_missing_where_it_was_given():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    assert "2 parameters train" in decay_report(optimizer, [one, other]).remark
    assert decay_report(optimizer, one).remark == ""


def test_frozen_parameter_with_a_gradient_left_decays_and_is_told():
    model = Net()
    model.head.weight.grad = torch.zeros(2, 4)
    model.head.weight.requires_grad_(False)
    optimizer = ours(model, lr=0.1)
    report = optimizer.decay_report()
    assert report["head.weight"].fate == "decayed"
    assert report.remark == (
        "looks wrong: 1 frozen parameter has a gradient left and decays ('head.weight')"
    )
    assert decay_report(optimizer, measure=True)["head.weight"].measured == 0.5
    before = model.head.weight.clone()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    optimizer.zero_grad()
    assert optimizer.decay_report()["head.weight"].fate == "frozen"


# Which splits look wrong where a policy decides.


def two_norms():
    return nn.Sequential(
        *(nn.Linear(2, 2), nn.LayerNorm(2, bias=False)),
        *(nn.Linear(2, 2), nn.LayerNorm(2, bias=False)),
    )


SPLITS = {
    "no_bias": "",
    "no_norm": "",
    "no_bias_norm": "",
    "all": "",
    "matrices": "",
    "exclude('0.*')": "",
    "scale(is_norm, by=0.1)": "",
    "exclude(is_norm, is_bias) * towards(1, is_norm)": "",
    "exclude('0.bias')": "1 bias decays, others do not ('2.bias')",
    "exclude('1.weight')": "1 norm decays, others do not ('3.weight')",
    "towards(1, '3.*') * exclude('1.weight')": "",
}


@pytest.mark.parametrize(("policy", "expected"), SPLITS.items(), ids=SPLITS)
def test_own_report_calls_a_split_wrong_and_never_a_wish(policy, expected):
    model = two_norms()
    remark = ours(model, wd_policy=policy).decay_report().remark
    assert remark.removeprefix("looks wrong: ") == expected


def test_group_that_does_not_decay_is_no_rule_for_others():
    model = two_norms()
    first, *rest = [model[1].weight, *model[0].parameters(), *model[2:].parameters()]
    exempt = {"params": [first], "weight_decay": 0.0}
    groups = [[exempt, {"params": rest, "wd_policy": "no_bias"}]]
    for wd_policy in (None, "no_bias"):
        told = AdamW(*groups, model=model, weight_decay=0.5, wd_policy=wd_policy)
        assert told.decay_report().remark == ""


def test_own_report_without_a_policy_is_judged_as_any():
    model = Net()
    told = AdamW(model.parameters()).decay_report()
    assert decay_report(AdamW(model.parameters())) == told
    torchs = torch.optim.AdamW(model.parameters())
    assert told.remark == decay_report(torchs, model).remark
    assert "2 norms decay" in told.remark


# Measured.

TORCH = torch.optim


class Forgetful(torch.optim.Optimizer):
    """Carries a decay and never applies it; what it needs beside is an attribute."""

    factor = 1.0

    def __init__(self, params, lr=0.1, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.sign = lambda: -1  # as the update of lion_pytorch

    def decay(self, group):
        return 0.0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - self.decay(group))
                    p.add_(p.grad, alpha=self.sign() * group["lr"])


class Unscaled(Forgetful):
    """Decays by the decay itself, not times the rate."""

    def decay(self, group):
        return group["weight_decay"]


class Constant(Forgetful):
    """Reads the default and not the group."""

    def decay(self, group):
        return group["lr"] * self.defaults["weight_decay"]


class Fresh(TORCH.AdamW):
    """Steps once and never again."""

    def step(self, closure=None):
        assert not self.state
        super().step(closure)


class Picky(Forgetful):
    @torch.no_grad()
    def step(self, closure):
        super().step()


MEASURED = {
    "forgetful": (Forgetful, {}, False, 0.0),
    "constant": (Constant, {}, False, 0.0),
    "unscaled": (Unscaled, {}, True, 10.0),
    "fresh": (Fresh, {}, True, 0.1),
    "torch.SGD": (TORCH.SGD, {}, True, 0.1),
    "torch.SGD momentum": (TORCH.SGD, {"momentum": 0.9}, True, 0.1),
    "torch.AdamW": (TORCH.AdamW, {}, True, 0.1),
    "torch.Adam": (TORCH.Adam, {}, True, None),
    "torch.RMSprop": (TORCH.RMSprop, {}, True, None),
    "torch.NAdam": (TORCH.NAdam, {"decoupled_weight_decay": True}, True, 0.1),
    "SGD": (SGD, {"wd_policy": "all"}, True, 0.1),
    "Adam": (Adam, {"wd_policy": "all"}, True, None),
    "AdamW": (AdamW, {"wd_policy": "all"}, True, 0.1),
    "scaled": (AdamW, {"wd_policy": {"weight": 0.5}}, True, 0.05),
    "exempt": (AdamW, {"wd_policy": {"weight": 0}}, False, 0.0),
    "independent": (AdamW, {"wd_policy": form("independent")}, True, 0.1),
    "corrected": (AdamW, {"wd_policy": form("corrected")}, True, 0.1),
    "cautious": (AdamW, {"wd_policy": form("cautious")}, True, 0.1),
    "towards": (AdamW, {"wd_policy": towards(1)}, None, None),
    "any class": (selective(TORCH.Adafactor), {"wd_policy": "all"}, True, 0.1),
}


@pytest.mark.parametrize("case", MEASURED.values(), ids=MEASURED)
def test_decay_is_measured(case):
    cls, settings, applied, measured = case
    model = nn.Linear(4, 3)
    optimizer = cls(model.parameters(), lr=0.03, weight_decay=0.1, **settings)
    torch.optim.lr_scheduler.LinearLR(optimizer)  # patches the step
    before = copy.deepcopy(model.state_dict())
    row = decay_report(optimizer, model, measure=True)["weight"]
    assert row.applied is applied
    assert row.measured == (measured and pytest.approx(measured, rel=1e-3))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.weight.grad is None
    assert not optimizer.state


def test_decay_that_is_not_as_promised_is_told():
    model = nn.Linear(4, 4)
    report = decay_report(Forgetful(model.parameters()), model, measure=True)
    assert str(report).splitlines() == [
        "group  reason   lr  decay  form     measured  tensors  elements",
        "    0  weight  0.1    0.1  default         0        1        16",
        "    0  bias    0.1    0.1  default         0        1         4",
        "decayed: 2 tensors, 20 elements; exempt: 0 tensors, 0 elements",
        "looks wrong: 2 parameters are decayed by no step ('weight' and 1 more)",
    ]
    remark = decay_report(Unscaled([model.weight]), measure=True).remark
    assert remark == "looks wrong: 1 parameter decays at another rate (without a name)"


def test_state_and_momentum_do_not_enter_the_measure():
    model = nn.Linear(4, 4)
    optimizer = Fresh(model.parameters(), weight_decay=0.1)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert decay_report(optimizer, measure=True).rows[0].measured == 0.1
    nesterov = {"momentum": 0.9, "nesterov": True}
    optimizer = torch.optim.SGD([model.weight], weight_decay=0.1, **nesterov)
    report = decay_report(optimizer, measure=True)
    # The first step adds g to 0.9 times the momentum that g began.
    assert (report.rows[0].measured, report.remark) == (0.19, "")


def test_l2_of_an_adaptive_class_is_some_decay_of_no_known_strength():
    report = decay_report(torch.optim.Adam([torch.ones(2, 2)]), measure=True)
    assert "measured" not in report.table()[0]
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2, 2))], weight_decay=0.1)
    table = decay_report(optimizer, measure=True).table()
    assert table[1][table[0].index("measured")] == "some"


def test_only_what_trains_and_has_elements_is_measured():
    model = Net()
    model.head.requires_grad_(False)
    report = decay_report(ours(model), measure=True)
    assert {row.name for row in report if row.applied is None} == {
        *("empty", "head.weight", "head.bias"),
    }


def test_class_that_cannot_be_stepped_like_this_is_not_measured():
    report = decay_report(Picky(nn.Linear(2, 2).parameters()), measure=True)
    assert {(row.applied, row.measured) for row in report} == {(None, None)}
    note = report.remark.splitlines()[-1]
    assert note.startswith("note: not measured, TypeError: ")
    assert "missing 1 required positional argument: 'closure'" in note


# Frameworks.


@pytest.mark.integration
def test_report_through_accelerate():
    accelerate = pytest.importorskip("accelerate")
    optimizer = ours(model := Net())
    wrapper = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert decay_report(wrapper, model) == optimizer.decay_report()


@pytest.mark.integration
def test_report_through_lightning():
    wrappers = pytest.importorskip("lightning.pytorch.core.optimizer")
    optimizer = ours(model := Net())
    wrapper = wrappers.LightningOptimizer(optimizer)
    assert decay_report(wrapper, model) == optimizer.decay_report()
    measured = decay_report(wrapper, measure=True)["head.weight"].measured
    assert measured == pytest.approx(0.5, rel=1e-3)


@pytest.mark.integration
def test_report_through_fastai():
    wrappers = pytest.importorskip("fastai.optimizer")
    optimizer = ours(model := Net())
    wrapper = wrappers.OptimWrapper(opt=optimizer)
    assert decay_report(wrapper, model) == optimizer.decay_report()


@pytest.mark.integration
def test_report_through_mmengine():
    wrappers = pytest.importorskip("mmengine.optim")
    optimizer = ours(model := Net())
    wrapper = wrappers.OptimWrapper(optimizer)
    assert decay_report(wrapper, model) == optimizer.decay_report()
    several = wrappers.OptimWrapperDict(all=wrapper)
    assert decay_report(several, model) == optimizer.decay_report()
