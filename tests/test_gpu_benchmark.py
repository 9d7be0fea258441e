"""The benchmark of a GPU, rehearsed where there is none."""

from __future__ import annotations

import gc
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.step import __main__ as command
from benchmarks.step import on_gpu, workload
from benchmarks.step.arms import BARE, DEFAULT, FUSED, OURS, Arm
from benchmarks.step.cases import CASES, Case
from benchmarks.step.gpu import clock, goals, training
from benchmarks.step.gpu import device as gpu_device
from benchmarks.step.gpu.device import Cuda, StandIn
from benchmarks.step.gpu.run import CASES as CHOSEN
from benchmarks.step.gpu.run import (
    FUSED_GRAPH,
    OURS_GRAPH,
    SCHEDULED,
    run_case,
)
from benchmarks.step.gpu.tables import case_lines, goal_lines, training_lines
from benchmarks.step.measure import spread
from benchmarks.step.results import QUICK, load, save
from benchmarks.step.workload import Workload

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
EFFORT = QUICK._replace(rounds=2, seconds=0.0, repeats=2, copied=1 << 10)
SMALL = ((4, 4), (4,), (3, 2), (5,))


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect():
    """Leave what earlier tests made out of the collections of every measurement."""
    gc.collect()
    gc.freeze()


class Simulated:
    """A host and a device, each with a clock of its own, in milliseconds."""

    def __init__(self, launches=10, depth=1000):
        self.now, self.free_at = 0.0, 0.0
        self.launches_of_a_step, self.depth, self.waiting = launches, depth, []

    def event(self):
        return SimulatedEvent(self)

    def synchronize(self):
        self.now = max(self.now, self.free_at)

    def nap(self, ms):
        self.run(ms)

    def run(self, ms):
        self.free_at = max(self.free_at, self.now) + ms

    def launches(self, step):
        step()
        return self.launches_of_a_step

    def perf_counter(self):
        return self.now / 1e3

    def step(self, host, device, waits=False):
        def step():
            self.waiting = [end for end in self.waiting if end > self.now]
            for _ in range(self.launches_of_a_step):
                if len(self.waiting) >= self.depth:
                    self.now = max(self.now, self.waiting.pop(0))
                self.now += host / self.launches_of_a_step
                self.run(device / self.launches_of_a_step)
                self.waiting.append(self.free_at)
            if waits:
                self.synchronize()

        return Arm("arm", step, lambda: None)


class SimulatedEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = max(self.gpu.now, self.gpu.free_at)

    def query(self):
        return self.gpu.now >= self.time

    def elapsed_time(self, end):
        return end.time - self.time


def measured(monkeypatch, gpu, arm):
    monkeypatch.setattr(clock.time, "perf_counter", gpu.perf_counter)
    return clock.measure(gpu, [arm], rounds=3, limit=60)["arm"]


@pytest.mark.parametrize(("host", "device"), [(2.0, 0.1), (0.1, 2.0)])
def test_host_and_device_are_timed_apart(monkeypatch, host, device):
    gpu = Simulated()
    times = measured(monkeypatch, gpu, gpu.step(host, device))
    assert times.host == pytest.approx([host] * 3)
    assert times.device == pytest.approx([device] * 3)
    assert all(max(host, device) <= ms <= host + device + 1e-9 for ms in times.idle)


@pytest.mark.parametrize("depth", [40, 1000])
def test_no_more_is_launched_during_a_nap_than_the_queue_holds(monkeypatch, depth):
    gpu = Simulated(launches=30, depth=depth)
    times = measured(monkeypatch, gpu, gpu.step(0.5, 0.1))
    assert times.device == pytest.approx([0.1] * 3)
    assert times.steps * 30 <= depth


@pytest.mark.parametrize(
    ("launches", "waits"), [(2002, False), (10, True)], ids=["many", "waits"]
)
def test_step_that_cannot_be_launched_ahead_has_host_times_alone(
    monkeypatch, launches, waits
):
    gpu = Simulated(launches=launches)
    times = measured(monkeypatch, gpu, gpu.step(20.0, 1.0, waits))
    assert times.device == []
    assert times.host == pytest.approx([20.0] * 3, rel=0.1)


def test_measuring_ends_at_its_limit():
    arms = [Arm("arm", lambda: None, lambda: None)]
    times = clock.measure(StandIn(), arms, rounds=10**9, limit=0.05)
    assert 1 <= len(times["arm"].idle) < 10**6


