"""`selective(cls)` does what `cls` does with groups split by hand, and works as it."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import selective_optim
from selective_optim import WeightDecay, policies, selective
from tests.support.compare import assert_same
from tests.support.problems import make_params, set_grads

STEPS = 8
NAdam, RAdam, RMSprop = torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop
MULTIPLIERS = [1, 0, 0.5, 1, 2, 0, 1, 0.5]


class Counting(torch.optim.Optimizer):
    """SGD that keeps in its groups what published classes keep there."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "k": 0, "train_mode": False}
        super().__init__(params, defaults)

    def train(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self) -> None:
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["k"] += 1  # schedule-free
            group.setdefault("step", torch.zeros(()))
            group["step"] += 1  # timm's Lamb, in place
            used = [p for p in group["params"] if p.grad is not None]
            norm = sum((float(p.grad.norm()) for p in used), 0.0)
            group["gamma"] = group.get("gamma", 1.0) + norm  # AvaGrad
            group["span"] = (0.0, float(group["k"]))  # a new tuple, of equal numbers
            group["ones"] = (1.0,) * len(used)  # of another length in each part
            group["pair"] = (0.0, group["gamma"])
            rate = group["lr"] / (group["gamma"] + group["k"] + float(group["step"]))
            for p in used:
                p.add_(p.grad + group["weight_decay"] * p, alpha=-rate)
        return loss


class Listing(Counting):
    """Makes a list at construction, with one item per group, as AdaBound does."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, base in zip(self.param_groups, self.base_lrs):
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad + group["weight_decay"] * p, alpha=-base)


class Fading(Counting):
    """Lets its decay fade, and sets its own mode, while it steps."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.train()
        loss = super().step(closure)
        for group in self.param_groups:
            group["weight_decay"] *= 0.9
        return loss


class Strict(torch.optim.NAdam):
    """Takes matrices alone, and says so late, as torch's Muon does."""

    def add_param_group(self, group: Any) -> None:
        super().add_param_group(group)
        if any(p.ndim != 2 for p in self.param_groups[-1]["params"]):
            raise ValueError("matrices alone")


class Rating(Counting):
    """Sets a rate for each group by what is in it, as pytorch_optimizer's ASGD does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            group["lr"] /= 1 + sum((float(p.grad.norm()) for p in used), 0.0)


class Converting(Counting):
    """Makes a tensor of the rate of each group, as torchao's Adam does."""

    def add_param_group(self, group: Any) -> None:
        super().add_param_group(group)
        self.param_groups[-1]["lr"] = torch.tensor(self.param_groups[-1]["lr"])


class Alone(torch.optim.NAdam):
    """Passes its step on to its base class."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, as SAM does."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"weight_decay": weight_decay})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)


class Regrouping(torch.optim.Optimizer):
    """Makes groups by size, as some implementations of Muon do."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        listed = [p for group in params for p in group["params"]]
        super().__init__([{"params": listed}], {"weight_decay": weight_decay})


class OfModel(torch.optim.Optimizer):
    """Makes groups from a model, as some implementations of Muon do."""

    def __init__(self, model: nn.Module) -> None:
        raise NotImplementedError


class Lookahead(torch.optim.Optimizer):
    def __init__(self, optimizer: Any) -> None:
        raise NotImplementedError


def verdict(info: Any) -> float:
    return MULTIPLIERS[int(info.name[1:])]


def named(params: Any) -> list[tuple[str, Any]]:
    return [(f"p{i}", param) for i, param in enumerate(params)]


def ours(cls: Any, params: Any, **arguments: Any) -> Any:
    """Make one with two groups and a rate each."""
    pairs = named(params)
    groups = [{"params": pairs[:5]}, {"params": pairs[5:], "lr": 0.02}]
    arguments = {"lr": 0.05, "weight_decay": 0.1, "wd_policy": verdict, **arguments}
    return selective(cls)(groups, **arguments)


def by_hand(cls: Any, params: Any, **arguments: Any) -> Any:
    groups = []
    for start, stop, lr in ((0, 5, 0.05), (5, 8, 0.02)):
        split: dict[float, list[Any]] = {}
        for multiplier, param in zip(MULTIPLIERS[start:stop], params[start:stop]):
            split.setdefault(multiplier, []).append(param)
        groups += [
            {"params": held, "lr": lr, "weight_decay": 0.1 * multiplier}
            for multiplier, held in split.items()
        ]
    return cls(groups, **arguments)


def train(optimizer: Any, params: Any, steps: Any = range(STEPS)) -> Any:
    for step in steps:
        set_grads(params, step)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5 if step % 2 else 1.5
        optimizer.step()
    return optimizer


def assert_trains_as_by_hand(cls: Any, between: Any = None, **arguments: Any) -> Any:
    """Train for eight steps, with something in the middle, and compare bits."""
    actual, expected = make_params(), make_params()
    optimizer = train(ours(cls, actual, **arguments), actual, range(4))
    if between is not None:
        optimizer, actual = between(optimizer, actual)
    train(optimizer, actual, range(4, STEPS))
    train(by_hand(cls, expected, **arguments), expected)
    assert_same(actual, expected)
    return optimizer


def reload(optimizer: Any) -> dict[str, Any]:
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


CLASSES = [Counting, Listing, Fading, Alone, NAdam, RMSprop, torch.optim.Adadelta]
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


# Bits.


