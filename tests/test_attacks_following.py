"""Decisions follow their parameters through what nobody expects of an optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import swap_tensors

from selective_optim import param_groups, selective
from tests.support import attacks
from tests.support.attacks import (
    DECOUPLED,
    LR,
    RIGHT,
    SERVED,
    WD,
    Judge,
    assert_right,
    assert_whole,
    built,
    make,
    net,
)
from tests.support.compare import assert_same

each_name = pytest.mark.parametrize("name", SERVED)


# Copies, after which a tensor is exchanged behind its parameter.


def same(things):
    return things


def saved_whole(things):
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(things):
    return pickle.loads(pickle.dumps(things))


def pickled_twice(things):
    return pickled(pickled(things))


def shallow(things):
    return things[0], copy.copy(things[1])


COPIES = [same, copy.deepcopy, shallow, pickled, pickled_twice, saved_whole]
each_copy = pytest.mark.parametrize("copied", COPIES)


def one_is_swapped(model, optimizer):
    swap_tensors(model.first.bias, nn.Parameter(model.first.bias.detach().clone()))


def norm_is_swapped(model, optimizer):
    swap_tensors(model.norm.weight, nn.Parameter(torch.ones(4)))


def all_are_swapped(model, optimizer):
    for param in model.parameters():
        swap_tensors(param, nn.Parameter(param.detach().clone()))


def two_are_swapped_in_turn(model, optimizer):
    for param in (model.first.weight, model.first.bias, model.first.weight):
        swap_tensors(param, nn.Parameter(param.detach().clone()))


def swapped_and_reordered(model, optimizer):
    one_is_swapped(model, optimizer)
    optimizer.param_groups[0]["params"].reverse()


def moved_to_double(model, optimizer):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


SWAPS = [
    one_is_swapped,
    norm_is_swapped,
    all_are_swapped,
    two_are_swapped_in_turn,
    swapped_and_reordered,
    moved_to_double,
]


@each_name
@each_copy
@pytest.mark.parametrize("swap", SWAPS)
def test_swapped_tensor_keeps_the_decision_of_its_parameter(name, copied, swap):
    model = net()
    optimizer = make(name, model)  # no step: the state of some would not fit a double
    model, optimizer = copied((model, optimizer))
    swap(model, optimizer)
    for _ in range(2):
        assert attacks.decays(model, optimizer) == RIGHT
        assert_whole(optimizer)


@each_name
@each_copy
def test_swapped_tensor_keeps_its_decision_between_steps(name, copied):
    model, optimizer = copied(built(name))
    for swap in (one_is_swapped, norm_is_swapped, swapped_and_reordered):
        assert attacks.decays(model, optimizer) == RIGHT
        swap(model, optimizer)
        assert attacks.decays(model, optimizer) == RIGHT


# Names that came in pairs, and are gone.

BY_NAME = {"*bias": 0, "norm.*": 0}


def nothing(model, optimizer):
    pass


def reordered(groups):
    groups[0]["params"].reverse()


def replaced_by_a_permutation(groups):
    groups[0]["params"] = groups[0]["params"][::-1]


def one_taken_out(groups):
    groups[0]["params"].pop(1)


def split_in_two(groups):
    half = groups[0]["params"][3:]
    del groups[0]["params"][3:]
    groups.append({**groups[0], "params": half})


def rebuilt(groups):
    groups[:] = [{**group, "params": group["params"][::-1]} for group in groups]


EDITS = [reordered, replaced_by_a_permutation, one_taken_out, split_in_two, rebuilt]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("swap", [nothing, one_is_swapped, all_are_swapped])
@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("copied", [same, pickled])
def test_tensors_whose_names_were_removed_keep_their_decisions(
    name, edit, swap, stepped, copied
):
    model = net()
    optimizer = make(name, list(model.named_parameters()), BY_NAME)
    if stepped:
        assert attacks.decays(model, optimizer) == RIGHT
    for group in optimizer.param_groups:
        del group["param_names"]
    swap(model, optimizer)
    edit(optimizer.param_groups)
    model, optimizer = copied((model, optimizer))
    for _ in range(2):
        acted = attacks.decays(model, optimizer)
        assert acted == RIGHT


@each_name
def test_names_and_tensors_that_are_reordered_together_stay_together(name):
    model = net()
    optimizer = make(name, list(model.named_parameters()), BY_NAME)
    (group,) = optimizer.param_groups
    group["params"].reverse()
    group["param_names"].reverse()
    assert attacks.decays(model, optimizer) == RIGHT
    assert [row.name for row in optimizer.decay_report().rows] == [*RIGHT][::-1]


# Subclasses that write down what torch's class writes down.


def three_keys(self):
    """As ``torch.optim.Optimizer.__getstate__``."""
    return {
        "defaults": self.defaults,
        "state": self.state,
        "param_groups": self.param_groups,
    }


def subclass(name):
    """Make a class that pickle finds under its name."""
    made = type(f"Three{name}", (SERVED[name],), {"__getstate__": three_keys})
    made.__module__ = __name__
    globals()[made.__name__] = made
    return made


THREE = {name: subclass(name) for name in SERVED}


@each_name
@pytest.mark.parametrize("copied", COPIES[1:])
def test_copy_by_torchs_three_keys_keeps_decisions(name, copied):
    model = net()
    more = DECOUPLED.get(name, {})
    optimizer = THREE[name](
        model.parameters(), lr=LR, weight_decay=WD, wd_policy="no_bias_norm", **more
    )
    assert attacks.decays(model, optimizer) == RIGHT
    twin, other = copied((model, optimizer))
    for _ in range(2):
        assert attacks.decays(twin, other) == RIGHT
    assert_right(model, optimizer)


# Groups that compute what is read of them.


class Computed(dict):
    """A group whose numbers are asked for anew whenever they are read."""

    def __init__(self, group, computed):
        super().__init__(group)
        self.computed = computed

    def __getitem__(self, key):
        if key in self.computed:
            return self.computed[key]()
        return super().__getitem__(key)

    def get(self, key, default=None):
        return self.computed[key]() if key in self.computed else super().get(key)


KINDS = {
    "automatic": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
CASES = [(name, kind) for name in ("SGD", "Adam", "AdamW") for kind in KINDS]
CASES += [("NAdam", "foreach"), ("NAdam", "for-loop")]
RATES = [0.1, 0.1, 0.02, 0.3]
DECAYS = [0.5, 0.5, 0.0, 0.3]


def pair(name, kind, model, policy="no_bias_norm"):
    """Make ours, and torch's with a group for each parameter."""
    optimizer = make(name, model, policy, **KINDS[kind])
    chosen = {**(KINDS[kind] or {"fused": True}), **DECOUPLED.get(name, {})}
    cls = getattr(torch.optim, name)
    return optimizer, Judge(cls, attacks.clones([*model.parameters()]), **chosen)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize(("key", "values"), [("lr", RATES), ("weight_decay", DECAYS)])