TENSORS = {"own_lr": True, "tensor_lr": True}
REHEARSED = [
    (Case("tiny", "", (SMALL,)), "adamw"),
    (Case("tiny_layers", "", (SMALL[:2], SMALL[2:]), own_lr=True), "sgd"),
    (Case("tiny_layers_tensors", "", (SMALL[:2],) * 2, **TENSORS), "adamw"),
    (Case("tiny_scaled", "", (SMALL,), scaled=True), "sgd"),
    (Case("vit_l_bf16", "", (SMALL,), dtype=torch.bfloat16), "adamw"),
]


@pytest.mark.filterwarnings("ignore:.*hardly decays:UserWarning")  # in bfloat16
@pytest.mark.parametrize(("case", "optimizer"), REHEARSED, ids=str)
def test_every_kind_of_case_is_rehearsed(case, optimizer):
    record = run_case(case, optimizer, CPU, EFFORT, compiled=False, limit=5.0)
    wanted = {BARE, FUSED, OURS, FUSED_GRAPH, OURS_GRAPH}
    assert wanted <= set(record["arms"])
    assert (DEFAULT in record["arms"]) is not case.scaled
    assert all(arm["ms"]["median"] > 0 for arm in record["arms"].values())
    assert FUSED in "\n".join(case_lines(record, 10.0))


def test_chosen_cases_are_cases():
    assert set(CHOSEN) <= {case.name for case in CASES}
    assert {goal.case for goal in goals.GOALS} <= set(CHOSEN)


def arm(device, host=1.0):
    times = {"round_host_ms": [host], "host_ms": spread([host])._asdict()}
    return {"round_ms": [device], "peak_extra_bytes": 0, **times}


JUDGED = [
    # case, optimizer, ours, torch's; verdicts
    ("tiny", "sgd", arm(1.02), arm(1.0), [True]),
    ("tiny", "sgd", arm(1.03), arm(1.0), [False]),
    ("tiny_layers", "adamw", arm(0.7, 0.3), arm(1.0), [True, True, True]),
    ("tiny_layers", "adamw", arm(0.8, 0.31), arm(1.0), [True, False, False]),
    ("tiny_layers", "sgd", arm(1.0, 0.29), arm(1.0), [True, True]),
]


@pytest.mark.parametrize(("case", "optimizer", "mine", "theirs", "expected"), JUDGED)
def test_goals_say_what_is_met(case, optimizer, mine, theirs, expected):
    record = {"case": case, "optimizer": optimizer, "elements": 10}
    results = {"cases": [{**record, "arms": {OURS: mine, FUSED: theirs}}]}
    assert [verdict.met for verdict in goals.verdicts(results)] == expected
    assert ("NOT MET" in "\n".join(goal_lines(results))) is not all(expected)


def test_goal_without_device_times_is_not_judged():
    host_alone = {"round_host_ms": [1.0]}
    record = {"case": "tiny_groups", "optimizer": "sgd", "elements": 10}
    arms = {OURS: arm(1.0, 0.04), FUSED: host_alone}
    (verdict,) = goals.verdicts({"cases": [{**record, "arms": arms}]})
    assert verdict.goal.endswith("host of ours at most 0.05 x torch fused")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, training.CLASS_COUNT)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


def test_training_is_rehearsed(monkeypatch, tmp_path):
    tiny = training.Training("train_vit_s", Tiny, batch=2, small=1)
    monkeypatch.setattr(command, "trainings", lambda: [tiny])
    monkeypatch.setattr(command.runs, "run_once", lambda *args: {"copy_gb_per_s": 1.0})
    words = ["--rehearse", "--quick", "--optimizer", "sgd", "--case", "train_vit_s"]
    path = tmp_path / "run.json"
    results = command.measure(command.parse([*words, "--json", str(path)]))
    (record,) = results["training"]
    assert set(record["arms"]) == {DEFAULT, FUSED, OURS, training.NO_STEP}
    assert load(path) == json.loads(json.dumps(results))
    assert "Training train_vit_s" in next(iter(training_lines(record)))
    assert [verdict.goal for verdict in goals.verdicts(results)] == [
        "train_vit_s, sgd: device of ours at most 1.01 x torch fused"
    ]


def test_vit_has_the_parameters_of_its_case():
    with torch.device("meta"):
        model = training.ViT()
    shapes = [tuple(param.shape) for param in model.parameters()]
    expected = next(case for case in CASES if case.name == "vit_s").shapes
    # One class token fewer, and positions of the patches alone.
    assert sorted(shapes)[1:] == sorted(expected)[2:]


