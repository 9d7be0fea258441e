"""What work costs, counted and not timed: machines that run tests are shared."""

import sys


def calls_of(work):
    """Count the calls, Python's and C's."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
