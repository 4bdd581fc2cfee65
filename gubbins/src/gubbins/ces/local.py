"""Back end `local`: processes on the host of the worker. Linux only (/proc)."""

from __future__ import annotations

__all__ = ["LocalBackend", "LocalSettings"]

import os
import pwd
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gubbins.domain.exceptions import OutputUnavailableError

from .processes.backend import ProcessBackend, ProcessSettings, Refused, exports, quote
from .protocol import CEDescription, Observation, Observed, PilotAtCE, PilotOutput
from .settings import AbsolutePath
from .transports.shell import LocalShell, Shell

_COMMAND_SECONDS = 30


class LocalSettings(ProcessSettings):
    """Settings of a local compute element."""

    directory: AbsolutePath | None = Field(
        default=None,
        description="Directory of the pilots' directories, absolute; default ~/.local/state/gubbins/<CE name>.",
    )
    run_as: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="User of this host that pilots run as; needs a worker that runs as root, and `directory`. "
        "Default: the worker's own, whose files and environment they can read.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.run_as is not None and self.directory is None:
            raise ValueError(
                "run_as needs a `directory` that this user can enter: the default is in the worker's home"
            )
        return self


class LocalBackend(ProcessBackend[LocalSettings]):
    """Runs pilots as processes of this host."""

    Settings = LocalSettings
    grid_type, scheme = "Local", "local"

    def __init__(self, ce: CEDescription, settings: LocalSettings, shell: Shell | None = None) -> None:
        directory = settings.directory
        if directory is None:
            state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
            directory = Path(state) / "gubbins" / ce.name
        super().__init__(
            ce,
            settings,
            shell or LocalShell(),
            host=socket.gethostname(),
            directory=str(directory),
            timeout_seconds=_COMMAND_SECONDS,
        )

    def preparation(self) -> list[str]:
        name = self.settings.run_as
        if name is None:
            return ['environment="umask $worker_umask$line_break$environment"']
        account = _account(name)
        variables = {"HOME": account.pw_dir, "USER": name, "LOGNAME": name, "TMPDIR": "/tmp"}  # noqa: S108
        ids = f"--reuid={account.pw_uid} --regid={account.pw_gid}"
        return [
            f"owner={account.pw_uid}:{account.pw_gid}",
            f"run_as='setpriv {ids} --clear-groups --inh-caps=-all --'",
            f"environment={quote(exports(variables))}$environment",
        ]

    async def poll(self, pilots: Sequence[PilotAtCE]) -> Mapping[str, Observation]:
        here = [pilot for pilot in pilots if self._is_here(pilot)]
        no_news = {pilot.stamp: Observation(Observed.NO_NEWS) for pilot in pilots if not self._is_here(pilot)}
        return {**no_news, **await super().poll(here)}

    async def cancel(self, pilots: Sequence[PilotAtCE]) -> None:
        await super().cancel([pilot for pilot in pilots if self._is_here(pilot)])

    async def output(self, pilot: PilotAtCE) -> PilotOutput:
        if not self._is_here(pilot):
            raise OutputUnavailableError(pilot.stamp, f"it is on another host ({pilot.reference})")
        return await super().output(pilot)

    def _is_here(self, pilot: PilotAtCE) -> bool:
        """True unless the pilot is on another host, according to its reference."""
        here, local = self.reference(""), f"{self.scheme}://"  # unlike those of an earlier back end
        return pilot.reference is None or pilot.reference.startswith(here) or not pilot.reference.startswith(local)


def _account(name: str) -> pwd.struct_passwd:
    """Look up the account that pilots run as.

    Raises:
        Refused: they cannot run as this user.
    """
    if os.geteuid() != 0:
        raise Refused(f"run_as {name!r} needs a worker that runs as root")
    try:
        account = pwd.getpwnam(name)
    except KeyError as error:
        raise Refused(f"run_as {name!r}: this host has no such user") from error
    if account.pw_uid == 0:
        raise Refused(f"run_as {name!r} is root itself")
    return account
