"""Back end `arc`: jobs of an ARC CE, named by the stamps of the pilots."""

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
    batches,
)
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

from .description import STDERR, STDOUT, describe
from .rest import MAX_POLLED, SITE_ERRORS, ArcRest, JobResponse
from .settings import ArcSettings

# Other states (OTHER, or those of newer CEs) are NO_NEWS.
_STATES = {
    **dict.fromkeys(
        ("ACCEPTING", "ACCEPTED", "PREPARING", "PREPARED", "SUBMITTING", "QUEUING", "HELD"), Observed.WAITING
    ),
    **dict.fromkeys(("RUNNING", "EXITINGLRMS", "EXECUTED", "FINISHING", "KILLING"), Observed.RUNNING),
    "FINISHED": Observed.DONE,
    **dict.fromkeys(("FAILED", "KILLED", "WIPED"), Observed.FAILED),
}
_MAX_SUBMITTED = 100  # in one request
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}\Z")

logger = logging.getLogger(__name__)

_submitting: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


class ArcBackend(CEBackend[ArcSettings]):
    """Back end of an ARC CE. Exit code 0 is DONE, all others are FAILED.

    The states of the CE may be some minutes old.

    Names of jobs are not unique: a pilot that may have been submitted before is searched first, by one instance of
    this process at a time. The caller must prevent concurrent submissions of a stamp by other processes.
    """

    Settings = ArcSettings
    grid_type, queue_setting = "AREX", "queue"
    operator_only = True  # the settings name files of our hosts that are sent to the URL

    def __init__(self, ce: CEDescription, settings: ArcSettings, rest: ArcRest | None = None) -> None:
        super().__init__(ce, settings)
        self._rest = rest or ArcRest(settings)
        self._ids: dict[str, str] = {}  # ids of jobs found by their stamp

    def unsupported_reason(self, vo: str) -> str | None:
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
            return await self._submit(list(new.values()), outcomes)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        if not pilots:
            return {}
        ids = await self._ids_of([pilot for pilot in pilots if pilot.reference])
        states = await self._states(list(ids.values()))
        lost = [pilot for pilot in pilots if not pilot.reference]
        search = self._ids_of(lost, set(ids.values()))
        # With known pilots the list of jobs is a secondary source, whose failure is a warning.
        found = await self.secondary_source(search) if ids else await search
        seen = {pilot.stamp: Observation(Observed.NO_NEWS) for pilot in lost if found is None}
        if found:
            jobs = list(found.values())
            more = self._states(jobs)
            known = await (self.secondary_source(more) if ids else more)
            states |= dict.fromkeys(jobs, "") if known is None else known
            ids |= found
        failed = [job for job, state in states.items() if _STATES.get(state) is Observed.FAILED]
        info = await self.secondary_source(self._rest.info(failed)) or {}
        for pilot in pilots:
            job = ids.get(pilot.stamp)
            if job is None:
                if pilot.reference is not None:  # of another CE
                    seen[pilot.stamp] = Observation(Observed.NO_NEWS)
            elif (state := states.get(job)) is not None:
                observed = _STATES.get(state, Observed.NO_NEWS)
                reason = _failure_reason(pilot, state, info.get(job, {})) if observed is Observed.FAILED else None
                reason = "held at the CE (HELD)" if state == "HELD" else reason
                if state and state not in _STATES:
                    reason = one_line(f"ARC: unknown state {state}")
                reference = self._reference(job) if pilot.reference is None else None
                seen[pilot.stamp] = Observation(observed, reason, reference)
        return seen

    async def _states(self, jobs: Sequence[str]) -> dict[str, str]:
        states, silent = await self.poll_parts(self._rest.status, batches(jobs, MAX_POLLED))
        return states | dict.fromkeys(silent, "")

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        if pilots and (ids := await self._ids_of(pilots)):
            refused = await self._rest.kill(list(ids.values()))
            if refused:
                self.warn(f"cannot cancel {len(refused)} pilots: {self.ce.name} returned {refused[0]}")

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        job = (await self._ids_of([pilot])).get(pilot.stamp)
        if job is None:
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} does not know it")
        stdout, stderr = await asyncio.gather(
            self._rest.read(job, f"session/{STDOUT}", OUTPUT_LIMIT_BYTES),
            self._rest.read(job, f"session/{STDERR}", OUTPUT_LIMIT_BYTES),
        )
        if stdout is None and stderr is None:
            raise OutputUnavailableError(pilot.stamp, f"{self.ce.name} has no output (yet, or any more)")
        return PilotOutput(*((part or b"").decode(errors="replace") for part in (stdout, stderr)))

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        if ids := await self._ids_of(pilot for pilot in pilots if not self.settings.keeps(pilot.status)):
            await self._rest.clean(list(ids.values()))

    async def close(self) -> None:
        await self._rest.close()

    async def _submit(
        self, pilots: Sequence[PilotAtCE], outcomes: dict[str, SubmitOutcome]
    ) -> Mapping[str, SubmitOutcome]:
        """Submit new pilots, and add their outcomes to those of the others."""
        described = {}
        for pilot in pilots:
            script = self.settings.script_of(pilot.vo)
            if script is None:
                outcomes[pilot.stamp] = SubmitOutcome(error=self.unsupported_reason(pilot.vo))
            else:
                variables = self.settings.variables(self.ce.name, pilot.vo, pilot.stamp, pilot.identity)
                secret = None if pilot.identity is None else pilot.identity.secret
                described[pilot] = describe(self.settings, script, pilot.stamp, variables, secret)

        async def submit(batch: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome | Exception]:
            responses = await self._rest.submit([described[pilot] for pilot in batch])
            return {pilot.stamp: self._outcome(each) for pilot, each in zip(batch, responses, strict=True)}

        return await self.gather_outcomes(submit, batches(list(described), _MAX_SUBMITTED), known=outcomes)

    def _outcome(self, response: JobResponse) -> SubmitOutcome | Exception:
        job = str(response.job.get("id", ""))
        if response.code >= 300:
            message = f"{response.code} {response.reason}"
            return SITE_ERRORS.outcome(message) or SubmitOutcome(error=one_line(message))
        if _ID.match(job):
            return SubmitOutcome(self._reference(job))
        # The next checks find it by its name.
        return CEUnavailableError(f"{self.ce.name} has accepted a job without an id: {job[:80]!r}")

    async def _ids_of(self, pilots: Iterable[PilotAtCE], others: Collection[str] = ()) -> dict[str, str]:
        """Get the ids of jobs by stamp; pilots without a reference are searched by their stamp."""
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
        """Search jobs of these names among all our jobs, except `others`.

        Unconfirmed submissions may leave several jobs of one stamp: the one with the lowest id is the pilot, the
        others are killed.
        """
        names, seen = set(stamps), set(others)
        # Listed twice, since the CE may omit a job that changes its state meanwhile.
        for pause in (0, self.settings.list_again_seconds):
            if names <= self._ids.keys():
                return
            await asyncio.sleep(pause)
            jobs = [job for job in await self._rest.list_jobs() if _ID.match(job) and job not in seen]
            found: dict[str, str] = {}
            duplicates = []
            for job, name in sorted((await self._rest.names(jobs)).items()):
                seen.add(job)
                if name is None or name not in names:
                    continue
                pilot = found.setdefault(name, self._ids.get(name, job))
                if pilot != job:
                    logger.warning(
                        "%s: killing job %s, a duplicate of %s (pilot %s)", self.ce.name, job, pilot, name
                    )
                    duplicates.append(job)
            # Before the ids are recorded, so that a failure leads to another search.
            await self._rest.kill(duplicates)
            self._ids |= found

    def _reference(self, job: str) -> str:
        return f"{self.settings.url}/rest/1.0/jobs/{job}"


def _failure_reason(pilot: PilotAtCE, state: str, info: Mapping[str, Any]) -> str:
    """Describe a failure in one line."""
    errors = info.get("Error") or []
    reason = "; ".join(str(each) for each in (errors if isinstance(errors, list) else [errors]))
    if state == "WIPED":
        reason = reason or "removed by the CE before its end was seen"
    elif state == "KILLED" or pilot.cancel_requested:
        begin = "cancelled" if pilot.cancel_requested else "killed at the CE"
        reason = f"{begin}: {reason}" if reason else begin
    elif not reason:
        code = info.get("ExitCode")
        reason = f"exit code {code}" if code is not None else "failed, and the CE gives no reason"
    return one_line(reason)
