"""Rules of a compute element: demand policy, shares, limits, time-outs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

_MAX = 2**31 - 1
_Share = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
_Number = Annotated[int, Field(strict=True, ge=0, le=_MAX)]
_Hours = Annotated[float, Field(gt=0, le=10 * 366 * 24, allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1, max_length=128)]
_Names = Annotated[tuple[_Name, ...], Field(max_length=1_000)]
_Seconds = Annotated[float, Field(gt=0, le=10 * 366 * 86400, allow_inf_nan=False)]


class DemandPolicy(StrEnum):
    """Policy by which a VO's demand is computed."""

    FILL = "fill"
    WAITING_JOBS = "waiting_jobs"


class VORules(BaseModel):
    """Rules that differ for one VO; what is left out is as for the others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: DemandPolicy | None = Field(default=None, description="As below.")
    share: _Share | None = Field(default=None, description="As below.")
    max_waiting: _Number | None = Field(default=None, description="As below.")
    max_per_cycle: _Number | None = Field(default=None, description="As below.")
    trickle: _Number | None = Field(default=None, description="As below.")


class CERules(BaseModel):
    """The rules of one compute element."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: DemandPolicy = Field(
        default=DemandPolicy.FILL,
        description="`fill` takes all free slots, `waiting_jobs` no more than the VO's waiting jobs justify.",
    )
    share: _Share = Field(default=1.0, description="A VO's part of the slots, relative to those of the others.")
    max_waiting: _Number | None = Field(
        default=None, description="A VO has no more pilots than that waiting (SUBMITTED) here."
    )
    max_per_cycle: _Number | None = Field(
        default=None, description="A VO submits no more pilots than that in one round; by hand, in any 60 seconds."
    )
    trickle: _Number = Field(
        default=1,
        description="With `waiting_jobs`: so many pilots even without jobs, where the VO has none.",
    )
    max_surplus_seconds: _Seconds | None = Field(
        default=None,
        description="With `waiting_jobs`: when for so long more pilots have waited than jobs justify, the oldest "
        "of them are cancelled.",
    )
    vos: dict[Annotated[str, Field(max_length=128)], VORules] = Field(
        default={}, max_length=1_000, description="What is different for some VOs, by name."
    )
    site: _Name | None = Field(
        default=None,
        description="Site that it belongs to, as jobs name it; left out: it gets no jobs that name any.",
    )
    grid_ce: _Name | None = Field(default=None, description="Name by which jobs ask for it; left out: its own.")
    queue: _Name | None = Field(
        default=None, description="Its queue, for the pilot registry; left out: that of the settings."
    )
    platform: Annotated[_Names, BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)] = (
        Field(default=(), description="Platforms of jobs that run here, one or a list; left out: all.")
    )
    job_types: _Names = Field(default=(), description="Types of jobs that run here; left out: all.")
    tags: _Names = Field(
        default=(), description="Tags of jobs that may run here, beside those without tags (`GPU`)."
    )
    required_tags: _Names = Field(default=(), description="Only jobs with all these tags run here.")
    max_cpu_seconds: Annotated[int, Field(strict=True, ge=1, le=2**53)] | None = Field(
        default=None, description="Only jobs with so much CPU time, or less, run here."
    )
    processors: Annotated[int, Field(strict=True, ge=1, le=10_000)] = Field(
        default=1,
        description="Processors of a pilot: jobs for so many (`8Processors`, `MultiProcessor`) run here.",
    )
    max_memory_mb: Annotated[int, Field(strict=True, ge=1, le=10**8)] | None = Field(
        default=None, description="Memory of a pilot, in MiB: jobs for so much (`16GB`) run here."
    )
    registry_output: bool = Field(
        default=False, description="Whether the output that is kept is written to the pilot registry, too."
    )
    max_batch: Annotated[int, Field(strict=True, ge=1, le=1_000)] = Field(
        default=100, description="So many requested pilots, of all VOs, are submitted by one call."
    )
    timeout_seconds: _Seconds = Field(default=60, description="No call waits longer for an answer.")
    unconfirmed_seconds: _Seconds = Field(
        default=600,
        description="A submission that was never confirmed and that the site does not know is undone then.",
    )
    lost_seconds: _Seconds = Field(
        default=3600, description="A pilot that the site has not known for so long has failed."
    )
    max_waiting_hours: _Hours | None = Field(
        default=None, description="A pilot that has waited for so long is cancelled: it is stale."
    )
    max_running_hours: _Hours | None = Field(
        default=None, description="A pilot that has run for so long is cancelled: it is stalled."
    )
    identity: Annotated[bool, Field(strict=True)] = Field(
        default=True, description="Whether pilots get a secret, where `GUBBINS_PILOT_API_URL` is set."
    )
    heartbeat_seconds: Annotated[int, Field(strict=True, ge=1, le=86400)] = Field(
        default=300, description="A pilot with a secret is told to send a heartbeat so often."
    )
    stale_after_seconds: _Seconds = Field(
        default=1200, description="A running pilot is shown as stale so long after its last heartbeat."
    )
    max_missing: Annotated[int, Field(strict=True, ge=1, le=_MAX)] = Field(
        default=5,
        description="Submissions stop when so many confirmed pilots in a row have gone missing, none ever seen; "
        "or when so many are missing, and more than `max_missing_share` of those that are active.",
    )
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="As above; 0.0-1.0.")
    breaker_failures: Annotated[int, Field(strict=True, ge=1, le=_MAX)] = Field(
        default=3, description="After so many failed calls in a row there is a pause."
    )
    breaker_pause_seconds: _Seconds = Field(default=60, description="The first pause; each next is twice as long.")
    breaker_max_pause_seconds: _Seconds = Field(default=900, description="No pause is longer.")
    keep_output: Literal["none", "failed", "all"] = Field(
        default="all", description="Whose output is fetched at their end, where the back end can."
    )
    keep_output_seconds: _Seconds = Field(default=7 * 86400, description="How long it is kept.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unconfirmed_seconds <= self.timeout_seconds:
            raise ValueError(
                "unconfirmed_seconds must be longer than timeout_seconds, or submissions that are still under "
                f"way are undone: {self.unconfirmed_seconds:g} is not more than {self.timeout_seconds:g}"
            )
        if self.stale_after_seconds <= self.heartbeat_seconds:
            raise ValueError(
                "stale_after_seconds must be longer than heartbeat_seconds, or every pilot is stale between two "
                f"heartbeats: {self.stale_after_seconds:g} is not more than {self.heartbeat_seconds}"
            )
        return self

    def of(self, vo: str) -> CERules:
        """The rules for one VO."""
        own = self.vos.get(vo)
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True))

    @property
    def breaker(self) -> dict[str, Any]:
        """Arguments of `MyPilotDB.record_failure`."""
        return {
            "failures": self.breaker_failures,
            "pause_seconds": self.breaker_pause_seconds,
            "max_pause_seconds": self.breaker_max_pause_seconds,
        }


