"""Back end `ssh`: processes on a remote host, through SSH."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources

from gubbins.ces.processes.commands import InvalidResponse, Refused, command, is_stamp, parse, quote
from gubbins.ces.protocol import (
    OUTPUT_LIMIT_BYTES,
    CEBackend,
    CEDescription,
    Observation,
    Observed,
    PilotAtCE,
    PilotOutput,
    SubmitOutcome,
    observation_of_exit,
)
from gubbins.ces.settings import PILOT_SCRIPT, executable_script
from gubbins.ces.transports.ssh import SSHShell
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

from .settings import SSHSettings

_CONCURRENT_SUBMISSIONS = 4  # commands; sshd has at most 10 sessions of one connection
WRAPPER = resources.files("gubbins.ces.processes").joinpath("wrapper.sh").read_text()


class SSHBackend(CEBackend[SSHSettings]):
    """Runs pilots as processes of a remote host. Exit code 0 is DONE, all others are FAILED.

    All state is in the directories of pilots. A remote command is for up to `pilots_per_command` pilots.
    """

    Settings = SSHSettings
    grid_type = "SSH"
    operator_only = True  # the settings name key files of our hosts

    def __init__(self, ce: CEDescription, settings: SSHSettings, shell: SSHShell | None = None) -> None:
        super().__init__(ce, settings)
        self._shell = shell or SSHShell(settings)
        workdir = settings.workdir or f".local/state/gubbins/{ce.name}"
        self._workdir = quote(workdir if workdir.startswith("/") else f"./{workdir}")
        self._host = f"{settings.host}:{settings.port}"
        self._enter = f"enter {self._workdir}"

    async def submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome]:
        by_vo: dict[str, list[PilotAtCE]] = defaultdict(list)
        for pilot in pilots:
            by_vo[pilot.vo].append(pilot)
        size = self.settings.pilots_per_command
        parts = [own[at : at + size] for own in by_vo.values() for at in range(0, len(own), size)]
        return await self.gather_outcomes(self._submit, parts, at_once=_CONCURRENT_SUBMISSIONS)

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        observations = {}
        with _ignore_missing_workdir(pilots):
            for word, rest in await self._bulk(
                _stamps(pilots), [self._enter], lambda stamp: f"observe {stamp}", files=True
            ):
                stamp, _, detail = rest.partition(" ")
                try:
                    observations[stamp] = self._observation(stamp, word, detail)
                except (TypeError, ValueError) as error:
                    raise InvalidResponse(f"{self._host}: invalid response: {one_line(rest)}") from error
        return observations

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        before = [self._enter, f"now=$(date +%s) kill_after={self.settings.kill_after_seconds}"]
        with _ignore_missing_workdir(pilots):
            await self._bulk(_stamps(pilots), before, lambda stamp: f"cancel {stamp}", files=True)

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        try:
            found = await self._bulk(
                [pilot.stamp], [self._enter], lambda stamp: f"output {stamp} {OUTPUT_LIMIT_BYTES}"
            )
        except Refused as error:
            if pilot.reference is not None:  # the file system may not be mounted
                raise
            raise OutputUnavailableError(pilot.stamp, str(error)) from error
        records = dict(found)
        if set(records) != {"stdout", "stderr"}:
            raise OutputUnavailableError(pilot.stamp, "its directory does not exist (any more)")
        return PilotOutput(records["stdout"], records["stderr"])

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        keep_minutes = round(self.settings.keep_days * 24 * 60)
        kept = {pilot.stamp for pilot in pilots if self.settings.keeps(pilot.status)}

        def line(stamp: str) -> str:
            return f"keep {stamp}" if stamp in kept else f"rm -rf ./{stamp}"

        await self._bulk(_stamps(pilots), [self._enter, f"sweep {keep_minutes}"], line)

    async def close(self) -> None:
        await self._shell.close()

    async def _submit(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, SubmitOutcome | Exception]:
        """Submit pilots of one VO by one command."""
        vo = pilots[0].vo
        stamps = [pilot.stamp for pilot in pilots]
        identities = {pilot.stamp: pilot.identity for pilot in pilots if pilot.identity is not None}
        script = executable_script(self.settings.script_of(vo) or PILOT_SCRIPT)
        variables = self.settings.variables(self.ce.name, vo, identity=next(iter(identities.values()), None))
        exports = "".join(f"{name}={quote(value)}\nexport {name}\n" for name, value in variables.items())
        before = [
            f"prepare {self._workdir}",
            self._enter,
            f"script={quote(script)}",
            f"wrapper={quote(WRAPPER)}",
            f"environment={quote(exports)}",
        ]

        def line(stamp: str) -> str:
            secret = identities[stamp].secret if stamp in identities else ""
            return f"secret={quote(secret)}\nsubmit {stamp}"

        try:
            records = await self._bulk(stamps, before, line)
        except Refused as error:
            # Nothing was started by this call; an earlier one may have started the same stamps.
            return {stamp: SubmitOutcome(error=one_line(error)) for stamp in stamps}
        outcomes: dict[str, SubmitOutcome | Exception] = {
            stamp: InvalidResponse(f"{self._host}: no outcome of a submission")
            if is_stamp(stamp)
            else SubmitOutcome(error=f"{stamp!r} cannot be the name of a directory")
            for stamp in stamps
        }
        for word, rest in records:
            stamp, _, why = rest.partition(" ")
            if word == "unreadable":
                outcomes[stamp] = CEUnavailableError(f"{self._host}: {one_line(why)}")
                continue
            refused = word == "refused"
            outcomes[stamp] = SubmitOutcome(
                reference=None if refused else self._reference(stamp),
                error=(one_line(why) or "the host gives no reason") if refused else None,
            )
        return outcomes

    async def _bulk(
        self,
        stamps: Iterable[str],
        before: Sequence[str],
        line: Callable[[str], str],
        *,
        files: bool = False,
    ) -> list[tuple[str, str]]:
        """Run remote commands with one line per stamp, and return their records; invalid stamps are skipped.

        With `files`, the commands begin with a search of the pilots' small files.

        Raises:
            Refused: nothing was done.
            CEUnavailableError: no response to a command, which may have been run.
        """
        names = [stamp for stamp in stamps if is_stamp(stamp)]
        size = self.settings.pilots_per_command
        batches = [names[start : start + size] for start in range(0, len(names), size)]
        records: list[tuple[str, str]] = []
        for batch in batches:
            found = [f"find_files {' '.join(batch)}"] if files else []
            request = command([*before, *found, *map(line, batch)])
            response = await self._shell.run(["/bin/sh", "-s"], stdin=request.text)
            try:
                records += parse(response, request.mark, host=self._host)
            except Refused as error:
                if batch is batches[0]:
                    raise
                raise CEUnavailableError(str(error)) from error
        return records

    def _reference(self, stamp: str) -> str:
        return f"ssh://{self._host}/{stamp}"

    def _observation(self, stamp: str, word: str, detail: str) -> Observation:
        state, reason = Observed.NO_NEWS, None
        match word:
            case "prepared" if int(detail) < self.settings.start_seconds:
                state = Observed.WAITING
            case "prepared":
                state, reason = Observed.FAILED, "the pilot process was never started"
            case "running":
                state = Observed.RUNNING
            case "unreadable":
                self.warn(f"{self._host}: {detail}")
            case "elsewhere":
                reason = f"it runs on {one_line(detail)}, but {self.settings.host} is another host now"
            case "restarted":
                state, reason = Observed.FAILED, "the host was restarted while it ran"
            case "ended":
                code, cancelled, line = detail.split(" ", 2)
                number = None if code == "-" else int(code)
                state, reason, _ = observation_of_exit(
                    number, cancelled=cancelled == "1", last_line=lambda: one_line(line)
                )
        return Observation(state, reason, self._reference(stamp))


def _stamps(pilots: Iterable[PilotAtCE]) -> Iterator[str]:
    return (pilot.stamp for pilot in pilots)


@contextlib.contextmanager
def _ignore_missing_workdir(pilots: Iterable[PilotAtCE]) -> Iterator[None]:
    """Ignore a missing working directory unless there are confirmed pilots: it may not be mounted then."""
    try:
        yield
    except Refused:
        if any(pilot.reference for pilot in pilots):
            raise
