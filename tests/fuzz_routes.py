"""Random edits to `Routed` and to torch's optimizers over hand-split groups, compared.

The twin has one of torch's optimizers per route, with a group for each parameter, the
finest split; its groups are written before every step from what should be.

    python -m tests.fuzz_routes --sequences 2000 --seed 0
"""

import argparse
import copy
import pickle
import random
import warnings

import torch
from torch import nn

from selective_optim import SGD, AdamW, Routed
from selective_optim.policies.predicates import is_embedding, is_matrix
from tests.support.attacks import Lines
from tests.support.compare import assert_same
from tests.support.others import in_another_thread
from tests.support.routes import Body

FIRST = (Body, {"lr": 0.02}), (SGD, {"lr": 0.1, "momentum": 0.9})
REST = (AdamW, {"lr": 0.01}), (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5})
POLICIES = {
    "all": lambda name: True,
    "no_bias": lambda name: not name.endswith("bias"),
    "no_bias_norm": lambda name: name in ("0.weight", "1.weight"),
}
STEPS = 12


class World:
    """Ours and the twins, and by the number of a parameter what should be."""

    def __init__(self, rng):
        self.rng, self.drawn, self.policy = rng, rng.randrange(10**6), "no_bias_norm"
        self.models, self.params, self.theirs, self.names = nn.ModuleList(), [], [], []
        self.layout, self.numbers = [], []  # of groups: parameters; route and numbers
        routes = zip(("first", "rest"), (is_matrix & ~is_embedding, "*"))
        drawn = rng.choice(FIRST), rng.choice(REST)
        self.routes = {n: (s, *own) for (n, s), own in zip(routes, drawn)}
        self.ours = self.make([{"params": self.grow()} for _ in range(2)])
        self.twins = {}
        for name, (_, cls, given) in self.routes.items():
            fused = {"fused": True} if cls in (SGD, AdamW) else {}
            params = [{"params": [self.theirs[i]]} for i, n in self.here(name)]
            torchs = getattr(torch.optim, cls.__name__)
            self.twins[name] = torchs(params, weight_decay=0.3, **given, **fused)

    def make(self, groups):
        given = {"weight_decay": 0.3, "wd_policy": self.policy}
        return Routed(groups, self.routes, model=[*self.models], **given)

    def here(self, route=None):
        pairs = [(i, n) for own, n in zip(self.layout, self.numbers) for i in own]
        return [pair for pair in pairs if route in (None, pair[1]["route"])]

    def decay(self, i, numbers):
        return numbers["weight_decay"] * POLICIES[self.policy](self.names[i])

    def grow(self):
        torch.manual_seed(self.drawn + len(self.params))
        block = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        count = len(self.params)
        self.models.append(block)
        self.params += block.parameters()
        self.theirs += copy.deepcopy(block).parameters()
        self.names += [name for name, _ in block.named_parameters()]
        for route, own in (("first", [1]), ("rest", [0, 2, 3, 4])):
            self.layout.append([count + i for i in own])
            lr = self.routes[route][2]["lr"]
            self.numbers.append({"route": route, "lr": lr, "weight_decay": 0.3})
        return list(block.parameters())

    def step(self):
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        for mine, other in zip(self.params, self.theirs):
            drawn = torch.randn(mine.shape, generator=generator)
            there = self.rng.random() < 0.8
            mine.grad, other.grad = (drawn, drawn.clone()) if there else (None, None)
        for name, twin in self.twins.items():
            before = {g["params"][0]: g for g in twin.param_groups}
            like, twin.param_groups[:] = dict(twin.param_groups[0]), []
            for i, numbers in self.here(name):
                own = {"lr": numbers["lr"], "weight_decay": self.decay(i, numbers)}
                group = before.get(self.theirs[i], {**like, "params": [self.theirs[i]]})
                twin.param_groups.append({**group, **own})
            twin.step()
        self.rng.choice([lambda step: step(), in_another_thread])(self.ours.step)

    def require(self):
        assert_same(self.params, self.theirs)
        states = {p: own for t in self.twins.values() for p, own in t.state.items()}
        mine = [dict(self.ours.state.get(param, {})) for param in self.params]
        assert_same(mine, [dict(states.get(param, {})) for param in self.theirs])
        told = [(r.route, r.lr, r.weight_decay) for r in self.ours.decay_report().rows]
        assert told == [(n["route"], n["lr"], self.decay(i, n)) for i, n in self.here()]

    # Edits.

    def rate(self):
        at, key = (
            self.rng.randrange(len(self.layout)),
            self.rng.choice(["lr", "weight_decay"]),
        )
        self.numbers[at][key] *= 0.5
        self.ours.param_groups[at][key] = self.numbers[at][key]

    def decide(self):
        self.ours.wd_policy = self.policy = self.rng.choice([*POLICIES])

    def add(self):
        self.ours.add_param_group({"params": self.grow(), "model": self.models[-1]})

    def reorder(self):
        order = self.rng.sample(range(len(self.layout)), len(self.layout))
        self.layout = [self.layout[i][::-1] for i in order]
        self.numbers = [self.numbers[i] for i in order]
        self.ours.param_groups = [dict(self.ours.param_groups[i]) for i in order]
        for group in self.ours.param_groups:
            group["params"].reverse()

    def move(self):
        a, b = self.rng.sample(range(len(self.layout)), 2)
        if self.numbers[a]["route"] == self.numbers[b]["route"] and self.layout[a][1:]:
            self.layout[b].append(self.layout[a].pop())
            groups = self.ours.param_groups
            groups[b]["params"].append(groups[a]["params"].pop())

    def renew(self):
        """Put new tensors where parameters stand, as Accelerate and FSDP do."""
        keep = self.rng.random() < 0.5
        self.ours.decay_report()  # after a move, strangers in a group are refused
        sides = (self.params, [self.ours]), (self.theirs, [*self.twins.values()])
        for params, optimizers in sides:
            new = {p: nn.Parameter(p.detach().clone()) for p in params}
            params[:] = new.values()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["params"] = [new[p] for p in group["params"]]
                for param in [p for p in new if p in optimizer.state]:
                    state = optimizer.state.pop(param)
                    optimizer.state.update({new[param]: state} if keep else {})
        rest = iter(self.params)
        for module in self.models.modules():
            for name, _ in list(module.named_parameters(recurse=False)):
                setattr(module, name, next(rest))
        self.ours.decay_report()

    def load(self):
        saved = pickle.loads(pickle.dumps(self.ours.state_dict()))
        if self.rng.random() < 0.5:
            self.ours = self.make([dict(group) for group in self.ours.param_groups])
        self.ours.load_state_dict(saved)

    def copied(self):
        way = self.rng.choice([copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
        self.models, self.params, self.ours = way((self.models, self.params, self.ours))

    def shallow(self):
        self.ours = self.rng.choice([self.ours, copy.copy(self.ours)])

    def interrupted(self):
        """Press Ctrl+C somewhere in what changes nothing, and do it again."""
        self.ours.zero_grad()
        ours, policy = self.ours, self.policy
        ways = [ours.step, ours.state_dict, lambda: setattr(ours, "wd_policy", policy)]
        way = self.rng.choice([*ways, ours.decay_report, lambda: copy.deepcopy(ours)])
        if Lines(self.rng.randrange(400)).run(way):
            way()


EDITS = [n for n in vars(World) if n[0] != "_"][6:]


def run(seed):
    """Run one sequence, and return the edits in it."""
    rng, done = random.Random(seed), []
    try:
        world = World(rng)
        for _ in range(STEPS):
            for name in (*rng.sample(EDITS, rng.randrange(3)), "step", "require"):
                done.append(name)
                getattr(world, name)()
    except BaseException as error:
        classes = [cls.__name__ for _, cls, _ in world.routes.values()]
        error.add_note(f"seed {seed}, {classes}: {' '.join(done)}")
        raise
    return done


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for seed in range(given.seed, given.seed + given.sequences):
        run(seed)
    print(f"{given.sequences} sequences, no difference")


if __name__ == "__main__":
    main()
