"""Base of back ends that keep a directory for each pilot on a host."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, CEBackend, CEDescription, PilotAtCE, PilotOutput
from gubbins.ces.settings import KeepDays, PilotSettings
from gubbins.ces.transports.shell import Completed, Shell
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.text import one_line

_STAMP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HERE = Path(__file__).parent
_MINUTES_OF_A_DAY = 24 * 60
# Exit codes of output.sh.
_NOT_FOUND, _NO_DIRECTORY = 66, 69


class DirectorySettings(PilotSettings):
    """Settings of a compute element with directories of pilots."""

    keep_days: KeepDays = 7


SettingsT = TypeVar("SettingsT", bound=DirectorySettings)


class DirectoryBackend(CEBackend[SettingsT]):
    """Keeps a directory for each pilot, named by its stamp, on a host.

    Args:
        shell: runs commands on the host.
        directory: directory of the pilots' directories.
        timeout_seconds: time limit of a command.
    """

    operator_only = True  # the settings run commands on our hosts, or name key files of our hosts
    file_of_pilots: ClassVar[str] = "."
    """File in the directory of each pilot; directories without it are not removed."""

    def __init__(
        self, ce: CEDescription, settings: SettingsT, shell: Shell, *, directory: str, timeout_seconds: float
    ) -> None:
        super().__init__(ce, settings)
        self._shell = shell
        self._directory = directory
        self._timeout_seconds = timeout_seconds

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not is_stamp(pilot.stamp):
            raise OutputUnavailableError(pilot.stamp, "it cannot be the name of a directory")
        # Of a confirmed pilot the file system may not be mounted.
        missing = [_NOT_FOUND] if pilot.reference else [_NOT_FOUND, _NO_DIRECTORY]
        texts = []
        for name in ("stdout", "stderr"):
            arguments = [self._directory, pilot.stamp, name, str(OUTPUT_LIMIT_BYTES)]
            what = f"the output of {pilot.stamp}"
            done = await self.run_command([*script("output"), *arguments], what=what)
            if done.returncode in missing:
                raise OutputUnavailableError(pilot.stamp, "its directory does not exist (any more)")
            texts.append(text_of_script(done, what))
        return PilotOutput(*texts)

    async def cleanup(self, pilots: Sequence[PilotAtCE]) -> None:
        await self.clean_directories(
            (("ended" if self.settings.keeps(pilot.status) else "remove", pilot.stamp) for pilot in pilots),
            remove_after_minutes=str(round(self.settings.keep_days * _MINUTES_OF_A_DAY)),
        )

    async def close(self) -> None:
        await self._shell.close()

    async def clean_directories(self, lines: Iterable[tuple[str, str]], *, remove_after_minutes: str = "") -> None:
        """Mark or remove directories; see `cleanup.sh`."""
        text = "".join(f"{what} {stamp}\n" for what, stamp in lines if is_stamp(stamp))
        if text:
            what = f"the directory of {self.ce.name}"
            argv = [*script("cleanup"), self._directory, remove_after_minutes, self.file_of_pilots]
            text_of_script(await self.run_command(argv, text.encode(), what=what), what)

    async def run_command(self, argv: Sequence[str], stdin: bytes = b"", *, what: str | None = None) -> Completed:
        """Run a command on the host; `what` replaces its name in errors."""
        try:
            return await self._shell.run(argv, stdin=stdin, timeout=self._timeout_seconds)
        except CEUnavailableError as error:
            raise type(error)(str(error).replace(argv[0], what or argv[0], 1)) from error


def is_stamp(stamp: str) -> bool:
    """True if the stamp is a safe name of a directory."""
    return _STAMP.fullmatch(stamp) is not None


def script(name: str, folder: Path = _HERE) -> list[str]:
    """Make a command that runs one of our scripts, to be followed by its arguments."""
    return ["/bin/sh", "-c", folder.joinpath(f"{name}.sh").read_text(), name]


def text_of_script(done: Completed, what: str) -> str:
    """Get the output of one of our scripts.

    Raises:
        CEUnavailableError: it failed.
    """
    if done.returncode != 0:
        error = one_line(done.stderr) or "no message"
        raise CEUnavailableError(f"{what}: {error} (exit code {done.returncode})")
    return done.stdout
