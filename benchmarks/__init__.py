"""Runs on real data and measurements, each a command.

``python -m benchmarks`` trains two networks on handwritten digits in three arms;
``python -m benchmarks.step`` times a step; ``python -m benchmarks.recipes_page``
makes the table of recipes. What they need beside torch stands in the ``bench`` extra.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec


def require(*modules: str) -> None:
    """End the program with what to type, unless all modules can be imported."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        sys.exit(
            f"The benchmarks need {' and '.join(missing)}: pip install -e '.[bench]'"
        )
