"""Every optimizer class at hand, through `selective` and with groups split by hand.

`python -m tests.any_class_survey` prints a line per library, and with `--all` one per
class; `--json benchmarks/results/any_class_DATE.json` saves what the page shows.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.step.results import describe_run
from selective_optim import selective
from selective_optim.policies import form
from selective_optim.step.setting import FLAGS

STEPS = 8
RESUMED_AT = 4
MULTIPLIERS = {"weight": 1.0, "bias": 0.0, "half": 0.5}


@dataclass(frozen=True)
class Survey:
    """One class to try.

    Args:
        library: Whose it is.
        name: What that calls it.
        cls: The class.
        arguments: For its constructor, beside rate and decay.
        matrices: Whether it takes matrices alone.
        group: Keys for every group.
        lrs: Rates of the two groups.
    """

    library: str
    name: str
    cls: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    matrices: bool = False
    group: dict[str, Any] = field(default_factory=dict)
    lrs: tuple[float, float] = (0.01, 0.005)

    @property
    def id(self) -> str:
        return f"{self.library}-{self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of it: "exact", "refused", "not run" or "different", and why."""

    kind: str
    reason: str = ""


class Net(nn.Module):
    """A stem, a norm, a body of 4,096 elements that 8-bit states take, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 64)
        self.norm = nn.LayerNorm(64)
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.norm(self.stem(x)))))


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def multiplier(name: str) -> float:
    if name == "body.weight":
        return 0.5
    return 1.0 if name.endswith("weight") and "norm" not in name else 0.0


def policy(info: Any) -> float:
    return multiplier(info.name)


def user_groups(case: Survey, net: Net) -> list[dict[str, Any]]:
    """Make two groups with a rate each, one of which starts with an exempt bias."""
    named = {
        n: p for n, p in net.named_parameters() if p.ndim == 2 or not case.matrices
    }
    head = [pair for pair in reversed(named.items()) if pair[0].startswith("head")]
    rest = [pair for pair in named.items() if not pair[0].startswith("head")]
    return [
        {"params": rest, "lr": case.lrs[0], **case.group},
        {"params": head, "lr": case.lrs[1], **case.group},
    ]


def by_hand(case: Survey, net: Net) -> Any:
    groups = []
    for group in user_groups(case, net):
        split: dict[float, list[Any]] = {}
        for name, param in group["params"]:
            split.setdefault(multiplier(name), []).append((name, param))
        groups += [
            {**group, "params": params, "weight_decay": 0.1 * m}
            for m, params in split.items()
        ]
    return case.cls(groups, **case.arguments)


def by_policy(case: Survey, net: Net) -> Any:
    groups = user_groups(case, net)
    for group in groups:
        group["weight_decay"] = 0.1
    return selective(case.cls)(groups, **case.arguments, wd_policy=policy, model=net)


def flag_in(case: Survey) -> str | None:
    """Find the key by which a group of the class chooses its form."""
    with suppress(Exception), redirect_stdout(io.StringIO()):
        group = by_hand(case, make_net()).param_groups[0]
        return next((flag for flag in FLAGS if flag in group), None)
    return None


def forms_by_hand(case: Survey, net: Net) -> Any:
    """Let the first group decay one way and the second the other."""
    first, second = user_groups(case, net)
    flag = flag_in(case)
    groups = [{**first, flag: True}, {**second, flag: False}]
    return case.cls([{**g, "weight_decay": 0.1} for g in groups], **case.arguments)


def forms_by_policy(case: Survey, net: Net) -> Any:
    groups = [{**g, "weight_decay": 0.1} for g in user_groups(case, net)]
    forms = form("l2", "head.*") * form("decoupled", "[!h]*")
    arguments = {**case.arguments, "wd_policy": forms, "model": net}
    return selective(case.cls)(groups, **arguments)


def forms_are_computed(case: Survey) -> bool:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        arms = [train(case, make, False) for make in (forms_by_policy, forms_by_hand)]
        return equal(*arms)


class Training:
    """One arm: a net, its optimizer, and how that wants to be stepped."""

    def __init__(self, case: Survey, make: Callable[[Survey, Net], Any]) -> None:
        self.case, self.make = case, make
        self.net = make_net()
        self.optimizer = make(case, self.net)

    def loss(self) -> torch.Tensor:
        torch.manual_seed(1000 + self.step)
        x = torch.randn(8, 16)
        return (self.net(x) - torch.randn(8, 4)).square().mean()

    def backward(self, **arguments: Any) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward(**arguments)
        return loss

    def run(self, step: int) -> None:
        self.step = step
        for group in self.optimizer.param_groups:
            rate = group["lr"] * (0.5 if step % 2 else 1.5)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        torch.manual_seed(step)
        # Some keep the graph's second derivatives, and some need a closure.
        loss = self.backward(create_graph=needs_graph(self.case))
        torch.manual_seed(2000 + step)
        if self.case.name.lower() == "kron":  # balances where numpy's chance says so
            import_module("numpy").random.seed(step)
        if self.case.name == "alig":
            self.optimizer.step(lambda: float(loss))
        elif needs_closure(self.case):
            self.optimizer.step(self.backward)
        else:
            self.optimizer.step()

    def resume(self) -> None:
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        saved = io.BytesIO()
        torch.save(self.optimizer.state_dict(), saved)
        saved.seek(0)
        self.optimizer = self.make(self.case, self.net)
        self.optimizer.load_state_dict(torch.load(saved, weights_only=False))


def needs_graph(case: Survey) -> bool:
    return case.name.lower() in ("adahessian", "sophiah")


def needs_closure(case: Survey) -> bool:
    return case.name.lower() == "bsam" or case.name.endswith("Closure")


def train(case: Survey, make: Callable[[Survey, Net], Any], resume: bool) -> Training:
    training = Training(case, make)
    for step in range(STEPS):
        if resume and step == RESUMED_AT:
            training.resume()
        training.run(step)
    return training


def equal(ours: Training, theirs: Training) -> bool:
    pairs = list(zip(ours.net.parameters(), theirs.net.parameters()))
    return all(torch.equal(a, b) for a, b in pairs) and all(
        same_state(ours.optimizer.state.get(a, {}), theirs.optimizer.state.get(b, {}))
        for a, b in pairs
    )


def same_state(actual: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            same_state(actual[key], value) for key, value in expected.items()
        )
    if isinstance(expected, (list, tuple)):
        return len(actual) == len(expected) and all(map(same_state, actual, expected))
    if type(expected) in (torch.Tensor, nn.Parameter):
        return torch.equal(actual, expected) or bool(expected.isnan().any())
    if isinstance(expected, (int, float, str, bool)):
        return bool(actual == expected) or expected != expected
    return True  # a subclass of tensors, a generator: told by the parameters


def judge(case: Survey) -> Outcome:
    """Compare a class with itself over groups split by hand."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            selective(case.cls)
        except TypeError as error:
            return Outcome("refused", _brief(error))
        try:
            expected = train(case, by_hand, resume=False)
        except Exception as error:
            return Outcome("not run", _brief(error))
        if not moved(expected):
            return Outcome("not run", "it changes nothing here")
        try:
            actual = train(case, by_policy, resume=False)
        except ValueError as error:
            return Outcome("refused", _brief(error))
        if not equal(actual, expected):
            return Outcome("different", "from groups split by hand")
        return _judge_resumed(case, expected)


