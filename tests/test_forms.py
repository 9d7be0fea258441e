"""Forms of decay and targets, against formulas in float64 and against torch."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import selective_optim
from selective_optim import AdamW
from selective_optim.decay import FORMS as FORM_KINDS
from selective_optim.decay import Decay, FormKind
from selective_optim.policies import diff, exclude, form, towards
from selective_optim.step.kernels import AdamKernel
from tests.support.compare import assert_same
from tests.support.devices import CPU, CUDA
from tests.support.graphs import captured, side_stream, static_grads
from tests.support.reference import AdamReference, SGDReference

FORMS = ("l2", "decoupled", "independent", "corrected", "cautious")
NUMBERS = ("independent", "corrected")
SHAPES = [(4, 3), (3,), (), (0,), (5, 2)]
KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False, "fused": False},
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "SGD-momentum": ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "SGD-nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}),
    "SGD-maximize": ("SGD", {"momentum": 0.9, "maximize": True}),
    "Adam": ("Adam", {}),
    "Adam-maximize": ("Adam", {"maximize": True}),
    "AdamW": ("AdamW", {}),
    "AdamW-amsgrad": ("AdamW", {"amsgrad": True}),
}
LR, WD = 0.1, 0.3
# A step that is traced raises torch's betas to the power of a float32 counter.
TRACED = {"rtol": 1e-4, "atol": 1e-5}
TRACED_FORMS = [  # compiling takes half a second
    ("l2", "init"),
    ("decoupled", 0.5),
    ("independent", None),
    ("corrected", None),
    ("corrected", 0.5),
    ("cautious", None),
    ("cautious", "init"),
]
all_forms = pytest.mark.parametrize(
    ("how", "target"), [*product(FORMS, [None, 0.5, "init"])]
)
RATES = [0.1, 0.07, 0.09, 0.02, 0.0, 0.03]


def test_new_form_needs_a_row_alone(monkeypatch):
    """One that follows the rate and has no first one is stepped, told and measured."""
    root = FormKind("decoupled", lambda wd, lr, lr0: wd * lr**-0.5, follows_lr=True)
    monkeypatch.setitem(FORM_KINDS, "root", root)
    actual, expected = make_params(), make_params()
    optimizer = AdamW(actual, lr=LR, weight_decay=WD, wd_policy=form("root"))
    oracle = torch.optim.AdamW(expected, lr=LR)
    for step, lr in enumerate([0.25, 0.16, 0.01]):
        optimizer.param_groups[0]["lr"] = oracle.param_groups[0]["lr"] = lr
        oracle.param_groups[0]["weight_decay"] = WD * lr**-0.5
        for params, stepping in ((actual, optimizer), (expected, oracle)):
            set_grads(params, step)
            stepping.step()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    rows = selective_optim.decay_report(optimizer, measure=True).rows
    assert [row.measured for row in rows if row.numel] == pytest.approx([WD] * 4)
    with pytest.raises(ValueError, match="in form 'root', which follows the rate"):
        selective_optim.proportional_to_lr(optimizer)


def policy_of(kind: str, target: Any) -> Any:
    return form(kind) if target is None else form(kind) * towards(target)


def make_params(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(each.to(device, dtype)) for each in drawn]


def set_grads(params: list[Any], step: int) -> None:
    """Give gradients, but for one parameter that misses a step, and one all."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        drawn = torch.randn(param.shape, generator=generator)
        absent = (i, step) == (1, 3) or (i == 4 and step == 0)
        param.grad = None if absent else drawn.to(param.device, param.dtype)


def train(optimizer: Any, params: list[Any], rates: Any = RATES, first: int = 0) -> Any:
    for step, rate in enumerate(rates, first):
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        set_grads(params, step)
        optimizer.step()
    return optimizer


def make(name: str, params: Any, policy: Any, **arguments: Any) -> Any:
    cls = getattr(selective_optim, name)
    return cls(
        params, **{"lr": LR, "weight_decay": WD, "wd_policy": policy, **arguments}
    )


