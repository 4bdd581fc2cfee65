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
    """Policy for the demand of a VO."""

    FILL = "fill"
    WAITING_JOBS = "waiting_jobs"


class VORules(BaseModel):
    """Rules that differ for one VO."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: DemandPolicy | None = Field(default=None, description="As below.")
    share: _Share | None = Field(default=None, description="As below.")
    max_waiting: _Number | None = Field(default=None, description="As below.")
    max_per_cycle: _Number | None = Field(default=None, description="As below.")
    trickle: _Number | None = Field(default=None, description="As below.")


class CERules(BaseModel):
    """Rules of one compute element."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: DemandPolicy = Field(
        default=DemandPolicy.FILL,
        description="`fill` requests pilots for all free slots, `waiting_jobs` only for waiting jobs of the VO.",
    )
    share: _Share = Field(default=1.0, description="Share of a VO in the slots, relative to other VOs.")
    max_waiting: _Number | None = Field(default=None, description="Limit of waiting (SUBMITTED) pilots of a VO.")
    max_per_cycle: _Number | None = Field(
        default=None,
        description="Limit of new pilots of a VO in one round; for those submitted manually, in any 60 seconds.",
    )
    trickle: _Number = Field(
        default=1,
        description="With `waiting_jobs`: pilots that a VO without pilots gets, even without waiting jobs.",
    )
    max_surplus_seconds: _Seconds | None = Field(
        default=None,
        description="With `waiting_jobs`: pilots for which there were no waiting jobs for so long are cancelled, "
        "oldest first.",
    )
    vos: dict[Annotated[str, Field(max_length=128)], VORules] = Field(
        default={}, max_length=1_000, description="Rules that differ for some VOs, by name."
    )
    site: _Name | None = Field(
        default=None,
        description="Its site, as named in jobs; default: it gets no jobs for a specific site.",
    )
    grid_ce: _Name | None = Field(default=None, description="Its name in jobs; default: the name.")
    queue: _Name | None = Field(
        default=None, description="Its queue in the pilot registry; default: the queue of the settings."
    )
    platform: Annotated[_Names, BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)] = (
        Field(default=(), description="Platforms of jobs that run here, one or a list; default: all.")
    )
    job_types: _Names = Field(default=(), description="Types of jobs that run here; default: all.")
    tags: _Names = Field(
        default=(), description="Tags of jobs that can run here (`GPU`; `ANY`: all), beside jobs without tags."
    )
    required_tags: _Names = Field(default=(), description="Only jobs with all these tags run here.")
    max_cpu_seconds: Annotated[int, Field(strict=True, ge=1, le=2**53)] | None = Field(
        default=None, description="Limit of the CPU time of jobs that run here."
    )
    processors: Annotated[int, Field(strict=True, ge=1, le=10_000)] = Field(
        default=1,
        description="Processors of a pilot: limit of those of jobs (`8Processors`, `MultiProcessor`).",
    )
    max_memory_mb: Annotated[int, Field(strict=True, ge=1, le=10**8)] | None = Field(
        default=None, description="Memory of a pilot, in MiB: limit of that of jobs (`16GB`)."
    )
    registry_output: bool = Field(
        default=False, description="Whether stored output is also written to the pilot registry."
    )
    max_batch: Annotated[int, Field(strict=True, ge=1, le=1_000)] = Field(
        default=100, description="Limit of requested pilots, of all VOs, that are submitted by one call."
    )
    timeout_seconds: _Seconds = Field(default=60, description="Time limit of a call.")
    unconfirmed_seconds: _Seconds = Field(
        default=600,
        description="Time after which an unconfirmed submission that is unknown to the site loses its slot.",
    )
    lost_seconds: _Seconds = Field(
        default=3600, description="Time after which a pilot that is unknown to the site becomes FAILED."
    )
    max_waiting_hours: _Hours | None = Field(
        default=None, description="Time after which a waiting pilot is cancelled."
    )
    max_running_hours: _Hours | None = Field(
        default=None, description="Time since its start after which a pilot is cancelled."
    )
    identity: Annotated[bool, Field(strict=True)] = Field(
        default=True, description="Whether pilots get a secret, if `GUBBINS_PILOT_API_URL` is set."
    )
    heartbeat_seconds: Annotated[int, Field(strict=True, ge=1, le=86400)] = Field(
        default=300, description="Interval of the heartbeats of a pilot with a secret."
    )
    stale_after_seconds: _Seconds = Field(
        default=1200, description="Time since its last heartbeat after which a running pilot is stale."
    )
    max_missing: Annotated[int, Field(strict=True, ge=1, le=_MAX)] = Field(
        default=5,
        description="Submissions stop when so many confirmed pilots were never seen, and at least "
        "`max_missing_share` of them and the active ones; or when so many of the active ones are missing.",
    )
    max_missing_share: Annotated[float, Field(ge=0, le=1)] = Field(default=0.5, description="As above; 0.0-1.0.")
    breaker_failures: Annotated[int, Field(strict=True, ge=1, le=_MAX)] = Field(
        default=3, description="Consecutive failed calls after which there is a pause."
    )
    breaker_pause_seconds: _Seconds = Field(
        default=60, description="The first pause; each failed probe doubles it."
    )
    breaker_max_pause_seconds: _Seconds = Field(default=900, description="The longest pause.")
    keep_output: Literal["none", "failed", "all"] = Field(
        default="all", description="Ended pilots whose output is fetched, if the back end can."
    )
    keep_output_seconds: _Seconds = Field(default=7 * 86400, description="Time for which output is stored.")

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
        """Rules for one VO."""
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


OF_VOS = "vos"
"""Setting with the settings that differ for a VO: {VO: {setting: value}}."""


def serves(vos: Sequence[str] | None, vo: str) -> bool:
    """True if a compute element that lists `vos` takes pilots of `vo`; None serves all."""
    return vos is None or vo in vos


def rules_of(ce: Mapping[str, Any]) -> CERules:
    """Read the rules of a compute element from its row.

    Unknown fields are ignored, and invalid ones have their defaults (see `rules_error`).
    """
    return _read(ce["rules"])[0]


def rules_error(ce: Mapping[str, Any]) -> str | None:
    """Describe the error in stored rules, with which there are no submissions; None: they are valid."""
    return _read(ce["rules"])[1]


def _read(stored: Any) -> tuple[CERules, str | None]:
    try:
        return CERules.model_validate(stored or {}, extra="ignore"), None  # fields of other versions
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False)
    wrong = {problem["loc"][0] for problem in problems if problem["loc"]}
    message = "; ".join(": ".join([*map(str, problem["loc"]), problem["msg"]]) for problem in problems)
    # Errors without a field are contradictions: then all rules have their defaults.
    rest = {key: value for key, value in stored.items() if key not in wrong} if wrong else {}
    return _read(rest)[0], message
