"""Histograms of durations: four buckets to each doubling, so that none is reported more than 19 % too long."""

from __future__ import annotations

from math import ceil, log2

#: Number of buckets; the last one begins at five years.
BUCKETS = 150
_PER_DOUBLING = 4
_FIRST_SECONDS = 0.001
_OFFSET = -_PER_DOUBLING * log2(_FIRST_SECONDS)


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration; the first one ends with 1 ms."""
    if seconds <= _FIRST_SECONDS:
        return 0
    bucket = ceil(_PER_DOUBLING * log2(seconds) + _OFFSET)
    return bucket if bucket < BUCKETS else BUCKETS - 1


def end_of_bucket(bucket: int) -> float:
    """Return the longest duration (s) of a bucket."""
    return float(_FIRST_SECONDS * 2 ** (bucket / _PER_DOUBLING))
