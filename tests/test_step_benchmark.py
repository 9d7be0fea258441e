from __future__ import annotations

import gc
import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step import __main__ as command
from benchmarks.step import arms as step_arms
from benchmarks.step import cases as step_cases
from benchmarks.step import goals as step_goals
from benchmarks.step import measure, once
from benchmarks.step import tables as step_tables
from benchmarks.step.bare import BareKernel
from benchmarks.step.cases import CASES, Case, case_named
from benchmarks.step.gpu import run as gpu_run
from benchmarks.step.measure import (
    EventClock,
    HostClock,
    clock_for,
    interleave,
    ratio,
    spread,
    warm_up,
)
from benchmarks.step.results import (
    QUICK,
    default_path,
    describe_run,
    load,
    run_case,
    save,
)
from benchmarks.step.workload import Workload

CPU = torch.device("cpu")
SMALL = ((4, 4), (4,), (3, 2), (5,))
PLAIN = Case("tiny", "", (SMALL,))
GROUPED = Case("tiny_layers", "", (SMALL[:2], SMALL[2:]), own_lr=True)
SHARDED = Case("dtensor", "", (SMALL,), sharded=True)
EFFORT = QUICK._replace(rounds=2, seconds=0.0, repeats=2, copied=1 << 10)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Leave what earlier tests made out of the collections of every measurement."""
    gc.collect()
    gc.freeze()


SIZES = [
    # name, tensors, elements, groups
    ("tiny", 1000, 10_000, 1),
    ("small", 1000, 64_000, 1),
    ("small_busy", 1000, 64_000, 1),
    ("resnet50", 161, 25_557_032, 1),
    ("vit_s", 152, 22_050_664, 1),
    ("vit_s_layers", 152, 22_050_664, 26),
    ("vit_l", 296, 304_326_632, 1),
    ("vit_l_layers", 296, 304_326_632, 26),
    ("vit_l_bf16", 296, 304_326_632, 1),
    ("decoder", 146, 1_235_814_400, 1),
    ("tiny_layers", 1000, 10_000, 26),
    ("tiny_layers_tensors", 1000, 10_000, 26),
    ("tiny_scaled", 1000, 10_000, 1),
    ("tiny_groups", 1000, 10_000, 1000),
    ("tiny_groups_lr", 1000, 10_000, 1000),
    ("dtensor", 1000, 10_000, 1),
]
MODELS = [
    ("resnet50", "torchvision.models", "resnet50"),
    ("vit_s", "timm.models.vision_transformer", "vit_small_patch16_224"),
    ("vit_l", "timm.models.vision_transformer", "vit_large_patch16_224"),
]


@pytest.mark.parametrize(("name", "tensors", "elements", "groups"), SIZES)
def test_case_has_the_size_of_its_network(name, tensors, elements, groups):
    case = case_named(name)
    actual = len(case.shapes), case.elements, len(case.groups)
    assert actual == (tensors, elements, groups)


def test_every_case_has_a_row_of_sizes():
    assert [case.name for case in CASES] == [row[0] for row in SIZES]


@pytest.mark.integration
@pytest.mark.parametrize(("name", "module", "model"), MODELS)
def test_case_has_the_shapes_of_the_real_model(name, module, model):
    make = getattr(pytest.importorskip(module), model)
    with torch.device("meta"):
        expected = [tuple(param.shape) for param in make().parameters()]
    assert case_named(name).shapes == expected


@pytest.mark.parametrize(
    ("case", "rates"), [(PLAIN, 1), (GROUPED, 2), (case_named("tiny_layers"), 26)]
)
def test_groups_have_as_many_learning_rates_as_the_case_says(case, rates):
    groups = step_arms.groups_of(Workload(case, CPU), "sgd")
    assert len({group["lr"] for group in groups}) == rates


def three_steps(case, optimizer, build):
    work = Workload(case, CPU)
    step = build(work, optimizer)
    for _ in range(3):
        work.refresh()
        step()
        for param in work.params:  # else a wrong beta would not show
            param.grad.mul_(-0.5)
    return work.params


def bare(work, optimizer):
    groups = step_arms.hand_split(work, optimizer)
    kernel = BareKernel(groups, optimizer, step_arms.SETTINGS[optimizer])

    def step():
        kernel.fetch()
        kernel.step()
        for call in kernel.calls:  # the part of an optimizer that the floor lacks
            torch._foreach_add_(call.steps, 1)

    return step


def bare_alone(work, optimizer):
    """Split at a size that some of the tensors have, so that there are both calls."""
    groups = step_arms.hand_split(work, optimizer)
    kernel = BareKernel(groups, optimizer, step_arms.SETTINGS[optimizer], alone=6)
    assert [call.alone for call in kernel.calls] == sorted(
        call.alone for call in kernel.calls
    )

    def step():
        before = torch.get_num_threads()
        kernel.fetch()
        kernel.step()
        assert torch.get_num_threads() == before
        for call in kernel.calls:
            torch._foreach_add_(call.steps, 1)

    return step


ARMS = [
    ("bare", bare),
    ("bare, small on one", bare_alone),
    ("ours", lambda *args: step_arms.build_ours(*args).step),
]


@pytest.mark.parametrize("case", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("optimizer", list(step_arms.CLASSES))
@pytest.mark.parametrize(("name", "build"), ARMS)
def test_arms_do_the_work_of_torch(name, build, optimizer, case):
    def fused(work, optimizer):
        return step_arms.build_torch(work, optimizer, fused=True).step

    actual = three_steps(case, optimizer, build)
    expected = three_steps(case, optimizer, fused)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_gradients_are_other_objects_at_every_step():
    work = Workload(PLAIN, CPU)
    work.refresh()
    before = [param.grad for param in work.params]
    work.refresh()
    assert not any(p.grad is old for p, old in zip(work.params, before, strict=True))


class Accelerator:
    """Stands in for ``torch.cuda``: a clock that its own calls advance."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def synchronize(self):
        self.log.append("synchronize")

    def work(self):
        self.log.append("work")
        self.now += 2.5

    def Event(self, enable_timing):  # torch's name
        def record():
            self.log.append("record")
            event.time = self.now

        event = SimpleNamespace(record=record)
        event.elapsed_time = lambda end: end.time - event.time
        return event

    def reset_peak_memory_stats(self):
        self.log.append("reset")

    def memory_allocated(self):
        return 1000

    def max_memory_allocated(self):
        return 1024


