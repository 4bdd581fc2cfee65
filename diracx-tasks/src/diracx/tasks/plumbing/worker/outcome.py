"""How an execution can end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from ..messages.error_info import ErrorInfo


class Succeeded(NamedTuple):  # made for every task
    """`execute` returned and its transaction was committed."""

    value: Any
    seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """`execute`, a dependency or the commit raised; or the execution was cancelled for a reason of ours."""

    error: BaseException
    told: ErrorInfo
    """The error as text, without the task's secrets."""
    seconds: float
    started: datetime
    interrupted: bool = False
    """It did not fail by itself: its lease, a lock or its worker was lost."""


@dataclass(frozen=True, slots=True)
class LeaseLost:
    """The lease ended meanwhile and another worker has the task now. It is not ours to judge."""


Outcome = Succeeded | Failed | LeaseLost
