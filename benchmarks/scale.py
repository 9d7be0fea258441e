"""What is paid per parameter, beside fused AdamW over groups split by hand.

python -m benchmarks.scale --json

Three arms take turns, each round over new models: ours, torch's and torch's again,
which shows how far equal arms differ. The collector runs as it does for users. All runs
on one thread, of which the time on the processor counts: what else the machine does is
left out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import nn

from benchmarks.step.measure import in_turn, ratio
from benchmarks.step.once import split_by_hand
from benchmarks.step.results import FOLDER, describe_run, save
from selective_optim import AdamW, decay_report

# torch takes groups one by one, and asks of each whether any before has its parameters:
# 40,000 groups would take minutes to make. Loading, it looks each tensor up in a list.
ONE_GROUP = (10, 1_000, 10_000, 40_000, 100_000)
MANY_GROUPS = (10, 1_000, 2_000)
LOADED, COPIED = 10_000, 4_000  # most tensors that torch loads, and of timed copies
OURS, HAND, AGAIN = ARMS = ("ours", "by hand", "by hand again")


def model_of(tensors: int) -> nn.Module:
    """Make a model of blocks as deep in names as those of today."""
    torch.manual_seed(0)
    count, rest = divmod(tensors, 4)
    body = [nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)) for _ in range(count)]
    heads = [nn.Linear(4, 2) for _ in range(rest // 2)]
    model = nn.ModuleDict({"body": nn.ModuleList(body), "heads": nn.ModuleList(heads)})
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    return model


def one_each(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every parameter a group of its own."""
    return [{**group, "params": [p]} for group in groups for p in group["params"]]


def build(arm: str, model: nn.Module, many: bool) -> Any:
    if arm == OURS:
        groups: Any = model.parameters()
        if many:
            groups = [{"params": [param]} for param in groups]
        kept = {"wd_policy": "no_bias_norm", "model": model} if many else {}
        return AdamW(groups, weight_decay=0.1, **kept or {"wd_policy": "no_bias_norm"})
    split = split_by_hand(model)
    groups = one_each(split) if many else split
    return torch.optim.AdamW(groups, weight_decay=0.1, fused=True)


def life(arm: str, tensors: int, many: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """List what an optimizer goes through, in order, to be timed."""
    model = model_of(tensors)
    made: list[Any] = []
    yield "construction", lambda: made.append(build(arm, model, many))
    (optimizer,) = made
    yield "first step", optimizer.step
    optimizer.step()
    yield "steady step", optimizer.step
    saved: list[Any] = []
    yield "first state_dict", lambda: saved.append(optimizer.state_dict())
    yield "state_dict", optimizer.state_dict
    resumed = build(arm, model, many)
    if arm == OURS or tensors <= LOADED:
        yield "load_state_dict", lambda: resumed.load_state_dict(saved[0])
        yield "step after loading", resumed.step
    if tensors <= COPIED:
        yield "deepcopy", lambda: copy.deepcopy(optimizer)
        yield "pickle", lambda: pickle.dumps(optimizer)
        yield "report", partial(decay_report, optimizer, model)


def times(arm: str, tensors: int, many: bool) -> dict[str, float]:
    """Time each thing once, in microseconds per parameter."""
    taken = {}
    for name, call in life(arm, tensors, many):
        gc.collect()  # or one arm would pay for what another left
        start = process_time()
        call()
        taken[name] = (process_time() - start) * 1e6 / tensors
    return taken


def memory(arm: str, tensors: int, many: bool) -> dict[str, float]:
    """Return the bytes of Python's per parameter that stay, tensors' own left out."""
    model = model_of(tensors)
    gc.collect()
    tracemalloc.start()
    optimizer = build(arm, model, many)
    gc.collect()
    made = tracemalloc.get_traced_memory()[0] / tensors
    optimizer.step()
    gc.collect()
    stepped = tracemalloc.get_traced_memory()[0] / tensors
    tracemalloc.stop()
    return {"made": made, "stepped": stepped}


def compare(tensors: int, many: bool, rounds: int) -> dict[str, Any]:
    """Measure one number of parameters, in one group or in as many."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for turn in range(rounds):
        for arm in in_turn(ARMS, turn):  # type: ignore[arg-type,type-var]  # names
            found[str(arm)].append(times(str(arm), tensors, many))
    told: dict[str, dict[str, Any]] = {}
    for name in found[OURS][0]:
        ours = [each[name] for each in found[OURS]]
        told[name] = {"ours_us": median(ours)}
        if name in found[HAND][0]:
            hand, again = ([each[name] for each in found[arm]] for arm in (HAND, AGAIN))
            told[name] |= {
                "hand_us": median(hand),
                "ratio": ratio(ours, hand)._asdict(),
                "again": ratio(again, hand)._asdict(),
            }
    few = tensors <= LOADED
    held = {arm: memory(arm, tensors, many) for arm in (OURS, HAND) if few}
    return {"tensors": tensors, "groups": many, "costs": told, "bytes": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="*", default=ONE_GROUP)
    parser.add_argument("--groups", type=int, nargs="*", default=MANY_GROUPS)
    parser.add_argument("--work", type=int, default=20_000, help="tensors of an arm")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = describe_run(torch.device("cpu"), quick=False)
    results["cases"] = []
    compare(100, False, 3)  # nothing is imported or compiled later
    sizes = [(n, False) for n in options.tensors] + [(n, True) for n in options.groups]
    for tensors, many in sizes:
        rounds = min(5, max(2, options.work // tensors))
        case = compare(tensors, many, rounds)
        results["cases"].append(case)
        print(f"{tensors:,} tensors in {'as many groups' if many else 'one group'}:")
        for name, cost in case["costs"].items():
            print(f"  {name:18} {cost['ours_us']:8.2f} us ", end="")
            ratios = [cost[key]["median"] for key in ("ratio", "again") if key in cost]
            print(*[f"{each:.2f}" for each in ratios], sep=", ")
        print(f"  bytes {case['bytes']}", flush=True)
    if options.json:
        release = torch.__version__.split("+")[0]
        save(results, FOLDER / f"scale_torch{release}_{results['date']}.json")


if __name__ == "__main__":
    main()
