"""Protocol of back ends: submit, poll, cancel, fetch output and clean up, many pilots per call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import one_line

OUTPUT_LIMIT_BYTES = 1 << 20
"""No more of a pilot's stdout, or stderr, is fetched: its last part."""


class CESettings(BaseModel):
    """Base of every back end's settings: an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class CEDescription:
    """The compute element a back end stands for."""

    name: str
    capacity: int
    success_rate: float  # 0.0-1.0


@dataclass(frozen=True, slots=True)
class PilotIdentity:
    """The secret of a pilot, and where to exchange it. A back end that can keep it from others hands it over.

    The pilot finds the address in PILOT_API_URL, and in PILOT_SECRET_FILE the name of a file with the secret that
    its own account alone can read.
    """

    url: str
    secret: str = field(repr=False)  # never on a command line, in a log, or in an error message


class PilotAtCE(NamedTuple):  # there may be a million of them
    """A pilot, as far as a compute element has to know it."""

    stamp: str  # ours, unique, made before the submission
    vo: str
    reference: str | None = None  # the CE's; None until a submission was confirmed
    status: MyPilotStatus = MyPilotStatus.SUBMITTED  # as the database knows it
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    cancel_requested: bool = False
    maybe_submitted: bool = True  # False: the stamp was made for this very submission, the CE cannot have it
    identity: PilotIdentity | None = None  # for a submission; None: it has none


@dataclass(frozen=True, slots=True)
class SubmitOutcome:
    """The answer to one submission: a reference, or the reason for its refusal."""

    reference: str | None = None
    error: str | None = None
    quota: bool = False  # refused because we have as many there as we may: no failure of the site


class Observed(StrEnum):
    """State of a pilot as its compute element reports it."""

    WAITING = "WAITING"  # it has it, and has not started it
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    NO_NEWS = "NO_NEWS"  # cannot be polled from here and now; nothing follows from that


class Observation(NamedTuple):
    """The state of one pilot at its compute element."""

    state: Observed
    reason: str | None = None  # one line for people: why it failed, or why it still waits
    reference: str | None = None  # when it was not known yet


class PilotOutput(NamedTuple):
    """Stdout and stderr of a pilot; the last `OUTPUT_LIMIT_BYTES` of each."""

    stdout: str
    stderr: str


def observed_end(code: int | None, *, cancelled: bool, last_line: Callable[[], str]) -> Observation:
    """Observation of a pilot process that has ended.

    Args:
        code: its exit code; None: there is none.
        cancelled: whether its end was requested.
        last_line: reads the last line of its stderr.
    """
    if code == 0:
        return Observation(Observed.DONE)
    if code is None:
        return Observation(
            Observed.FAILED, "cancelled" if cancelled else "the process vanished without an exit code"
        )
    reason = f"cancelled (exit code {code})" if cancelled else f"exit code {code}"
    line = last_line()
    return Observation(Observed.FAILED, f"{reason}: {line}" if line else reason)


SettingsT = TypeVar("SettingsT", bound=CESettings)
AnswerT = TypeVar("AnswerT")


class CEBackend(ABC, Generic[SettingsT]):
    """One compute element, as long as one task needs it.

    An instance is cheap, made for each use, and keeps nothing that the next one would need: workers come and go.
    Every method may raise any exception to say that the compute element could not be asked at all; nothing is
    then concluded about any pilot.
    """

    Settings: ClassVar[type[CESettings]]
    """Model of the `settings` of a compute element."""

    operator_only: ClassVar[bool] = False
    """True if such compute elements come from the operator's files alone, never through the API: for back
    ends whose settings amount to running commands on our own hosts."""

    grid_type: ClassVar[str] = ""
    """Its name in DIRAC, for the pilot registry; empty: that of the back end."""

    queue_setting: ClassVar[str] = ""
    """The setting that names the queue; empty: there is none."""

    close_seconds: ClassVar[float] = 5
    """Longest time that `close` may take: the response of the compute element waits for it."""

    warning: str | None = None
    """Errors in the calls of this instance, although they were answered: kept as the last error of the
    compute element, and no failure of it."""

    def __init__(self, ce: CEDescription, settings: SettingsT) -> None:
        self.ce = ce
        self.settings = settings

    def warn(self, what: object) -> None:
        """Add to the warning."""
        self.warning = one_line(f"{self.warning}; {what}" if self.warning else what)

    async def side_source(self, answer: Awaitable[AnswerT]) -> AnswerT | None:
        """The answer of a source beside the main one, for pilots that this one does not know; None: it has failed.

        Then nothing follows for those pilots (NO_NEWS), what the main source says of the others holds, and the
        failure is a warning.
        """
        try:
            return await answer
        except CEUnavailableError as error:
            self.warn(error)
            return None

    @classmethod
    def grid_type_of(cls, settings: Mapping[str, Any]) -> str:
        """The `grid_type` of a compute element with these settings, which may be invalid."""
        return cls.grid_type

    def why_not(self, vo: str) -> str | None:
        """The reason why the settings give this VO no pilots; None: they do.

        That is no failure of the compute element, and it is not asked: other VOs go on there.
        """
        return None

    @abstractmethod
    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        """Submit pilots; the outcome of each by its stamp. The same stamp again is no second pilot."""

    @abstractmethod
    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        """Poll these pilots; their states by stamp.

        A stamp that is missing from the answer is *unknown* to the compute element, which never means that
        the pilot has completed.
        """

    @abstractmethod
    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        """Cancel these pilots. Repeated until `poll` says that they have ended."""

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        """Fetch stdout and stderr of a pilot; before its end, what there is.

        Raises:
            OutputUnavailableError: the compute element has none of this pilot, or none any more.
        """
        raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} keeps no output")

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        """Remove what is kept for these pilots, which are recorded as ended, as their `status` says."""

    async def close(self) -> None:
        """Give back connections."""