def test_case_that_fails_does_not_cost_the_others(monkeypatch, tmp_path):
    def run(case, *args):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(command.gpu, "run_case", run)
    monkeypatch.setattr(command.runs, "run_once", lambda *args: {})
    path = tmp_path / "run.json"
    words = ["--rehearse", "--case", "tiny", "--json", str(path)]
    command.measure(command.parse(words))
    assert [left["case"] for left in load(path)["left_out"]] == ["tiny", "tiny"]


WORK = """
import sys, time
from pathlib import Path
try:
    print("begun", flush=True)
    Path(sys.argv[1]).write_text("{}")
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


STUBBORN = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + WORK


TIMER = threading.Timer


def written(path):
    return path.exists() and path.stat().st_size > 0


@pytest.fixture
def work(monkeypatch, tmp_path):
    """Have a piece run a script, and return where the script is to be.

    Limits count from where the script has saved something, however long it takes to
    start on a busy machine, and tests need no limit in which it surely has.
    """
    path, saved = tmp_path / "work.py", tmp_path / "steps.json"
    path.write_text(WORK)
    words = [sys.executable, str(path), str(saved)]

    class Timer(threading.Timer):
        def run(self):
            while not written(saved) and not self.finished.wait(0.01):
                pass
            super().run()

    monkeypatch.setattr(on_gpu.threading, "Timer", Timer)
    monkeypatch.setattr(on_gpu, "command", lambda *args: words)
    # As the command does: tests in the background are started without interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield path
    signal.signal(signal.SIGINT, before)


STEPS = on_gpu.PIECES[1]


def test_piece_is_interrupted_at_its_limit_and_what_it_did_is_saved(work, tmp_path):
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=0.1) == 0
    lines = (tmp_path / "steps.log").read_text().splitlines()
    assert lines[:2] == ["begun", "interrupted"]
    assert (tmp_path / "steps.json").read_text() == "{}"


def test_piece_that_ignores_an_interrupt_is_killed(work, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "GRACE", 0.1)
    work.write_text(STUBBORN)
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=0.1) == -signal.SIGKILL
    assert "begun" in (tmp_path / "steps.log").read_text()


PROGRAM = """
import sys
from benchmarks.step import on_gpu, workload
_, script, out = sys.argv
on_gpu.command = lambda *args: [sys.executable, script, f"{out}/steps.json"]
on_gpu.main(["--piece", "steps", "--out", out])
"""


def test_signal_ends_the_command_and_its_piece(tmp_path):
    (tmp_path / "work.py").write_text(WORK)
    words = [sys.executable, "-c", PROGRAM, tmp_path / "work.py", tmp_path]
    with subprocess.Popen(words, cwd=ROOT, stdout=-1, stderr=-1, text=True) as started:
        assert started.stdout.readline() == "begun\n"
        while not written(tmp_path / "steps.json"):
            assert started.poll() is None
        started.terminate()
        _, errors = started.communicate(timeout=30)
    assert errors.endswith("KeyboardInterrupt\n")
    assert (tmp_path / "steps.json").exists()
    assert "begun" in (tmp_path / "steps.log").read_text()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("piece", on_gpu.PIECES[1:], ids=lambda piece: piece.name)
def test_pieces_are_commands_of_the_benchmark(piece, device, tmp_path):
    words = on_gpu.command(piece, device, tmp_path)
    assert words[1:4] == ["-u", "-m", "benchmarks.step"]
    args = command.parse(words[4:])
    assert (args.on_gpu, args.device.type) == (True, device)
    assert args.json == str(tmp_path / f"{piece.name}.json")


def test_pieces_are_short_and_measure_every_case():
    assert all(piece.seconds + on_gpu.GRACE < 600 for piece in on_gpu.PIECES)
    assert sum(piece.seconds for piece in on_gpu.PIECES) <= 25 * 60
    words = {word for piece in on_gpu.PIECES for word in piece.words}
    assert {*CHOSEN, *training.TRAININGS} <= words


def test_joined_pieces_are_one_run(tmp_path, capsys):
    run = {"device": "cuda", "device_name": "H100", "torch": "2.11", "date": "2026-1-1"}
    record = {"case": "tiny", "optimizer": "sgd", "elements": 10}
    arms = {OURS: arm(1.0), FUSED: arm(1.0)}
    for name in ("steps", "models"):
        save(
            {"run": run, "cases": [{**record, "arms": arms}]}, tmp_path / f"{name}.json"
        )
    joined = load(on_gpu.join(tmp_path))
    assert len(joined["cases"]) == 2
    assert "met      tiny, sgd: device of ours" in capsys.readouterr().out


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for ``torch.cuda`` where a cycle takes half a microsecond."""
    gpu = Simulated()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: gpu.event())
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)

    def sleep(cycles):
        gpu.run(cycles / 2000)

    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    return gpu


