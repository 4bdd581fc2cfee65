"""Settings that back ends share: the pilots' scripts and environment, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import without_nul

from .protocol import CESettings


def _absolute(path: Path) -> Path:
    # Workers are started from anywhere, and must find the same file.
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _variable_name(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name!r} is no name of a variable: letters, digits and _")
    return name


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Text = Annotated[str, AfterValidator(without_nul)]
Script = Annotated[str, Field(min_length=1), AfterValidator(without_nul)]
DefaultScript = Annotated[Script, Field(description="For VOs that have no script of their own.")]
VariableName = Annotated[str, AfterValidator(_variable_name)]
KeepDays = Annotated[float, Field(ge=0, allow_inf_nan=False, description="How long those files stay, in days.")]

# A wrapper writes its pid within milliseconds.
StartSeconds = Annotated[
    float,
    Field(ge=0, allow_inf_nan=False, description="A pilot process that has not started after so long has failed."),
]


class PilotSettings(CESettings):
    """Settings of a compute element that runs pilot scripts."""

    scripts: dict[str, Script] = Field(
        default={},
        description="Pilot script per VO, as text; run by /bin/sh unless its first line says otherwise (#!).",
    )
    environment: dict[VariableName, Text] = Field(default={}, description="Added to the pilots' environment.")
    keep: Literal["none", "failed", "all"] = Field(
        default="failed", description="Whose files at the site (stdout, stderr) stay after the end."
    )

    def variables(self, ce_name: str, vo: str, stamp: str | None = None) -> dict[str, str]:
        """The environment of the VO's pilots; with `stamp`, of that one."""
        own = {} if stamp is None else {"PILOT_STAMP": stamp}
        return self.environment | own | {"PILOT_VO": vo, "PILOT_CE": ce_name}

    def keeps(self, status: MyPilotStatus) -> bool:
        """Whether the files of a pilot that ended so stay."""
        return self.keep == "all" or (self.keep == "failed" and status is MyPilotStatus.FAILED)


def executable_script(script: str) -> str:
    """The script as an executable file: with an interpreter and a last line end."""
    text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
    return text if text.endswith("\n") else f"{text}\n"
