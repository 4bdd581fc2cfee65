"""Back end `local`: processes on the host of the worker. Linux only (/proc)."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gubbins.ces.protocol import (
    CEBackend,
    Observation,
    Observed,
    PilotAtCE,
    PilotOutput,
    SubmitOutcome,
)
from gubbins.ces.settings import (
    PILOT_SCRIPT,
    SECRET_FILE,
    AbsolutePath,
    DefaultScript,
    KeepDays,
    PilotSettings,
    StartSeconds,
)
from gubbins.ces.transports.shell import inherited_environment
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

from .account import Account
from .job import LocalJob, sweep

_SECONDS_OF_A_DAY = 24 * 3600


class LocalSettings(PilotSettings):
    """Settings of a local compute element."""

    directory: AbsolutePath | None = Field(
        default=None,
        description="Directory of the pilots' directories, absolute; default ~/.local/state/gubbins/<CE name>.",
    )
    default_script: DefaultScript = None
    run_as: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="User of this host that pilots run as; needs a worker that runs as root, and `directory`. "
        "Default: the worker's own, whose files and environment they can read.",
    )
    kill_after_seconds: float = Field(
        default=10, ge=0, allow_inf_nan=False, description="Time from SIGTERM to SIGKILL for a cancelled pilot."
    )
    keep_days: KeepDays = 7
    start_seconds: StartSeconds = 60

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.run_as is not None and self.directory is None:
            raise ValueError(
                "run_as needs a `directory` that this user can enter: the default is in the worker's home"
            )
        return self


class LocalBackend(CEBackend[LocalSettings]):
    """Runs pilots as processes of this host. Exit code 0 is DONE, all others are FAILED.

    All state is in the directories of pilots, which survive restarts of the worker.
    """

    Settings = LocalSettings
    grid_type = "Local"
    operator_only = True

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        async def submit(pilot: PilotAtCE) -> Mapping[str, SubmitOutcome]:
            return {pilot.stamp: await asyncio.to_thread(self._submit, pilot)}

        return await self.gather_outcomes(submit, pilots)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        seen: dict[str, Observation] = {}

        def poll_one(pilot: PilotAtCE) -> None:
            seen[pilot.stamp] = Observation(Observed.NO_NEWS)  # stays if its directory cannot be read
            if (observation := self._observe(pilot)) is not None:
                seen[pilot.stamp] = observation
            elif pilot.reference is not None and not self._directory().is_dir():
                raise FileNotFoundError(f"{self._directory()} does not exist, or is not mounted")
            else:
                del seen[pilot.stamp]

        await self._each(pilots, poll_one)
        return seen

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        def cancel_one(pilot: PilotAtCE) -> None:
            if self._is_here(pilot):
                self._job(pilot.stamp).cancel(kill_after_seconds=self.settings.kill_after_seconds)

        await self._each(pilots, cancel_one)

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self._is_here(pilot):
            raise OutputUnavailableError(pilot.stamp, f"it is on another host ({pilot.reference})")
        try:
            return await asyncio.to_thread(self._job(pilot.stamp).output)
        except FileNotFoundError as error:
            raise OutputUnavailableError(pilot.stamp, "its directory does not exist (any more)") from error
        except OSError as error:
            raise CEUnavailableError(str(error)) from error

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        def remove(pilot: PilotAtCE) -> None:
            if self.settings.keeps(pilot.status):
                self._job(pilot.stamp).mark_for_sweep()
            else:
                self._job(pilot.stamp).remove()

        await self._each(pilots, remove)
        keep_seconds = self.settings.keep_days * _SECONDS_OF_A_DAY
        await asyncio.to_thread(sweep, self._directory(), keep_seconds=keep_seconds)

    async def _each(self, pilots: Sequence[PilotAtCE], do: Callable[[PilotAtCE], None]) -> None:
        """Call a function for each pilot, in a thread; an OSError becomes a warning."""

        def do_all() -> None:
            for pilot in pilots:
                try:
                    do(pilot)
                except OSError as error:
                    self.warn(error)

        await asyncio.to_thread(do_all)

    def _directory(self) -> Path:
        if self.settings.directory is not None:
            return self.settings.directory
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(state) / "gubbins" / self.ce.name

    def _account(self) -> Account | None:
        return None if self.settings.run_as is None else Account.of(self.settings.run_as)

    def _job(self, stamp: str) -> LocalJob:
        return LocalJob(self._directory() / stamp)

    @staticmethod
    def _is_here(pilot: PilotAtCE) -> bool:
        """True unless the pilot is on another host, according to its reference."""
        return pilot.reference is None or pilot.reference.startswith(f"local://{socket.gethostname()}/")

    def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        try:
            account = self._account()
            job = LocalJob(self._directory() / pilot.stamp, account)
            own = {} if account is None else account.environment
            variables = self.settings.variables(self.ce.name, pilot.vo, pilot.stamp, pilot.identity)
            secret = None if pilot.identity is None else pilot.identity.secret
            if secret is not None:
                own = own | {"PILOT_SECRET_FILE": str(job.work / SECRET_FILE)}
            if job.create(self.settings.script_of(pilot.vo) or PILOT_SCRIPT, secret):
                job.launch(inherited_environment() | own | variables)
        except (OSError, LookupError, subprocess.SubprocessError) as error:
            return SubmitOutcome(error=one_line(error))
        return SubmitOutcome(reference=self._reference(pilot))

    @staticmethod
    def _reference(pilot: PilotAtCE) -> str:
        return f"local://{socket.gethostname()}/{pilot.stamp}"

    def _observe(self, pilot: PilotAtCE) -> Observation | None:
        if not self._is_here(pilot):
            return Observation(Observed.NO_NEWS)
        observation = self._job(pilot.stamp).observe(start_seconds=self.settings.start_seconds)
        if observation is not None and pilot.reference is None:
            return Observation(observation.state, observation.reason, self._reference(pilot))
        return observation
