"""Settings of a site with Grid Engine, PBS or LSF."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from gubbins.ces.settings import Text, VariableName
from gubbins.ces.slurm.settings import SubmitHostSettings, Word


class BatchSettings(SubmitHostSettings):
    """Settings of a compute element with Grid Engine, PBS or LSF; the nodes must have the directory."""

    system: Literal["gridengine", "pbs", "torque", "lsf"] = Field(description="The batch system.")
    queue: Word | None = Field(default=None, description="Queue; default: chosen by the site.")
    extra_options: list[Annotated[str, Field(pattern=r"^[^\s\x00-\x1f][^\x00-\x1f]*$")]] = Field(
        default=[], description="Additional arguments of qsub or bsub, one each (`-P`, `physics`)."
    )
    command_environment: dict[VariableName, Text] = Field(
        default={}, description="Environment of the commands (`SGE_ROOT`, `LSF_ENVDIR`)."
    )

    @field_validator("extra_options")
    @classmethod
    def _refuse_reserved(cls, options: list[str]) -> list[str]:
        for option in options:
            if option in ("-J", "-N", "-o", "-e", "-t", "-terse", "-I", "-K", "-sync"):
                raise ValueError(f"{option} is reserved for the back end")
        return options

    @model_validator(mode="after")
    def _refuse_cpus_of_grid_engine(self) -> Self:
        if self.system == "gridengine" and self.cpus is not None:
            raise ValueError(
                "Grid Engine has no `cpus`: name a parallel environment of the site in `extra_options`: "
                f"['-pe', 'smp', '{self.cpus}']"
            )
        return self
