"""What works with the torch class works with ours after one import line changed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import selective_optim
from selective_optim import policies
from tests.support.compare import assert_same
from tests.support.problems import (
    HYPER,
    KINDS,
    assert_same_training,
    each_kind,
    explicit,
    frozen,
    set_grads,
)

NAMES = ["SGD", "Adam", "AdamW"]
each_name = pytest.mark.parametrize("name", NAMES)
LOOP = KINDS["for-loop"]
MOMENTUM = {"SGD": {"momentum": 0.9}, "Adam": {}, "AdamW": {}}


def ours(name: str, params: Any, **arguments: Any) -> Any:
    return getattr(selective_optim, name)(params, **arguments)


def torchs(name: str, params: Any, **arguments: Any) -> Any:
    return getattr(torch.optim, name)(params, **arguments)


def tensors(*shapes: tuple[int, ...], dtype: Any = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in shapes
    ]


def train(optimizer: Any, params: Any, steps: int = 3) -> None:
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()


def train_alike(
    name: str, shapes: Any, ours_kind: Any, torchs_kind: Any, dtype: Any = torch.float32
) -> None:
    """Train with both and compare everything."""
    actual, expected = tensors(*shapes, dtype=dtype), tensors(*shapes, dtype=dtype)
    optimizer = ours(name, actual, **HYPER, **MOMENTUM[name], **ours_kind)
    oracle = torchs(name, expected, **HYPER, **MOMENTUM[name], **torchs_kind)
    train(optimizer, actual)
    train(oracle, expected)
    assert_same_training(actual, optimizer, expected, oracle)


# The class itself


@each_name
def test_signature_is_torchs_with_ours_at_the_end(name):
    actual = inspect.signature(getattr(selective_optim, name)).parameters
    expected = inspect.signature(getattr(torch.optim, name)).parameters
    shared = list(actual.values())[: len(expected)]
    added = list(actual.values())[len(expected) :]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in expected.values()
    ]
    assert {p.kind for p in added} == {inspect.Parameter.KEYWORD_ONLY}
    own = ["wd_policy", "model"]
    assert [p.name for p in added] in (own, ["decoupled_weight_decay", *own])


@each_name
def test_optimizer_is_an_instance_of_torchs_class(name):
    optimizer = ours(name, tensors((2, 2)))
    assert isinstance(optimizer, getattr(torch.optim, name))
    assert type(optimizer).__name__ == name
    assert type(optimizer).__mro__.index(getattr(torch.optim, name)) > 0


def test_only_adamw_is_an_adamw():
    assert not isinstance(ours("Adam", tensors((2, 2))), torch.optim.AdamW)
    assert isinstance(ours("AdamW", tensors((2, 2))), torch.optim.Adam)


@each_name
@each_kind
def test_repr_defaults_and_group_keys_are_torchs(name, kind):
    params = tensors((2, 2), (2,))
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2}]
    optimizer = ours(name, copy.copy(groups), **HYPER, **kind)
    oracle = torchs(name, copy.copy(groups), **HYPER, **kind)
    assert repr(optimizer) == repr(oracle)
    assert optimizer.defaults == oracle.defaults
    assert optimizer.param_groups == oracle.param_groups
    assert list(map(list, optimizer.param_groups)) == list(
        map(list, oracle.param_groups)
    )


@each_name
@each_kind
@pytest.mark.parametrize("amsgrad", [False, True])
def test_keys_stay_torchs_through_a_step(name, kind, amsgrad):
    third = {"SGD": {}}.get(name, {"amsgrad": amsgrad})
    arguments = {**kind, **MOMENTUM[name], **third}
    params, twins = tensors((2, 2), (2,)), tensors((2, 2), (2,))
    optimizer = ours(name, params, **HYPER, **arguments, wd_policy="matrices")
    oracle = torchs(name, twins, **HYPER, **arguments)
    train(optimizer, params)
    train(oracle, twins)
    assert [*map(list, optimizer.param_groups)] == [*map(list, oracle.param_groups)]
    assert [*map(list, optimizer.state.values())] == [*map(list, oracle.state.values())]
    for p, q in zip(params, twins):
        for key, value in oracle.state[q].items():
            assert optimizer.state[p][key].shape == value.shape
            assert optimizer.state[p][key].dtype == value.dtype
            assert optimizer.state[p][key].stride() == value.stride()


BAD_ARGUMENTS = [
    ("SGD", {"lr": -1.0}),
    ("SGD", {"momentum": -1.0}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"weight_decay": -1.0}),
    ("Adam", {"betas": (1.0, 0.9)}),
    ("Adam", {"eps": -1.0}),
    ("AdamW", {"fused": True, "foreach": True}),
    ("AdamW", {"fused": True, "differentiable": True}),
    ("AdamW", {"lr": torch.tensor(0.1), "foreach": True}),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_ARGUMENTS, ids=str)
def test_torchs_own_errors_come_as_they_are(name, arguments):
    def message(make: Any) -> tuple[type, str]:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            make(name, tensors((2, 2)), **arguments)
        return caught.type, str(caught.value)

    assert message(ours) == message(torchs)


@each_name
def test_bad_params_are_refused_as_in_torch(name):
    mixed = [nn.Linear(2, 2), *tensors((2, 2))]  # not a list of modules
    for params, kind in [
        *(([], ValueError), (torch.ones(2), TypeError), (mixed, TypeError)),
    ]:
        with pytest.raises(kind) as actual:
            ours(name, params)
        with pytest.raises(kind) as expected:
            torchs(name, params)
        assert str(actual.value) == str(expected.value)


@each_name
@pytest.mark.parametrize("group", [3, {"lr": 0.1}], ids=str)
def test_what_is_no_group_is_refused_as_in_torch(name, group):
    def message(make: Any) -> tuple[type, str]:
        params = tensors((2, 2))
        optimizer = make(name, params)
        with pytest.raises((TypeError, KeyError)) as caught:
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
        return caught.type, str(caught.value)

    assert message(ours) == message(torchs)


# Closures and hooks


@each_name
@each_kind
def test_closure_runs_once_with_gradients_on_and_its_loss_comes_back(name, kind):
    (param,) = tensors((2, 3))
    optimizer = ours(name, [param], **HYPER, **kind)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        before = param.clone()
        loss = optimizer.step(closure)
    assert seen == [True]
    assert loss.requires_grad
    assert loss == (before**2).sum()
    assert not torch.equal(param, before)
    assert optimizer.step() is None


@each_name
def test_step_leaves_the_grad_mode_alone(name):
    params = tensors((2, 3))
    optimizer = ours(name, params, **HYPER)
    train(optimizer, params, 2)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        train(optimizer, params, 2)
        assert not torch.is_grad_enabled()
    assert params[0].requires_grad
    assert params[0].grad_fn is None


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Count what hooks of the whole process see."""
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


