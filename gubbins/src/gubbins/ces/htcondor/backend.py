"""The back end `htcondor`: jobs of a schedd, whose files are spooled to it and fetched from it."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from weakref import WeakValueDictionary

from gubbins.ces.judging import SiteWords
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
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

from .description import submission
from .jobs import ABANDONED, ATTRIBUTES, Job, judge, parse_jobs, pilots_own
from .process import Bindings, BindingsRefusal
from .settings import HTCondorSettings

WORDS = SiteWords(quota=r"\bMAX_JOBS_(PER_OWNER|SUBMITTED)\b", refusal=r"(?!)")

logger = logging.getLogger(__name__)

_submitting: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


class HTCondorBackend(CEBackend[HTCondorSettings]):
    """The reference of a pilot is its job's number (`12.0`); its stamp is the job's attribute `GubbinsStamp`.

    A schedd takes two jobs of one stamp. So a pilot that may have been submitted before is looked for first, by
    one instance of this process after the other; that no other process does the same at the same time is for
    the caller to see to.
    """

    Settings = HTCondorSettings
    grid_type = "HTCondorCE"
    operator_only = True  # the settings name files on our own hosts, and configure what runs there

    def __init__(self, ce: CEDescription, settings: HTCondorSettings, bindings: Bindings | None = None) -> None:
        super().__init__(ce, settings)
        self._bindings = Bindings(settings) if bindings is None else bindings

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        outcomes = {pilot.stamp: SubmitOutcome(pilot.reference) for pilot in pilots if pilot.reference}
        new = {pilot.stamp: pilot for pilot in pilots if not pilot.reference}
        if not new:
            return outcomes
        key = (id(asyncio.get_running_loop()), f"{self.settings.collector} {self._name}")
        async with _submitting.setdefault(key, asyncio.Lock()):
            found, silent = await self._find([pilot for pilot in new.values() if pilot.maybe_submitted])
            if silent:
                raise CEUnavailableError(str(self.warning))
            for stamp, job in found.items():
                outcomes[stamp] = SubmitOutcome(job.reference)
                del new[stamp]
            if new:
                outcomes |= await self._submit(list(new.values()))
        return outcomes

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        found, silent = await self._find(pilots)
        seen = {pilot.stamp: judge(pilot, found[pilot.stamp]) for pilot in pilots if pilot.stamp in found}
        return seen | dict.fromkeys(silent, Observation(Observed.NO_NEWS))

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if pilots:
            self._note_denied(await self._bindings.call("remove", stamps=[pilot.stamp for pilot in pilots]))

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        job = pilots_own(pilot, (await self._queue()).get(pilot.stamp, ()))
        if job is None:
            raise OutputUnavailableError(
                pilot.stamp, f"the queue of {self.ce.name} has it no longer, or never had it"
            )
        if not job.completed:
            raise OutputUnavailableError(pilot.stamp, "there is none of a job that was removed or has not ended")
        texts = await self._bindings.call(
            "output", job=job.reference, names=["stdout", "stderr"], limit_bytes=OUTPUT_LIMIT_BYTES
        )
        if not isinstance(texts, list) or not any(isinstance(text, str) for text in texts):
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} has sent none")
        stdout, stderr = (text if isinstance(text, str) else "" for text in texts)
        return PilotOutput(stdout, stderr)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        if stamps := [pilot.stamp for pilot in pilots if not self.settings.keeps(pilot.status)]:
            await self._bindings.call("release", stamps=stamps)

    @property
    def _name(self) -> str:
        return self.settings.schedd or self.settings.address or ""

    async def _submit(self, pilots: Sequence[PilotAtCE]) -> dict[str, SubmitOutcome]:
        alike: dict[tuple[str, str | None], list[PilotAtCE]] = defaultdict(list)
        for pilot in pilots:
            alike[pilot.vo, None if pilot.identity is None else pilot.identity.url].append(pilot)
        submissions = [submission(self.settings, self.ce.name, its) for its in alike.values()]
        answers = await self._bindings.call("submit", submissions=submissions)
        return {pilot.stamp: self._outcome(answers, pilot.stamp) for pilot in pilots}

    def _outcome(self, answers: object, stamp: str) -> SubmitOutcome:
        match answers[stamp] if isinstance(answers, Mapping) and stamp in answers else None:
            case {"reference": str(reference)} if reference:
                return SubmitOutcome(reference)
            case {"error": str(error)}:
                return WORDS.outcome(error) or SubmitOutcome(error=one_line(error) or "no reason given")
        raise CEUnavailableError(f"{self.ce.name} did not respond about the pilot {stamp}")

    async def _find(self, pilots: Sequence[PilotAtCE]) -> tuple[dict[str, Job], Collection[str]]:
        """The jobs of these pilots, from the queue, or of those that have left it from the history.

        And the stamps of those of which nothing is known, because the history does not answer.

        An unconfirmed submission may have left two jobs of one stamp. The one that the database knows,
        or else the first, is the pilot; the other is removed.
        """
        if not pilots:
            return {}, ()
        jobs = await self._queue()
        gone = {pilot.stamp: pilot.reference for pilot in pilots if pilot.stamp not in jobs}
        told = await self.side_source(self._history(gone)) if gone else {}
        jobs |= told or {}
        found = {}
        for pilot in pilots:
            own = pilots_own(pilot, jobs.get(pilot.stamp, ()))
            if own is not None:
                found[pilot.stamp] = own
        twins = [job for stamp, own in found.items() for job in jobs[stamp] if job is not own and not job.ended]
        await self._remove("another job is this pilot", twins)
        await self._remove(
            ABANDONED, [job for job in found.values() if job.abandoned(60 * self.settings.spool_minutes)]
        )
        return found, gone if told is None else ()

    async def _remove(self, reason: str, jobs: Sequence[Job]) -> None:
        if jobs:
            numbers = [job.reference for job in jobs]
            logger.warning("%s: removing %s: %s", self.ce.name, ", ".join(numbers), reason)
            self._note_denied(await self._bindings.call("remove_jobs", jobs=numbers, reason=reason))

    async def _queue(self) -> dict[str, list[Job]]:
        return parse_jobs(await self._bindings.call("queue", attributes=ATTRIBUTES))

    async def _history(self, references: Mapping[str, str | None]) -> dict[str, list[Job]]:
        """Jobs that have left the queue, from the history; none where the history may not be read.

        Raises:
            CEUnavailableError: no response, so nothing is known about jobs that are in no queue.
        """
        try:
            told = await self._bindings.call("history", attributes=ATTRIBUTES, stamps=list(references))
        except BindingsRefusal as error:
            logger.warning("%s does not tell the history of its jobs: %s", self.ce.name, error)
            return {}
        # The history holds the jobs of all users, who may give them any stamp.
        known = {
            stamp: [job for job in jobs if references.get(stamp) in (None, job.reference)]
            for stamp, jobs in parse_jobs(told).items()
        }
        return {stamp: jobs for stamp, jobs in known.items() if jobs}

    def _note_denied(self, denied: object) -> None:
        if denied:
            self.warn(f"{self.ce.name} does not let us remove {denied} of the jobs: they are another's")
