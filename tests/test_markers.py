"""What authors marked on their models is exempt, also behind wrappers."""

import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm

from selective_optim import AdamW
from selective_optim._torch import canonical_name
from selective_optim.parameters import ModuleIndex
from selective_optim.policies import exclude, exempt_, is_bias, marked, named

# torch says this itself, of itself, when torch.compile is first imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(3, 2))
        self.proj = nn.Linear(2, 2)
        self.A_log = nn.Parameter(torch.ones(2, 2))
        self.A_log._no_weight_decay = True
        self.kernel = nn.Parameter(torch.ones(2, 2))
        self.kernel._optim = {"weight_decay": 0, "lr": 0.001}
        self.slow = nn.Parameter(torch.ones(2, 2))
        self.slow._optim = {"lr": 0.001}
        self.out = nn.Linear(2, 2)

    def no_weight_decay(self):
        return ["table"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.rel_bias_table = nn.Parameter(torch.ones(3, 2))
        self.table = nn.Parameter(torch.ones(3, 2))
        self.head = weight_norm(nn.Linear(2, 2))

    def forward(self, x):
        return self.head(self.inner.proj(x))

    def no_weight_decay(self):
        return {"head.parametrizations.weight.original*", "inner.proj.w*"}

    def no_weight_decay_keywords(self):
        return {"bias_table"}

    def no_weight_decay_patterns(self):
        return ["*.out.w?ight"]


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Outer()


def exempt(model, policy=None):
    infos = ModuleIndex(model).everyone()
    policy = (policy or marked()).bind(infos)
    return {info.name for info in infos if not policy(info).multiplier}


MARKED = {
    "inner.A_log",
    "inner.table",
    "inner.proj.weight",
    "inner.kernel",
    "inner.out.weight",
    "rel_bias_table",
    "head.weight",
}


def test_marked_exempts_what_each_marker_names():
    assert exempt(Outer()) == MARKED


def test_marked_asks_modules_at_any_depth():
    assert exempt(Root()) == {f"net.{name}" for name in MARKED}


def test_marked_counts_names_past_a_wrapper_in_the_middle():
    model = Root()
    model.net.inner = checkpoint_wrapper(model.net.inner)

    assert exempt(model) == exempt(Root())


class Sharded(nn.Module):
    """Holds a module, and passes attributes on, as FSDP does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def no_weight_decay(self):
        return self._fsdp_wrapped_module.no_weight_decay()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "compile": torch.compile,
    "both": lambda module: torch.compile(DistributedDataParallel(module)),
    "fsdp": Sharded,
    "checkpoint": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_marked_finds_the_lists_behind_a_wrapper(wrap, process_group):
    assert exempt(wrap(Outer())) == exempt(Outer())


def test_timm_finds_the_list_behind_a_wrapper_that_holds_more():
    """A training module may hold its loss before the model, under ``module``."""
    whole = nn.Module()
    whole.loss, whole.module = nn.Linear(2, 2), Outer()
    expected = exempt(Outer(), named("timm")) | {"loss.bias"}
    assert exempt(whole, named("timm")) == expected


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_timm_finds_the_list_behind_a_wrapper(wrap, process_group):
    assert exempt(wrap(Outer()), named("timm")) == exempt(Outer(), named("timm"))


def test_marked_holds_under_fully_shard(process_group):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    model = Outer()
    exempt_(model.head)
    fsdp.fully_shard(model.inner, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)

    assert exempt(model) >= {"head.weight", "head.bias", "inner.table"}


PRODUCTS = {
    "timm": (named("timm"), {"inner.proj.bias", "head.weight", "head.bias"}),
    "no_bias": (exclude(is_bias), {"inner.proj.bias", "head.bias"}),
}


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("turned", [False, True])
def test_marked_adds_to_another_policy(case, turned):
    policy, more = PRODUCTS[case]
    product = marked() * policy if turned else policy * marked()

    found = exempt(Outer(), product)

    assert found == exempt(Outer()) | exempt(Outer(), policy)
    assert more <= found


def test_marked_decides_in_an_optimizer():
    model = Outer()
    policy = exclude(is_bias) * marked()

    rows = AdamW(model.parameters(), wd_policy=policy).decay_report().rows

    names = {canonical_name(row.name) for row in rows if not row.weight_decay}
    assert names == exempt(model, policy)
    assert {row.reason for row in rows if row.name == "inner.table"} == {
        "Inner.no_weight_decay() lists 'table'"
    }


def test_marked_asks_each_module_once():
    asked = []

    class Counting(nn.Linear):
        def no_weight_decay(self):
            asked.append(self)
            return ()

    model = nn.Sequential(Counting(2, 2), Counting(2, 2))

    AdamW(model.parameters(), wd_policy=named("timm") * marked())

    assert len(asked) == 2


def test_marked_tied_parameter_is_exempt_at_any_place():
    model = Outer()
    model.table = model.inner.table

    assert "table" in exempt(model)


def test_exempt_marks_a_module_and_all_inside():
    model = Root()

    assert exempt_(model.net.inner) is model.net.inner
    assert exempt(model) >= {"net.inner.proj.bias", "net.inner.proj.weight"}
    assert all(param._no_weight_decay for param in model.net.inner.parameters())
    assert "net.table" not in exempt(model)


def test_exempt_marks_one_parameter():
    model = nn.Linear(2, 2)

    exempt_(model.weight)

    assert exempt(model) == {"weight"}


def test_exempt_mark_outlives_a_replaced_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    exempt_(model[0])
    model[0].weight = nn.Parameter(torch.ones(2, 2))

    assert exempt(model) == {"0.weight", "0.bias"}


def test_exempt_refuses_other_things():
    with pytest.raises(TypeError, match=r"not 'head' \(str\)\. Write .*exempt_\("):
        exempt_("head")


def test_marked_prints_compares_and_pickles():
    policy = exclude(is_bias) * marked()

    assert repr(policy) == "exclude(is_bias) * marked()"
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy.bind([]) == policy


def test_marked_needs_modules():
    named_tensors = [("weight", nn.Parameter(torch.ones(2)))]

    with pytest.raises(ValueError, match="needs module types"):
        AdamW(named_tensors, wd_policy=marked())


def test_marked_asks_for_patterns_at_any_depth():
    inner = Outer()
    del inner.inner.out
    inner.out = nn.Linear(2, 2)

    assert "net.out.weight" not in exempt(nn.ModuleDict({"net": inner}))
    inner.no_weight_decay_patterns = lambda: ["out.*"]
    assert "net.out.weight" in exempt(nn.ModuleDict({"net": inner}))


def with_own_decay(value):
    model = nn.Linear(2, 2)
    model.weight._optim = {"weight_decay": value}
    return model


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (0.05, 0.05), (0.2, 0.2)])
def test_marked_decays_by_the_settings_of_a_parameter(value, expected):
    model = with_own_decay(value)
    policy = marked(weight_decay=0.1)
    optimizer = AdamW(model.parameters(), weight_decay=0.1, wd_policy=policy)

    weight, bias = optimizer.decay_report().rows

    assert weight.weight_decay == pytest.approx(expected)
    assert weight.reason == f"_optim has weight_decay {value}"
    assert (bias.weight_decay, bias.reason) == (0.1, "not marked")


def test_marked_refuses_settings_that_it_cannot_scale():
    words = r"failed for 'weight' .*: its _optim has weight_decay 0.05, .*not known\. W"
    with pytest.raises(ValueError, match=words):
        AdamW(with_own_decay(0.05).parameters(), wd_policy=marked())


def test_marked_takes_settings_of_another_kind_for_none():
    model = nn.Linear(2, 2)
    model.weight._optim = "adam"

    assert exempt(model) == set()


@pytest.mark.parametrize("value", [0, -0.1, float("inf"), float("nan")])
def test_marked_refuses_a_decay_that_cannot_be_scaled(value):
    with pytest.raises(ValueError, match=r"must be finite and > 0, not .*marked\("):
        marked(weight_decay=value)


def test_marked_refuses_a_decay_that_is_no_number():
    with pytest.raises(TypeError, match=r"must be a number, not '0.1' \(str\)\. Write"):
        marked(weight_decay="0.1")


def test_marked_with_a_decay_prints_compares_and_pickles():
    policy = marked(weight_decay=0.1)

    assert repr(policy) == "marked(weight_decay=0.1)"
    assert pickle.loads(pickle.dumps(policy)) == policy != marked()
