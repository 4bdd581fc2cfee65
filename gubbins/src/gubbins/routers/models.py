"""Models of requests and responses."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from gubbins.domain.circuit_breaker import Circuit, CircuitState
from gubbins.domain.downtimes import Downtime
from gubbins.domain.pilot_states import MyPilotStatus, PilotOutcome

_PILOT: dict[str, Any] = {
    "pilot_id": 42,
    "vo": "lhcb",
    "ce_name": "ce01.example.org",
    "status": "RUNNING",
    "stamp": "9f0c2b1d7e5a4c55b0a6c1f2d3e4f5a6",
    "reference": "sim://ce01.example.org/9f0c2b1d7e5a4c55b0a6c1f2d3e4f5a6",
    "submitted_at": "2026-01-01T12:00:00Z",
    "started_at": "2026-01-01T12:00:30Z",
    "ended_at": None,
    "last_update": "2026-01-01T12:00:30Z",
    "missing_since": None,
    "cancel_requested_at": None,
    "last_error": None,
    "waiting_reason": None,
    "host": "node17.example.org",
    "cores": 8,
    "memory_mb": 16000,
    "heartbeat_at": "2026-01-01T12:10:30Z",
    "stale": False,
    "outcome": None,
    "exit_code": None,
    "jobs_done": None,
}
_HISTORY: list[dict[str, Any]] = [
    {"status": "SUBMITTED", "at": "2026-01-01T12:00:00Z", "reason": None},
    {"status": "RUNNING", "at": "2026-01-01T12:00:30Z", "reason": None},
]


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]})


class Submission(BaseModel):
    """A submitted pilot."""

    model_config = _example({"pilot_id": 42, "ce_name": "ce01.example.org", "vo": "lhcb"})

    pilot_id: int
    ce_name: str
    vo: str


class Pilot(BaseModel):
    """Current state of a pilot. All times are UTC."""

    model_config = _example(_PILOT)

    pilot_id: int
    vo: str
    ce_name: str
    status: MyPilotStatus
    stamp: str = Field(description="Our unique name of the pilot, known to the compute element.")
    reference: str | None = Field(description="Name of the pilot at the compute element; null until confirmed.")
    submitted_at: datetime
    started_at: datetime | None = Field(description="Time when it was first observed running.")
    ended_at: datetime | None = Field(description="Time when its end was observed.")
    last_update: datetime = Field(description="Time of the last change of its state.")
    missing_since: datetime | None = Field(description="Since when the compute element does not know it.")
    cancel_requested_at: datetime | None
    last_error: str | None
    waiting_reason: str | None = Field(description="Reason reported by the site why it is waiting.")
    host: str | None = Field(description="This and the fields below are reported by the pilot.")
    cores: int | None
    memory_mb: int | None
    heartbeat_at: datetime | None = Field(description="Time of its last report.")
    stale: bool = Field(description="True if it is running and its heartbeats have stopped.")
    outcome: PilotOutcome | None = Field(description="Reason of its end.")
    exit_code: int | None
    jobs_done: int | None


class PilotStep(BaseModel):
    """A state that a pilot entered."""

    model_config = _example(_HISTORY[1])

    status: MyPilotStatus
    at: datetime
    reason: str | None


class PilotWithHistory(Pilot):
    """A pilot with its history, oldest step first."""

    model_config = _example({**_PILOT, "history": _HISTORY, "jobs": [1234]})

    history: list[PilotStep]
    jobs: list[int] | None = Field(
        description="Ids of the jobs that ran on it, newest first, at most 1,000; null: the pilot registry is not "
        "configured or does not respond."
    )


class PilotOutputPublic(BaseModel):
    """Output of a pilot; of a long one, the last part."""

    model_config = _example(
        {
            "pilot_id": 42,
            "stdout": "Matched job 1234\n",
            "stderr": "",
            "fetched_at": "2026-01-01T13:00:00Z",
            "expires_at": "2026-01-08T13:00:00Z",
        }
    )

    pilot_id: int
    stdout: str
    stderr: str
    fetched_at: datetime | None = Field(description="Time of the fetch of stored output; null: not stored.")
    expires_at: datetime | None = Field(description="End of the storage.")


class PilotPage(BaseModel):
    """One page of a list of pilots, newest first."""

    model_config = _example({"items": [_PILOT], "total": 1, "page": 1, "per_page": 100})

    items: list[Pilot]
    total: int = Field(description="Number of matching pilots on all pages.")
    page: int
    per_page: int


_CIRCUIT = Circuit().as_dict(datetime.now(UTC))


class CircuitPublic(BaseModel):
    """Circuit breaker of one kind of call to a compute element."""

    model_config = _example(_CIRCUIT)

    state: CircuitState = Field(
        description="closed: calls are made; open: no calls until `open_until`; half-open: one call is a probe."
    )
    failures: int = Field(description="Consecutive failed calls.")
    open_until: datetime | None
    last_error: str | None = Field(description="For administrators; null for others.")
    last_error_at: datetime | None


class CEBan(BaseModel):
    """Request to ban a compute element."""

    model_config = _example({"reason": "network maintenance until Thursday"})

    reason: str | None = Field(default=None, max_length=1024)


class NewDowntime(BaseModel):
    """Request to plan a downtime."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "starts_at": "2026-12-01T08:00:00Z",
                    "ends_at": "2026-12-01T18:00:00Z",
                    "reason": "new switches",
                    "drain_seconds": 86400,
                }
            ]
        },
    )

    starts_at: AwareDatetime
    ends_at: AwareDatetime
    reason: str = Field(min_length=1, max_length=1024)
    drain_seconds: float = Field(
        default=0, ge=0, le=366 * 86400, description="Time before its start without submissions."
    )


