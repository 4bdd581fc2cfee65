"""Settings of an HTCondor schedd."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from gubbins.ces.settings import PilotSettings
from gubbins.ces.transports.tokens import TokenSource

# Commands set by the back end, and commands that would not submit one job per pilot.
_RESERVED = frozenset(
    {
        "allowed_job_duration", "arguments", "cmd", "env", "environment", "error", "executable", "getenv", "hold",
        "initialdir", "input", "leave_in_queue", "log", "materialize_max_idle", "max_idle", "max_materialize",
        "max_retries", "noop_job", "output", "periodic_remove", "queue",
        "should_transfer_files", "stream_error", "stream_output", "transfer_executable", "transfer_input_files",
        "transfer_output_files", "transfer_output_remaps", "when_to_transfer_output",
    }
)  # fmt: skip
#: Commands whose values may be files of the worker, which are spooled with each pilot.
_FILES = frozenset(
    {
        "container_image", "jar_files", "public_input_files", "scitokens_file", "tool_daemon_cmd",
        "tool_daemon_input", "transfer_plugins", "use_x509userproxy", "x509userproxy",
    }
)  # fmt: skip
_OUR_ATTRIBUTES = frozenset({"gubbinscarrier", "gubbinsstamp", "iwd", "jobmaterializemaxidle", "submit_iwd"})


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
    spool_together: bool = Field(
        default=True,
        description="Spool the files of many pilots once, and let the schedd make their jobs. Without, each pilot "
        "takes two round trips more, as it does where a submit command names a file of the worker.",
    )
    configuration: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$")], Line] = Field(
        default={},
        description="HTCondor configuration of the bindings; files of the host's own configuration are not read.",
    )
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
        description="A pilot whose files are not spooled after so long is removed; more than `timeout_seconds`.",
    )
    keep_days: float = Field(
        default=7, gt=0, le=3650, allow_inf_nan=False, description="How long they stay there, in days."
    )
    timeout_seconds: float = Field(
        default=20, gt=0, le=300, allow_inf_nan=False, description="How long one call of the schedd may take."
    )

    @property
    def spools_together(self) -> bool:
        """True if the files of many pilots are spooled by one job."""
        names = {name.lower().removeprefix("+").removeprefix("my.") for name in self.submit_commands}
        return self.spool_together and names.isdisjoint(_FILES)

    @field_validator("submit_commands")
    @classmethod
    def _refuse_reserved(cls, commands: dict[str, str]) -> dict[str, str]:
        for command in commands:
            name = command.lower()
            if name in _RESERVED or name.removeprefix("+").removeprefix("my.") in _OUR_ATTRIBUTES:
                raise ValueError(f"{command!r} is not for you to set: the back end needs it")
        return commands

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.collector is None) == (self.address is None):
            raise ValueError("give either a collector or an address")
        if self.address is not None and self.schedd is not None:
            raise ValueError("schedd is of no use with an address")
        return self