def test_group_that_computes_a_number_is_read_anew_at_every_step(
    name, kind, key, values
):
    now = [0]
    model = net()
    params = [*model.parameters()]
    optimizer, judge = pair(name, kind, model)
    judge.decay([*RIGHT.values()])
    read = {key: lambda: values[now[0]]}
    optimizer.param_groups[0] = Computed(optimizer.param_groups[0], read)
    groups = judge.optimizer.param_groups
    for i, decayed in enumerate(RIGHT.values()):
        if decayed or key == "lr":
            groups[i] = Computed(groups[i], read)
    for step in range(len(values)):
        now[0] = step
        attacks.set_grads(params, step)
        attacks.set_grads(judge.params, step)
        optimizer.step()
        judge.optimizer.step()
        judge.require(params, optimizer)


# Counters that several share.


@pytest.mark.parametrize(("name", "kind"), [c for c in CASES if c[0] != "SGD"])
@pytest.mark.parametrize("shared", [(0, 1), (1, 4), (0, 1, 2)])
def test_shared_counter_counts_as_in_torch(name, kind, shared):
    """Each decays otherwise than the next, so torch has them in groups of their own."""
    model = net()
    params = [*model.parameters()]
    multipliers = [1.0, 0.0, 0.5, 0.25, 2.0, 3.0]
    table = dict(zip(RIGHT, multipliers))
    optimizer, judge = pair(name, kind, model, lambda info: table[info.name])
    judge.decay(multipliers)
    for step in range(5):
        for own, other in ((params, optimizer), (judge.params, judge.optimizer)):
            attacks.set_grads(own, step)
            if step == 2:
                counter = other.state[own[shared[0]]]["step"]
                for i in shared:
                    other.state[own[i]]["step"] = counter
            other.step()
        judge.require(params, optimizer)


# Parameters that go from one group to a new one.


def moved(model, optimizer):
    taken = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [taken]})


