"""What has to be known of a host with a shell, and of the pilots that run there."""

from __future__ import annotations

__all__ = ["DEFAULT_SCRIPT", "SSHHost", "SSHSettings"]

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from gubbins.ces.protocol import CESettings
from gubbins.text import without_nul

DEFAULT_SCRIPT = "sleep 1"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _our_path(path: Path) -> Path:
    path = path.expanduser()
    # Workers are started from anywhere, and must find the same file.
    if not path.is_absolute():
        raise ValueError("must be an absolute path, or begin with ~")
    return path


OurPath = Annotated[Path, AfterValidator(_our_path)]
Text = Annotated[str, AfterValidator(without_nul)]


class SSHHost(CESettings):
    """A host that is reached through SSH. There is no password here, and no way to give one."""

    host: str = Field(
        pattern=r"^[A-Za-z0-9_:][A-Za-z0-9_.:-]*$",
        description="Name or address of one host; not an alias of several.",
    )
    port: int = Field(default=22, ge=1, le=65535)
    username: str | None = Field(
        default=None, pattern=r"^[^\s\x00-\x1f-][^\s\x00-\x1f]*$", description="Default: the worker's own."
    )
    known_hosts: OurPath = Field(
        default=Path("~/.ssh/known_hosts"),
        validate_default=True,
        description="File with the host keys to believe, as OpenSSH has it.",
    )
    client_keys: tuple[OurPath, ...] = Field(
        default=(),
        description="Private key files without a passphrase; default: the keys of the agent and ~/.ssh/id_*.",
    )
    agent_socket: OurPath | None = Field(
        default=None, description="Socket of an SSH agent; default: SSH_AUTH_SOCK, unless there are `client_keys`."
    )
    connect_timeout_seconds: float = Field(
        default=15, gt=0, le=60, description="For the connection and the log-in together."
    )
    command_timeout_seconds: float = Field(default=40, gt=0, le=600, description="For one remote command.")
    max_sessions: int = Field(
        default=4, ge=1, le=100, description="Remote commands at once; sshd's MaxSessions is 10 by default."
    )


class SSHSettings(SSHHost):
    """Settings of a compute element that is a host with a shell."""

    workdir: Text = Field(
        default="",
        description="Where the pilots' directories are, from the home directory if not absolute; "
        "default .local/state/gubbins/<CE name>.",
    )
    scripts: dict[str, Text] = Field(
        default={},
        description="Pilot script per VO, as text; run by /bin/sh unless its first line says otherwise (#!).",
    )
    default_script: Text = Field(default=DEFAULT_SCRIPT, description="For VOs that have no script of their own.")
    environment: dict[str, Text] = Field(default={}, description="Added to the pilots' environment.")
    kill_after_seconds: int = Field(
        default=10, ge=0, description="A cancelled pilot that ignores SIGTERM is killed."
    )
    keep: Literal["none", "failed", "all"] = Field(
        default="failed", description="Whose directories (with stdout and stderr) stay after the end."
    )
    keep_days: float = Field(
        default=7, ge=0, allow_inf_nan=False, description="How long those directories stay, in days."
    )

    @field_validator("environment")
    @classmethod
    def _names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a variable: letters, digits and _")
        return environment
