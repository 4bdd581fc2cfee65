"""Back end `htcondor`: jobs of a schedd, with files spooled to it and fetched from it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from weakref import WeakValueDictionary

from gubbins.ces.protocol import (
    OUTPUT_LIMIT_BYTES,
    CEBackend,
    CEDescription,
    Observation,
    Observed,
    PilotAtCE,
    PilotOutput,
    SubmitOutcome,
)
from gubbins.ces.site_errors import SiteErrors
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

from .description import submission
from .jobs import ABANDONED, ATTRIBUTES, COMPLETED, Job, by_stamp, judge, parse_jobs, pilots_own, unused_carriers
from .process import Bindings, BindingsRefusal
from .settings import HTCondorSettings

SITE_ERRORS = SiteErrors(quota=r"\bMAX_JOBS_(PER_OWNER|PER_SUBMISSION|SUBMITTED)\b", refusal=r"(?!)")

# Errors of a history that we may not read. All others may be temporary.
_NO_HISTORY = re.compile(r"history has been disabled|undefined in remote configuration|\bdenied\b|authoriz", re.I)

_CONCURRENT_SUBMISSIONS = 4  # each of one VO

logger = logging.getLogger(__name__)

_submitting: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


class HTCondorBackend(CEBackend[HTCondorSettings]):
    """Back end of an HTCondor schedd.

    The reference of a pilot is its job id (`12.0`); its stamp is the attribute `GubbinsStamp` of the job. A schedd
    accepts several jobs with one stamp: a pilot that may have been submitted before is searched first, by one
    instance of this process at a time. The caller must prevent concurrent submissions of a stamp by other
    processes.
    """

    Settings = HTCondorSettings
    grid_type = "HTCondorCE"
    operator_only = True  # the settings name files of our hosts, and configure programs there

    def __init__(self, ce: CEDescription, settings: HTCondorSettings, bindings: Bindings | None = None) -> None:
        super().__init__(ce, settings)
        self._bindings = Bindings(settings) if bindings is None else bindings

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        outcomes = {pilot.stamp: SubmitOutcome(pilot.reference) for pilot in pilots if pilot.reference}
        new = {pilot.stamp: pilot for pilot in pilots if not pilot.reference}
        if not new:
            return outcomes
        place = f"{self.settings.collector} {self.settings.schedd} {self.settings.address}"
        async with _submitting.setdefault((id(asyncio.get_running_loop()), place), asyncio.Lock()):
            found, silent = await self._find([pilot for pilot in new.values() if pilot.maybe_submitted])
            if silent:
                raise CEUnavailableError(str(self.warning))
            for stamp, job in found.items():
                outcomes[stamp] = SubmitOutcome(job.reference)
                del new[stamp]
            return await self._submit(list(new.values()), outcomes) if new else outcomes

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        found, silent = await self._find(pilots)
        seen = {pilot.stamp: judge(pilot, found[pilot.stamp]) for pilot in pilots if pilot.stamp in found}
        return seen | dict.fromkeys(silent, Observation(Observed.NO_NEWS))

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if pilots:
            self._note_denied(await self._bindings.call("remove", stamps=[pilot.stamp for pilot in pilots]))

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        job = pilots_own(pilot, by_stamp(await self._queue()).get(pilot.stamp, ()))
        if job is None:
            raise OutputUnavailableError(
                pilot.stamp, f"the queue of {self.ce.name} has it no longer, or never had it"
            )
        if job.status != COMPLETED:
            raise OutputUnavailableError(pilot.stamp, "there is none of a job that was removed or has not ended")
        texts = await self._bindings.call(
            "output",
            job=job.reference,
            names=[f"{pilot.stamp}.out", f"{pilot.stamp}.err"],
            limit_bytes=OUTPUT_LIMIT_BYTES,
        )
        if not isinstance(texts, list) or not any(isinstance(text, str) for text in texts):
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} has sent none")
        stdout, stderr = (text if isinstance(text, str) else "" for text in texts)
        return PilotOutput(stdout, stderr)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        if stamps := [pilot.stamp for pilot in pilots if not self.settings.keeps(pilot.status)]:
            await self._bindings.call("release", stamps=stamps)

    async def _submit(
        self, pilots: Sequence[PilotAtCE], known: Mapping[str, SubmitOutcome]
    ) -> Mapping[str, SubmitOutcome]:
        alike: dict[tuple[str, str | None], list[PilotAtCE]] = defaultdict(list)
        for pilot in pilots:
            alike[pilot.vo, None if pilot.identity is None else pilot.identity.url].append(pilot)

        async def send(its: Sequence[PilotAtCE]) -> dict[str, SubmitOutcome | Exception]:
            responses = await self._bindings.call("submit", **submission(self.settings, self.ce.name, its))
            return {pilot.stamp: self._outcome(responses, pilot.stamp) for pilot in its}

        return await self.gather_outcomes(send, alike.values(), known=known, at_once=_CONCURRENT_SUBMISSIONS)

    def _outcome(self, responses: object, stamp: str) -> SubmitOutcome | Exception:
        match responses[stamp] if isinstance(responses, Mapping) and stamp in responses else None:
            case {"reference": str(reference)} if reference:
                return SubmitOutcome(reference)
            case {"error": str(error)}:
                return SITE_ERRORS.outcome(error) or SubmitOutcome(error=one_line(error) or "no reason given")
            case {"unknown": str(error)}:
                return CEUnavailableError(one_line(error))
        return CEUnavailableError(f"{self.ce.name} did not respond about the pilot {stamp}")

    async def _find(self, pilots: Sequence[PilotAtCE]) -> tuple[dict[str, Job], Collection[str]]:
        """Find the jobs of pilots by stamp, in the queue or else in the history.

        Also returns the stamps of pilots whose state is unknown because the history is not available. Unconfirmed
        submissions may leave two jobs of one stamp: the one in the database, or else the first, is the pilot; the
        other is removed.
        """
        if not pilots:
            return {}, ()
        queue = await self._queue()
        jobs = by_stamp(queue)
        gone = {pilot.stamp: pilot.reference for pilot in pilots if pilot.stamp not in jobs}
        history = await self.secondary_source(self._history(gone)) if gone else {}
        jobs |= history or {}
        found = {}
        for pilot in pilots:
            own = pilots_own(pilot, jobs.get(pilot.stamp, ()))
            if own is not None:
                found[pilot.stamp] = own
        seconds = 60 * self.settings.spool_minutes
        twins = [job for stamp, own in found.items() for job in jobs[stamp] if job is not own and not job.ended]
        abandoned = [job for job in found.values() if job.abandoned(seconds)]
        await asyncio.gather(
            self._remove("another job is this pilot", twins),
            self._remove(ABANDONED, abandoned),
            self._remove("its pilots are gone", unused_carriers(queue, seconds)),
        )
        return found, gone if history is None else ()

    async def _remove(self, reason: str, jobs: Sequence[Job]) -> None:
        if references := [job.reference for job in jobs]:
            logger.info("%s: removing %s: %s", self.ce.name, ", ".join(references), reason)
            removal = self._bindings.call("remove_jobs", jobs=references, reason=reason)
            self._note_denied(await self.secondary_source(removal))

    async def _queue(self) -> list[Job]:
        return parse_jobs(await self._bindings.call("queue", attributes=ATTRIBUTES))

    async def _history(self, references: Mapping[str, str | None]) -> dict[str, list[Job]]:
        """Find jobs that have left the queue in the history; none if we may not read it.

        Raises:
            CEUnavailableError: no response: the state of jobs that have left the queue is unknown.
        """
        try:
            rows = await self._bindings.call("history", attributes=ATTRIBUTES, stamps=list(references))
        except BindingsRefusal as error:
            if not _NO_HISTORY.search(str(error)):
                raise
            logger.warning("Cannot read the history of jobs of %s: %s", self.ce.name, error)
            return {}
        # The history has jobs of all users, who can set any stamp. Jobs that were removed by force keep the name
        # of their node.
        return by_stamp(
            job._replace(remote_host=None)
            for job in parse_jobs(rows)
            if job.stamp is not None and references.get(job.stamp) in (None, job.reference)
        )

    def _note_denied(self, denied: object) -> None:
        if denied:
            self.warn(f"{self.ce.name} does not let us remove {denied} of the jobs: they are another's")