def test_nap_lasts_as_long_as_it_is_told(cuda):
    device = Cuda()
    device.nap(1.0)
    device.synchronize()
    before = cuda.now
    device.nap(7.0)
    device.synchronize()
    assert cuda.now - before == pytest.approx(7.0)


def test_launches_are_what_the_device_did(cuda, monkeypatch):
    kinds = ["kernel", "kernel", "gpu_memcpy", "cpu_op", "gpu_user_annotation", None]
    events = [{"cat": kind} for kind in kinds]
    monkeypatch.setattr(gpu_device, "trace_of", lambda call, **own: events)
    assert Cuda().launches(lambda: None) == 3
    events.clear()
    assert Cuda().launches(lambda: None) is None


def test_replayed_graph_of_many_kernels_has_device_times(monkeypatch):
    """It takes one place of a queue that has none for as many launches."""
    gpu = Simulated(launches=1)
    gpu.launches = lambda step: 2002
    times = measured(monkeypatch, gpu, gpu.step(0.1, 4.0))
    assert times.device == pytest.approx([4.0] * 3)


def test_nothing_is_profiled_before_all_is_timed(monkeypatch):
    def profiled(*args):
        raise AssertionError("the profiler stays attached, and slows what follows")

    monkeypatch.setattr(StandIn, "launches", profiled)
    case = Case("tiny", "", (SMALL,))
    run_case(case, "sgd", CPU, EFFORT, compiled=False, limit=1.0)
    with pytest.raises(AssertionError, match="attached"):
        command.gpu.count_launches(case, "sgd", CPU)


def saved_run(monkeypatch, path, run_case, *more):
    """Run two cases of a rehearsal, and return what was saved."""
    monkeypatch.setattr(command.gpu, "run_case", run_case)
    monkeypatch.setattr(command.gpu, "count_launches", lambda *args: {})
    monkeypatch.setattr(command.runs, "run_once", lambda *args: {"copy_gb_per_s": 1.0})
    monkeypatch.setattr(command.gpu_tables, "case_lines", lambda *args: [])
    own = ["--rehearse", "--case", "tiny", "tiny_layers", "--optimizer", "sgd"]
    command.measure(command.parse([*own, "--json", str(path), *more]))
    return load(path)


def record_of(case, optimizer="sgd"):
    return {"case": case, "optimizer": optimizer, "elements": 10, "arms": {}}


class Killed(BaseException):
    """Stands for a signal that leaves no time for anything."""


def test_case_whose_process_ended_is_tried_again_with_care_and_then_left(
    monkeypatch, tmp_path
):
    path = tmp_path / "run.json"
    asked = []

    def run(case, *args, careful=False):
        asked.append((case.name, careful))
        if case.name == "tiny":
            raise Killed
        return record_of(case.name)

    for _ in range(2):
        with pytest.raises(Killed):
            saved_run(monkeypatch, path, run, "--resume")
        assert load(path)["under_way"]["case"] == "tiny"
    saved = saved_run(monkeypatch, path, run, "--resume")
    assert asked == [("tiny", False), ("tiny", True), ("tiny_layers", False)]
    assert [left["case"] for left in saved["left_out"]] == ["tiny"]
    assert [record["case"] for record in saved["cases"]] == ["tiny_layers"]
    assert "under_way" not in saved


def test_device_that_answers_no_more_ends_the_process(monkeypatch, tmp_path):
    path = tmp_path / "run.json"

    def run(case, *args, careful):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(command, "answers", lambda device: False)
    with pytest.raises(SystemExit) as ended:
        saved_run(monkeypatch, path, run)
    assert ended.value.code == command.DEAD
    assert load(path)["died"] == [{"case": "tiny", "optimizer": "sgd"}]


