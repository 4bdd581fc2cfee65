"""What has to be known of a host with a shell, and of the pilots that run there."""

from __future__ import annotations

__all__ = ["DEFAULT_SCRIPT", "SSHSettings"]

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from gubbins.ces.transports.ssh import SSHHost
from gubbins.domain.text import without_nul

DEFAULT_SCRIPT = "sleep 1"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


Text = Annotated[str, AfterValidator(without_nul)]


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
