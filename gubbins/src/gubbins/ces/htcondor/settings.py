"""Settings of an HTCondor schedd."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from gubbins.ces.settings import DefaultScript, PilotSettings
from gubbins.ces.transports.tokens import TokenSource

# What the back end says itself, or what would make something else than one job of a pilot.
_OURS = frozenset(
    {
        "allowed_job_duration", "arguments", "cmd", "env", "environment", "error", "executable", "getenv", "hold",
        "initialdir", "input", "leave_in_queue", "log", "max_retries", "output", "periodic_remove", "queue",
        "should_transfer_files", "stream_error", "stream_output", "transfer_executable", "transfer_input_files",
        "transfer_output_files", "transfer_output_remaps", "when_to_transfer_output",
    }
)  # fmt: skip
_OUR_ATTRIBUTE = "gubbinsstamp"


def _one_line(value: str) -> str:
    if any(character in value for character in "\0\r\n"):
        raise ValueError("must be one line")
    return value


Line = Annotated[str, AfterValidator(_one_line)]


class HTCondorSettings(PilotSettings):
    """Settings of an HTCondor schedd, or of an HTCondor-CE."""

    collector: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\[\]:-]+$")] | None = Field(
        default=None, description="The collector that knows the schedd, as `host` or `host:port`."
    )
    schedd: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@+-]+$")] | None = Field(
        default=None, description="Name of the schedd; can be left out if the collector knows one only."
    )
    address: Annotated[str, Field(pattern=r"^<[^<>\s]+>$")] | None = Field(
        default=None,
        description="Address of the schedd, in place of a collector: its `MyAddress`, in angle brackets.",
    )
    token: TokenSource | None = Field(
        default=None,
        description="File of an IDTOKEN of the schedd's trust domain, read anew for each call; or the identity "
        "provider that gives a SCITOKEN.",
    )
    cpus: int = Field(default=1, ge=1, description="CPUs of a pilot.")
    memory_mb: int | None = Field(default=None, ge=1, description="Memory of a pilot, in MiB.")
    disk_mb: int | None = Field(default=None, ge=1, description="Scratch space of a pilot, in MiB.")
    wall_time_minutes: int | None = Field(default=None, ge=1, description="Longest run of a pilot.")
    submit_commands: dict[Annotated[str, Field(pattern=r"^(\+|(?i:MY)\.)?[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(
        default={}, description="More commands of the submit language (`requirements`, `+Attribute`…)."
    )
    configuration: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")], Line] = Field(
        default={},
        description="HTCondor configuration of the bindings; files of the host's own configuration are not read.",
    )
    default_script: DefaultScript = None
    held_minutes: float = Field(
        default=10,
        ge=0,
        allow_inf_nan=False,
        description="A pilot that HTCondor itself has put on hold is removed after so long.",
    )
    spool_minutes: float = Field(
        default=10,
        ge=0,
        allow_inf_nan=False,
        description="A pilot whose files have not been spooled after so long is removed.",
    )
    keep_days: float = Field(
        default=7, gt=0, le=3650, allow_inf_nan=False, description="How long they stay there, in days."
    )
    timeout_seconds: float = Field(
        default=20, gt=0, le=300, allow_inf_nan=False, description="How long one call of the schedd may take."
    )

    @field_validator("submit_commands")
    @classmethod
    def _not_ours(cls, commands: dict[str, str]) -> dict[str, str]:
        for command in commands:
            name = command.lower()
            if name in _OURS or name.removeprefix("+").removeprefix("my.") == _OUR_ATTRIBUTE:
                raise ValueError(f"{command!r} is not for you to set: the back end needs it")
        return commands

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.collector is None) == (self.address is None):
            raise ValueError("give either a collector or an address")
        if self.address is not None and self.schedd is not None:
            raise ValueError("schedd is of no use with an address")
        return self