def test_event_clock_times_between_synchronizations():
    device = Accelerator()
    assert EventClock(device)(device.work) == 2.5
    assert device.log == ["synchronize", "record", "work", "record", "synchronize"]


def test_peak_on_accelerator_counts_from_what_was_there():
    device = Accelerator()
    assert measure.peak_on_accelerator(device, device.work) == 24
    assert device.log == ["synchronize", "reset", "work", "synchronize"]


def test_clock_follows_the_device():
    kinds = [type(clock_for(torch.device(name))) for name in ("cpu", "cuda")]
    assert kinds == [HostClock, EventClock]


def test_peak_on_cpu_sees_memory_that_is_given_back():
    extra = measure.peak_extra(CPU, lambda: torch.ones(1000).add(1).sum().item())
    assert extra >= 8000


def counting_arm(name, log):
    return step_arms.Arm(name, lambda: log.append(name), lambda: None)


def test_interleave_begins_each_round_with_another_arm():
    log = []
    arms = [counting_arm(name, log) for name in "abc"]
    times = interleave(arms, HostClock(), rounds=3, seconds=0.0)
    assert "".join(log) == "abc" + "aaabbbccc" + "bbbcccaaa" + "cccaaabbb"
    assert {name: list(map(len, rounds)) for name, rounds in times.items()} == {
        name: [2, 2, 2] for name in "abc"
    }


def test_warm_up_leaves_out_an_arm_that_cannot_run():
    def fail():
        raise RuntimeError("no such kernel\nand a long trace")

    log = []
    arms = [counting_arm("a", log), step_arms.Arm("b", fail, lambda: None)]
    able, errors = warm_up(arms, HostClock())
    assert [arm.name for arm in able] == ["a"]
    assert errors == {"b": "RuntimeError: no such kernel"}


