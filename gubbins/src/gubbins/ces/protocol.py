"""Protocol of back ends: submit, poll, cancel, fetch output and clean up, many pilots per call."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import one_line

OUTPUT_LIMIT_BYTES = 1 << 20
"""Limit of stdout, and of stderr, of a pilot: of more the last part is fetched."""


class CESettings(BaseModel):
    """Base of the settings of a back end; refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class CEDescription:
    """Compute element of a back end."""

    name: str
    capacity: int
    success_rate: float  # 0.0-1.0


@dataclass(frozen=True, slots=True)
class PilotIdentity:
    """Secret of a pilot, and the URL where it is exchanged; passed by back ends that can protect the secret.

    The pilot gets the environment variables PILOT_API_URL, and PILOT_SECRET_FILE: a file with the secret that only
    its own account can read.
    """

    url: str
    secret: str = field(repr=False)  # never on a command line, in a log or in an error message


class PilotAtCE(NamedTuple):  # a tuple, since there may be a million
    """A pilot in a call to a compute element."""

    stamp: str  # our unique name, made before the submission
    vo: str
    reference: str | None = None  # name at the CE; None until the submission was confirmed
    status: MyPilotStatus = MyPilotStatus.SUBMITTED  # in the database
    submitted_at: datetime | None = None
    started_at: datetime | None = None
    cancel_requested: bool = False
    maybe_submitted: bool = True  # False: the stamp is new, the CE cannot have it
    identity: PilotIdentity | None = None  # for a submission


@dataclass(frozen=True, slots=True)
class SubmitOutcome:
    """Outcome of one submission: a reference, or the reason of the refusal."""

    reference: str | None = None
    error: str | None = None
    quota: bool = False  # refused for the quota of our pilots, which is not a failure of the site


class NothingDoneError(CEUnavailableError):
    """A step of a call failed before it had any effect: the compute element was not reached, or refused all of it.

    It counts in `CEBackend.gather_outcomes`. From `submit` it is like any other error, since there may have been
    other steps. `quota` as in `SubmitOutcome`.
    """

    quota = False


class Observed(StrEnum):
    """State of a pilot reported by its compute element."""

    WAITING = "WAITING"  # accepted, not started
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    NO_NEWS = "NO_NEWS"  # cannot be polled at present; its state does not change


class Observation(NamedTuple):
    """Observed state of one pilot."""

    state: Observed
    reason: str | None = None  # one line: why it failed, or is waiting
    reference: str | None = None  # if it was not known yet


class PilotOutput(NamedTuple):
    """The last `OUTPUT_LIMIT_BYTES` of stdout and stderr of a pilot."""

    stdout: str
    stderr: str


SettingsT = TypeVar("SettingsT", bound=CESettings)
ResponseT = TypeVar("ResponseT")
ItemT = TypeVar("ItemT")

_MAX_ERRORS = 8  # of a site that has not responded to any part of a submission


def batches(items: Sequence[ItemT], size: int) -> list[Sequence[ItemT]]:
    """Split items into parts of at most this size."""
    return [items[first : first + size] for first in range(0, len(items), size)]


