"""Histograms of times: four buckets to each doubling, so that none is told more than 19 % too long."""

from __future__ import annotations

import math

_FIRST_SECONDS = 0.001
_PER_DOUBLING = 4


def bucket_of(seconds: float) -> int:
    """The bucket that a time belongs to; the first one ends with 1 ms."""
    if seconds <= _FIRST_SECONDS:
        return 0
    return math.ceil(_PER_DOUBLING * math.log2(seconds / _FIRST_SECONDS))


def end_of_bucket(bucket: int) -> float:
    """The longest time (s) that belongs to a bucket."""
    return float(_FIRST_SECONDS * 2 ** (bucket / _PER_DOUBLING))
