"""Kill the digits training at random moments, resume it, and compare the bits.

Each time, a child process trains and saves a checkpoint every few steps. It is
killed with SIGKILL after a random step, started again, and so on until it is done;
then its parameters, buffers and optimizer state must be those of a run that nobody
interrupted, in this process.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import require
from benchmarks.digits.arms import selective
from benchmarks.digits.networks import NETWORKS, build
from benchmarks.digits.training import (
    Data,
    differences,
    load,
    reproducible,
    snapshot,
    train,
)

CHECKPOINT, FINAL, DATA = "checkpoint.pt", "final.pt", "data.pt"
KILLS = 2  # per run; the third start may finish


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.resume", description=__doc__)
    add = parser.add_argument
    add("--times", type=int, default=10, help="runs to interrupt")
    add("--epochs", type=int, default=3, help="of each run")
    add("--every", type=int, default=7, help="steps from one checkpoint to the next")
    add("--seed", type=int, default=0, help="of weights, batches and moments of death")
    add("--device", default="cpu")
    add("--network", choices=NETWORKS, help="default: each in turn")
    add("--timeout", type=float, default=300, help="seconds that one start may take")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # what tells a child to train
    return parser.parse_args(arguments)


def save(value: Any, path: Path) -> None:
    """Write a file that is whole at every moment, whenever the process dies."""
    fresh = path.with_suffix(".fresh")
    torch.save(value, fresh)
    os.replace(fresh, path)


def train_from_checkpoint(options: argparse.Namespace) -> dict[str, Tensor]:
    """Be the child: train from the last checkpoint to the end, telling every step."""
    model = build(options.network, options.seed, options.device)
    optimizer = selective(model)
    path, first_step = options.folder / CHECKPOINT, 0
    if path.exists():
        checkpoint = torch.load(path, map_location=options.device, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        first_step = checkpoint["step"]

    def after_step(step: int) -> None:
        if step % options.every == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save({**state, "step": step}, path)
        print(step, flush=True)

    # Not from scikit-learn, which takes as long to import as torch.
    data = torch.load(options.folder.parent / DATA, map_location=options.device)
    with reproducible():
        settings = {"seed": options.seed, "first_step": first_step}
        train(model, optimizer, Data(*data), options.epochs, after_step, **settings)
    return snapshot(model, optimizer)


@contextmanager
def child(options: argparse.Namespace, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a child that trains in a folder; it does not outlive the block."""
    settings = {
        "--folder": folder,
        "--network": options.network,
        "--epochs": options.epochs,
        "--every": options.every,
        "--seed": options.seed,
        "--device": options.device,
    }
    command = [sys.executable, "-m", "tests.resume"]
    command += [str(word) for setting in settings.items() for word in setting]
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        watchdog = threading.Timer(options.timeout, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def run_until(options: argparse.Namespace, folder: Path, last_step: float) -> int:
    """Start the training, kill it a moment after a step, and return the last step told.

    Args:
        options: What to train.
        folder: Where its checkpoints lie.
        last_step: The step to die after, or infinity to let it finish.

    Raises:
        RuntimeError: The child ended by itself before its work was done.
    """
    step = 0
    with child(options, folder) as process:
        for line in process.stdout or ():
            step = int(line)
            if step >= last_step:
                # It dies within its next step, or while it writes a checkpoint.
                time.sleep(random.uniform(0, 0.02))
                process.kill()
                return step
        if process.wait() != 0:
            raise RuntimeError(
                f"the training ended with status {process.returncode}, step {step}. "
                f"If that is -9, allow it more than --timeout {options.timeout:g}."
            )
    return step


def finish(
    options: argparse.Namespace, folder: Path, deaths: Sequence[int]
) -> tuple[dict[str, Tensor], list[int]]:
    """Train to the end through some deaths; return the final tensors and the deaths."""
    folder.mkdir()
    died = [run_until(options, folder, step) for step in deaths]
    run_until(options, folder, math.inf)
    return torch.load(folder / FINAL, weights_only=True), died


def compare(options: argparse.Namespace, base: Path) -> Iterator[tuple[str, list[str]]]:
    """Interrupt as many runs as asked; yield what happened and what differs of each."""
    dice = random.Random(options.seed)
    data = load()
    torch.save([*data], base / DATA)
    total = options.epochs * data.steps_per_epoch
    networks = [options.network] if options.network else list(NETWORKS)
    references = {}
    for number in range(options.times):
        network = networks[number % len(networks)]
        own = argparse.Namespace(**{**vars(options), "network": network})
        if network not in references:
            # No checkpoints either: taking a state dict must not change a bit.
            alone = {"folder": base / network, "every": total + 1}
            with redirect_stdout(None):
                references[network] = train_from_checkpoint(
                    argparse.Namespace(**{**vars(own), **alone})
                )
        # Each death is later than the one before, so that the last start resumes most.
        deaths = sorted(dice.sample(range(1, total), KILLS))
        tensors, died = finish(own, base / str(number), deaths)
        steps = " and ".join(map(str, died))
        story = f"{network}, killed after steps {steps} of {total}"
        yield story, differences(references[network], tensors)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    require("sklearn")
    if options.folder:
        save(train_from_checkpoint(options), options.folder / FINAL)
        return 0
    same = 0
    with tempfile.TemporaryDirectory() as base:
        for story, differing in compare(options, Path(base)):
            ending = (
                f"other bits, first in {differing[0]!r}" if differing else "same bits"
            )
            print(f"{story}: {ending}", flush=True)
            same += not differing
    print(
        f"{same} of {options.times} runs ended with the bits of an uninterrupted one."
    )
    return 0 if same == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
