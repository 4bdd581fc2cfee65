"""A metric as it is told to Prometheus and to OpenTelemetry alike."""

from __future__ import annotations

__all__ = ["BOUNDARIES", "CONTENT_TYPE", "Family", "Histogram", "Source", "as_text"]

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..plumbing._util.histogram import end_of_bucket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels: TypeAlias = Mapping[str, str]
#: Every fourth of our buckets, from 8 ms to 70 min: each is twice as long as the one before.
_LAST_OF_BUCKETS = range(12, 92, 4)
#: Upper ends of those buckets, in s.
BOUNDARIES = tuple(end_of_bucket(last) for last in _LAST_OF_BUCKETS)


@dataclass(frozen=True, slots=True)
class Family:
    """All values of one metric."""

    name: str
    kind: Literal["counter", "gauge", "level"]
    """A level is a gauge that makes sense when it is added up: OpenTelemetry tells them apart."""
    about: str
    samples: Sequence[tuple[Labels, float]]
    """Labels and value; each set of labels once."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram, from counts in our buckets."""

    name: str
    about: str
    samples: Sequence[tuple[Labels, list[int], float]]
    """Labels, counts and sum (s)."""


#: Figures that another distribution adds, by an entry point in the group `diracx.tasks_metrics`. It names a
#: function without arguments: its context opens what is needed and yields what asks for the figures, or None
#: where they are not to be had. They are asked for every 30 s at most, by the scheduler that leads.
Source: TypeAlias = Callable[[], AbstractAsyncContextManager[Callable[[], Awaitable[Sequence[Family]]] | None]]


def as_text(families: Iterable[Family | Histogram]) -> str:
    """The text format of Prometheus."""
    lines: list[str] = []
    for family in families:
        kind = "histogram" if isinstance(family, Histogram) else family.kind.replace("level", "gauge")
        lines += [f"# HELP {family.name} {family.about}", f"# TYPE {family.name} {kind}"]
        if isinstance(family, Histogram):
            lines += _buckets(family)
        else:
            lines += [f"{family.name}{_labels(labels)} {_number(value)}" for labels, value in family.samples]
    return "\n".join(lines) + "\n"


def _buckets(family: Histogram) -> Iterable[str]:
    name = family.name
    for labels, counts, total in family.samples:
        for last, end in zip(_LAST_OF_BUCKETS, BOUNDARIES, strict=True):
            yield f"{name}_bucket{_labels({**labels, 'le': f'{end:g}'})} {sum(counts[: last + 1])}"
        yield f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {sum(counts)}"
        yield f"{name}_sum{_labels(labels)} {_number(total)}"
        yield f"{name}_count{_labels(labels)} {sum(counts)}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    inside = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{inside}}}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
