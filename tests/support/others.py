"""Another thread, which steps or looks on while one steps."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def looking(optimizer: Any, wanted: bool) -> Iterator[None]:
    """Look at groups and report from another thread meanwhile, if that is wanted."""
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    going, wrong = [True], []

    def look() -> None:
        while going:
            try:
                optimizer.decay_report()
                seen = [len(group["params"]) for group in optimizer.param_groups]
            except Exception as error:
                seen = [repr(error)]  # type: ignore[list-item]  # told below
            if seen != sizes:
                wrong.append(seen)

    if not wanted:
        yield
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        going.clear()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong, f"another thread saw {wrong[0]}"


def in_another_thread(function: Callable[[], None]) -> None:
    """Run a function there, and raise here what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
