"""Back end `batch`: jobs of Grid Engine, PBS or LSF, on the host of the worker or through SSH."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gubbins.ces.protocol import CEDescription, PilotAtCE, SubmitOutcome, batches
from gubbins.ces.slurm.batch import job_script
from gubbins.ces.slurm.error_parsing import error_line, error_lines, is_unreachable
from gubbins.ces.slurm.jobs import Job, Jobs, Record
from gubbins.ces.slurm.submit_host import Submission, SubmitHostBackend, jobs_of
from gubbins.ces.transports.shell import Completed, Shell
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus

from .settings import BatchSettings
from .systems import SYSTEMS

_MAX_IDS = 500  # in one command


class BatchBackend(SubmitHostBackend[BatchSettings]):
    """Back end of a batch system without accounting: the end of a job is read from its directory.

    A job that has left the queue without an exit code is cancelled if that was requested, and unknown otherwise.
    """

    Settings = BatchSettings
    queue_setting = "queue"
    # `bsub` would not print the number of the job, wait for its end, or only check its resources.
    misleading_variables = "BSUB_(QUIET2?|BLOCK|CHK_RESREQ)"

    @classmethod
    def grid_type_of(cls, settings: Mapping[str, Any]) -> str:
        names = {"gridengine": "GE", "pbs": "Torque", "torque": "Torque", "lsf": "LSF"}
        return names.get(str(settings.get("system")), "")

    def __init__(self, ce: CEDescription, settings: BatchSettings, shell: Shell | None = None) -> None:
        super().__init__(ce, settings, shell, settings.command_environment)
        self._system = SYSTEMS[settings.system]

    def submission(self, pilot: PilotAtCE) -> Submission:
        command, *options = self._system.submit(self.settings, pilot)
        job, number = self.settings.directory / pilot.stamp, self._system.variable
        output = ' > "$job/stdout" 2> "$job/stderr"'
        script = job_script(
            self.settings, self.ce.name, pilot, job, number=number, id=number, output=output, shown_to_others=True
        )
        path = "" if self.settings.commands is None else f'PATH="{self.settings.commands}:$PATH"; '
        find = path + self._system.find(pilot.stamp)
        argv = self.command(command, *options, *self.settings.extra_options)
        secret = "" if pilot.identity is None else pilot.identity.secret
        return Submission(argv, script, self._system.number, find, secret)

    def refusal(self, done: Completed) -> SubmitOutcome | None:
        lines = error_lines(done)
        if is_unreachable(done) or any("has been submitted" in line for line in lines):
            return None
        outcomes = (self._system.errors.outcome(line, lines, name=self.settings.system) for line in lines)
        return next((outcome for outcome in outcomes if outcome is not None), None)

    async def queue(self, pilots: Sequence[PilotAtCE]) -> Jobs:
        command, *options = self._system.queue
        done = await self.run_command(self.command(command, *options))
        nothing = any(re.search(self._system.nothing, line, re.IGNORECASE) for line in error_lines(done))
        if done.returncode != 0 and nothing and not is_unreachable(done):
            return {}
        return jobs_of(done, command, self._system.parse, self._system.listing)

    async def completions(self, pilots: Sequence[PilotAtCE], records: Mapping[str, Record]) -> tuple[Jobs, bool]:
        found = {}
        for pilot in pilots:
            record = records.get(pilot.stamp)
            ran = pilot.cancel_requested and pilot.status is MyPilotStatus.RUNNING
            number = pilot.reference or (record.number if record is not None else "")
            if number and (ran or (record is not None and record.cancelled)):
                found[pilot.stamp] = [Job(number, "CANCELLED", "", "")]
        return found, True

    async def cancel_jobs(self, jobs: Iterable[Job]) -> None:
        for batch in batches([job.number for job in jobs], _MAX_IDS):
            done = await self.run_command(self.command(self._system.cancel, *batch))
            if done.returncode == 0:
                continue
            about_a_job = re.search(rf"\b({'|'.join(batch)})\b", "; ".join(error_lines(done)))
            if is_unreachable(done) and not about_a_job:  # else, its node is
                raise CEUnavailableError(f"{self._system.cancel}: {error_line(done)}")
            if not all(re.search(self._system.unknown_job, line, re.IGNORECASE) for line in error_lines(done)):
                self.warn(f"{self._system.cancel}: {error_line(done)}")