@each_class
def test_step_equals_groups_split_by_hand(cls):
    assert_trains_as_by_hand(cls)


@each_class
def test_resumed_run_continues_bit_for_bit(cls):
    def resume(optimizer, params):
        again = ours(cls, params)
        again.load_state_dict(reload(optimizer))
        return again, params

    assert_trains_as_by_hand(cls, resume)


def test_values_of_parts_are_loaded_before_their_target_is_taken():
    """Until training begins these parameters do not decay, each kind by itself."""

    class Measuring(Counting):
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                norms = [param.grad.norm().item() for param in group["params"]]
                group["gamma"] = group.get("gamma", 0.0) + sum(norms)
                for param in group["params"]:
                    param.data.sub_(param.grad, alpha=0.01 * group["gamma"])

    policy = policies.scale("p1", by=0.5) * policies.exclude("p2")
    policy *= policies.towards("init") * policies.form("decoupled")
    params, twins = make_params()[:4], make_params()[:4]
    make = partial(selective(Measuring), weight_decay=WD, wd_policy=policy)
    optimizer, oracle = train(make(named(params)), params), make(named(twins))
    train(oracle, twins)
    again = make(named(params))
    again.load_state_dict(reload(optimizer))
    train(again, params)
    train(oracle, twins)
    assert_same(params, twins)


@each_class
def test_deep_copy_continues_bit_for_bit(cls):
    if cls is Listing:
        pytest.skip("torch's copies lose attributes, base_lrs among them")

    def copied(optimizer, params):
        params, optimizer = copy.deepcopy((params, optimizer))
        return optimizer, params

    assert_trains_as_by_hand(cls, copied)


@each_class
def test_pickled_optimizer_continues_bit_for_bit(cls):
    if cls is Listing:
        pytest.skip("torch's copies lose attributes, base_lrs among them")

    def pickled(optimizer, params):
        optimizer.wd_policy = {"p0": 1, "*": 1}  # a function of tests is not found
        return optimizer, params

    actual = make_params()
    optimizer = ours(cls, actual, wd_policy={"p[15]": 0, "p[27]": 0.5, "p4": 2})
    train(optimizer, actual, range(4))
    actual, again = pickle.loads(pickle.dumps((actual, optimizer)))
    train(again, actual, range(4, STEPS))
    expected = make_params()
    train(by_hand(cls, expected), expected)
    assert_same(actual, expected)
    assert type(again) is type(optimizer)
    assert again.wd_policy == optimizer.wd_policy


def test_closure_sees_the_groups_of_the_user_and_its_edits_hold():
    actual, expected = make_params(), make_params()
    optimizer, oracle = ours(Counting, actual), by_hand(Counting, expected)
    counts = []

    def closing(each, params, step):
        def closure():
            set_grads(params, step)
            counts.append(len(each.param_groups))
            for group in each.param_groups:
                group["lr"] *= 0.9
            return 3.0

        return closure

    for step in range(STEPS):
        assert optimizer.step(closing(optimizer, actual, step)) == 3.0
        oracle.step(closure=closing(oracle, expected, step))
    assert set(counts[::2]) == {2}
    assert_same(actual, expected)


FORMS = [
    (NAdam, "decoupled_weight_decay", {}),
    (RAdam, "decoupled_weight_decay", {}),
]


@pytest.mark.parametrize(("cls", "flag", "arguments"), FORMS)
def test_form_that_a_group_may_choose_is_computed_by_the_class(cls, flag, arguments):
    actual, expected = make_params()[:3], make_params()[:3]
    optimizer = selective(cls)(
        named(actual),
        lr=0.05,
        weight_decay=0.1,
        wd_policy=policies.form("decoupled", "p1") * policies.scale("p2", by=0.5),
    )
    hand = [(0.1, False), (0.1, True), (0.05, False)]
    oracle = cls(
        [
            {"params": [p], "weight_decay": wd, flag: decoupled}
            for p, (wd, decoupled) in zip(expected, hand)
        ],
        lr=0.05,
    )
    train(optimizer, actual)
    train(oracle, expected)
    assert_same(actual, expected)
    forms = [row.form for row in optimizer.decay_report().rows]
    assert forms == ["l2", "decoupled", "l2"]
    assert optimizer.param_groups[0][flag] is False


