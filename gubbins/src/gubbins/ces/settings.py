"""Common settings of back ends: scripts, environment and files of pilots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import without_nul

from .protocol import CESettings, PilotIdentity

PILOT_SCRIPT = Path(__file__).with_name("pilot.sh").read_text()
SECRET_FILE = ".pilot-secret"  # noqa: S105
"""Name of the file with the secret of a pilot, in the pilot's own directory."""


def _absolute(path: Path) -> Path:
    # Independent of the working directory of a worker.
    if not path.is_absolute():
        raise ValueError("must be an absolute path")
    return path


def _variable_name(name: str) -> str:
    if not (name.isascii() and name.isidentifier()):
        raise ValueError(f"{name!r} is not a name of a variable: letters, digits and _")
    return name


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Text = Annotated[str, AfterValidator(without_nul)]
Script = Annotated[str, Field(min_length=1), AfterValidator(without_nul)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
KeepDays = Annotated[float, Field(ge=0, allow_inf_nan=False, description="Days for which kept files stay.")]


class PilotSettings(CESettings):
    """Settings of a compute element that runs pilot scripts."""

    scripts: dict[str, Script] = Field(
        default={},
        description="Pilot script per VO, as text; run by /bin/sh unless its first line begins with #!.",
    )
    default_script: Script | None = Field(
        default=None,
        description="Script for VOs without their own; default: the default pilot script, or none at an ARC CE.",
    )
    payloads: dict[str, Script] = Field(
        default={},
        description="Command per VO that the default pilot script runs, for VOs without their own script.",
    )
    environment: dict[VariableName, Text] = Field(
        default={}, description="Additional environment variables of pilots."
    )
    keep: Literal["none", "failed", "all"] = Field(
        default="failed", description="Ended pilots whose files at the site (stdout, stderr) are kept."
    )

    def variables(
        self, ce_name: str, vo: str, stamp: str | None = None, identity: PilotIdentity | None = None
    ) -> dict[str, str]:
        """Environment variables of the VO's pilots, or of one of them, without the secret."""
        own = {} if stamp is None else {"PILOT_STAMP": stamp}
        if identity is not None:
            own["PILOT_API_URL"] = identity.url
        if vo in self.payloads:
            own["PILOT_PAYLOAD"] = self.payloads[vo]
        return self.environment | own | {"PILOT_VO": vo, "PILOT_CE": ce_name}

    def script_of(self, vo: str) -> str | None:
        """Script of the VO's pilots; None: the VO is not supported."""
        return self.scripts.get(vo, PILOT_SCRIPT if vo in self.payloads else self.default_script)

    def executable(self, vo: str) -> str:
        """Content of an executable file for the VO's pilots: their script, or else the default pilot script."""
        script = self.script_of(vo) or PILOT_SCRIPT
        text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
        return text if text.endswith("\n") else f"{text}\n"

    def keeps(self, status: MyPilotStatus) -> bool:
        """True if the files of a pilot with this final state are kept."""
        return self.keep == "all" or (self.keep == "failed" and status is MyPilotStatus.FAILED)
