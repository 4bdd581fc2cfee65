"""Settings of a Slurm site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from gubbins.ces.directories.backend import DirectorySettings
from gubbins.ces.transports.ssh import SSHHost

# Options set by the back end, and options that would not submit one job per pilot.
_RESERVED = {"array", "chdir", "clusters", "comment", "error", "input", "job-name", "output", "parsable"}
_RESERVED |= {"requeue", "test-only", "wait", "wrap"}


def _absolute(path: Path) -> Path:
    # Slurm interprets % and \ in names of output files.
    if not path.is_absolute() or any(character in "%\\\n" for character in str(path)):
        raise ValueError("must be an absolute path without % and \\")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=@/+-]+$")]


class SubmitHostSettings(DirectorySettings):
    """Settings of a batch system with commands on a submit host, and a directory for each pilot."""

    ssh: SSHHost | None = Field(
        default=None,
        description="SSH settings of the submit host (`host`, `username`…; needs the extra `ssh`); default: the "
        "host of the worker. All paths below are on the submit host.",
    )
    directory: AbsolutePath = Field(
        description="Directory of the pilots' directories, absolute; the same for all workers that use this site."
    )
    account: Word | None = Field(default=None, description="Account of the jobs.")
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a pilot.")
    memory_mb: int | None = Field(default=None, ge=1, description="Memory of a pilot, in MiB.")
    wall_minutes: int | None = Field(default=None, ge=1, description="Time limit of a pilot, in minutes.")
    commands: AbsolutePath | None = Field(
        default=None, description="Directory of the commands of the batch system; default: they are in PATH."
    )
    timeout_seconds: float = Field(default=20, gt=0, allow_inf_nan=False, description="Time limit of one command.")
    concurrent_submissions: int = Field(
        default=8, ge=1, description="Number of concurrent submissions, each by a command of its own."
    )


class SlurmSettings(SubmitHostSettings):
    """Settings of a Slurm compute element."""

    nodes_see_directory: bool = Field(
        default=True,
        description="Whether the nodes have that directory under the same name. If not, there is no output, and "
        "the end of a job is known only while Slurm keeps the job.",
    )
    clusters: Word | None = Field(
        default=None,
        description="Clusters of a multi-cluster site (`--clusters`), separated by commas; needs slurmdbd.",
    )
    partition: Word | None = Field(default=None, description="Partition, or several separated by commas.")
    qos: Word | None = Field(default=None, description="Quality of service.")
    extra_options: list[Annotated[str, Field(pattern=r"^--[a-z]")]] = Field(
        default=[], description="Additional options of sbatch, each as one string (`--constraint=avx2`)."
    )
    completion_log: AbsolutePath | None = Field(
        default=None, description="Log of `jobcomp/filetxt`, if any, with the ends of jobs that Slurm has removed."
    )
    accounting: bool = Field(
        default=False,
        description="Whether the site has an accounting database (slurmdbd), queried by `sacct` for jobs "
        "that Slurm has removed.",
    )
    slurm_conf: AbsolutePath | None = Field(default=None, description="SLURM_CONF of the commands.")

    @field_validator("extra_options")
    @classmethod
    def _refuse_reserved(cls, options: list[str]) -> list[str]:
        for option in options:
            name = option[2:].partition("=")[0]
            # sbatch accepts unambiguous prefixes of options.
            if any(reserved.startswith(name) for reserved in _RESERVED) or "\n" in option:
                raise ValueError(f"--{name} is reserved for the back end")
        return options