ORDER = ["global pre", "pre", "post", "global post"]


@each_name
@pytest.mark.parametrize("others", ["before", "after", "stepped"])
def test_hooks_fire_once_whoever_else_builds_torchs_class(name, others, calls):
    events = {"before": [0], "after": [2], "stepped": [0, 2, 3]}[others]
    params, extra = tensors((2, 3)), tensors((2, 3))
    rivals: list[Any] = []
    for event in range(4):
        rivals += [torchs(name, extra, lr=0.1)] * (event in events)
        if event == 1:
            optimizer = ours(name, params, **HYPER)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    set_grads(params, 0)
    for _ in range(2):
        calls.clear()
        optimizer.step()
        assert calls == ORDER
    calls.clear()
    rivals[0].step()
    assert calls == ["global pre", "global post"]


@each_name
def test_hooks_of_a_copy_fire_once(name, calls):
    params = tensors((2, 3))
    optimizer = ours(name, params, **HYPER)
    twin = copy.deepcopy(optimizer)
    calls.clear()
    twin.step()
    assert calls == ["global pre", "global post"]


@each_name
def test_pre_hook_may_exchange_the_closure(name):
    params = tensors((2, 3))
    optimizer = ours(name, params, **HYPER)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7), {}))
    assert optimizer.step(lambda: 5) == 7