def load_decay_of_zero(optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["weight_decay"] = 0.0
    optimizer.load_state_dict(saved)


def assign_without_decay(optimizer: Any) -> None:
    policy, optimizer.wd_policy = optimizer.wd_policy, "all"
    optimizer.param_groups[0]["weight_decay"] = 0.0
    set_grads([*optimizer.param_groups[0]["params"]], 0)
    optimizer.step()
    optimizer.wd_policy = policy


@pytest.mark.filterwarnings("ignore:.weight_decay. is 0 in every group")
@pytest.mark.parametrize("form", ["l2", "decoupled"])
@pytest.mark.parametrize("begin", [None, load_decay_of_zero, assign_without_decay])
@pytest.mark.parametrize(("cls", "flag", "arguments"), FORMS)
def test_form_is_that_of_the_policy_when_decay_begins_later(
    cls, flag, arguments, begin, form
):
    """While nothing decays, no form needs to be told to the class; then it does."""
    (actual,), (expected,) = make_params()[:1], make_params()[:1]
    policy = policies.form(form)
    first = 0.0 if begin is None else 0.1
    numbers = {"lr": 0.05, flag: form == "l2"}
    optimizer = selective(cls)(
        [actual], weight_decay=first, wd_policy=policy, **numbers
    )
    if begin is not None:
        begin(optimizer)
        expected.data.copy_(actual.data)
    numbers[flag] = form == "decoupled"
    oracle = cls([expected], weight_decay=0.0, **numbers)
    if begin is not None:
        oracle.state[expected] = copy.deepcopy(optimizer.state[actual])
    for wd in (0.0, 0.1, 0.0, 0.2):
        for each, param in ((optimizer, actual), (oracle, expected)):
            each.param_groups[0]["weight_decay"] = wd
            train(each, [param], range(2))
    assert_same([actual], [expected])


@pytest.mark.parametrize("kind", ["independent", "corrected"])
def test_forms_that_are_numbers_are_computed_for_the_class(kind):
    """Bit for bit the class with its decay set by hand, and again after a resume."""
    rates = [0.05, 0.04, 0.01, 0.03, 0.02]
    actual, expected = make_params()[:3], make_params()[:3]
    policy = policies.form(kind, "p1") * policies.form("decoupled", "p0")
    make = partial(selective(NAdam), lr=0.05, weight_decay=0.1, wd_policy=policy)
    optimizer = make(named(actual))
    oracle = NAdam(
        [
            {"params": [p], "decoupled_weight_decay": decoupled}
            for p, decoupled in zip(expected, (True, True, False))
        ],
        *(0.05, (0.9, 0.999), 1e-8, 0.1),
    )
    for step, rate in enumerate(rates):
        if step == 3:
            state_dict = optimizer.state_dict()
            optimizer = make(named(actual), lr=0.9)  # which the state dict corrects
            optimizer.load_state_dict(state_dict)
        for group in (*optimizer.param_groups, *oracle.param_groups):
            group["lr"] = rate
        by_hand = 0.1 / 0.05 if kind == "independent" else 0.1 * (rate / 0.05)
        oracle.param_groups[1]["weight_decay"] = by_hand
        for each, params in ((optimizer, actual), (oracle, expected)):
            set_grads(params, step)
            each.step()
        assert_same(actual, expected)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("kind", ["independent", "corrected"])
def test_forms_follow_a_rate_that_is_a_tensor(kind):
    """Schedulers write to it in place, so it is the same object at every step."""
    actual, expected = make_params(), make_params()
    rate = torch.tensor(0.05, dtype=torch.float64)
    policy = policies.form(kind)
    optimizer = selective(RAdam)(actual, rate, weight_decay=0.1, wd_policy=policy)
    oracle = RAdam(expected, 0.05, weight_decay=0.1, decoupled_weight_decay=True)
    for step in range(STEPS):
        rate.fill_(0.05 / (step + 1))
        oracle.param_groups[0]["lr"] = rate.clone()
        by_hand = 0.1 / 0.05 if kind == "independent" else 0.1 * (rate.item() / 0.05)
        oracle.param_groups[0]["weight_decay"] = by_hand
        for each, params in ((optimizer, actual), (oracle, expected)):
            set_grads(params, step)
            each.step()
    assert_same(actual, expected)


def test_load_that_fails_leaves_the_rate_that_training_began_with():
    params = make_params()[:2]
    policy = policies.form("corrected")
    make = partial(selective(NAdam), weight_decay=0.1, wd_policy=policy)
    state_dict = make(params, lr=0.05).state_dict()
    own = [{"positions": [i], "k": i} for i in range(2)]
    optimizer = make(params, lr=0.9)
    with pytest.raises(ValueError, match="'k' differs between the parts"):
        optimizer.load_state_dict({**state_dict, "parts": [own]})
    assert {row.lr0 for row in optimizer.decay_report().rows} == {0.9}


LR, WD = 0.05, 0.1
PULLS = {
    "l2": lambda p, g, t, lr: g.add_(WD * (p - t)),
    "decoupled": lambda p, g, t, lr: p.sub_(lr * WD * (p - t)),
    "independent": lambda p, g, t, lr: p.sub_(lr / LR * WD * (p - t)),
    "corrected": lambda p, g, t, lr: p.sub_(lr**2 / LR * WD * (p - t)),
}


def step_by_formula(oracle: Any, kind: str, targets: Sequence[Tensor]) -> None:
    """Step the class without decay, and decay by the formula of the contract."""
    params = [p for group in oracle.param_groups for p in group["params"]]
    lr = oracle.param_groups[0]["lr"]
    before = [param.detach().clone() for param in params]
    with torch.no_grad():
        if kind != "cautious":
            for param, target in zip(params, targets):
                PULLS[kind](param, param.grad, target, lr)
        oracle.step()
        if kind == "cautious":
            for param, old, target in zip(params, before, targets):
                agree = (old - param) * (old - target) >= 0
                param.sub_(torch.where(agree, lr * WD * (old - target), 0.0))


@pytest.mark.parametrize("cls", [NAdam, RMSprop, Counting])
@pytest.mark.parametrize("kind", [*PULLS, "cautious"])
@pytest.mark.parametrize("target", [0.0, 1.0, "init"])
def test_every_form_and_target_serves_every_class(cls, kind, target):
    """Also where the class has another form of its own, or does not say which."""
    actual = [nn.Parameter(p.detach().double()) for p in make_params()[:3]]
    expected = [nn.Parameter(p.detach().clone()) for p in actual]
    starts = [param.detach().clone() for param in actual]
    policy = policies.form(kind) * policies.towards(target)
    optimizer = selective(cls)(actual, lr=LR, weight_decay=WD, wd_policy=policy)
    oracle = cls(expected, lr=LR, weight_decay=0.0)
    targets = (
        starts if target == "init" else [torch.full_like(p, target) for p in starts]
    )
    for step in range(STEPS):
        for each, params in ((optimizer, actual), (oracle, expected)):
            each.param_groups[0]["lr"] = LR / (1 + step)
            set_grads(params, step)
        grads = [param.grad.clone() for param in actual]
        optimizer.step()
        assert_same([param.grad for param in actual], grads)
        step_by_formula(oracle, kind, targets)
        for a, b in zip(actual, expected):
            # Both round each operation once, in another order.
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_pass_runs_after_the_closure_and_once():
    """The class evaluates the closure, and its gradients are those that decay."""
    actual, expected = make_params()[:3], make_params()[:3]
    policy = policies.form("l2")
    optimizer = selective(Counting)(actual, lr=LR, weight_decay=WD, wd_policy=policy)
    oracle = Counting(expected, lr=LR, weight_decay=0.0)
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            set_grads(actual, step)
            return 1.0

        assert optimizer.step(closure) == 1.0
        set_grads(expected, step)
        step_by_formula(oracle, "l2", [torch.zeros_like(p) for p in expected])
    for a, b in zip(actual, expected):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)  # float32, another order


