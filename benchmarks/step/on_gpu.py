"""Everything that waits for a GPU, in pieces of less than ten minutes each.

A machine with a GPU may be at hand for a while only, and bare: no installation, no
network, perhaps no pytest. From a checkout, one piece or all of them::

    python -m benchmarks.step.on_gpu --piece tests --out out
    python -m benchmarks.step.on_gpu --out out
    python -m benchmarks.step.on_gpu --piece join --out out

Each piece logs every line as it comes and saves every case as it is measured: whatever
ends it, its limit, a signal or the machine, what was done until then is in ``out``.
A process that dies or hangs costs the case that it was at; a piece that is run again
replaces what it saved. ``join`` makes one file of the measurements, as
``benchmarks/results`` keeps them, on any machine to which they were copied;
``benchmarks.step`` makes tables of it with ``--show``, a picture with ``--picture``.
``--device cpu`` rehearses all this in a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks.step import results as runs
from benchmarks.step.__main__ import DEAD
from benchmarks.step.gpu.tables import goal_lines, left_lines
from benchmarks.step.gpu.training import TRAININGS

ROOT = Path(__file__).parents[2]
GRACE = 15  # seconds from an interrupt to a kill
MOST_SILENCE = 120  # seconds; no case takes as long, and no test
LEAST_SECONDS = 20  # that are worth another process
# Plugins of pytest that the machine happens to have may warn, and so end all tests.
QUIETLY = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Piece(NamedTuple):
    """A command and the seconds it may take; all of them together take 23 minutes."""

    name: str
    seconds: int
    words: list[str]
    rehearsal: list[str]  # the words for a CPU


def _cases(*names: str, limit: int) -> list[str]:
    return ["benchmarks.step", "--case", *names, "--limit", str(limit)]


# Nothing of CUDA is in them, and importing what they test may take a minute.
IGNORED = ("tests/test_frameworks_*", "tests/*_installed.py")
TESTS = [
    *("pytest", "-m", "cuda", "-v", "-p", "no:cacheprovider", "--durations=15"),
    # A package of the machine that warns when a test imports it costs that file alone.
    "--continue-on-collection-errors",
    *(f"--ignore-glob={files}" for files in IGNORED),
]
PIECES = (
    Piece("tests", 400, TESTS, TESTS),
    Piece(
        "steps",
        400,
        _cases(
            *("tiny_layers", "tiny", "tiny_groups", "tiny_groups_lr", "tiny_scaled"),
            *("tiny_layers_tensors", "dtensor"),
            limit=18,
        ),
        _cases("tiny", "tiny_layers", limit=2),
    ),
    Piece(
        "models",
        400,
        _cases(
            *("vit_l", "vit_l_layers", "resnet50", "vit_l_bf16", "decoder"), limit=25
        ),
        [*_cases("resnet50", limit=2), "--optimizer", "sgd"],
    ),
    Piece(
        "training",
        150,
        _cases(*TRAININGS, limit=25),
        [*_cases("train_vit_s", limit=2), "--optimizer", "sgd"],
    ),
)
MEASURING = PIECES[1:]
JOIN = "join"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.on_gpu")
    add = parser.add_argument
    names = [piece.name for piece in PIECES]
    add("--piece", nargs="+", choices=[*names, JOIN], default=[*names, JOIN])
    add("--out", type=Path, required=True, metavar="FOLDER", help="where to save")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    add("--seconds", type=int, help="end each piece earlier than it would")
    add("--quick", action="store_true", help="few rounds, to see that all runs")
    add("--commit", help="to note in the results, where git cannot be asked")
    return parser.parse_args(words)


def command(piece: Piece, device: str, out: Path, *more: str) -> list[str]:
    """Return what runs a piece; ``more`` is for those that measure."""
    words = piece.words if device == "cuda" else piece.rehearsal
    own = [sys.executable, "-u", "-m", *words]
    if piece.name == "tests":
        return own
    how = ["--device", "cuda"] if device == "cuda" else ["--rehearse", "--quick"]
    return [*own, *how, "--json", str(out / f"{piece.name}.json"), *more]


@contextlib.contextmanager
def ending(child: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Interrupt a process at its limit, or when this one ends; then kill it."""
    limit = threading.Timer(seconds, child.send_signal, [signal.SIGINT])
    last = threading.Timer(seconds + GRACE, child.kill)
    limit.start()
    last.start()
    try:
        yield
    finally:
        limit.cancel()
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            child.kill()
        last.cancel()