def moved_back(model, optimizer):
    moved(model, optimizer)
    (taken,) = optimizer.param_groups.pop()["params"]
    optimizer.param_groups[0]["params"].append(taken)


def cleared(model, optimizer):
    groups = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def emptied(model, optimizer):
    params = list(optimizer.param_groups[0]["params"])
    optimizer.param_groups[0]["params"].clear()
    optimizer.add_param_group({"params": params, "lr": LR})


def assigned(model, optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    moved(model, optimizer)


@each_name
@pytest.mark.parametrize("edit", [moved, moved_back, cleared, emptied, assigned])
@pytest.mark.parametrize("copied", [same, copy.deepcopy])
def test_parameter_that_moves_to_a_group_of_its_own_is_served(name, edit, copied):
    model, optimizer = copied(built(name))
    edit(model, optimizer)
    for _ in range(2):
        assert attacks.decays(model, optimizer) == RIGHT
    assert attacks.reported(optimizer) == RIGHT


# Parameters that go to a group of other numbers.


def in_place(optimizer, index, params):
    optimizer.param_groups[index]["params"][:] = params


def by_a_new_list(optimizer, index, params):
    optimizer.param_groups[index]["params"] = list(params)


def by_a_new_group(optimizer, index, params):
    group = optimizer.param_groups[index]
    optimizer.param_groups[index] = {**group, "params": list(params)}


WRITING = [in_place, by_a_new_list, by_a_new_group]
# Two groups of the parameters of `Net`, by number, and how they stand later.
MOVES = [
    ([0, 1, 2, 3], [4, 5], [1, 2, 3], [4, 5, 0]),
    ([0], [1, 2, 3, 4, 5], [0, 1], [2, 3, 4, 5]),
    ([0, 1, 2], [3, 4, 5], [3, 4, 5], [0, 1, 2]),
    ([0, 1, 4], [2, 3, 5], [0], [1, 2, 3, 4, 5]),
    ([4, 0], [1, 2, 3, 5], [0], [1, 2, 3, 5, 4]),
]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SGD", "automatic"), ("AdamW", "foreach"), ("AdamW", "fused"), *CASES[-2:]],
)
@pytest.mark.parametrize("write", WRITING)
@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("number", range(len(MOVES)))
def test_parameter_that_moves_to_another_rate_has_that_rate(
    name, kind, write, stepped, number
):
    first, second, *later = MOVES[number]
    model = net()
    params = [*model.parameters()]
    groups = [
        {"params": [params[i] for i in first]},
        {"params": [params[i] for i in second], "lr": LR / 2},
    ]
    _, judge = pair(name, kind, model)
    optimizer = make(name, groups, "no_bias_norm", model=model, **KINDS[kind])
    judge.decay([*RIGHT.values()])
    for step in range(4):
        if step == stepped:
            for index, own in enumerate(later):
                write(optimizer, index, [params[i] for i in own])
        standing = later if step >= stepped else (first, second)
        for i, group in enumerate(judge.optimizer.param_groups):
            group["lr"] = LR if i in standing[0] else LR / 2
        attacks.set_grads(params, step)
        attacks.set_grads(judge.params, step)
        optimizer.step()
        judge.optimizer.step()
        judge.require(params, optimizer)


def test_classes_of_three_keys_are_found_by_pickle():
    things: Any = [*THREE.values()]
    assert pickled(things) == things


def test_a_shallow_copy_and_its_original_split_and_write_as_one():
    """They share groups, as in torch; parts that one makes are the other's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twin = copy.deepcopy(model)
    cls = selective(torch.optim.NAdam)
    one = cls(model, lr=0.01, weight_decay=0.1, wd_policy="no_bias")
    other = copy.copy(one)
    by_hand = param_groups(twin, "no_bias", 0.1)
    reference = torch.optim.NAdam(by_hand, lr=0.01)
    edits = [
        lambda o: o.param_groups[0].update(maximize=True),
        lambda o: setattr(o, "wd_policy", "no_bias"),
        lambda o: o.param_groups[0]["params"].reverse(),
        lambda o: o.param_groups[0].update(maximize=False, lr=0.02),
    ]
    for number in range(12):
        edits[number % 4](one)
        for group in reference.param_groups:
            group["maximize"] = one.param_groups[0]["maximize"]
            group["lr"] = one.param_groups[0]["lr"]
        for params in zip(model.parameters(), twin.parameters()):
            for param in params:
                param.grad = torch.full_like(param, 0.1 * (number - 5))
        (one, other)[number % 3 == 0].step()
        reference.step()
        assert_same(model, twin)
