"""What a state consists of: the data of the server, and what each worker believes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Points in time (ms or µs since the epoch) and ids of stream entries, in whatever text they stand.
NAMES = ("worker-a", "worker-b")
_NAME = re.compile("|".join(NAMES))
_MOMENT = re.compile(r"\d{13,17}(?:-\d+)?")


@dataclass(frozen=True, slots=True)
class Held:
    """One delivery in a worker's hands."""

    task: str
    stream: str
    entry: str
    deliveries: int
    since: str
    phase: str = "reserved"
    """reserved; running; ended (to be settled); cut off (to be handed back)."""
    locked: bool = False
    """Whether the worker believes that the task's lock is its own."""
    ask: bool = False
    """Whether the lease may have ended since it was reserved: then it is asked for before it begins."""


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker process and its network."""

    process: str = "runs"
    """runs, paused or dead."""
    connected: bool = True
    lease: str = "valid"
    """valid; expired (its timer has fired, or will when it goes on); ended (for the server, too)."""
    held: tuple[Held, ...] = ()
    answer_lost: bool = False
    """Whether the last call for work was not answered: what it may have reserved is asked for first."""

    @property
    def may_call(self) -> bool:
        """Whether it can reach the server."""
        return self.process == "runs" and self.connected


@dataclass(frozen=True, slots=True)
class State:
    """Everything that decides what can happen next."""

    workers: tuple[WorkerState, WorkerState]
    settled: tuple[int, ...]
    """How often each task has been settled as done."""
    begun: tuple[int, ...]
    """How often each task has begun; 2 for more than once."""
    disturbed: tuple[str, ...] = ()
    """The disturbances so far."""


def canonical(state: State, content: Sequence[tuple[str, Any]]) -> str:
    """A name for the state: two states of one name have the same future.

    Moments are replaced by their order. Both workers are alike: of a state and the one with the workers exchanged,
    the name is that of the smaller.
    """
    pieces = [repr(("worker", name, worker)) for name, worker in zip(NAMES, state.workers, strict=True)]
    pieces += [repr((key, part)) for key, value in content for part in (value if type(value) is list else [value])]
    rest = repr((state.settled, state.begun, state.disturbed))
    one, other = (
        "\n".join([*sorted(pieces), rest]),
        "\n".join([*sorted(map(_exchanged, pieces)), _exchanged(rest)]),
    )
    return min(_without_moments(one), _without_moments(other))


def _exchanged(text: str) -> str:
    return _NAME.sub(lambda found: NAMES[1 - NAMES.index(found[0])], text)


def _without_moments(text: str) -> str:
    moments = sorted({_order(found) for found in _MOMENT.findall(text)})
    rank = {moment: position for position, moment in enumerate(moments)}
    return _MOMENT.sub(lambda found: f"t{rank[_order(found[0])]}", text)


def _order(text: str) -> int:
    """The moment in µs. Ids of one ms are told apart by their sequence, as lua/start.lua does."""
    moment, _, sequence = text.partition("-")
    if sequence:
        return int(moment) * 1000 + min(int(sequence), 999)
    return int(moment) * (1000 if len(moment) <= 13 else 1)
