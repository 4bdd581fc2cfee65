"""Settings of a site with Grid Engine, PBS or LSF."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from gubbins.ces.settings import Text, VariableName
from gubbins.ces.slurm.settings import SubmitHostSettings, Word


class BatchSettings(SubmitHostSettings):
    """Settings of a compute element with Grid Engine, PBS or LSF; the nodes must have the directory."""

    system: Literal["gridengine", "pbs", "lsf"] = Field(description="The batch system.")
    queue: Word | None = Field(default=None, description="Queue; default: as the site chooses.")
    extra_options: list[Annotated[str, Field(pattern=r"^[^\s\x00-\x1f][^\x00-\x1f]*$")]] = Field(
        default=[], description="More words for qsub or bsub, one each (`-P`, `physics`)."
    )
    command_environment: dict[VariableName, Text] = Field(
        default={}, description="Environment of the commands (`SGE_ROOT`, `LSF_ENVDIR`)."
    )

    @field_validator("extra_options")
    @classmethod
    def _not_ours(cls, options: list[str]) -> list[str]:
        for option in options:
            if option in ("-J", "-N", "-o", "-e", "-t", "-terse", "-I", "-K", "-sync"):
                raise ValueError(f"{option} is not for you to set: the back end needs it")
        return options