def test_gradient_that_the_class_replaces_is_the_users_again():
    """Else the decay in it would be added again at the next step."""

    class Centering(Counting):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = param.grad - param.grad.mean()
            return super().step(closure)

    params = make_params()[:2]
    policy = policies.form("l2")
    optimizer = selective(Centering)(params, lr=LR, weight_decay=WD, wd_policy=policy)
    set_grads(params, 0)
    grads = [param.grad for param in params]
    optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads))


def test_gradient_that_the_class_clears_between_closures_stays_cleared():
    class Twice(Counting):
        def step(self, closure: Any = None) -> None:
            closure()
            self.zero_grad()
            closure()

    params = make_params()[:2]
    policy = policies.form("l2")
    optimizer = selective(Twice)(params, lr=LR, weight_decay=WD, wd_policy=policy)
    optimizer.step(lambda: sum(param.sum() for param in params).backward())
    assert_same([param.grad for param in params], list(map(torch.ones_like, params)))


def test_value_that_is_no_closure_reaches_the_class():
    class Weighed(Counting):
        def step(self, loss: Any = None) -> Any:
            self.weighed = 2 * loss
            return super().step()

    params, twins = make_params(), make_params()
    optimizer, oracle = ours(Weighed, params), by_hand(Weighed, twins)
    for each, tensors in ((optimizer, params), (oracle, twins)):
        set_grads(tensors, 0)
        each.step(0.5)
    assert optimizer.weighed == 1.0
    assert_same(params, twins)


@pytest.mark.parametrize("kind", ["l2", "cautious"])
def test_pass_beside_a_class_that_raises_leaves_gradients_as_they_were(kind):
    class Broken(Counting):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("broken")

    params = make_params()[:2]
    policy = policies.form(kind)
    optimizer = selective(Broken)(params, lr=LR, weight_decay=WD, wd_policy=policy)
    set_grads(params, 0)
    before = [(p.grad, p.grad.clone(), p.detach().clone()) for p in params]
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    for param, (grad, values, was) in zip(params, before):
        assert param.grad is grad
        assert torch.equal(grad, values)
        assert torch.equal(param, was)
    assert len(optimizer.param_groups) == 1


# The class.


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_three_are_ours(name):
    assert selective(getattr(torch.optim, name)) is getattr(selective_optim, name)
    assert selective(getattr(selective_optim, name)) is getattr(selective_optim, name)


def test_class_is_a_subclass_made_once_that_bears_the_same_name():
    cls = selective(NAdam)
    assert selective(NAdam) is cls
    assert selective(cls) is cls
    assert issubclass(cls, NAdam)
    assert cls.__name__ == "NAdam"
    assert repr(cls) == "selective(<class 'torch.optim.nadam.NAdam'>)"


@each_class
def test_signature_is_the_class_s_with_ours_at_its_end(cls):
    actual = inspect.signature(selective(cls)).parameters
    expected = inspect.signature(cls).parameters
    assert list(actual) == [*expected, "wd_policy", "model"]


def test_class_made_anew_can_be_collected():
    gc.collect()  # what other tests have left

    class Passing(Counting):
        pass

    before = len(Counting.__subclasses__())
    selective(Passing)
    assert selective(Passing) is selective(Passing)
    assert len(Counting.__subclasses__()) == before


def test_class_is_pickled_as_the_call_that_makes_it():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(selective(NAdam), protocol)) is selective(
            NAdam
        )
    assert copy.deepcopy(selective(NAdam)) is selective(NAdam)


class Named(selective(NAdam)):
    """A subclass that a module has under a name."""


def test_named_subclass_of_one_is_pickled_by_its_name():
    assert pickle.loads(pickle.dumps(Named)) is Named
    optimizer = Named(make_params()[:2], wd_policy="matrices", weight_decay=0.1)
    again = pickle.loads(pickle.dumps(optimizer))
    assert type(again) is Named
    assert again.wd_policy == optimizer.wd_policy


