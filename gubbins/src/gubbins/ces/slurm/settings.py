"""Settings of a Slurm site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from gubbins.ces.settings import DefaultScript, KeepDays, PilotSettings
from gubbins.ces.transports.ssh import SSHHost

# What the back end says itself, or what would make something else than one job of a pilot.
_OURS = {"array", "chdir", "clusters", "comment", "error", "input", "job-name", "output", "parsable", "requeue"}
_OURS |= {"test-only", "wait", "wrap"}


def _absolute(path: Path) -> Path:
    # Workers are started from anywhere; and Slurm takes % and \ in the names of output files for its own.
    if not path.is_absolute() or any(character in "%\\\n" for character in str(path)):
        raise ValueError("must be an absolute path without % and \\")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=@/+-]+$")]


class SubmitHostSettings(PilotSettings):
    """Settings of a site whose batch system is commanded on a submit host, with a directory for each pilot."""

    ssh: SSHHost | None = Field(
        default=None,
        description="The submit host and what it takes to get there (`host`, `username`…; needs the extra `ssh`); "
        "left out: the worker's own host. All paths below are there.",
    )
    directory: AbsolutePath = Field(
        description="Where the pilots' directories are, absolute; the same for all workers that use this site."
    )
    account: Word | None = Field(default=None, description="Account that is charged.")
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a pilot.")
    memory_mb: int | None = Field(default=None, ge=1, description="Memory of a pilot, in MiB.")
    wall_minutes: int | None = Field(default=None, ge=1, description="Time limit of a pilot, in minutes.")
    default_script: DefaultScript = None
    commands: AbsolutePath | None = Field(
        default=None, description="Directory of the commands of the batch system; left out: they are in PATH."
    )
    timeout_seconds: float = Field(
        default=20, gt=0, allow_inf_nan=False, description="How long one command may take."
    )
    concurrent_submissions: int = Field(
        default=8,
        ge=1,
        description="How many pilots are submitted at the same time, each by a command of its own.",
    )
    keep_days: KeepDays = 7


class SlurmSettings(SubmitHostSettings):
    """Settings of a Slurm compute element."""

    nodes_see_directory: bool = Field(
        default=True,
        description="Whether the nodes have that directory under the same name. If not, there is no output, and "
        "the end of a job is known only for as long as Slurm knows it.",
    )
    clusters: Word | None = Field(
        default=None,
        description="Clusters of a site with several (`--clusters`), with commas; needs slurmdbd there.",
    )
    partition: Word | None = Field(default=None, description="Partition, or several with commas.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    extra_options: list[Annotated[str, Field(pattern=r"^--[a-z]")]] = Field(
        default=[], description="More options of sbatch, each as one string (`--constraint=avx2`)."
    )
    completion_log: AbsolutePath | None = Field(
        default=None,
        description="The file of `jobcomp/filetxt`, if the site has one: ends are known when Slurm has forgotten.",
    )
    accounting: bool = Field(
        default=False,
        description="Whether the site keeps accounts (slurmdbd): `sacct` knows ends that Slurm has forgotten.",
    )
    slurm_conf: AbsolutePath | None = Field(default=None, description="SLURM_CONF of the commands.")

    @field_validator("extra_options")
    @classmethod
    def _not_ours(cls, options: list[str]) -> list[str]:
        for option in options:
            name = option[2:].partition("=")[0]
            # sbatch takes the beginning of a name for the name.
            if any(ours.startswith(name) for ours in _OURS) or "\n" in option:
                raise ValueError(f"--{name} is not for you to set: the back end needs it")
        return options