def trained_copies(
    name: str, leaves: list[Any], policy: Any, differentiable: bool, rates: list[float]
) -> list[Any]:
    """Train for autograd to follow, on copies of the leaves, or plainly."""
    params = [leaf.clone() for leaf in leaves] if differentiable else leaves
    own = {"differentiable": differentiable, "foreach": False}
    train(make(name, params, policy, **own), params, rates, first=10)
    return params


# The formulas.


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [None, 0.5, "init"])
@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("option", OPTIONS)
def test_forms_follow_their_formulas(option, how, target, kind, device):
    name, arguments = OPTIONS[option]
    params = make_params(device=device)
    own = {k: v for k, v in arguments.items() if k != "amsgrad" or v}
    reference = SGDReference if name == "SGD" else AdamReference
    references = []
    for param in params:
        start = param.detach().cpu().clone()
        towards_what = {None: 0.0, "init": start}.get(target, target)
        references.append(
            reference(start, LR, WD, how, towards_what, LR, **own)  # type: ignore[arg-type]
        )
    optimizer = make(name, params, policy_of(how, target), **arguments, **KINDS[kind])
    for step, rate in enumerate(RATES):
        set_grads(params, step)
        for param, ref in zip(params, references):
            ref.lr = rate
            if param.grad is not None:
                ref.step(param.grad.cpu())
        train(optimizer, params, [rate], step)  # torch may write to gradients
    # The order of the same operations may differ by a few roundings of 1.1e-16 each.
    expected = [ref.p for ref in references]
    actual = [param.cpu() for param in params]
    assert_same(actual, expected, rtol=1e-12, atol=1e-12, strides=False)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("kind", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("how", NUMBERS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_numbers_are_bits_of_torch_with_the_decay_set_by_hand(name, how, kind, device):
    mine, theirs = (
        make_params(torch.float64, device),
        make_params(torch.float64, device),
    )
    optimizer = make(name, mine, form(how), **KINDS[kind])
    arguments = {"lr": LR, "weight_decay": WD, **KINDS[kind]}
    twin = (
        getattr(torch.optim, name)(theirs, decoupled_weight_decay=True, **arguments)
        if name == "Adam"
        else torch.optim.AdamW(theirs, **arguments)
    )
    for step, rate in enumerate(RATES):
        by_hand = WD / LR if how == "independent" else WD * (rate / LR)
        twin.param_groups[0]["weight_decay"] = by_hand
        train(optimizer, mine, [rate], step)
        train(twin, theirs, [rate], step)
        assert_same(mine, theirs)
    assert_same([*optimizer.state.values()], [*twin.state.values()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", NUMBERS)
def test_numbers_for_sgd_are_bits_of_its_decoupled_decay(how, kind):
    mine, theirs = make_params(torch.float32), make_params(torch.float32)
    own = {"momentum": 0.9, **KINDS[kind]}
    optimizer = make("SGD", mine, form(how), **own)
    twin = make("SGD", theirs, None, decoupled_weight_decay=True, **own)
    for step, rate in enumerate(RATES):
        by_hand = WD / LR if how == "independent" else WD * (rate / LR)
        twin.param_groups[0]["weight_decay"] = by_hand
        train(optimizer, mine, [rate], step)
        train(twin, theirs, [rate], step)
    assert_same(mine, theirs)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7])
def test_corrected_decay_is_the_groups_at_the_rate_it_began_with(rate):
    """To the bit: ``wd * lr / lr0`` need not be ``wd`` where the rates are equal."""
    decays = [i / 97 for i in range(1, 60)]
    assert [FORM_KINDS["corrected"].strength(wd, rate, rate) for wd in decays] == decays
    assert any(wd * rate / rate != wd for wd in decays)


def test_cautious_is_the_formula_of_dion():
    """``mask = update * X >= 0; X -= mask * lr * wd * X`` before the update."""
    params = make_params()[:1]
    optimizer = make("AdamW", params, form("cautious"), fused=True)
    x, m, v = params[0].detach().clone(), 0.0, 0.0
    for step in range(50):
        set_grads(params, 10 + step)
        g = params[0].grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        t = step + 1
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        x = x - (update * x >= 0).double() * LR * WD * x
        x = x - LR * update
    torch.testing.assert_close(params[0].detach(), x, rtol=1e-12, atol=1e-12)


def test_cautious_decays_where_nothing_pulls():
    """Where the update is 0 it does not disagree: rows without gradient decay."""
    param = nn.Parameter(torch.ones(2))
    optimizer = AdamW([param], lr=LR, weight_decay=WD, wd_policy=form("cautious"))
    param.grad = torch.zeros(2)
    optimizer.step()
    assert_same(param, torch.full((2,), 1 - LR * WD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cautious_signs_survive_products_that_round_to_zero(dtype):
    tiny = torch.finfo(dtype).tiny
    param = nn.Parameter(torch.full((2,), tiny, dtype=dtype))
    optimizer = make("SGD", [param], form("cautious"), lr=1.0, weight_decay=0.5)
    param.grad = torch.tensor([tiny / 4, -tiny / 4], dtype=dtype)
    optimizer.step()
    expected = torch.tensor([tiny / 2 - tiny / 4, tiny + tiny / 4], dtype=dtype)
    assert_same(param, expected)


# Everything mixed, and other ways through a step.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_forms_mix_freely_in_one_group(name, kind):
    policies = [form("cautious"), towards("init"), exclude("2"), form("corrected")]
    policies.append(form("l2") * towards(1))

    def chosen(info: Any) -> Any:
        return policies[int(info.name)](info)

    together = make_params()
    named = [(str(i), param) for i, param in enumerate(together)]
    train(make(name, named, chosen, **KINDS[kind]), together)
    for i, policy in enumerate(policies):
        alone = make_params()
        groups = [{"params": [(str(j), p)]} for j, p in enumerate(alone)]
        groups[i]["wd_policy"] = policy
        train(make(name, groups, "all", **KINDS[kind]), alone)
        assert_same(together[i], alone[i])


@pytest.mark.parametrize("kind", ["automatic", "fused", "for-loop"])
@pytest.mark.parametrize(("how", "target"), [*product(FORMS, [None, 0.5])])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_tensor_rates_do_what_numbers_do(name, how, target, kind):
    outcomes = []
    for rate in (LR, torch.tensor(LR, dtype=torch.float64)):
        params = make_params()
        policy = policy_of(how, target)
        optimizer = make(name, params, policy, lr=rate, **KINDS[kind])
        outcomes.append((params, train(optimizer, params)))
    (mine, _), (theirs, _) = outcomes
    # Tensors of no dimension multiply in another order than numbers.
    assert_same(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["automatic", "fused", "for-loop"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("target", [None, 0.5])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_cautious_reads_tensor_betas_as_numbers(name, target, maximize, kind):
    policy, outcomes = policy_of("cautious", target), []
    for as_given in (float, torch.tensor):
        params = make_params()
        betas = as_given(0.75), as_given(0.9375)  # which float32 holds to the bit
        own = {"lr": torch.tensor(LR), "betas": betas, "maximize": maximize}
        train(make(name, params, policy, **own, **KINDS[kind]), params)
        outcomes.append(params)
    assert_same(*outcomes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("maximize", [False, True])
def test_cautious_reads_moments_in_half_precision_as_the_formula_says(maximize):
    """As fused kernels on CUDA keep them beside float32: see ``takes_beside``."""
    setting = SimpleNamespace(arguments={"beta1": 0.75, "maximize": maximize})
    grad = torch.tensor([4.0, -4.0, 1.0])
    first = torch.tensor([1.0, 1.0, -8.0])
    # 0.75 of the moment and 0.25 of the gradient.
    expected = [[1.75, -0.25, -5.75], [-0.25, 1.75, -6.25]][maximize]
    for moment in (first, first.bfloat16()):
        actual = AdamKernel.direction(setting, grad, [moment])
        assert_same(actual, torch.tensor(expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, of itself
@pytest.mark.parametrize(("how", "target"), TRACED_FORMS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_compiled_steps_do_the_same(name, how, target):
    outcomes = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = make_params()
        rate = torch.tensor(LR, dtype=torch.float64)
        own = {"lr": rate, "foreach": False}
        optimizer = make(name, params, policy_of(how, target), **own)
        step = (
            torch.compile(optimizer.step, backend="eager")
            if compiled
            else optimizer.step
        )
        for number in range(3):
            set_grads(params, number + 10)
            rate.fill_(RATES[number])
            step()
        outcomes.append(params)
    assert_same(*outcomes, **TRACED)


@pytest.mark.parametrize(("how", "target"), TRACED_FORMS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_differentiable_steps_do_the_same(name, how, target):
    outcomes = []
    for differentiable in (False, True):
        leaves = make_params()
        policy = policy_of(how, target)
        params = trained_copies(name, leaves, policy, differentiable, RATES[:3])
        outcomes.append([param.detach() for param in params])
        if differentiable:
            sum(param.sum() for param in params).backward()
            assert all(leaf.grad is not None for leaf in leaves)
    assert_same(*outcomes, **TRACED)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("kind", ["automatic", "fused", "foreach", "for-loop"])
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_dropped_step_changes_no_bit(name, how, target, kind, device):
    params = make_params(torch.float32, device)
    with torch.no_grad():
        params[0][0] = -0.0
    own = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = make(name, params, policy_of(how, target), **own, **KINDS[kind])
    train(optimizer, params, RATES[:2])
    before = copy.deepcopy([params, optimizer.state_dict()["state"]])
    set_grads(params, 2)
    optimizer.grad_scale = torch.tensor(8.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert_same([params, optimizer.state_dict()["state"]], before)
    assert_same(torch.signbit(params[0]), torch.signbit(before[0][0]))


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("kind", ["automatic", "fused", "foreach", "for-loop"])
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_scale_is_taken_from_the_gradients_first(name, how, target, kind, device):
    outcomes = []
    for scale in (1.0, 1024.0):
        params = make_params(torch.float32, device)
        own = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = make(name, params, policy_of(how, target), **own, **KINDS[kind])
        for number in range(4):
            set_grads(params, number)
            for param in params:
                param.grad = None if param.grad is None else param.grad * scale
            optimizer.grad_scale = torch.tensor(scale, device=device)
            optimizer.found_inf = torch.tensor(0.0, device=device)
            optimizer.step()
        outcomes.append(params)
    assert_same(*outcomes)  # a power of two scales without rounding


@pytest.mark.parametrize("device", [CPU, CUDA])
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_replayed_graph_equals_eager_steps(name, how, target, device):
    outcomes = []
    for graphed in (True, False):
        params = make_params(torch.float32, device)
        rate = torch.tensor(LR, device=device)
        own = {"capturable": True} if name == "AdamW" else {"momentum": 0.9}
        policy = policy_of(how, target)
        optimizer = make(name, params, policy, lr=rate, fused=True, **own)
        with side_stream(device):
            for number in range(3):
                static_grads(params, number)
                optimizer.step()
        step = captured(device, optimizer.step) if graphed else optimizer.step
        for number, value in enumerate(RATES[1:4], 3):
            static_grads(params, number)
            rate.fill_(value)
            step()
        outcomes.append(params)
    assert_same(*outcomes)


@pytest.mark.parametrize("kind", ["automatic", "foreach", "for-loop"])
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_half_precision_is_rounded_once(name, how, target, kind):
    """What a pass computes in bfloat16 is the value in float64, rounded."""
    start = torch.tensor([1.0, -2.0, 0.7, 3.0]).bfloat16()
    grad = torch.tensor([0.1, 0.2, -0.3, 0.0]).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        param = nn.Parameter(start.clone().to(dtype))
        policy = (
            policy_of(how, target) if how != "decoupled" else towards(target or 0.5)
        )
        optimizer = make(name, [param], policy, weight_decay=3.0, **KINDS[kind])
        param.grad = grad.to(dtype)
        optimizer.step()
        results.append(param.detach().double())
    # Decay, then the update: each is rounded to 8 bits once, and SGD's L2 gradient.
    torch.testing.assert_close(*results, rtol=3 * 2**-8, atol=2**-8)


@pytest.mark.parametrize("kind", ["automatic", "foreach", "for-loop"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_as_float32_does_rounded(dtype, kind):
    """With no gradient to speak of: what is left is the pass alone, to the bit."""
    start = torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype)
    param = nn.Parameter(start.clone())
    policy = form("decoupled") * towards(0.3)
    optimizer = make("SGD", [param], policy, lr=1.0, weight_decay=0.1, **KINDS[kind])
    param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = torch.sub(start.float(), start.float() - 0.3, alpha=0.1)
    assert_same(param, expected.to(dtype))


def test_complex_parameters_are_two_real_ones():
    whole = nn.Parameter(torch.randn(6, dtype=torch.complex128))
    parts = nn.Parameter(torch.view_as_real(whole.detach()).clone())
    for how, target in product(FORMS, [None, "init"]):
        results = []
        for param in (whole, parts):
            param = nn.Parameter(param.detach().clone())
            optimizer = make("AdamW", [param], policy_of(how, target))
            for number in range(3):
                generator = torch.Generator().manual_seed(number)
                grad = torch.randn(6, 2, dtype=torch.float64, generator=generator)
                param.grad = torch.view_as_complex(grad) if param.is_complex() else grad
                optimizer.step()
            result = param.detach()
            results.append(
                torch.view_as_real(result) if result.is_complex() else result
            )
        assert_same(*results, rtol=1e-14, atol=1e-14)


@all_forms
def test_chunks_change_nothing(how, target, monkeypatch):
    outcomes = []
    for chunk in (1, 10, 2**18):
        monkeypatch.setattr("selective_optim.step.decay_passes.CHUNK", chunk)
        params = make_params()
        train(make("SGD", params, policy_of(how, target), momentum=0.9), params)
        outcomes.append(params)
    assert_same(outcomes[0], outcomes[2])
    assert_same(outcomes[1], outcomes[2])


def arranged() -> list[Any]:
    """Make parameters that lie in memory otherwise than they are read."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 3), (2, 3, 4, 5), (6, 4))
    ]
    images = drawn[1].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(each) for each in (drawn[0].t(), images, drawn[2])]


@pytest.mark.parametrize("kind", KINDS)
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_layout_of_memory_changes_nothing(name, how, target, kind):
    plain = [nn.Parameter(param.detach().contiguous()) for param in arranged()]
    outcomes = []
    for params in (arranged(), plain):
        optimizer = make(name, params, policy_of(how, target), **KINDS[kind])
        for step in range(3):
            set_grads(params, 10 + step)
            for param in params:
                param.grad = torch.empty_like(param).copy_(param.grad)
            optimizer.step()
        outcomes.append([param.detach().contiguous() for param in params])
    assert_same(*outcomes)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with dup")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [0.5, "init"])
@pytest.mark.parametrize("how", ["decoupled", "cautious"])
def test_what_is_listed_twice_decays_twice(how, target, kind):
    param = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = make("SGD", [param, param], policy_of(how, target), **KINDS[kind])
    param.grad = torch.zeros_like(param)
    if target == "init":
        optimizer.step()  # from which training begins
    with torch.no_grad():
        param.fill_(2.0)
    optimizer.step()
    goal = 1.0 if target == "init" else target
    expected = torch.full_like(param, goal + (2 - goal) * (1 - LR * WD) ** 2)
    assert_same(param.detach(), expected, rtol=1e-15, atol=1e-15)


@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_views_that_negate_decay_as_what_they_show(name, how, target):
    outcomes = []
    for negated in (False, True):
        params = make_params()
        if negated:
            values = [torch._neg_view(-param.detach()) for param in params]
            params = list(map(nn.Parameter, values))
        train(make(name, params, policy_of(how, target)), params)
        outcomes.append([param.detach() + 0 for param in params])
    assert_same(*outcomes, rtol=1e-14, atol=1e-14)


def test_decay_that_vanishes_in_a_pass_is_told_of():
    """A fused kernel would let most of it arrive, and a pass rounds all away."""
    param = nn.Parameter(torch.full((2,), 0.02, dtype=torch.bfloat16))
    optimizer = make("AdamW", [param], form("cautious"), lr=1e-3, weight_decay=0.1)
    param.grad = torch.zeros_like(param)
    with pytest.warns(UserWarning, match=r"hardly decays: torch.bfloat16.*float32"):
        optimizer.step()


@pytest.mark.parametrize(("how", "target"), TRACED_FORMS)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_dtypes_may_be_mixed_in_a_step_that_is_traced(name, how, target):
    outcomes = []
    for differentiable in (False, True):
        single, double = make_params(torch.float32), make_params(torch.float64)
        leaves = [each for pair in zip(single, double) for each in pair]
        policy = policy_of(how, target)
        params = trained_copies(name, leaves, policy, differentiable, RATES[:2])
        outcomes.append([param.detach() for param in params])
    assert_same(*outcomes, **TRACED)


# What training began with.


def test_lr0_is_the_rate_of_the_group_when_it_was_added():
    params = make_params()
    groups = [{"params": params[:2], "initial_lr": 0.4}, {"params": params[2:]}]
    optimizer = make("AdamW", groups, form("independent"))
    optimizer.param_groups[1]["lr"] = 0.05
    rows = optimizer.decay_report().rows
    assert [row.lr0 for row in rows] == [0.4, 0.4, LR, LR, LR]
    assert [row.timescale for row in rows[1:3]] == [0.4 / (LR * WD), LR / (0.05 * WD)]


def test_lr0_and_init_stay_when_the_rate_or_the_policy_changes():
    params = make_params()
    optimizer = make("AdamW", params, None)
    train(optimizer, params, RATES[1:3])
    optimizer.wd_policy = form("corrected")
    assert {row.lr0 for row in optimizer.decay_report().rows} == {LR}


def resumed(optimizer: Any, params: list[Any], how: str) -> tuple[Any, list[Any]]:
    if how == "deepcopy":
        copied = copy.deepcopy([params, optimizer])
        return copied[1], copied[0]
    if how == "pickle":
        file = io.BytesIO()
        torch.save([params, optimizer], file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        return loaded[1], loaded[0]
    file = io.BytesIO()
    torch.save([[p.data for p in params], optimizer.state_dict()], file)
    file.seek(0)
    values, state_dict = torch.load(file, weights_only=True)
    params = [nn.Parameter(value) for value in values]
    fresh = make(type(optimizer).__name__, params, optimizer.wd_policy, lr=0.77)
    fresh.load_state_dict(state_dict)
    return fresh, params


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
@all_forms
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_training_goes_on_bit_for_bit(name, how, target, way):
    params = make_params(torch.float32)
    optimizer = make(name, params, policy_of(how, target))
    train(optimizer, params, RATES[:2])
    other, copies = resumed(optimizer, params, way)
    train(optimizer, params, RATES[2:], first=2)
    train(other, copies, RATES[2:], first=2)
    assert_same(copies, params)


def test_a_state_dict_without_init_says_so():
    params = make_params()
    optimizer = make("AdamW", params, towards("init"))
    state_dict = train(optimizer, params).state_dict()
    del state_dict["decay"]
    with pytest.warns(UserWarning, match="does not record what parameter 0 of group 0"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("kind", ["independent", "corrected"])
@pytest.mark.parametrize("own", [{"lr": 0.5}, {"initial_lr": 0.5, "max_lr": 1.0}])
def test_a_state_dict_without_the_first_rate_says_so_where_that_may_matter(kind, own):
    """As that of ``torch.distributed.checkpoint``, which has no record of ours."""
    params = make_params()
    state_dict = train(make("AdamW", params, form(kind)), params).state_dict()
    del state_dict["decay"]
    other = make("AdamW", make_params(), form(kind))
    for group in state_dict["param_groups"]:
        group["lr"] = other.param_groups[0]["lr"]
    other.load_state_dict(state_dict)  # the same rate: nothing is lost
    state_dict["param_groups"][0].update(own)
    with pytest.warns(UserWarning, match="does not record the rate .* parameter 0 of"):
        other.load_state_dict(state_dict)
    plain = make("AdamW", make_params(), "all")
    plain.load_state_dict(state_dict)  # which no rate divides


@pytest.mark.parametrize("kind", ["independent", "corrected"])
def test_the_first_rate_that_a_scheduler_saved_stands_for_the_record(kind):
    params = make_params()
    optimizer = make("AdamW", params, form(kind))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    state_dict = train(optimizer, params).state_dict()
    del state_dict["decay"]
    resumed = AdamW(params, lr=7.0, weight_decay=WD, wd_policy=form(kind))
    resumed.load_state_dict(state_dict)
    assert {row.lr0 for row in resumed.decay_report()} == {LR}


def test_a_target_of_zero_is_none():
    """It overrules another target, and is no other decision than none."""
    params = make_params()
    assert (towards(1) * towards(0)) != towards(1)
    state_dict = make("AdamW", params, towards(1) * towards(0)).state_dict()
    assert state_dict["decay"] == make("AdamW", params, "all").state_dict()["decay"]
    make("AdamW", params, "all").load_state_dict(state_dict)  # warns of nothing
    assert not diff(nn.Linear(2, 2), towards(0), "all")


@pytest.mark.parametrize("policy", [form("corrected"), "all"])
@pytest.mark.parametrize(
    "third",
    [
        *(None, "x", [1], 5, {"target": [1]}),
        *({"lr0": value} for value in ("x", 0.0, -1.0, float("nan"), None)),
    ],
    ids=repr,
)
def test_a_record_of_another_version_is_passed_over(third, policy):
    params = make_params()
    optimizer = make("AdamW", params, policy)
    state_dict = optimizer.state_dict()
    form_now = state_dict["decay"][0][0][1]
    state_dict["decay"] = [[[1.0, form_now, third]] * len(params)]
    optimizer.load_state_dict(state_dict)
    assert {row.lr0 for row in optimizer.decay_report().rows} <= {LR, None}


def test_lr0_is_resumed_for_a_policy_that_is_assigned_later():
    params = make_params()
    state_dict = make("AdamW", params, form("corrected")).state_dict()
    optimizer = make("AdamW", params, "all", lr=0.77)
    with pytest.warns(UserWarning, match="another weight decay policy"):
        optimizer.load_state_dict(state_dict)
    optimizer.wd_policy = form("independent")
    assert {row.lr0 for row in optimizer.decay_report().rows} == {LR}


@pytest.mark.parametrize("rate", [0.02, 0.0])
def test_what_is_new_in_a_group_begins_as_the_others(rate):
    params = make_params()
    optimizer = make("AdamW", params[:3], form("independent"))
    group = optimizer.param_groups[0]
    group["lr"] = rate
    group["params"].append(params[3])
    assert {row.lr0 for row in optimizer.decay_report().rows} == {LR}


@pytest.mark.parametrize("way", ["replaced", "cleared"])
def test_init_of_tensors_that_were_replaced_is_let_go(way):
    params = make_params()
    optimizer = make("AdamW", params, towards("init"))
    train(optimizer, params, RATES[:2])
    decided = optimizer._decider.layout[0]
    inits = [weakref.ref(row.decision.init) for row in decided]
    del decided
    params = [nn.Parameter(param.detach().float()) for param in params]
    if way == "replaced":
        optimizer.param_groups[0]["params"] = params
    else:
        optimizer.param_groups.clear()
        optimizer.state.clear()
        optimizer.add_param_group({"params": params})
    train(optimizer, params, RATES[:2])
    gc.collect()
    assert not any(init() is not None for init in inits)


def test_another_target_is_a_change_on_resume():
    params = make_params()
    state_dict = train(make("AdamW", params, towards(1)), params).state_dict()
    with pytest.warns(UserWarning, match=r"\(decoupled\) towards 1 and now decays in"):
        make("AdamW", params, towards(2)).load_state_dict(state_dict)


def test_init_follows_a_model_that_is_moved():
    model = nn.Linear(3, 2)
    optimizer = AdamW(model, lr=LR, weight_decay=WD, wd_policy=towards("init"))
    model.double()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    inits = [entry[2]["init"] for entry in optimizer.state_dict()["decay"][0]]
    assert {init.dtype for init in inits} == {torch.float64}
    assert_same(inits, list(model.parameters()))


def test_numbers_cost_no_memory_and_init_one_tensor_each():
    params = make_params()
    entries = make("AdamW", params, form("corrected")).state_dict()["decay"][0]
    assert entries == [[1.0, "corrected", {"lr0": LR}]] * 5
    optimizer = make("AdamW", params, towards("init"))
    entries = optimizer.state_dict()["decay"][0]
    assert entries == [[1.0, "decoupled", {"target": "init"}]] * 5
    starts = [param.detach().clone() for param in params]
    entries = train(optimizer, params).state_dict()["decay"][0]
    assert_same([entry[2]["init"] for entry in entries], starts)
    assert make("AdamW", params, "all").state_dict()["decay"][0][0] == [
        1.0,
        "decoupled",
    ]


# What cannot be.


def test_a_rate_of_zero_to_begin_with_is_refused():
    with pytest.raises(ValueError, match=r"divides by the rate .* initial_lr=3e-4"):
        make("AdamW", make_params(), form("independent"), lr=0.0)


def test_a_base_rate_of_another_sign_is_refused():
    groups = [{"params": make_params(), "initial_lr": -0.1}]
    with pytest.raises(ValueError, match=r"begins with, and that is -0\.1"):
        make("AdamW", groups, form("corrected"))


def test_a_form_for_a_policy_is_answered_with_the_policy():
    with pytest.raises(ValueError, match=r'Write wd_policy=form\("cautious"\)'):
        make("AdamW", make_params(), "cautious")


def test_no_target_is_refused():
    """It would print as what cannot be read."""
    with pytest.raises(TypeError, match=r'finite number or "init", not None\. Write'):
        towards(None)  # type: ignore[arg-type]
    assert Decay(1, target=None) == Decay(1)


def test_init_may_come_after_the_optimizer():
    """A model that has no values yet gets them before training begins."""
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    optimizer = AdamW(model, lr=LR, weight_decay=WD, wd_policy=towards("init"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(3.0)
            param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(param.eq(3.0).all() for param in model.parameters())


def test_a_parameter_of_another_shape_is_told():
    model = nn.Linear(2, 2, bias=False)
    optimizer = AdamW(model, wd_policy=towards("init"))
    model.weight.grad = torch.zeros(2, 2)
    optimizer.step()
    model.weight.grad = None
    model.weight.data = torch.zeros(3, 2)
    model.weight.grad = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="what it was in shape 2 x 2, and has shape 3"):
        optimizer.step()