def _judge_resumed(case: Survey, expected: Training) -> Outcome:
    try:
        resumed = train(case, by_hand, resume=True)
    except Exception as error:
        return Outcome("exact", f"it cannot resume: {_brief(error)}")
    actual = train(case, by_policy, resume=True)
    if equal(actual, expected):
        return Outcome("exact")
    if equal(actual, resumed):
        return Outcome("exact", "it resumes otherwise than it went on, split or not")
    return Outcome("different", "from groups split by hand, when resumed")


def moved(training: Training) -> bool:
    return any(
        not torch.equal(a, b)
        for a, b in zip(training.net.parameters(), make_net().parameters())
    )


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.120}"


# The classes, library by library.


NO_DECAY = ("Optimizer", "LBFGS", "Rprop", "SparseAdam")


def torch_classes() -> Iterator[Survey]:
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name, None)
        if isinstance(cls, type) and name not in NO_DECAY:
            yield Survey("torch", name, cls, needed(cls), matrices=name == "Muon")


def timm_classes() -> Iterator[Survey]:
    timm = import_module("timm.optim")
    for name in timm.list_optimizers():
        info = timm.get_optimizer_info(name)
        try:
            cls = timm.get_optimizer_class(name, bind_defaults=False)
        except AssertionError as error:  # without a device, or without apex
            yield Survey("timm", name, absent(error))  # told when it is made
            continue
        yield Survey("timm", name, cls, {**needed(cls), **(info.defaults or {})})