OTHER_PROCESS = """
import pickle, sys, torch
params, optimizer = pickle.load(open(sys.argv[1], "rb"))
for param in params:
    param.grad = torch.ones_like(param)
optimizer.step()
pickle.dump([type(optimizer), *params], open(sys.argv[1], "wb"))
"""


def test_optimizer_steps_alike_in_another_process(tmp_path):
    params = make_params()[:2]
    optimizer = selective(NAdam)(params, weight_decay=0.1, wd_policy="matrices")
    train(optimizer, params, range(2))
    file = tmp_path / "optimizer"
    file.write_bytes(pickle.dumps((params, optimizer)))
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(file)], check=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    cls, *there = pickle.loads(file.read_bytes())
    assert cls is selective(NAdam)
    assert_same(there, params)


# The groups.


def test_groups_stay_the_users_with_the_keys_of_the_class():
    params = make_params()
    optimizer = train(ours(NAdam, params), params)
    oracle = NAdam(params, weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1]
    keys = {*oracle.param_groups[0], "param_names"}
    assert set(optimizer.param_groups[0]) == keys
    assert optimizer.defaults.keys() == oracle.defaults.keys()
    assert isinstance(optimizer, NAdam)


def test_group_dict_of_the_caller_is_the_live_one():
    param = nn.Parameter(torch.ones(2))
    group = {"params": [param], "lr": 0.5}
    optimizer = selective(Counting)([group], weight_decay=0.1)
    assert optimizer.param_groups[0] is group
    assert group["weight_decay"] == 0.1


def test_what_is_the_same_in_all_parts_shows_in_the_group():
    params = make_params()
    optimizer = train(ours(Counting, params), params)
    for group in optimizer.param_groups:
        assert group["k"] == STEPS
        assert group["step"] == STEPS
        assert group["span"] == (0.0, STEPS)
        # Each part has its own.
        assert group.keys().isdisjoint({"gamma", "ones", "pair"})


def test_tensor_rate_is_followed_by_all_parts():
    params, expected = make_params(), make_params()
    rate = torch.tensor(0.05)
    optimizer = selective(RMSprop)(
        named(params), rate, weight_decay=0.1, wd_policy=verdict
    )
    oracle = by_hand(RMSprop, expected)
    for step in range(STEPS):
        set_grads(params, step)
        set_grads(expected, step)
        optimizer.param_groups[0]["lr"].fill_(0.05 / (step + 1))
        for group in oracle.param_groups:
            group["lr"] = torch.tensor(0.05 / (step + 1))
        optimizer.step()
        oracle.step()
    assert_same(params, expected)


def test_rate_that_the_class_turned_into_tensors_is_written_once_for_all_parts():
    actual, expected = make_params(), make_params()
    optimizer, oracle = ours(Converting, actual), by_hand(Converting, expected)
    for step in range(STEPS):
        for params, each in ((actual, optimizer), (expected, oracle)):
            set_grads(params, step)
            for group in each.param_groups:
                group["lr"].mul_(0.9)  # as schedulers do
            each.step()
    assert_same(actual, expected)


def test_counter_that_a_user_sets_back_is_counted_once_per_step():
    params = make_params()
    optimizer = train(ours(Counting, params), params)
    optimizer.param_groups[0]["step"] = torch.zeros(())
    train(optimizer, params, range(3))
    assert [float(part["step"]) for part in optimizer._parts[:2]] == [3.0] * 2


def test_counter_of_a_checkpoint_of_the_class_is_counted_once_per_step():
    params = make_params()
    groups = [{"params": params[:5]}, {"params": params[5:]}]
    plain = Counting(groups, lr=0.01, weight_decay=0.1)
    train(plain, params, range(3))
    optimizer = ours(Counting, params)
    optimizer.load_state_dict(reload(plain))
    train(optimizer, params, range(3, 5))
    assert {float(part["step"]) for part in optimizer._parts} == {5.0}


def test_modes_of_the_class_are_kept():
    params = make_params()
    optimizer = ours(Counting, params)
    optimizer.train()
    assert all(group["train_mode"] for group in optimizer.param_groups)
    train(optimizer, params)
    assert all(part["train_mode"] for part in optimizer._groups)
    optimizer.eval()
    assert not any(group["train_mode"] for group in optimizer.param_groups)
    assert not hasattr(ours(NAdam, make_params()), "train")


class Plain(Counting):
    def decays(self) -> list[float]:
        return []


class Telling(Plain):
    def decays(self) -> list[float]:
        return [group["weight_decay"] for group in self.param_groups]


class Passing(Telling):
    def decays(self) -> list[float]:
        return super().decays()


@pytest.mark.parametrize("cls", [Telling, Passing])
def test_method_sees_the_parts_if_any_version_of_it_reads_the_decay(cls):
    optimizer = selective(cls)(nn.Linear(2, 1), weight_decay=0.1, wd_policy="no_bias")
    assert optimizer.decays() == [0.1, 0.0]


def test_constructor_that_failed_may_be_called_again():
    cls = selective(Strict)
    optimizer = cls.__new__(cls)
    with pytest.raises(ValueError, match="matrices alone"):
        optimizer.__init__(nn.Linear(2, 1), weight_decay=0.1, wd_policy="no_bias")
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "wd_policy": "none"}
    optimizer.__init__([group], weight_decay=0.1, wd_policy="all")
    assert [row.weight_decay for row in optimizer.decay_report()] == [0.0]


