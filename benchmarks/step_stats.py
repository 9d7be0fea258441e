"""Medians with their spread, and ratios taken round by round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class Spread(NamedTuple):
    """A median and the values that a tenth of the samples lie below and above."""

    median: float
    p10: float
    p90: float


def quantile(values: Sequence[float], part: float) -> float:
    """Interpolate between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), quantile(values, 0.1), quantile(values, 0.9))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Compare two arms round by round: what disturbs one round disturbs both."""
    return spread([n / d for n, d in zip(numerator, denominator, strict=True)])