def test_ratio_is_taken_round_by_round():
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, 1.2, 2.8)
    assert spread([5.0]) == (5.0, 5.0, 5.0)


def test_compiled_arm_joins_where_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step: step)
    asked = [(PLAIN, True), (PLAIN, False), (case_named("tiny_groups"), True)]
    arms = [
        step_arms.make_arms(Workload(case, CPU), None, "sgd", compiled)
        for case, compiled in asked
    ]
    names = [[arm.name for arm in each] for each in arms]
    assert [step_arms.COMPILED in each for each in names] == [True, False, False]


def test_case_too_large_for_the_memory_is_left_out(monkeypatch, capsys):
    def run_case(*args):
        raise torch.OutOfMemoryError("needs 80 GB")

    monkeypatch.setattr(command.runs, "run_case", run_case)
    monkeypatch.setattr(command.runs, "run_once", lambda *args: {})
    results = command.measure(
        command.parse(["--case", "decoder", "--optimizer", "sgd"])
    )
    assert results["cases"] == []
    assert "left out, needs 80 GB" in capsys.readouterr().out


@pytest.fixture(scope="module")
def results():
    cases = [(PLAIN, "sgd"), (PLAIN, "adamw"), (GROUPED, "adamw")]
    return {
        "run": describe_run(CPU, quick=True),
        "once": {
            "build_ms": {
                step_arms.OURS: {"median": 12.0, "p10": 11.0, "p90": 13.0},
            },
            "import_ms": {"median": 31.0, "p10": 30.0, "p90": 32.0},
            "copy_gb_per_s": 10.0,
        },
        "cases": [run_case(*case, CPU, EFFORT, compiled=False) for case in cases],
    }


def test_run_times_every_arm(results):
    bare = [step_arms.BARE, step_arms.ALONE]
    expected = [*bare, *step_arms.TORCH[:3], step_arms.OURS]
    assert [list(record["arms"]) for record in results["cases"]] == [
        expected,
        expected,
        [*expected, step_arms.ONE_GROUP],
    ]


def test_sharded_case_is_compared_with_plain_tensors():
    pytest.importorskip("torch.distributed.tensor")
    record = run_case(SHARDED, "adamw", CPU, EFFORT, compiled=False)
    assert {step_arms.BARE, step_arms.OURS, step_arms.PLAIN} <= set(record["arms"])


def test_saved_run_reads_back_the_same(results, tmp_path):
    save(results, tmp_path / "new" / "run.json")
    actual = load(tmp_path / "new" / "run.json")
    assert actual == json.loads(json.dumps(results))


@pytest.mark.parametrize(
    ("device", "name"), [("cpu", "cpu_torch2.13.0_2026-01-31.json"),
                         ("cuda", "nvidia-h200_torch2.13.0_2026-01-31.json")]
)  # fmt: skip
def test_file_is_named_by_device_torch_and_date(device, name):
    run = {"device": device, "device_name": "NVIDIA H200", "torch": "2.13.0+cpu"}
    assert default_path({**run, "date": "2026-01-31"}).name == name


def made_up(device, ms, **record):
    arms = {
        name: {
            "ms": {"median": value},
            "round_ms": [value],
            "peak_extra_bytes": 8,
        }
        for name, value in ms.items()
    }
    base = {"case": "tiny", "optimizer": "adamw", "elements": 10, "arms": arms}
    once = {
        "build_ms": {step_arms.OURS: {"median": 12.0}},
        "import_ms": {"median": 31.0},
        "copy_gb_per_s": 1000.0,
    }
    return {"run": {"device": device}, "once": once, "cases": [{**base, **record}]}


GOALS = [
    # device, ms of each arm, record, verdicts in order
    ("cpu", {"ours": 1.5, "bare kernel": 1.0, "torch fused": 7.6}, {},
     [True, True, True, False]),
    ("cpu", {"ours": 1.6, "bare kernel": 1.0, "torch fused": 7.6}, {},
     [False, False, True, False]),
    ("cpu", {"ours": 1.0, "torch default": 4.0, "torch fused": 9.0},
     {"case": "dtensor"}, [False, True, False]),
]  # fmt: skip