@each_name
def test_hook_sees_gradients_before_and_parameters_after(name):
    (param,) = tensors((2, 3))
    zero = torch.zeros_like(param)
    optimizer = ours(name, [param], lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: setattr(param, "grad", zero))
    optimizer.register_step_post_hook(lambda *_: seen.append(param.detach().clone()))
    before = param.detach().clone()
    train(optimizer, [param], 2)
    decay = {"AdamW": [0.995, 0.995**2]}.get(name, [1, 1])
    torch.testing.assert_close(seen, [before * factor for factor in decay])


# Groups and gradients


@each_name
@pytest.mark.parametrize("set_to_none", [True, False])
@each_kind
def test_zero_grad_works_both_ways(name, set_to_none, kind):
    actual, expected = tensors((2, 3), (3,)), tensors((2, 3), (3,))
    optimizer = ours(name, actual, **HYPER, **kind)
    oracle = torchs(name, expected, **HYPER, **explicit(kind))
    for params, own in ((actual, optimizer), (expected, oracle)):
        for step in range(4):
            own.zero_grad(set_to_none)
            own.step()  # without gradients, or with zeros, which decay
            sum(((p - step) ** 2).sum() for p in params).backward()
            own.step()
        own.zero_grad(set_to_none)
    assert_same(actual, expected)
    assert all((p.grad is None) == set_to_none for p in actual)


@each_name
@each_kind
def test_added_groups_step_as_in_torch(name, kind):
    shapes = [(3, 4), (4,), (2, 2)]
    actual, expected = tensors(*shapes), tensors(*shapes)
    optimizer = ours(name, actual[:1], **HYPER, **MOMENTUM[name], **kind)
    oracle = torchs(name, expected[:1], **HYPER, **MOMENTUM[name], **explicit(kind))
    for position in (0, 1, 2):
        for params, own in ((actual, optimizer), (expected, oracle)):
            if position:
                group = {"params": params[position], "lr": 0.01 * position}
                own.add_param_group(group)
            set_grads(params[: position + 1], position)
            own.step()
    assert_same(actual, expected)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.01, 0.02]