class CEBackend(ABC, Generic[SettingsT]):
    """Interface to one compute element; an instance is created for each use, and its state ends with it.

    A method that raises any exception reports that the compute element did not respond: the states of its pilots
    do not change.
    """

    Settings: ClassVar[type[CESettings]]
    """Model of the `settings` of a compute element."""

    operator_only: ClassVar[bool] = False
    """True: only operators create such compute elements, from files; for back ends whose settings can run commands
    on our own hosts, or use their files."""

    grid_type: ClassVar[str] = ""
    """Name in DIRAC, for the pilot registry; empty: the name of the back end."""

    queue_setting: ClassVar[str] = ""
    """Name of the setting with the queue; empty: none."""

    close_seconds: ClassVar[float] = 5
    """Time limit of `close`, which delays the result of a call."""

    warning: str | None = None
    """Errors beside the results of calls: stored as the last error of the compute element, not as a failure."""

    outcomes: Mapping[str, SubmitOutcome] = MappingProxyType({})
    """Outcomes of the submission so far; they are kept if it fails or exceeds its time limit."""

    def __init__(self, ce: CEDescription, settings: SettingsT) -> None:
        self.ce = ce
        self.settings = settings

    def warn(self, what: object) -> None:
        """Add an error to the warning."""
        self.warning = one_line(f"{self.warning}; {what}" if self.warning else what)

    async def secondary_source(self, response: Awaitable[ResponseT]) -> ResponseT | None:
        """Await the response of a secondary source, for pilots that the main one does not know; None: it failed.

        The failure is added to the warning; these pilots are NO_NEWS then, and the others are not affected.
        """
        try:
            return await response
        except CEUnavailableError as error:
            self.warn(error)
            return None

    async def poll_parts(
        self,
        poll: Callable[[Sequence[ItemT]], Awaitable[Mapping[str, ResponseT]]],
        parts: Iterable[Sequence[ItemT]],
    ) -> tuple[dict[str, ResponseT], list[ItemT]]:
        """Poll in parts, the first of which is the main source: an error of a later one is a warning.

        Also returns the items from that part on, which are NO_NEWS.
        """
        found: dict[str, ResponseT] = {}
        silent: list[ItemT] = []
        for number, part in enumerate(parts):
            if silent:
                silent += part
            elif (known := await (self.secondary_source(poll(part)) if number else poll(part))) is not None:
                found |= known
            else:
                silent += part
        return found, silent

    async def gather_outcomes(
        self,
        submit: Callable[[Sequence[PilotAtCE]], Awaitable[Mapping[str, SubmitOutcome | Exception]]],
        parts: Iterable[Sequence[PilotAtCE]],
        *,
        known: Mapping[str, SubmitOutcome] | None = None,
        at_once: int = 1,
    ) -> Mapping[str, SubmitOutcome]:
        """Submit pilots in parts, and return the known outcomes by stamp; errors of the others become warnings.

        Args:
            submit: submits one part; an error, raised or returned, means that the outcome is not known, unless a
                `NothingDoneError` is raised: the pilots of this part are refused.
            known: outcomes of other pilots of the call.
            at_once: number of concurrent calls of `submit`.

        Raises:
            Exception: the first error, if the compute element has not responded to any part.
        """
        self.outcomes = outcomes = dict(known or {})
        errors: list[Exception] = []
        responded = bool(outcomes)
        limit = asyncio.Semaphore(at_once)

        async def submit_part(part: Sequence[PilotAtCE]) -> None:
            nonlocal responded
            async with limit:
                try:
                    if len(errors) >= _MAX_ERRORS and not responded:
                        raise errors[0]
                    response = await submit(part)
                except Exception as error:
                    errors.append(error)
                    if isinstance(error, NothingDoneError):
                        refusal = SubmitOutcome(error=one_line(error), quota=error.quota)
                        outcomes.update((pilot.stamp, refusal) for pilot in part)
                    return
            for stamp, outcome in response.items():
                if isinstance(outcome, Exception):
                    errors.append(outcome)
                else:
                    outcomes[stamp], responded = outcome, True

        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(submit_part(part))
        unknown = [error for error in errors if not isinstance(error, NothingDoneError)]
        if errors and not responded:
            raise (unknown or errors)[0]
        for error in dict.fromkeys(map(str, unknown)):
            self.warn(error)
        return outcomes

    @classmethod
    def grid_type_of(cls, settings: Mapping[str, Any]) -> str:
        """Get the `grid_type` of a compute element with these settings, which may be invalid."""
        return cls.grid_type

    def unsupported_reason(self, vo: str) -> str | None:
        """Reason why the settings do not support the VO; None: they do. Not a failure of the compute element."""
        return None

    @abstractmethod
    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        """Submit pilots, and return their outcomes by stamp. A repeated stamp must not start a second pilot.

        A missing stamp means that the pilot may or may not have been submitted. An error is raised only if no
        outcome is known; then those in `outcomes` count. See `gather_outcomes`.
        """

    @abstractmethod
    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        """Poll pilots, and return their observed states by stamp.

        A missing stamp means that the compute element does not know the pilot, never that it has ended.
        """

    @abstractmethod
    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        """Cancel pilots. Repeated until `poll` reports their end."""

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        """Fetch stdout and stderr of a pilot, complete or so far.

        Raises:
            OutputUnavailableError: there is no output of this pilot, or it was removed.
        """
        raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} keeps no output")

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        """Remove files and jobs of these ended pilots, depending on their `status`."""

    async def close(self) -> None:
        """Close connections."""