class Silence:
    """Kills a process that says nothing for too long, as one that a device hangs."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child
        self.heard()

    def heard(self) -> None:
        """Begin to wait anew."""
        self.stop()
        self._timer = threading.Timer(MOST_SILENCE, self._child.kill)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if timer := vars(self).get("_timer"):
            timer.cancel()


def run(piece: Piece, device: str, out: Path, seconds: int | None, *more: str) -> int:
    """Run a piece; every line goes to the screen and into its log at once.

    A process that dies, or hangs, costs the case that it was at: another goes on.
    """
    end = time.monotonic() + min(piece.seconds, seconds or piece.seconds)
    words = command(piece, device, out, *more)
    saved = out / f"{piece.name}.json"
    saved.unlink(missing_ok=True)
    with (out / f"{piece.name}.log").open("w") as log:
        code = run_once(piece.name, words, log, end - time.monotonic())
        while (
            (code < 0 or code == DEAD)
            and saved.exists()
            and end - time.monotonic() > LEAST_SECONDS
        ):
            again = [*words, "--resume"]
            code = run_once(piece.name, again, log, end - time.monotonic())
    return code


def run_once(name: str, words: list[str], log: TextIO, seconds: float) -> int:
    began = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), **QUIETLY}
    with (
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as child,
        ending(child, seconds),
    ):
        assert child.stdout is not None  # a pipe
        silence = Silence(child)
        for line in child.stdout:
            silence.heard()
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
        silence.stop()
        code = child.wait()
        last = f"{name}: exit code {code} after {time.monotonic() - began:.0f} s"
        print(last, flush=True)
        log.write(f"{last}\n")
    return code


def join(out: Path) -> Path | None:
    """Make one file of what the pieces measured; show the goals.

    Raises:
        SystemExit: They are not of one device, version and commit.
    """
    parts: dict[str, Any] = {}
    for piece in MEASURING:
        path = out / f"{piece.name}.json"
        part = runs.load(path) if path.exists() else {}
        if "run" in part:
            parts[path.name] = part
        else:
            print(f"{piece.name}: not there, nothing of it is joined")
    if not parts:
        return None
    require_one_run(parts, out)
    first, *_ = parts.values()
    whole: dict[str, Any] = {"run": first["run"], "once": first.get("once", {})}
    for key in ("cases", "training", "left_out"):
        whole[key] = [each for part in parts.values() for each in part.get(key, ())]
    lost = [part["under_way"] for part in parts.values() if "under_way" in part]
    whole["left_out"] += [{**names, "error": "was under way"} for names in lost]
    print("\n".join([*left_lines(whole), *goal_lines(whole)]))
    path = out / runs.default_path(whole["run"]).name
    runs.save(whole, path)
    return path


def require_one_run(parts: dict[str, Any], out: Path) -> None:
    """Check that what is to be one table was measured alike."""
    for key in ("device_name", "torch", "python", "commit", "quick"):
        values = {name: part["run"].get(key) for name, part in parts.items()}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name} has {value}" for name, value in values.items())
            sys.exit(
                f"The pieces differ in {key}: {said}. Move those of one run to a "
                f"folder of their own: --piece {JOIN} --out {out}"
            )


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # Also where this began in the background, with interrupts ignored.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    more = ["--commit", args.commit] if args.commit else []
    more += ["--quick", "--limit", "1"] if args.quick else []
    codes = []
    for piece in PIECES:
        if piece.name not in args.piece:
            continue
        if piece.name == "tests" and find_spec("pytest") is None:
            print("tests: left out, there is no pytest; name one in PYTHONPATH")
            codes.append(1)
            continue
        codes.append(run(piece, args.device, args.out, args.seconds, *more))
    if JOIN in args.piece and (path := join(args.out)):
        print(f"saved as {path}")
    return max(map(abs, codes), default=0)


if __name__ == "__main__":
    sys.exit(main())