@each_name
def test_parameter_in_two_groups_is_refused_as_in_torch(name):
    params = tensors((2, 3))
    optimizer = ours(name, params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1


@each_name
def test_named_parameters_keep_their_names_in_the_groups(name):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = ours(name, model.named_parameters(), **HYPER, wd_policy="no_bias")
    oracle = torchs(name, model.named_parameters(), **HYPER)
    names = [n for n, _ in model.named_parameters()]
    for (actual,), (expected,) in (
        (optimizer.param_groups, oracle.param_groups),
        (optimizer.state_dict()["param_groups"], oracle.state_dict()["param_groups"]),
    ):
        assert actual["param_names"] == expected["param_names"] == names
        assert actual.keys() == expected.keys()


@each_name
@each_kind
def test_gradients_that_never_come_leave_everything_alone(name, kind):
    params = tensors((2, 3), (3,))
    before = [p.detach().clone() for p in params]
    optimizer = ours(name, params, **HYPER, **kind)
    for _ in range(3):
        optimizer.step()
    assert_same(params, before)
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@each_kind
def test_counters_are_of_the_dtype_that_torch_gives_them(name, kind, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        train_alike(name, [(2, 3), (3,)], kind, explicit(kind))
    finally:
        torch.set_default_dtype(before)


@each_name
@each_kind
def test_odd_shapes_step_as_in_torch(name, kind):
    shapes = [(), (0,), (0, 3), (1,), (1, 1, 1), (5, 0, 2), (2, 3)]
    train_alike(name, shapes, kind, explicit(kind))


@each_name
@each_kind
def test_only_empty_parameters_step(name, kind):
    train_alike(name, [(0,), (2, 0)], kind, explicit(kind))


# Kinds of numbers


@each_name
@pytest.mark.parametrize("kind", [{}, LOOP, {"foreach": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_step_as_in_torch(name, kind, dtype):
    # Automatically, what fused cannot do goes torch's own way: here the for-loop.
    train_alike(name, [(2, 3), (3,), ()], kind, kind, dtype)


def complex_pair() -> list[nn.Parameter]:
    return [*tensors((2, 3), (3,)), *tensors((3, 2), (2,), dtype=torch.complex64)]


@each_name
def test_complex_and_real_parameters_share_a_group(name):
    actual, expected = complex_pair(), complex_pair()
    optimizer = ours(name, actual, **HYPER, wd_policy=lambda info: info.ndim > 1)
    train(optimizer, actual)
    for params, kind in ((expected[:2], KINDS["fused"]), (expected[2:], LOOP)):
        split = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
        oracle = torchs(name, split, **HYPER, **kind)
        for step in range(3):
            set_grads(expected, step)
            oracle.step()
    assert_same(actual, expected)


@each_name
def test_explicit_fused_refuses_complex_with_torchs_words(name):
    def build_and_step(make: Any) -> None:
        params = tensors((2, 3), dtype=torch.complex64)
        optimizer = make(name, params, fused=True, **MOMENTUM[name])
        train(optimizer, params, 1)

    def message(make: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            build_and_step(make)
        return str(caught.value)

    assert message(ours) == message(torchs)


# Hyperparameters


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("kind", [{}, LOOP, {"fused": True}], ids=str)
def test_tensor_betas_step_as_in_torch(name, kind):
    actual, expected = tensors((3, 4), (4,)), tensors((3, 4), (4,))
    runs = [(actual, ours, kind), (expected, torchs, explicit(kind))]
    for params, make, choice in runs:
        betas = torch.tensor(0.8), torch.tensor(0.99)
        own = make(name, params, lr=torch.tensor(0.05), betas=betas, **choice)
        for step in range(4):
            set_grads(params, step)
            own.step()
            own.param_groups[0]["betas"][0].mul_(0.9)
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("kind", [{}, {"fused": True}], ids=str)
def test_betas_of_one_element_in_a_group_step_as_those_without_dimensions(name, kind):
    """torch's constructor takes their dimension away, and of a group's the step."""
    actual, expected = tensors((3, 4), (4,)), tensors((3, 4), (4,))
    runs = [(actual, ours, kind, [1]), (expected, torchs, explicit(kind), [])]
    for params, make, choice, shape in runs:
        betas = torch.full(shape, 0.8), torch.full(shape, 0.99)
        own = make(name, [{"params": params, "betas": betas}], **choice)
        for step in range(4):
            set_grads(params, step)
            own.step()
            betas[0].mul_(0.9)
    assert_same(actual, expected)


@pytest.mark.parametrize("multiplier", [1, 0.5])
@pytest.mark.parametrize("kind", [{}, LOOP, {"fused": True}], ids=str)
def test_tensor_weight_decay_is_read_anew_at_every_step(multiplier, kind):
    (param,) = [nn.Parameter(torch.ones(2, dtype=torch.float64))]
    wd = torch.tensor(0.25, dtype=torch.float64)
    optimizer = selective_optim.SGD(
        [("p", param)], lr=1.0, weight_decay=wd, wd_policy={"p": multiplier}, **kind
    )
    param.grad = torch.zeros_like(param)
    for _ in range(3):
        optimizer.step()
        wd.fill_(0.0)
    assert_same([param], [torch.full_like(param, 1 - 0.25 * multiplier)])


def test_tensor_lr_that_is_replaced_is_the_one_that_counts():
    (param,) = [nn.Parameter(torch.zeros(2))]
    optimizer = selective_optim.SGD([param], lr=torch.tensor(1.0))
    param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.0)
    optimizer.step()
    assert_same([param], [torch.full((2,), -3.0)])


@each_name
@each_kind
def test_maximize_is_the_step_along_the_negated_gradient(name, kind):
    actual, expected = tensors((3, 4), (4,)), tensors((3, 4), (4,))
    optimizer = ours(name, actual, **HYPER, **kind, maximize=True)
    oracle = ours(name, expected, **HYPER, **kind)
    for step in range(3):
        set_grads(actual, step)
        set_grads(expected, step)
        for param in expected:
            param.grad.neg_()
        optimizer.step()
        oracle.step()
    assert_same(actual, expected)


# Sparse gradients


def sparse_grad(param: Tensor, rows: list[int], step: int) -> Tensor:
    values = torch.full((len(rows), param.shape[1]), 1.0 + step)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, param.shape)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("kind", [{}, LOOP, {"foreach": True}], ids=str)
def test_exempt_sparse_parameters_train_beside_decayed_dense_ones(momentum, kind):
    def make() -> nn.ModuleDict:
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        return nn.ModuleDict({"table": table, "head": nn.Linear(3, 2)})

    actual, expected = make(), make()
    optimizer = selective_optim.SGD(
        actual.parameters(),
        **HYPER,
        momentum=momentum,
        wd_policy=policies.exclude(nn.Embedding),
        **kind,
    )
    table, head = expected.values()
    # torch has no fused step for sparse gradients: one optimizer for each kind.
    dense = {**HYPER, **explicit(kind), "momentum": momentum}
    oracles = [
        torch.optim.SGD(head.parameters(), **dense),
        torch.optim.SGD(table.parameters(), lr=0.05, momentum=momentum, **kind),
    ]
    for step in range(4):
        for model, own in ((actual, [optimizer]), (expected, oracles)):
            model.zero_grad()
            loss = model["head"](model["table"](torch.tensor([1, 1, 4, step]))).exp()
            loss.sum().backward()
            for each in own:
                each.step()
    assert actual["table"].weight.grad.is_sparse
    assert_same([*actual.parameters()], [*expected.parameters()])


@pytest.mark.parametrize("kind", [{}, LOOP, {"foreach": True}], ids=str)
def test_untouched_rows_of_a_sparse_parameter_stay(kind):
    (param,) = tensors((5, 3))
    before = param.detach().clone()
    optimizer = selective_optim.SGD([param], lr=1.0, **kind)
    for step in range(3):
        param.grad = sparse_grad(param, [0, 3], step)
        optimizer.step()
    assert_same([param[[1, 2, 4]]], [before[[1, 2, 4]]])
    torch.testing.assert_close(param.detach()[0], before[0] - 6.0)


@pytest.mark.parametrize("kind", [{}, LOOP, {"foreach": True}], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_decayed_sparse_parameter_is_named_and_nothing_moves(kind, decoupled):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = selective_optim.SGD(
        model.parameters(), **HYPER, decoupled_weight_decay=decoupled, **kind
    )
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0\.weight' .*sparse.*Exempt it"):
        optimizer.step()
    assert_same([*model.parameters()], before)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("wd_policy", [None, policies.exclude(nn.Embedding)], ids=str)
def test_adam_refuses_sparse_gradients_as_torch_does(name, wd_policy):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = ours(name, model.parameters(), **HYPER, wd_policy=wd_policy)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"does not support sparse.*'0\.weight'"):
        optimizer.step()


def test_gradient_may_turn_dense_and_sparse_again():
    actual, expected = tensors((5, 3)), tensors((5, 3))
    optimizer = selective_optim.SGD(actual, lr=0.5)
    oracle = torch.optim.SGD(expected, lr=0.5)
    for step in range(6):
        for (param,), own in ((actual, optimizer), (expected, oracle)):
            sparse = sparse_grad(param, [0, 3], step)
            param.grad = sparse if step % 3 else sparse.to_dense()
            own.step()
    assert_same(actual, expected)


# Modules that change under the optimizer


@each_name
@each_kind
def test_found_inf_of_several_devices_drops_the_step(name, kind):
    # GradScaler adds up what it found on each device: two infinities make 2.0.
    params = tensors((3, 4), (4,))
    optimizer = ours(name, params, **HYPER, **MOMENTUM[name], **kind)
    train(optimizer, params)
    before = frozen(optimizer, params)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(2.0)
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    assert_same(frozen(optimizer, params), before)
