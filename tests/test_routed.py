"""`Routed` does what separate optimizers do over the same parameters, bit for bit."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

import selective_optim
from selective_optim import (
    SGD,
    AdamW,
    Routed,
    WeightDecay,
    checkpoint,
    decay_report,
    selective,
)
from selective_optim.policies import is_hidden_matrix
from tests.support.compare import assert_same
from tests.support.routes import (
    ADAMW,
    MUON,
    Body,
    Net,
    loss_of,
    needs_muon,
    routed,
    routes,
    split,
    twins,
)
from tests.support.routes import separate as separate_optimizers

STEPS = 20
FUSED = {"fused": True}
SGDS = {"lr": 0.05, "momentum": 0.9}
PAIRS = {
    "muon-adamw": ((Body, MUON), (AdamW, ADAMW), FUSED),
    "muon-adamw-for-loop": (
        (Body, MUON),
        (AdamW, {**ADAMW, "fused": False, "foreach": False}),
        {},
    ),
    "muon-sgd": ((Body, MUON), (SGD, SGDS), FUSED),
    "nadam-adamw": ((torch.optim.NAdam, {"lr": 1e-2}), (AdamW, ADAMW), FUSED),
    "rmsprop-radam": (
        (torch.optim.RMSprop, {"lr": 1e-2}),
        (torch.optim.RAdam, {"lr": 1e-2}),
        {},
    ),
}


def both(first, rest, extra):
    """Make a model twice, with one optimizer and with the two that it stands for."""
    model, twin = twins()
    one = routed(
        model, routes={"first": (is_hidden_matrix, *first), "rest": ("*", *rest)}
    )
    torchs = getattr(torch.optim, rest[0].__name__)
    return model, one, twin, separate_optimizers(twin, first, (torchs, rest[1] | extra))


def step(model, optimizers, number):
    loss_of(model, number).backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def state_of(optimizers, model):
    found = {}
    for optimizer in optimizers:
        found |= {param: dict(own) for param, own in optimizer.state.items()}
    return [found[param] for param in model.parameters()]


def assert_twins(model, one, twin, others):
    assert_same(model, twin)
    assert_same(state_of([one], model), state_of(others, twin))


def plain(model, optimizers, number):
    step(model, optimizers, number)


def accumulating(model, optimizers, number):
    loss_of(model, 100 + number).backward()
    step(model, optimizers, number)


def closing(model, optimizers, number):
    # The reference: one evaluation, and each optimizer steps.
    if len(optimizers) > 1:
        step(model, optimizers, number)
        return
    calls = []

    def closure():
        optimizers[0].zero_grad()
        calls.append(number)
        loss = loss_of(model, number)
        loss.backward()
        return loss

    assert optimizers[0].step(closure).item() > 0
    assert calls == [number]
    optimizers[0].zero_grad()


WAYS = [plain, accumulating, closing]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("way", WAYS)
def test_bits_are_those_of_separate_optimizers(pair, way):
    model, one, twin, others = both(*pair)
    for number in range(STEPS):
        way(model, [one], number)
        way(twin, others, number)
    assert_twins(model, one, twin, others)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle"])
def test_training_goes_on_as_it_would_have(pair, how):
    model, one, twin, others = both(*pair)
    for number in range(STEPS):
        step(model, [one], number)
        step(twin, others, number)
        if number != STEPS // 2:
            continue
        if how == "deepcopy":
            model, one = copy.deepcopy((model, one))
        elif how == "pickle":
            model, one = pickle.loads(pickle.dumps((model, one)))
        else:
            saved = pickle.loads(pickle.dumps(one.state_dict()))
            model = copy.deepcopy(model)
            one = both(*pair)[1]
            one = routed(
                model,
                routes={
                    n: (is_hidden_matrix if n == "first" else "*", *r)
                    for n, r in zip(("first", "rest"), pair)
                },
            )
            one.load_state_dict(saved)
    assert_twins(model, one, twin, others)


SCHEDULERS = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=STEPS),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.9**epoch),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_scales_every_rate(make):
    model, one, twin, others = both(*PAIRS["muon-adamw"])
    schedulers, theirs = [make(one)], [make(other) for other in others]
    for number in range(STEPS):
        step(model, [one], number)
        step(twin, others, number)
        for scheduler in (*schedulers, *theirs):
            scheduler.step()
    assert_twins(model, one, twin, others)
    rates = [group["lr"] for group in one.param_groups]
    assert rates == [others[0].param_groups[0]["lr"], others[1].param_groups[0]["lr"]]


def test_one_cycle_needs_what_groups_of_two_classes_need():
    model, _ = twins()
    one = routed(model)
    with pytest.raises(ValueError, match="momentum or beta1"):
        OneCycleLR(one, max_lr=[0.02, 3e-3], total_steps=10)
    scheduler = OneCycleLR(
        one, max_lr=[0.02, 3e-3], total_steps=10, cycle_momentum=False
    )
    for number in range(3):
        step(model, [one], number)
        scheduler.step()
    assert [group["max_lr"] for group in one.param_groups] == [0.02, 3e-3]


def test_plateaus_and_hand_edits_reach_every_route():
    model, _ = twins()
    one = routed(model)
    scheduler = ReduceLROnPlateau(one, patience=0, factor=0.5)
    for _ in range(2):
        scheduler.step(1.0)
    assert [group["lr"] for group in one.param_groups] == [0.01, 1.5e-3]
    for group in one.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    step(model, [one], 0)
    assert_same(model, before)


@pytest.mark.parametrize("explicit", [True, False])
def test_a_scaler_scales_where_every_route_takes_that(explicit):
    fused = {"fused": True} if explicit else {}
    pair = ((SGD, {**SGDS, **fused}), (AdamW, {**ADAMW, **fused}), FUSED)
    model, one, twin, others = both(
        pair[0], pair[1], {"fused": True} if explicit else FUSED
    )
    others[0] = torch.optim.SGD(split(twin)[0], **SGDS, weight_decay=0.1, fused=True)
    assert one._step_supports_amp_scaling == explicit
    scaler, its = (torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2))
    for number in range(6):
        for scaling, net, optimizers in ((scaler, model, [one]), (its, twin, others)):
            loss = loss_of(net, number) * (float("inf") if number == 3 else 1.0)
            scaling.scale(loss).backward()
            for optimizer in optimizers:
                scaling.step(optimizer)
                optimizer.zero_grad()
            scaling.update()
    assert_twins(model, one, twin, others)
    assert not {"grad_scale", "found_inf"} & vars(one.optimizers["rest"]).keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, as it compiles
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # 2.7
def test_a_compiled_step_has_the_same_bits():
    # Compiled, no class of torch chooses its fused kernels by itself.
    model, one, twin, others = both(*PAIRS["muon-adamw"][:2], {})
    for net, optimizers in ((model, [one]), (twin, others)):
        steps = [torch.compile(each.step, backend="eager") for each in optimizers]
        for number in range(4):
            loss_of(net, number).backward()
            for compiled in steps:
                compiled()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert_same(model, twin)


def test_hooks_run_once():
    model, _ = twins()
    one, ran = routed(model), []
    one.register_step_pre_hook(lambda *_: ran.append("pre"))
    one.register_step_post_hook(lambda *_: ran.append("post"))
    handle = register_optimizer_step_post_hook(lambda o, *_: ran.append(type(o)))
    try:
        step(model, [one], 0)
    finally:
        handle.remove()
    assert ran == ["pre", "post", Routed] or ran == ["pre", Routed, "post"]


def test_groups_are_one_per_users_group_and_route():
    model, _ = twins()
    body, _, _ = split(model)
    rest = [p for p in model.parameters() if all(p is not own for own in body)]
    named = {id(p): name for name, p in model.named_parameters()}

    def pairs(params):
        return [(named[id(p)], p) for p in params]

    groups = [
        {"params": pairs([body[0], rest[0]]), "lr": {"muon": 0.5, "adamw": 0.25}},
        {"params": pairs([body[1], *rest[1:3]]), "lr_scale": 0.5, "tag": "x"},
        {"params": pairs(rest[3:]), "betas": (0.5, 0.6), "momentum": 0.1},
    ]
    one = Routed(groups, routes(), model=model)
    told = [(group["route"], group["lr"]) for group in one.param_groups]
    expected = [("muon", 0.5), ("adamw", 0.25), ("muon", 0.01), ("adamw", 1.5e-3)]
    assert told == [*expected, ("adamw", 3e-3)]
    assert [group.get("tag") for group in one.param_groups[2:4]] == ["x", "x"]
    last = one.param_groups[4]
    assert last["betas"] == (0.5, 0.6)
    assert "momentum" not in last
    assert not {"lr_scale"} & set().union(*one.param_groups)
    assert groups[1].keys() == {"params", "lr_scale", "tag"}
    assert one.defaults.keys() == {"lr", "weight_decay"}


@needs_muon
def test_weight_decay_is_the_routes_then_the_optimizers_then_the_classes():
    model, _ = twins()
    own = {"adamw": ("*", AdamW, {**ADAMW, "weight_decay": 0.3})}
    one = Routed(model, routes(**own), weight_decay=0.2)
    assert [group["weight_decay"] for group in one.param_groups] == [0.2, 0.3]
    one = Routed(model, routes())
    assert [group["weight_decay"] for group in one.param_groups] == [0.1, 0.01]


def test_one_policy_decides_for_all_routes_unless_a_route_brings_its_own():
    model, _ = twins()
    # No glob of it matches in the first route, and all match in the model.
    one = routed(model, wd_policy={"*.bias": 0, "embed.*": 0.5})
    decays = {row.name: row.weight_decay for row in one.decay_report()}
    assert decays["embed.weight"] == 0.05
    assert decays["head.bias"] == 0
    own = {"adamw": ("*", AdamW, {**ADAMW, "wd_policy": "none"})}
    one = routed(model, routes=routes(**own), wd_policy="all")
    assert {r.route for r in one.decay_report() if r.weight_decay} == {"muon"}


def test_another_policy_is_decided_for_all_routes_or_for_none():
    model, _ = twins()
    one = routed(model)
    one.wd_policy = {"embed.*": 0, "blocks.0.*": 0}
    decayed = {row.name for row in one.decay_report() if row.weight_decay}
    assert "blocks.1.0.weight" in decayed
    assert "blocks.1.0.bias" in decayed
    assert not {"embed.weight", "blocks.0.0.weight"} & decayed
    before = one.decay_report().rows
    with pytest.raises(ValueError, match="matches none"):
        one.wd_policy = {"nothing.*": 0}
    assert one.decay_report().rows == before
    twin = copy.deepcopy(one)
    with pytest.warns(UserWarning, match="exempts all 11 parameters"):
        twin.wd_policy = "none"
    assert not any(row.weight_decay for row in twin.decay_report())
    assert one.decay_report().rows == before


def test_a_group_is_added_to_its_routes():
    model, _ = twins()
    one = routed(model)
    more = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="which layer of Sequential is its output"):
        one.add_param_group({"params": more, "model": more, "lr_scale": 0.5})
    added = [(group["route"], group["lr"]) for group in one.param_groups[2:]]
    assert ("adamw", 1.5e-3) in added
    layer = nn.Linear(4, 4, bias=False)
    one.add_param_group({"params": layer, "model": layer, "route": "muon"})
    assert one.param_groups[-1]["route"] == "muon"
    sum(p.sum() for group in one.param_groups for p in group["params"]).backward()
    one.step()
    assert set(one.state) == {p for g in one.param_groups for p in g["params"]}


@pytest.mark.parametrize("told", [{}, {"route": "adamw"}], ids=["asked", "told"])
def test_the_policy_of_a_route_decides_for_what_is_added_to_it(told):
    model, _ = twins()
    own = {"adamw": ("*", AdamW, {**ADAMW, "wd_policy": "none"})}
    one = routed(model, routes=routes(**own), wd_policy="all")
    layer = nn.Linear(2, 2)
    one.add_param_group({"params": [layer.bias], "model": layer, **told})
    assert one.decay_report().rows[-1].weight_decay == 0


def test_groups_that_are_cleared_and_added_again_stay_on_their_route():
    model, twin = twins()
    one = routed(model)
    new = dict(zip(model.parameters(), twin.parameters()))
    groups = [dict(group) for group in one.param_groups]
    one.param_groups.clear()
    for group in groups:
        one.add_param_group({**group, "params": [new[p] for p in group["params"]]})
    report = {(r.name, r.weight_decay, r.route) for r in routed(twin).decay_report()}
    assert {(r.name, r.weight_decay, r.route) for r in one.decay_report()} == report
    step(twin, [one], 0)


@needs_muon
def test_the_state_is_one_mapping():
    model, _ = twins()
    one = routed(model)
    weight = model.blocks[0][0].weight
    assert len(one.state) == 0
    assert weight not in one.state
    assert one.state.get(weight) is None
    assert weight not in one.state
    one.state[weight]["noted"] = 1
    assert one.optimizers["muon"].state[weight] == {"noted": 1}
    with pytest.raises(KeyError):
        one.state[nn.Parameter(torch.ones(1))]
    step(model, [one], 0)
    assert len(one.state) == len(list(model.parameters()))
    del one.state[weight]
    assert weight not in one.optimizers["muon"].state
    one.state = dict(one.state)
    assert len(one.state) == len(list(model.parameters())) - 1
    one.state.clear()
    assert not one.optimizers["adamw"].state


@needs_muon
def test_reports_show_the_route():
    model, _ = twins()
    one = routed(model)
    for report in (one.decay_report(), decay_report(one, model)):
        assert {row.route for row in report} == {"muon", "adamw"}
        assert "route" in str(report).splitlines()[0]
    row = one.decay_report()["blocks.0.0.weight"]
    assert (row.route, row.group, row.form) == ("muon", 0, "decoupled")
    measured = decay_report(one, model, measure=True)
    assert all(row.applied for row in measured if row.weight_decay)


def test_it_is_one_optimizer_of_torch():
    model, _ = twins()
    one = routed(model)
    assert isinstance(one, torch.optim.Optimizer)
    assert selective(Body) is type(one.optimizers["muon"])
    assert type(one.optimizers["adamw"]) is AdamW
    assert "route: muon" in repr(one)
    assert "wd_policy: exclude" in repr(one)
    assert {"Routed", "Muon"} <= set(selective_optim.__all__)


def test_nothing_of_it_outlives_it():
    model, _ = twins()
    one = routed(model)
    step(model, [one], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = routed(model)
    step(model, [again], 1)


def test_schedules_of_weight_decay_serve_every_route():
    model, _ = twins()
    one = routed(model)
    scheduler = LambdaLR(WeightDecay(one), lambda epoch: 0.5**epoch)
    step(model, [one], 0)
    scheduler.step()
    assert [group["weight_decay"] for group in one.param_groups] == [0.05, 0.05]


def test_a_changed_model_keeps_what_still_fits():
    model, _ = twins()
    one = routed(model)
    step(model, [one], 0)
    wider = Net()
    wider.head = nn.Linear(6, 9)
    again = routed(wider)
    fitted = checkpoint.fit(copy.deepcopy(one.state_dict()), again)
    assert fitted.resized == ["head.weight", "head.bias"]
    assert len(fitted.kept) == 9
    again.load_state_dict(fitted.state_dict)
    step(wider, [again], 1)
    assert [group["route"] for group in again.param_groups] == ["muon", "adamw"]


class Averaging(torch.optim.SGD):
    """Has modes, as schedule-free optimizers do."""

    def train(self):
        for group in self.param_groups:
            group["train_mode"] = True

    def eval(self):
        for group in self.param_groups:
            group["train_mode"] = False


def test_modes_of_a_class_are_those_of_the_optimizer():
    model, _ = twins()
    assert not hasattr(routed(model), "train")
    one = routed(model, routes=routes(adamw=("*", Averaging, {"lr": 0.1})))
    one.train()
    step(model, [one], 0)
    assert one.param_groups[1]["train_mode"] is True
    one = copy.deepcopy(one)
    one.eval()
    assert [group.get("train_mode") for group in one.param_groups] == [None, False]