def absent(error: Exception) -> type:
    class Absent(torch.optim.SGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise error

    return Absent


# What some constructors have no default for, and what makes others run here.
SETTINGS = {"lr": 0.01, "num_iterations": 100, "num_data": 8}
CHOSEN = {"triton": False, "keep_num": 2}


def needed(cls: Any) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters
    chosen = {
        name: value
        for name, value in SETTINGS.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }
    if cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        chosen["fused"] = False  # ours would choose the kernel, and torch the for-loop
    if cls.__module__.startswith("bitsandbytes") and cls.__name__.startswith(
        ("SGD", "LARS")
    ):
        chosen["momentum"] = 0.9  # without, they are not implemented
    if "nesterov" in parameters and "momentum" in parameters:
        chosen["momentum"] = 0.9
    return chosen | {k: v for k, v in CHOSEN.items() if k in parameters}


def classes_in(library: str, module: str, **settings: Any) -> Iterator[Survey]:
    found = import_module(module)
    for name in sorted(name for name in vars(found) if not name.startswith("_")):
        cls = getattr(found, name)
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
            yield Survey(library, name, cls, needed(cls), **settings)


MUONS = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")


def pytorch_optimizer_classes() -> Iterator[Survey]:
    module = import_module("pytorch_optimizer")
    for name in module.get_supported_optimizers():
        cls = module.load_optimizer(name)
        group = {"use_muon": True} if name in MUONS else {}
        matrices = name in (*MUONS, "spectralsphere")
        yield Survey("pytorch_optimizer", name, cls, needed(cls), matrices, group)


LIBRARIES: dict[str, Callable[[], Iterator[Survey]]] = {
    "torch": torch_classes,
    "timm": timm_classes,
    "schedulefree": lambda: classes_in("schedulefree", "schedulefree"),
    # Which refuse groups with different rates.
    "prodigyopt": lambda: classes_in("prodigyopt", "prodigyopt", lrs=(1.0, 1.0)),
    "dadaptation": lambda: classes_in("dadaptation", "dadaptation", lrs=(1.0, 1.0)),
    "lion-pytorch": lambda: classes_in("lion-pytorch", "lion_pytorch"),
    "torch-optimi": lambda: classes_in("torch-optimi", "optimi"),
    "pytorch_optimizer": pytorch_optimizer_classes,
    "torchao": lambda: classes_in("torchao", "torchao.optim"),
    "bitsandbytes": lambda: classes_in("bitsandbytes", "bitsandbytes.optim"),
    "transformers": lambda: [
        Survey(
            "transformers",
            "Adafactor",
            import_module("transformers").Adafactor,
            {"relative_step": False, "scale_parameter": False},
        )
    ],
}


OTHERS = "refused", "not run", "different"


def survey(library: str, every: bool) -> dict[str, Any]:
    """Judge all classes of a library; count the exact ones, and name the others."""
    found: dict[str, Any] = {"exact": 0, **{kind: {} for kind in OTHERS}}
    for case in LIBRARIES[library]():
        outcome = judge(case)
        if outcome.kind == "exact":
            found["exact"] += 1
        else:
            found[outcome.kind][case.name] = outcome.reason
        if every or outcome.kind == "different":
            print(f"{case.id:45} {outcome.kind:10} {outcome.reason}", flush=True)
    return {"library": library, "version": version(library), **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for library in arguments.libraries:
        found.append(survey(library, arguments.all))
        others = (f"{len(found[-1][kind])} {kind}" for kind in OTHERS)
        print(f"{library}: {found[-1]['exact']} exact, {', '.join(others)}", flush=True)
    if arguments.json:
        run = describe_run(torch.device("cpu"), quick=False)
        arguments.json.write_text(json.dumps({**run, "libraries": found}, indent=1))


if __name__ == "__main__":
    main()