def test_group_that_is_added_later_is_split():
    actual, expected = make_params(), make_params()
    pairs = named(actual)
    optimizer = selective(Counting)(
        pairs[:5], lr=0.05, weight_decay=0.1, wd_policy=verdict
    )
    optimizer.add_param_group({"params": pairs[5:], "lr": 0.02})
    train(optimizer, actual)
    train(by_hand(Counting, expected), expected)
    assert_same(actual, expected)


@pytest.mark.parametrize("cls", [Counting, NAdam])
def test_group_is_added_right_after_loading_a_copy(cls):
    """The parts of groups that were just loaded hold no parameters yet."""
    params = make_params()
    optimizer = train(ours(cls, params), params, range(2))
    optimizer.load_state_dict(reload(optimizer))
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [("p0", nn.Parameter(torch.ones(2, 2)))]})
    assert len(copied.param_groups) == len(optimizer.param_groups) + 1


def test_group_that_cannot_be_added_changes_nothing():
    params = make_params()
    optimizer = ours(Counting, params)
    train(optimizer, params, range(1))
    extra = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("p1", extra), ("p2", params[0])]})
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [extra]})
    assert len(optimizer.param_groups) == 2
    train(optimizer, params, range(1, 3))


def test_group_that_the_class_refuses_in_part_changes_nothing():
    actual, expected = make_params(), make_params()
    square, late = [[p for p in params if p.ndim == 2] for params in (actual, expected)]
    optimizer = selective(Strict)(square, weight_decay=0.1, wd_policy="matrices")
    train(optimizer, actual, range(1))
    others = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="matrices alone"):
        optimizer.add_param_group({"params": others})
    assert len(optimizer.param_groups) == 1
    train(optimizer, [*actual, *others], range(1, 3))
    assert_same(others, [torch.ones(2, 2), torch.ones(2)])
    oracle = Strict(late, weight_decay=0.1)
    train(oracle, expected, range(1))
    train(oracle, expected, range(1, 3))
    assert_same(actual, expected)


def test_copies_in_place_of_groups_keep_the_rates_that_the_class_set_for_each_part():
    actual, expected = make_params(), make_params()
    for each, params in (
        (ours(Rating, actual), actual),
        (by_hand(Rating, expected), expected),
    ):
        for step in range(STEPS):
            set_grads(params, step)
            each.param_groups[:] = map(dict, each.param_groups)
            each.step()
    assert_same(actual, expected)


def test_groups_that_are_cleared_may_come_again():
    params = make_params()[:4]
    optimizer = selective(Counting)(params, weight_decay=0.1, wd_policy="matrices")
    train(optimizer, params, range(2))
    [group] = copy.copy(optimizer.param_groups)
    optimizer.param_groups.clear()
    optimizer.add_param_group(group)
    train(optimizer, params, range(2, 4))
    assert [row.weight_decay for row in optimizer.decay_report().rows] == [
        *(0.1, 0.0, 0.0, 0.1)
    ]


def test_policy_that_is_assigned_splits_anew():
    params, expected = make_params()[:4], make_params()[:4]
    optimizer = selective(NAdam)(params, weight_decay=0.1, wd_policy="matrices")
    oracle = NAdam([{"params": [p]} for p in expected], weight_decay=0.1)
    for step, exempt in ((0, (1, 2)), (1, (1, 2)), (2, ()), (3, ()), (4, (1, 2))):
        optimizer.wd_policy = "matrices" if exempt else "all"
        for i, group in enumerate(oracle.param_groups):
            group["weight_decay"] = 0.0 if i in exempt else 0.1
        train(optimizer, params, [step])
        train(oracle, expected, [step])
    assert_same(params, expected)


# What drives an optimizer.


def test_schedulers_of_rate_and_decay_drive_the_parts():
    actual, expected = make_params(), make_params()
    optimizer, oracle = ours(NAdam, actual), by_hand(NAdam, expected)
    schedulers = [
        [ExponentialLR(each, 0.9), CosineAnnealingLR(WeightDecay(each), 8, eta_min=0)]
        for each in (optimizer, oracle)
    ]
    for step in range(STEPS):
        for params, each, own in zip(
            (actual, expected), (optimizer, oracle), schedulers
        ):
            set_grads(params, step)
            each.step()
            for scheduler in own:
                scheduler.step()
    # Multiples of a scheduled number round otherwise than the schedule of a multiple.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["lr"] == oracle.param_groups[0]["lr"]