class CEPublic(BaseModel):
    """A compute element, with what its users may see."""

    model_config = _example(
        {
            "name": "ce01.example.org",
            "capacity": 20,
            "success_rate": 0.95,
            "enabled": True,
            "backend": "simulated",
            "vos": ["lhcb"],
            "active": 18,
            "available_slots": 2,
            "last_error": None,
            "last_error_at": None,
            "banned_at": None,
            "ban_reason": None,
            "downtime": None,
            "circuits": {"submit": _CIRCUIT, "status": _CIRCUIT},
            "rules": {"policy": "waiting_jobs", "max_waiting": 10},
        }
    )

    name: str
    capacity: int = Field(description="Slots, shared by all VOs.")
    success_rate: float
    enabled: bool
    backend: str
    vos: list[str] | None = Field(description="VOs that it serves, only yours; null: all.")
    active: int = Field(description="Active pilots of all VOs.")
    available_slots: int
    last_error: str | None = Field(description="For administrators: its last error; null after a success.")
    last_error_at: datetime | None
    banned_at: datetime | None = Field(description="Time of the ban; null: not banned.")
    ban_reason: str | None
    downtime: Downtime | None = Field(description="Current downtime, or the one for which it is drained.")
    circuits: dict[str, CircuitPublic] = Field(description="By kind of call: `submit` and `status`.")
    rules: dict[str, Any] | None = Field(description="Its rules for your VO, other than the defaults.")
    reports: dict[str, int] | None = Field(
        default=None, description="Of a single compute element: your `stale` pilots, and reported outcomes."
    )


class Summary(BaseModel):
    """Numbers of pilots, without zeros. Each state is a field, too, as in the published extension."""

    model_config = _example(
        {
            "pilots": {"lhcb": {"ce01.example.org": {"RUNNING": 18, "DONE": 411, "FAILED": 20}}},
            "totals": {"RUNNING": 18, "DONE": 411, "FAILED": 20},
            "reports": {"lhcb": {"ce01.example.org": {"stale": 1, "no work": 37, "worked": 374}}},
            "RUNNING": 18,
            "DONE": 411,
            "FAILED": 20,
        }
    ) | {"extra": "allow"}

    pilots: dict[str, dict[str, dict[str, int]]] = Field(description="By VO, compute element and state.")
    totals: dict[str, int] = Field(description="By state.")
    reports: dict[str, dict[str, dict[str, int]]] = Field(
        description="By VO and compute element: running pilots that are `stale`, and reported outcomes."
    )


_STAMP = _PILOT["stamp"]
_Count = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]


class PilotTokenRequest(BaseModel):
    """Request to exchange a pilot's secret, or its refresh token."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True) | _example(
        {"stamp": _STAMP, "secret": "(43 characters from the file PILOT_SECRET_FILE)"}
    )

    stamp: str = Field(max_length=32, pattern=r"^[0-9a-f]{32}$", description="PILOT_STAMP.")
    secret: str | None = Field(default=None, min_length=1, max_length=128, repr=False)
    refresh_token: str | None = Field(default=None, min_length=1, max_length=256, repr=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.secret is None) == (self.refresh_token is None):
            raise ValueError("give either secret or refresh_token")
        return self


class PilotToken(BaseModel):
    """A token of DiracX for a pilot."""

    model_config = _example(
        {
            "access_token": "eyJ…",
            "token_type": "Bearer",
            "expires_in": 1200,
            "refresh_token": "Vw….mQ…",
            "heartbeat_seconds": 300,
        }
    )

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105
    expires_in: int = Field(description="Seconds.")
    refresh_token: str = Field(description="For the next token, once. A reuse revokes all tokens of the pilot.")
    heartbeat_seconds: int = Field(description="Interval of reports.")


class PilotReport(BaseModel):
    """Report of a pilot about itself; an empty one is a heartbeat. Omitted fields do not change."""

    model_config = ConfigDict(extra="forbid") | _example({"host": "node17", "cores": 8, "memory_mb": 16000})

    host: str | None = Field(default=None, max_length=255)
    cores: _Count | None = None
    memory_mb: _Count | None = None
    outcome: PilotOutcome | None = Field(default=None, description="Reason of its end.")
    exit_code: Annotated[int, Field(strict=True, ge=0, le=255)] | None = Field(
        default=None, description="Of its payload."
    )
    jobs_done: _Count | None = None
    detail: str | None = Field(default=None, max_length=1000, description="Details of the outcome.")


class PilotReported(BaseModel):
    """Response to the report of a pilot."""

    model_config = _example({"status": "RUNNING", "heartbeat_seconds": 300})

    status: MyPilotStatus
    heartbeat_seconds: int