@pytest.mark.parametrize(("device", "ms", "record", "expected"), GOALS)
def test_goals_say_what_is_met(device, ms, record, expected):
    verdicts = step_goals.verdicts(made_up(device, ms, **record))
    assert [verdict.met for verdict in verdicts] == expected


def test_every_goal_names_a_case():
    assert {goal.case for goal in step_goals.GOALS} <= {case.name for case in CASES}


def test_tables_show_arms_and_goals(results):
    lines = [
        *step_tables.case_lines(results["cases"][0]),
        *step_tables.once_lines(results),
        *step_tables.share_lines(results),
        *step_tables.goal_lines(results),
    ]
    text = "\n".join(lines)
    assert all(arm in text for arm in results["cases"][0]["arms"])
    assert "NOT MET  import after torch: at most 30 ms" in text
    assert "met      build from 1,000 parameters: at most 20 ms" in text


def test_large_cases_run_on_a_cpu_only_when_asked_for():
    by_default = command.chosen_cases(None, CPU)
    assert not any(case.large for case in by_default)
    on_cuda = command.chosen_cases(None, torch.device("cuda"))
    assert {case.name for case in on_cuda} == set(gpu_run.CASES)
    assert command.chosen_cases(["decoder"], CPU) == [case_named("decoder")]


def test_command_saves_a_run(monkeypatch, tmp_path, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(command, "CASES", (PLAIN,))
    monkeypatch.setattr(command.runs, "QUICK", EFFORT)
    monkeypatch.setattr(command.runs, "import_time", lambda _: spread([1.0]))
    path = tmp_path / "run.json"
    command.main(["--quick", "--optimizer", "sgd", "--json", str(path)])
    torch.set_num_threads(threads)
    assert [record["case"] for record in load(path)["cases"]] == ["tiny"]
    assert f"saved as {path}" in capsys.readouterr().out


def test_picture_is_drawn_beside_the_saved_run(results, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    path = tmp_path / "run.json"
    save(results, path)
    command.main(["--picture", str(path)])
    assert capsys.readouterr().out == f"{tmp_path / 'run.png'}\n"
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_picture_leaves_out_what_did_not_run():
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    picture = importlib.import_module("benchmarks.step.picture")
    record = made_up("cpu", {"ours": 3.0, "bare kernel": 2.0})["cases"][0]
    assert picture.over_bare(record) == {"ours": (1.5, 1.5, 1.5)}
    del record["arms"]["bare kernel"]["round_ms"]
    assert picture.over_bare(record) == {}


def test_construction_is_timed_on_1000_parameters():
    model = once.model_of_1000()
    assert len(list(model.parameters())) == 1000
    assert [len(g["params"]) for g in once.split_by_hand(model)] == [250, 750]


def test_layers_of_the_small_vit_are_half_blocks():
    sizes = [len(group) for group in case_named("vit_s_layers").groups]
    assert sizes == [4, *[6] * 24, 4]
    assert len(step_cases.vit(384, 12)) == 26


def test_busy_processes_end_with_the_block():
    before = set(children())
    with pytest.raises(RuntimeError, match="stop"):
        run_busy()
    assert set(children()) == before


def run_busy():
    with measure.busy_processes(2):
        assert len(children()) >= 2
        raise RuntimeError("stop")


def children():
    """List the processes that this one has started and that still run."""
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    if not own.exists():
        pytest.skip("needs a list of processes, which Linux has in /proc")
    return own.read_text().split()


def test_goals_of_a_busy_machine_are_held_to_mean_and_percentile():
    def arm(mean, p90):
        return {"mean_ms": mean, "ms": {"median": 1.0, "p10": 1.0, "p90": p90}}

    record = {
        "case": "small_busy",
        "optimizer": "adamw",
        "arms": {"ours": arm(2.0, 3.0), "torch default": arm(2.5, 2.9)},
    }
    mean, percentile = step_goals._of_busy(record)
    assert (mean.met, percentile.met) == (True, False)
    assert percentile.measured == "3.00 and 2.90 ms"
