"""An example CE back end: a directory that another program processes.

`{stamp}.todo` asks for a pilot; that program turns it into `{stamp}.running` and at last into `{stamp}.done`
or `{stamp}.failed`, which says why. `{stamp}.cancel` asks it to end the pilot.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from gubbins.ces import CEBackend, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import CESettings

SUFFIXES = {
    "todo": Observed.WAITING,
    "running": Observed.RUNNING,
    "done": Observed.DONE,
    "failed": Observed.FAILED,
}


class SpoolSettings(CESettings):
    directory: Path = Field(description="Where the files are; must exist.")


class SpoolBackend(CEBackend[SpoolSettings]):
    Settings = SpoolSettings
    operator_only = True  # only an operator may name a directory of our hosts

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        return {pilot.stamp: self._submit(pilot) for pilot in pilots}

    def _submit(self, pilot: PilotAtCE) -> SubmitOutcome:
        if self._observe(pilot) is None:  # the same stamp again is no second pilot
            try:
                (self.settings.directory / f"{pilot.stamp}.todo").write_text(pilot.vo)
            except OSError as error:
                return SubmitOutcome(error=str(error))
        return SubmitOutcome(reference=f"spool://{pilot.stamp}")

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        if not self.settings.directory.is_dir():
            raise FileNotFoundError(f"{self.settings.directory} is not there")  # nothing follows for any pilot
        seen = {pilot.stamp: self._observe(pilot) for pilot in pilots}
        return {stamp: observation for stamp, observation in seen.items() if observation is not None}

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        for pilot in pilots:
            if self._observe(pilot) is not None:
                (self.settings.directory / f"{pilot.stamp}.cancel").touch()

    def _observe(self, pilot: PilotAtCE) -> Observation | None:
        for suffix, state in SUFFIXES.items():
            with contextlib.suppress(FileNotFoundError):
                text = (self.settings.directory / f"{pilot.stamp}.{suffix}").read_text()
                reason = text.strip() if state is Observed.FAILED else None
                # The reference is for a pilot whose submission was never confirmed; others have it.
                return Observation(state, reason, f"spool://{pilot.stamp}")
        return None
