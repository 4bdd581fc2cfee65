"""Models of requests and responses."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from gubbins.domain.circuit_breaker import CircuitState
from gubbins.domain.pilot_states import MyPilotStatus

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
}
_HISTORY: list[dict[str, Any]] = [
    {"status": "SUBMITTED", "at": "2026-01-01T12:00:00Z", "reason": None},
    {"status": "RUNNING", "at": "2026-01-01T12:00:30Z", "reason": None},
]


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]})


class Submission(BaseModel):
    """A pilot that was submitted."""

    model_config = _example({"pilot_id": 42, "ce_name": "ce01.example.org", "vo": "lhcb"})

    pilot_id: int
    ce_name: str
    vo: str


class Pilot(BaseModel):
    """A pilot as it is now. All times are UTC."""

    model_config = _example(_PILOT)

    pilot_id: int
    vo: str
    ce_name: str
    status: MyPilotStatus
    stamp: str = Field(description="Our own unique name of the pilot, which the compute element knows.")
    reference: str | None = Field(description="The compute element's name of it; null until confirmed.")
    submitted_at: datetime
    started_at: datetime | None = Field(description="When it was first seen running.")
    ended_at: datetime | None = Field(description="When it was seen to have ended.")
    last_update: datetime = Field(description="When its state last changed.")
    missing_since: datetime | None = Field(description="Since when the compute element does not know it.")
    cancel_requested_at: datetime | None
    last_error: str | None
    waiting_reason: str | None = Field(description="What it waits for, as the site says; null: for its turn.")


class PilotStep(BaseModel):
    """A state that a pilot entered."""

    model_config = _example(_HISTORY[1])

    status: MyPilotStatus
    at: datetime
    reason: str | None


class PilotWithHistory(Pilot):
    """A pilot with all its steps, oldest first."""

    model_config = _example({**_PILOT, "history": _HISTORY, "jobs": [1234]})

    history: list[PilotStep]
    jobs: list[int] | None = Field(
        description="Ids of the jobs that ran on it, newest first, 1,000 at most; null: not known, for the pilot "
        "registry is not configured or does not answer."
    )


class PilotOutputPublic(BaseModel):
    """Output of a pilot; of much, the last part."""

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
    fetched_at: datetime | None = Field(description="When it was fetched for keeping; null: just now.")
    expires_at: datetime | None = Field(description="Until when it is kept.")


class PilotPage(BaseModel):
    """One page of a list of pilots, newest first."""

    model_config = _example({"items": [_PILOT], "total": 1, "page": 1, "per_page": 100})

    items: list[Pilot]
    total: int = Field(description="How many pilots match, on all pages.")
    page: int
    per_page: int


_CIRCUIT: dict[str, Any] = {
    "state": "closed",
    "failures": 0,
    "open_until": None,
    "last_error": None,
    "last_error_at": None,
}


class CircuitPublic(BaseModel):
    """The circuit breaker of one kind of call to a compute element."""

    model_config = _example(_CIRCUIT)

    state: CircuitState = Field(
        description="closed: calls are made; open: none until `open_until`; half-open: one tries again."
    )
    failures: int = Field(description="Failed calls since the last one that worked.")
    open_until: datetime | None
    last_error: str | None = Field(description="For administrators; null for others.")
    last_error_at: datetime | None


class CEBan(BaseModel):
    """Request to ban a compute element."""

    model_config = _example({"reason": "network maintenance until Thursday"})

    reason: str | None = Field(default=None, max_length=1024)


_DOWNTIME: dict[str, Any] = {
    "id": 7,
    "ce_name": "ce01.example.org",
    "starts_at": "2026-12-01T08:00:00Z",
    "ends_at": "2026-12-01T18:00:00Z",
    "drain_from": "2026-11-30T08:00:00Z",
    "reason": "new switches",
    "added_by": "operator alice",
    "source": None,
}


class DowntimePublic(BaseModel):
    """A downtime of a compute element. All times are UTC."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"examples": [_DOWNTIME]})

    id: int
    ce_name: str
    starts_at: datetime
    ends_at: datetime
    drain_from: datetime = Field(description="No pilots are submitted from then on.")
    reason: str
    added_by: str
    source: str | None = Field(description="Where it was imported from; null: a user has added it.")


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
        default=0, ge=0, le=366 * 86400, description="For so long before its start nothing is submitted."
    )


class CEPublic(BaseModel):
    """A compute element as its users see it."""

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
    vos: list[str] | None = Field(description="The VOs it serves, as far as they are yours; null: all.")
    active: int = Field(description="Pilots of all VOs that hold a slot.")
    available_slots: int
    last_error: str | None = Field(description="For administrators: its last error; null once it works again.")
    last_error_at: datetime | None
    banned_at: datetime | None = Field(description="Since when it is not touched at all; null: it is not banned.")
    ban_reason: str | None
    downtime: DowntimePublic | None = Field(description="That it is in, or drained for; null: none.")
    circuits: dict[str, CircuitPublic] = Field(description="By kind of call: `submit` and `status`.")
    rules: dict[str, Any] | None = Field(
        description="Its rules for your VO, as far as they are not the default ones."
    )


class Summary(BaseModel):
    """Numbers of pilots; what is absent is zero. Each state is a field, too, as in the published extension."""

    model_config = _example(
        {
            "pilots": {"lhcb": {"ce01.example.org": {"RUNNING": 18, "DONE": 411, "FAILED": 20}}},
            "totals": {"RUNNING": 18, "DONE": 411, "FAILED": 20},
            "RUNNING": 18,
            "DONE": 411,
            "FAILED": 20,
        }
    ) | {"extra": "allow"}

    pilots: dict[str, dict[str, dict[str, int]]] = Field(description="By VO, compute element and state.")
    totals: dict[str, int] = Field(description="By state.")
