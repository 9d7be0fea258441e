"""Everything that waits for a GPU, in pieces of less than ten minutes each.

A machine with a GPU may be at hand for a while only, and bare: no installation, no
network, perhaps no pytest. From a checkout, one piece or all of them::

    python -m benchmarks.step.on_gpu --piece tests --out out
    python -m benchmarks.step.on_gpu --out out
    python -m benchmarks.step.on_gpu --piece join --out out

Each piece logs every line as it comes and saves every case as it is measured: whatever
ends it, its limit, a signal or the machine, what was done until then is in ``out``.
``join`` makes one file of the measurements, as ``benchmarks/results`` keeps them.
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
from typing import Any, NamedTuple

from benchmarks.step import results as runs
from benchmarks.step.gpu.tables import goal_lines
from benchmarks.step.gpu.training import TRAININGS

ROOT = Path(__file__).parents[2]
GRACE = 15  # seconds from an interrupt to a kill


class Piece(NamedTuple):
    """A command and the seconds it may take; all of them together take 25 minutes."""

    name: str
    seconds: int
    words: list[str]
    rehearsal: list[str]  # the words for a CPU


def _cases(*names: str, limit: int) -> list[str]:
    return ["benchmarks.step", "--case", *names, "--limit", str(limit)]


TESTS = [
    *("pytest", "-m", "cuda", "-v", "-p", "no:cacheprovider", "--durations=15"),
    # A package of the machine that warns when a test imports it costs that file alone.
    "--continue-on-collection-errors",
]
PIECES = (
    Piece("tests", 480, TESTS, TESTS),
    Piece(
        "steps",
        420,
        _cases(
            *("tiny_layers", "tiny", "tiny_groups", "tiny_groups_lr", "tiny_scaled"),
            *("tiny_layers_tensors", "dtensor"),
            limit=18,
        ),
        _cases("tiny", "tiny_layers", limit=2),
    ),
    Piece(
        "models",
        420,
        _cases(
            *("vit_l", "vit_l_layers", "resnet50", "vit_l_bf16", "decoder"), limit=25
        ),
        [*_cases("resnet50", limit=2), "--optimizer", "sgd"],
    ),
    Piece(
        "training",
        170,
        _cases(*TRAININGS, limit=25),
        [*_cases("train_vit_s", limit=2), "--optimizer", "sgd"],
    ),
)
JOIN = "join"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step.on_gpu")
    add = parser.add_argument
    names = [piece.name for piece in PIECES]
    add("--piece", nargs="+", choices=[*names, JOIN], default=[*names, JOIN])
    add("--out", type=Path, required=True, metavar="FOLDER", help="where to save")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: rehearse")
    add("--seconds", type=int, help="end each piece earlier than it would")
    return parser.parse_args(words)


def command(piece: Piece, device: str, out: Path) -> list[str]:
    """Return what runs a piece."""
    words = piece.words if device == "cuda" else piece.rehearsal
    own = [sys.executable, "-u", "-m", *words]
    if piece.name == "tests":
        return own
    how = ["--device", "cuda"] if device == "cuda" else ["--rehearse", "--quick"]
    return [*own, *how, "--json", str(out / f"{piece.name}.json")]


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


def run(piece: Piece, device: str, out: Path, seconds: int | None) -> int:
    """Run a piece; every line goes to the screen and into its log at once."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    began = time.monotonic()
    most = min(piece.seconds, seconds or piece.seconds)
    with (
        subprocess.Popen(
            command(piece, device, out),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as child,
        (out / f"{piece.name}.log").open("w") as log,
        ending(child, most),
    ):
        assert child.stdout is not None  # a pipe
        for line in child.stdout:
            log.write(line)
            log.flush()
            print(line, end="", flush=True)
        code = child.wait()
        last = f"{piece.name}: exit code {code} after {time.monotonic() - began:.0f} s"
        print(last, flush=True)
        log.write(f"{last}\n")
    return code


def join(out: Path) -> Path | None:
    """Make one file of what the pieces measured; show the goals."""
    found = [out / f"{piece.name}.json" for piece in PIECES]
    parts = [runs.load(path) for path in found if path.exists()]
    if not parts:
        return None
    whole: dict[str, Any] = {**parts[0], "cases": [], "training": []}
    for part in parts:
        for key in ("cases", "training", "left_out"):
            whole[key] = [*whole.get(key, []), *part.get(key, [])]
    print("\n".join(goal_lines(whole)))
    path = out / runs.default_path(whole["run"]).name
    runs.save(whole, path)
    return path


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # Also where this began in the background, with interrupts ignored.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    codes = []
    for piece in PIECES:
        if piece.name not in args.piece:
            continue
        if piece.name == "tests" and find_spec("pytest") is None:
            print("tests: left out, there is no pytest")
            continue
        codes.append(run(piece, args.device, args.out, args.seconds))
    if JOIN in args.piece and (path := join(args.out)):
        print(f"saved as {path}")
    return max(map(abs, codes), default=0)


if __name__ == "__main__":
    sys.exit(main())
