"""The back end `arc`: pilots as jobs of an ARC CE. The stamp is the name of the job."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
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
from gubbins.ces.transports.tokens import CredentialsError
from gubbins.domain.exceptions import OutputUnavailableError
from gubbins.domain.text import one_line

from .description import STDERR, STDOUT, describe
from .rest import WORDS, ArcRest, NotAcceptedError
from .settings import ArcSettings

# A state that is not here (OTHER, or one of a newer CE) says nothing.
_STATES = {
    **dict.fromkeys(
        ("ACCEPTING", "ACCEPTED", "PREPARING", "PREPARED", "SUBMITTING", "QUEUING", "HELD"), Observed.WAITING
    ),
    **dict.fromkeys(("RUNNING", "EXITINGLRMS", "EXECUTED", "FINISHING", "KILLING"), Observed.RUNNING),
    "FINISHED": Observed.DONE,
    **dict.fromkeys(("FAILED", "KILLED", "WIPED"), Observed.FAILED),
}
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")

logger = logging.getLogger(__name__)

_submitting: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


class ArcBackend(CEBackend[ArcSettings]):
    """Exit code 0 is DONE, everything else FAILED.

    A CE tells of states what its information provider has seen last, a minute ago perhaps. They are not
    compared with earlier ones; the end is what it says of those that have ended.

    Jobs have no unique names. So a pilot that may have been submitted before is looked for first, by one
    instance of this process after the other; that no other process does the same at the same time is for
    the caller to see to.
    """

    Settings = ArcSettings
    grid_type, queue_setting = "AREX", "queue"
    operator_only = True  # the settings name files on our own hosts, whose contents are shown to the URL

    def __init__(self, ce: CEDescription, settings: ArcSettings) -> None:
        super().__init__(ce, settings)
        self._rest = ArcRest(settings)
        self._ids: dict[str, str] = {}  # of jobs that were found by their stamp

    def why_not(self, vo: str) -> str | None:
        if self.settings.script_of(vo) is None:
            return f"no pilot script for {vo}: give it one in scripts, a payload in payloads, or a default_script"
        return None

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        outcomes = {pilot.stamp: SubmitOutcome(pilot.reference) for pilot in pilots if pilot.reference}
        new = {pilot.stamp: pilot for pilot in pilots if not pilot.reference}
        if not new:
            return outcomes
        key = (id(asyncio.get_running_loop()), self.settings.url)
        async with _submitting.setdefault(key, asyncio.Lock()):
            await self._find([stamp for stamp, pilot in new.items() if pilot.maybe_submitted])
            for stamp in self._ids.keys() & new.keys():
                outcomes[stamp] = SubmitOutcome(self._reference(self._ids[stamp]))
                del new[stamp]
            outcomes.update(await self._submit(list(new.values())))
        return outcomes

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        if not pilots:
            return {}
        ids = await self._ids_of([pilot for pilot in pilots if pilot.reference])
        states = await self._rest.status(list(ids.values()))
        lost = [pilot for pilot in pilots if not pilot.reference]
        found = self._ids_of(lost, set(ids.values()))
        # Where there is nothing else to ask about, the list of jobs is the main source.
        of_lost = await self.side_source(found) if ids else await found
        seen = {pilot.stamp: Observation(Observed.NO_NEWS) for pilot in lost if of_lost is None}
        if of_lost:
            states |= await self._rest.status(list(of_lost.values()))
            ids |= of_lost
        failed = [job for job, state in states.items() if _STATES.get(state) is Observed.FAILED]
        told = await self.side_source(self._rest.info(failed)) or {}
        for pilot in pilots:
            job = ids.get(pilot.stamp)
            if job is None:
                if pilot.reference is not None:  # it is none of this CE's
                    seen[pilot.stamp] = Observation(Observed.NO_NEWS)
            elif (state := states.get(job)) is not None:
                what = _STATES.get(state, Observed.NO_NEWS)
                reason = _why(pilot, state, told.get(job, {})) if what is Observed.FAILED else None
                reason = "held at the CE (HELD)" if state == "HELD" else reason
                reference = self._reference(job) if pilot.reference is None else None
                seen[pilot.stamp] = Observation(what, reason, reference)
        return seen

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if pilots and (ids := await self._ids_of(pilots)):
            refused = await self._rest.kill(list(ids.values()))
            if refused:
                self.warn(f"cannot cancel {len(refused)} pilots: {self.ce.name} answers {refused[0]}")

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        job = (await self._ids_of([pilot])).get(pilot.stamp)
        if job is None:
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} does not know it")
        stdout, stderr = await asyncio.gather(
            self._rest.read(job, f"session/{STDOUT}", OUTPUT_LIMIT_BYTES),
            self._rest.read(job, f"session/{STDERR}", OUTPUT_LIMIT_BYTES),
        )
        if stdout is None and stderr is None:
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} has none (yet, or any more)")
        return PilotOutput(*((part or b"").decode(errors="replace") for part in (stdout, stderr)))

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        if ids := await self._ids_of(pilot for pilot in pilots if not self.settings.keeps(pilot.status)):
            await self._rest.clean(list(ids.values()))

    async def close(self) -> None:
        await self._rest.close()

    async def _submit(self, pilots: Sequence[PilotAtCE]) -> dict[str, SubmitOutcome]:
        outcomes = {}
        described = {}
        for pilot in pilots:
            script = self.settings.script_of(pilot.vo)
            if script is None:
                outcomes[pilot.stamp] = SubmitOutcome(error=self.why_not(pilot.vo))
            else:
                variables = self.settings.variables(self.ce.name, pilot.vo, pilot.stamp, pilot.identity)
                secret = None if pilot.identity is None else pilot.identity.secret
                described[pilot.stamp] = describe(self.settings, script, pilot.stamp, variables, secret)
        try:
            answers = await self._rest.submit(list(described.values()))
        except (NotAcceptedError, CredentialsError) as error:
            return outcomes | dict.fromkeys(described, _refusal(str(error)))
        for stamp, answer in zip(described, answers, strict=True):
            job = str(answer.job.get("id"))
            if answer.code < 300 and _ID.match(job):
                outcomes[stamp] = SubmitOutcome(self._reference(job))
            else:
                outcomes[stamp] = _refusal(f"{answer.code} {answer.reason}")
        return outcomes

    async def _ids_of(self, pilots: Iterable[PilotAtCE], others: Collection[str] = ()) -> dict[str, str]:
        """The ids of jobs by stamp; pilots without a reference are looked for by their stamp."""
        known = {}
        lost = []
        for pilot in pilots:
            if pilot.reference is None:
                lost.append(pilot.stamp)
            elif _ID.match(job := pilot.reference.rpartition("/")[2]):
                known[pilot.stamp] = job
        await self._find(lost, {*others, *known.values()})
        return known | {stamp: self._ids[stamp] for stamp in lost if stamp in self._ids}

    async def _find(self, stamps: Sequence[str], others: Collection[str] = ()) -> None:
        """Look for jobs of these names among all of ours but those that are known to be others.

        An unconfirmed submission may have left two jobs of one stamp. The one with the lowest id is
        the pilot; the others are killed.
        """
        names, seen = set(stamps), set(others)
        # A job that changes its state while the CE makes the list of them may be left out of it.
        for pause in (0, self.settings.list_again_seconds):
            if names <= self._ids.keys():
                return
            await asyncio.sleep(pause)
            jobs = [job for job in await self._rest.list_jobs() if _ID.match(job) and job not in seen]
            found: dict[str, str] = {}
            twins = []
            for job, name in sorted((await self._rest.names(jobs)).items()):
                seen.add(job)
                if name is None or name not in names:
                    continue
                pilot = found.setdefault(name, self._ids.get(name, job))
                if pilot != job:
                    logger.warning("%s: %s is pilot %s, killing its twin %s", self.ce.name, pilot, name, job)
                    twins.append(job)
            # Recorded only when the twins are killed, so that a failure leads to another search.
            await self._rest.kill(twins)
            self._ids |= found

    def _reference(self, job: str) -> str:
        return f"{self.settings.url}/rest/1.0/jobs/{job}"


def _refusal(said: str) -> SubmitOutcome:
    return WORDS.outcome(said) or SubmitOutcome(error=one_line(said))


def _why(pilot: PilotAtCE, state: str, told: Mapping[str, Any]) -> str:
    """The reason of the failure, in one line."""
    errors = told.get("Error") or []
    words = "; ".join(str(each) for each in (errors if isinstance(errors, list) else [errors]))
    if state == "WIPED":
        words = words or "removed by the CE before its end was seen"
    elif state == "KILLED" or pilot.cancel_requested:
        begin = "cancelled" if pilot.cancel_requested else "killed at the CE"
        words = f"{begin}: {words}" if words else begin
    elif not words:
        code = told.get("ExitCode")
        words = f"exit code {code}" if code is not None else "failed, and the CE does not say why"
    return one_line(words)