@pytest.mark.parametrize("cls", [NAdam, Alone])
def test_hooks_run_once_each_and_see_the_groups_of_the_user(cls):
    NAdam(make_params()[:1])  # torch has wrapped its step from here on
    params = make_params()
    optimizer = ours(cls, params)
    seen = []
    note = lambda *_: seen.append(len(optimizer.param_groups))  # noqa: E731
    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(note)
    optimizer.register_state_dict_pre_hook(note)
    optimizer.register_state_dict_post_hook(note)
    optimizer.register_load_state_dict_pre_hook(note)
    optimizer.register_load_state_dict_post_hook(note)
    train(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [2] * 6


def test_global_hooks_run_once():
    NAdam(make_params()[:1])
    params = make_params()
    optimizer = ours(NAdam, params)
    seen = []
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    train(optimizer, params, range(1))
    hook.remove()
    assert seen == [1]


def test_hooks_of_saving_and_loading_may_replace_the_state_dict():
    params = make_params()
    optimizer = ours(Counting, params)
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "note": 1})
    saved = train(optimizer, params, range(2)).state_dict()
    assert saved["note"] == 1

    def faster(_, state_dict):
        groups = [{**g, "lr": 9.0} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(faster)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 9.0


def test_scaler_unscales_and_skips():
    actual, expected = make_params()[:2], make_params()[:2]
    optimizer = selective(RMSprop)(actual, weight_decay=0.1, wd_policy="all")
    oracle = RMSprop(expected, weight_decay=0.1)
    for each, params in ((optimizer, actual), (oracle, expected)):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            loss = sum((p * (step + 1)).square().sum() for p in params)
            scaler.scale(loss).backward()
            if step == 2:
                params[0].grad[0, 0] = torch.inf
            scaler.step(each)
            scaler.update()
            each.zero_grad()
    assert_same(actual, expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_step_is_as_close_as_that_of_the_class():
    actual, expected = make_params()[:3], make_params()[:3]
    optimizer = selective(NAdam)(actual, weight_decay=0.1, wd_policy="matrices")
    oracle = NAdam(
        [{"params": [p], "weight_decay": wd} for p, wd in zip(expected, (0.1, 0, 0))]
    )
    for each, params in ((optimizer, actual), (oracle, expected)):
        torch._dynamo.reset()
        step = torch.compile(each.step, backend="eager")
        for number in range(3):
            set_grads(params, number)
            step()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_report_tells_what_decays():
    optimizer = ours(Counting, make_params())
    rows = optimizer.decay_report().rows
    assert [row.weight_decay for row in rows] == [0.1 * m for m in MULTIPLIERS]
    assert {row.form for row in rows} == {None}
    assert "default" in str(optimizer.decay_report())
    assert "wd_policy" in repr(optimizer)


# State dicts.


def test_state_dict_goes_to_the_class_and_back():
    params, others = make_params()[:3], make_params()[:3]
    optimizer = selective(NAdam)(params, weight_decay=0.1, wd_policy="all")
    train(optimizer, params, range(3))
    plain = NAdam(others, weight_decay=0.1)
    plain.load_state_dict(reload(optimizer))
    with torch.no_grad():
        for p, q in zip(others, params):
            p.copy_(q)
    train(plain, others, range(3, 5))
    train(optimizer, params, range(3, 5))
    assert_same(params, others)
    optimizer.load_state_dict(reload(plain))
    train(plain, others, range(5, STEPS))
    train(optimizer, params, range(5, STEPS))
    assert_same(params, others)


def test_keys_that_a_checkpoint_lacks_are_gone_as_in_torch():
    for make in (selective(NAdam), NAdam):
        optimizer = make(make_params()[:3], weight_decay=0.1)
        saved = optimizer.state_dict()
        optimizer.param_groups[0]["mine"] = 1
        optimizer.load_state_dict(saved)
        assert "mine" not in optimizer.param_groups[0]


def test_loading_another_policy_warns_and_keeps_the_constructors():
    params = make_params()[:3]
    first = selective(NAdam)(named(params), weight_decay=0.1, wd_policy="matrices")
    saved = train(first, params, range(2)).state_dict()
    second = selective(NAdam)(named(params), weight_decay=0.1, wd_policy="all")
    with pytest.warns(UserWarning, match="'p1' was exempt and now decays in full"):
        second.load_state_dict(saved)
    assert [row.weight_decay for row in second.decay_report().rows] == [0.1] * 3


# Refusals.


def two_params(cls: Any) -> None:
    params = make_params()[:2]
    selective(cls)(params, weight_decay=0.1, wd_policy="matrices")


def assigned_after_training(cls: Any) -> None:
    params = make_params()
    train(ours(cls, params), params, range(2)).wd_policy = "all"


def scheduled(cls: Any) -> None:
    params = make_params()
    train(ours(cls, params), params, range(3))


def stated_target(cls: Any, target: Any = 1.0) -> None:
    params = make_params()[:2]
    selective(cls)(params, weight_decay=0.1, wd_policy=policies.towards(target))


def given_list(cls: Any) -> None:
    ours(cls, make_params()).step(None, [1, 2])


def loaded_by_hand(cls: Any) -> None:
    params = make_params()
    ours(cls, params).load_state_dict(by_hand(cls, params).state_dict())


CALL = r"\w+ing\(selective_optim\.param_groups\(model, \.{3}\)\)\.$"
BY_HAND = f"Split the groups by hand: {CALL}"
REFUSALS = [
    (selective, 3, TypeError, "must be a subclass of torch.optim.Optimizer, not 3"),
    (selective, nn.Linear, TypeError, r"Write selective\(torch.optim.NAdam\)"),
    (selective, Lookahead, TypeError, r"Lookahead\(selective\(...\)\(...\)\)"),
    (
        *(selective, OfModel, TypeError),
        r"OfModel takes 'model' itself .*\. Use a class that takes parameters\.$",
    ),
    (two_params, Wrapping, ValueError, rf"keeps another .* in 'base'.*{BY_HAND}"),
    (two_params, Regrouping, ValueError, rf"makes groups of its own.*{BY_HAND}"),
    (
        lambda cls: selective(cls)([nn.Parameter(torch.ones(2))]),
        torch.optim.Rprop,
        ValueError,
        "no 'weight_decay' in its groups",
    ),
    (assigned_after_training, Counting, ValueError, "'gamma' differs by now"),
    (assigned_after_training, Listing, ValueError, "made 'base_lrs' at construction"),
    (scheduled, Rating, ValueError, r"selective_optim.param_groups\(model"),
    (
        *(stated_target, Counting, ValueError),
        r"states the target 1, and Counting does not .* \* form\('decoupled'\)\.$",
    ),
    (
        *(partial(stated_target, target="init"), Counting, ValueError),
        r"states the target 'init', and Counting does not say",
    ),
    (given_list, Counting, ValueError, "a list of 2 items"),
    (loaded_by_hand, Counting, ValueError, "checkpoint.merge_groups"),
]


@pytest.mark.parametrize(("act", "cls", "kind", "message"), REFUSALS)
def test_what_cannot_be_served_is_refused_with_the_way_out(act, cls, kind, message):
    with pytest.raises(kind, match=message):
        act(cls)


def test_refused_policy_changes_nothing():
    actual, expected = make_params(), make_params()
    optimizer = train(ours(Counting, actual), actual, range(4))
    with pytest.raises(ValueError, match="gamma"):
        optimizer.wd_policy = "all"
    train(optimizer, actual, range(4, STEPS))
    train(by_hand(Counting, expected), expected)
    assert_same(actual, expected)


def test_refused_form_changes_nothing():
    params = make_params()[:2]
    optimizer = selective(Counting)(params, weight_decay=0.1, wd_policy="matrices")
    with pytest.raises(ValueError, match="target"):
        optimizer.wd_policy = policies.towards(1.0, policies.is_vector)
    assert optimizer.wd_policy == policies.as_policy("matrices")
    assert [row.weight_decay for row in optimizer.decay_report().rows] == [0.1, 0.0]


def test_overrides_by_index_are_refused_before_the_first_step():
    class Managed(Counting):
        def __init__(self, params: Any, **arguments: Any) -> None:
            super().__init__(params, **arguments)
            self.initialized = False
            self.mng = type("Manager", (), {"index2config": {(0, 1): {}}})()

    params = make_params()
    optimizer = selective(Managed)(named(params), wd_policy=verdict, weight_decay=0.1)
    set_grads(params, 0)
    with pytest.raises(ValueError, match="register_module_override"):
        optimizer.step()
    assert_same(params, make_params())


class Warming(torch.optim.Optimizer):
    """Keeps a key in its groups until it is warm, and lists the keys that it saw."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "cold": 2})
        self.seen: list[set[str]] = []

    def step(self, closure: Any = None) -> None:
        self.seen = [set(group) for group in self.param_groups]
        for group in self.param_groups:
            group["cold"] = group.get("cold", 0) - 1
            if group["cold"] <= 0:
                del group["cold"]


def test_key_that_the_class_takes_out_of_its_groups_is_gone_from_the_users():
    model = nn.Linear(2, 2)
    optimizer = selective(Warming)(model, weight_decay=0.1, wd_policy="no_bias")
    optimizer.step()
    assert optimizer.param_groups[0]["cold"] == 1
    optimizer.step()
    assert "cold" not in optimizer.param_groups[0]


def test_key_that_the_user_takes_out_is_gone_from_what_the_class_sees():
    model = nn.Linear(2, 2)
    optimizer = selective(Warming)(model, weight_decay=0.1, wd_policy="no_bias")
    optimizer.param_groups[0]["mine"] = 1
    optimizer.step()
    assert ["mine" in keys for keys in optimizer.seen] == [True, True]
    del optimizer.param_groups[0]["mine"]
    optimizer.step()
    assert ["mine" in keys for keys in optimizer.seen] == [False, False]


@pytest.mark.parametrize("stated", ["independent", "corrected"])
def test_state_that_a_class_makes_when_constructed_is_none_that_was_loaded(stated):
    """Nothing is missing from it, and its rate is that of the constructor."""
    policy = policies.form(stated) * policies.towards("init")
    optimizer = selective(torch.optim.Adagrad)(
        make_params()[:3], lr=LR, weight_decay=WD, wd_policy=policy
    )
    optimizer.param_groups[0].update(initial_lr=2 * LR)
    optimizer.step()
    assert {row.lr0 for row in optimizer.decay_report()} == {LR}


def test_new_dict_whose_first_part_is_all_new_takes_its_numbers():
    """A part of new parameters alone comes before those that had other numbers."""
    layer, other = model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = {"lr": 0.1, "weight_decay": 0.1, "wd_policy": "no_bias", "model": model}
    optimizer = selective(NAdam)(layer.parameters(), **own)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    params = [other.weight, layer.bias]
    optimizer.param_groups[:] = [
        {**optimizer.param_groups[0], "params": params, "lr": 0.0, "betas": (0.5, 0.6)}
    ]
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same(params, before)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, NAdam, RMSprop])
def test_constructor_that_is_called_again_begins_anew(cls):
    def trained(again):
        params = make_params()
        known = {"weight_decay": 0.1, "wd_policy": "matrices"}
        optimizer = selective(cls)(params, lr=0.1, **known)
        if again:
            set_grads(params, 0)
            optimizer.step()
            optimizer.__init__(params := make_params(), lr=0.05, **known)
        else:
            optimizer = selective(cls)(params, lr=0.05, **known)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return params

    assert_same(trained(True), trained(False))