def test_device_is_asked_whether_it_answers(monkeypatch):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    assert command.answers(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not command.answers(torch.device("cuda"))


def test_training_that_fails_is_left_out(monkeypatch, tmp_path):
    def fail():
        raise ImportError("torchvision")

    broken = training.Training("train_resnet50", fail, batch=2, small=1)
    monkeypatch.setattr(command, "trainings", lambda: [broken])
    monkeypatch.setattr(command.runs, "run_once", lambda *args: {})
    path = tmp_path / "run.json"
    words = ["--rehearse", "--case", "train_resnet50", "--json", str(path)]
    command.measure(command.parse(words))
    assert [left["error"] for left in load(path)["left_out"]] == ["torchvision"] * 2


def test_launches_are_counted_once_all_is_measured(monkeypatch, tmp_path):
    def run(case, *args, careful):
        return {**record_of(case.name), "arms": {OURS: {"launches": None}}}

    def count(case, *args):
        if case.name == "tiny":
            raise RuntimeError("no profiler")
        return {OURS: 55}

    saved_run(monkeypatch, tmp_path / "run.json", run)
    monkeypatch.setattr(command.gpu, "count_launches", count)
    results = load(tmp_path / "run.json")
    args = command.parse(["--rehearse", "--json", str(tmp_path / "run.json")])
    command.add_launches(results, args)
    counts = [each["arms"][OURS]["launches"] for each in results["cases"]]
    assert counts == [None, 55]
    command.add_launches({**results, "counting": True}, None)  # it ended a process


def test_commit_is_noted_where_there_is_no_git(monkeypatch, tmp_path):
    def run(case, *args, careful):
        return record_of(case.name)

    saved = saved_run(monkeypatch, tmp_path / "run.json", run, "--commit", "abc1234")
    assert saved["run"]["commit"] == "abc1234"


def test_goals_that_nothing_says_anything_of_are_shown():
    """A goal is never met by an arm that failed, or is missing."""
    arms = {OURS: arm(0.1, 0.1)}
    errors = {FUSED: "RuntimeError: no"}
    record = {**record_of("tiny_layers", "adamw"), "arms": arms, "errors": errors}
    graphs = {OURS_GRAPH: arm(0.1, 0.1), FUSED_GRAPH: arm(0.1, 0.1)}
    other = {**record_of("tiny_groups", "adamw"), "arms": graphs, "errors": {}}
    results = {"cases": [record, other]}
    reasons = dict(goals.unjudged(results))
    tiny = "tiny_layers, adamw: device of"
    assert reasons[f"{tiny} ours at most 1.02 x torch fused"] == (
        "torch fused cannot: RuntimeError: no"
    )
    assert "vit_l, sgd" in goals.not_run(results)
    assert "tiny_layers, adamw" not in goals.not_run(results)
    judged = {verdict.goal for verdict in goals.verdicts(results)}
    assert {goal.partition(",")[0] for goal in judged} == {"tiny_groups"}
    assert not judged & set(reasons)
    assert "UNKNOWN  tiny_layers" in "\n".join(goal_lines(results))


RUN = {"device": "cuda", "device_name": "H100", "torch": "2.11", "date": "2026-1-1"}


@pytest.mark.parametrize("key", ["device_name", "torch", "commit"])
def test_pieces_of_two_runs_are_not_joined(tmp_path, key):
    for name, run in (("steps", RUN), ("models", {**RUN, key: "another"})):
        save({"run": run, "cases": []}, tmp_path / f"{name}.json")
    with pytest.raises(SystemExit, match=rf"differ in {key}: .*models.json has anoth"):
        on_gpu.join(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_piece_was_at_is_not_joined_as_measured(tmp_path, capsys):
    (tmp_path / "steps.json").write_text("{}")
    under_way = {"case": "vit_l", "optimizer": "sgd"}
    part = {"run": RUN, "once": {}, "cases": [], "under_way": under_way}
    save(part, tmp_path / "models.json")
    joined = load(on_gpu.join(tmp_path))
    assert joined["left_out"] == [{**under_way, "error": "was under way"}]
    assert "under_way" not in joined
    said = capsys.readouterr().out
    assert "steps: not there" in said
    assert "training: not there" in said
    assert "vit_l, sgd: left out, was under way" in said


DYING = """
import os, signal, sys
from pathlib import Path
print("begun", sys.argv[2:], flush=True)
if "--resume" not in sys.argv:
    Path(sys.argv[1]).write_text("{}")
    END
"""
DEATHS = {"killed": "os.kill(os.getpid(), 9)", "dead": f"sys.exit({command.DEAD})"}


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_piece_whose_process_dies_goes_on_in_another(work, tmp_path, death):
    work.write_text(DYING.replace("END", death))
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=60) == 0
    lines = (tmp_path / "steps.log").read_text().splitlines()
    begun = [line for line in lines if line.startswith("begun")]
    assert begun == ["begun []", "begun ['--resume']"]


def test_piece_that_fails_is_not_begun_again(work, tmp_path):
    work.write_text(DYING.replace("END", "sys.exit(1)"))
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=60) == 1
    assert (tmp_path / "steps.log").read_text().count("begun") == 1


