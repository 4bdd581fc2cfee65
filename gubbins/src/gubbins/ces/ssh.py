"""Back end `ssh`: processes on a remote host, through SSH."""

from __future__ import annotations

__all__ = ["SSHBackend", "SSHSettings"]

from pydantic import Field

from .processes.backend import ProcessBackend, ProcessSettings
from .protocol import CEDescription
from .settings import Text
from .transports.shell import Shell
from .transports.ssh import SSHHost, SSHShell


class SSHSettings(SSHHost, ProcessSettings):
    """Settings of a compute element that is a Linux host."""

    workdir: Text = Field(
        default="",
        description="Directory of the pilots' directories, relative to the home directory; "
        "default .local/state/gubbins/<CE name>.",
    )
    pilots_per_command: int = Field(default=200, ge=1, description="Pilots in one remote command.")


class SSHBackend(ProcessBackend[SSHSettings]):
    """Runs pilots as processes of a remote host."""

    Settings = SSHSettings
    grid_type, scheme = "SSH", "ssh"

    def __init__(self, ce: CEDescription, settings: SSHSettings, shell: Shell | None = None) -> None:
        workdir = settings.workdir or f".local/state/gubbins/{ce.name}"
        super().__init__(
            ce,
            settings,
            shell or SSHShell(settings),
            host=settings.host,
            port=settings.port,
            directory=workdir if workdir.startswith("/") else f"./{workdir}",
            timeout_seconds=settings.command_timeout_seconds,
        )
        self.pilots_per_command = settings.pilots_per_command
