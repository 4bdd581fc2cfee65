"""Settings that back ends share: the pilots' scripts and environment, and what is kept of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.domain.text import without_nul

from .protocol import CESettings, PilotIdentity

PILOT_SCRIPT = Path(__file__).with_name("pilot.sh").read_text()
SECRET_FILE = ".pilot-secret"  # noqa: S105
"""Name of the file with the secret of a pilot, in a directory that is the pilot's own."""


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
DefaultScript = Annotated[
    Script | None,
    Field(description="For VOs that have no script of their own; left out: the default pilot script."),
]
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
    payloads: dict[str, Script] = Field(
        default={},
        description="Command per VO that the default pilot script runs, for VOs that have no script of their own.",
    )
    environment: dict[VariableName, Text] = Field(default={}, description="Added to the pilots' environment.")
    keep: Literal["none", "failed", "all"] = Field(
        default="failed", description="Whose files at the site (stdout, stderr) stay after the end."
    )

    def variables(
        self, ce_name: str, vo: str, stamp: str | None = None, identity: PilotIdentity | None = None
    ) -> dict[str, str]:
        """The environment of the VO's pilots; with `stamp`, of that one. It holds no secret."""
        own = {} if stamp is None else {"PILOT_STAMP": stamp}
        if identity is not None:
            own["PILOT_API_URL"] = identity.url
        if vo in self.payloads:
            own["PILOT_PAYLOAD"] = self.payloads[vo]
        return self.environment | own | {"PILOT_VO": vo, "PILOT_CE": ce_name}

    def script_of(self, vo: str) -> str | None:
        """The script of the VO's pilots; None: it gets none here."""
        default: str | None = PILOT_SCRIPT if vo in self.payloads else getattr(self, "default_script", None)
        return self.scripts.get(vo, default)

    def keeps(self, status: MyPilotStatus) -> bool:
        """True if the files of a pilot that ended so stay."""
        return self.keep == "all" or (self.keep == "failed" and status is MyPilotStatus.FAILED)


def executable_script(script: str) -> str:
    """The script as an executable file: with an interpreter and a last line end."""
    text = script if script.startswith("#!") else f"#!/bin/sh\n{script}"
    return text if text.endswith("\n") else f"{text}\n"