def test_piece_that_hangs_is_killed_before_its_limit(work, monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "MOST_SILENCE", 1)
    monkeypatch.setattr(threading, "Timer", TIMER)  # nothing will be saved
    work.write_text(WORK.replace("write_text", "exists # "))
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=60) == -signal.SIGKILL


def test_piece_that_says_something_is_not_taken_for_hanging(
    work, monkeypatch, tmp_path
):
    monkeypatch.setattr(on_gpu, "MOST_SILENCE", 2)
    monkeypatch.setattr(threading, "Timer", TIMER)
    work.write_text(
        "import time\nfor i in range(5):\n    print(i, flush=True)\n    time.sleep(0.5)"
    )
    assert on_gpu.run(STEPS, "cpu", tmp_path, seconds=60) == 0


def test_tests_without_pytest_are_no_success(monkeypatch, tmp_path):
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    assert on_gpu.main(["--piece", "tests", "--out", str(tmp_path)]) == 1


def test_tests_are_run_without_plugins_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "")
    say = "import os; print(os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'])"
    monkeypatch.setattr(on_gpu, "command", lambda *args: [sys.executable, "-c", say])
    on_gpu.run(on_gpu.PIECES[0], "cpu", tmp_path, seconds=20)
    assert (tmp_path / "tests.log").read_text().startswith("1\n")


def test_saved_run_is_shown(capsys, tmp_path):
    case = Case("tiny", "", (SMALL,))
    record = run_case(case, "sgd", CPU, EFFORT, compiled=False, limit=1.0)
    left = [{"case": "vit_l", "optimizer": "sgd", "error": "no memory"}]
    path = tmp_path / "run.json"
    save({"run": RUN, "once": {}, "cases": [record], "left_out": left}, path)
    command.main(["--show", str(path)])
    said = capsys.readouterr().out
    assert "1,000 tiny tensors, sgd" in said
    assert "vit_l, sgd: left out, no memory" in said
    assert "Not measured: tiny, adamw; tiny_scaled" in said


def test_picture_needs_cases(tmp_path):
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    path = tmp_path / "run.json"
    save({"run": RUN, "cases": [], "training": []}, path)
    with pytest.raises(SystemExit, match="holds no case to draw"):
        command.main(["--picture", str(path)])


def test_mesh_of_a_gpu_needs_no_network(monkeypatch):
    asked = []
    monkeypatch.setattr(
        workload.dist, "init_process_group", lambda b, **own: asked.append(b)
    )
    monkeypatch.setattr(workload.dist, "destroy_process_group", lambda: None)
    mesh = pytest.importorskip("torch.distributed.device_mesh")
    monkeypatch.setattr(mesh, "init_device_mesh", lambda *args: "mesh")
    with workload.one_process_mesh(torch.device("cuda")) as made:
        assert made == "mesh"
    assert asked == ["nccl"]


def test_files_that_are_not_collected_hold_no_test_of_cuda():
    files = [path for each in on_gpu.IGNORED for path in ROOT.glob(each)]
    assert len(files) > 5
    marks = re.compile(r"support\.devices|mark\.cuda|def test\w*\([^)]*\bdevice\b")
    assert not [path for path in files if marks.search(path.read_text())]


def test_schedule_is_timed_where_groups_have_rates():
    load = Workload(Case("tiny", "", (SMALL[:2], SMALL[2:]), own_lr=True), CPU)
    (made,) = command.gpu._scheduled(load, "adamw")
    assert made.name == SCHEDULED
    groups = step_groups(made)
    before = [group["lr"] for group in groups]
    made.prepare()
    made.step()
    assert [group["lr"] for group in groups] == [lr * 0.999999 for lr in before]
    plain = Workload(Case("tiny", "", (SMALL,)), CPU)
    assert command.gpu._scheduled(plain, "adamw") == []


def step_groups(arm):
    """Find the groups of the optimizer that an arm's preparation changes."""
    (optimizer,) = [
        cell.cell_contents
        for cell in arm.prepare.__closure__
        if isinstance(cell.cell_contents, torch.optim.Optimizer)
    ]
    return optimizer.param_groups