def serves(vos: Sequence[str] | None, vo: str) -> bool:
    """True if a compute element that lists `vos` takes pilots of `vo`; None serves all."""
    return vos is None or vo in vos


def rules_of(ce: Mapping[str, Any]) -> CERules:
    """The rules of a compute element as the database has it.

    Fields that this version does not know are left out, and invalid ones have their defaults: one row must not
    stop the others (`rules_error`).
    """
    return _read(ce["rules"])[0]


def rules_error(ce: Mapping[str, Any]) -> str | None:
    """The error in the stored rules; None: they are valid. Until `gubbins ce load` mends it, it gets no pilots."""
    return _read(ce["rules"])[1]


def _read(stored: Any) -> tuple[CERules, str | None]:
    try:
        return CERules.model_validate(_known(stored or {})), None
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)
    wrong = {problem["loc"][0] for problem in problems if problem["loc"]}
    said = "; ".join(": ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in problems)
    # Rules that contradict each other are all left out.
    rest = {key: value for key, value in stored.items() if key not in wrong} if wrong else {}
    return _read(rest)[0], said


def _known(stored: Any) -> Any:
    """The rules without fields that only another version has."""
    if not isinstance(stored, Mapping):
        return stored
    known = {key: value for key, value in stored.items() if key in CERules.model_fields}
    if isinstance(vos := known.get("vos"), Mapping):
        known["vos"] = {
            vo: {key: value for key, value in own.items() if key in VORules.model_fields}
            if isinstance(own, Mapping)
            else own
            for vo, own in vos.items()
        }
    return known
