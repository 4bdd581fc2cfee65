"""Tables of `MyPilotDB` for SQLite, MySQL, MariaDB and PostgreSQL."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, cast

from diracx.core.models.pilot import PilotStatus
from diracx.tasks.plumbing.sql.types import UTF8, AnyName, AnyText, UTCDateTime
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    ColumnElement,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    Label,
    LargeBinary,
    Select,
    String,
    Table,
    func,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus, PilotOutcome

# SQLite generates ids only in a column of type INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")
_CEName = AnyName(128)
MAX_VO_CHARS = 128
_VO = AnyName(MAX_VO_CHARS)
MAX_REASON_CHARS = 1024
MAX_REFERENCE_CHARS = 255
MAX_DETAIL_CHARS = 200
#: Eight hashes of 64 characters, and blanks.
MAX_HASHES_CHARS = 8 * 65
_Reason = AnyText(MAX_REASON_CHARS)
# MySQL's plain BLOB ends at 64 kB.
_Compressed = LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")


def _choice(kind: type[StrEnum], constraint: str | None = None) -> Enum:
    """A string, with a CHECK constraint if it has a name, which MySQL requires to be unique in the database."""
    return Enum(
        kind,
        native_enum=False,
        length=16,
        create_constraint=constraint is not None,
        name=constraint,
        values_callable=lambda values: [str(value) for value in values],
    )


class MyPilotDBBase(DeclarativeBase):
    """Base of all tables."""


class ComputeElements(MyPilotDBBase):
    """A site where pilots can be submitted."""

    __tablename__ = "ComputeElements"
    __table_args__ = UTF8

    name: Mapped[str] = mapped_column("Name", _CEName, primary_key=True, key="name")
    # Slots: limit of SUBMITTED and RUNNING pilots of all VOs.
    capacity: Mapped[int] = mapped_column("Capacity", Integer, key="capacity")
    # Reliability, 0.0-1.0; only the simulated back end uses it.
    success_rate: Mapped[float] = mapped_column("SuccessRate", Double, default=1.0, key="success_rate")
    enabled: Mapped[bool] = mapped_column("Enabled", Boolean, default=True, key="enabled")
    # Name of an entry point in the group `gubbins.ces`, and its settings.
    backend: Mapped[str] = mapped_column("Backend", AnyName(64), default="simulated", key="backend")
    settings: Mapped[dict[str, Any]] = mapped_column("Settings", JSON, default=dict, key="settings")
    # The VOs it serves; NULL: all.
    vos: Mapped[list[str] | None] = mapped_column("VOs", JSON(none_as_null=True), key="vos")
    # Rules other than the defaults.
    rules: Mapped[dict[str, Any] | None] = mapped_column("Rules", JSON(none_as_null=True), key="rules")
    # NULL: it is not banned.
    banned_at: Mapped[datetime | None] = mapped_column("BannedAt", UTCDateTime, key="banned_at")
    ban_reason: Mapped[str | None] = mapped_column("BanReason", _Reason, key="ban_reason")
    # Last refusal or failed poll; NULL after a success.
    last_error: Mapped[str | None] = mapped_column("LastError", _Reason, key="last_error")
    last_error_at: Mapped[datetime | None] = mapped_column("LastErrorAt", UTCDateTime, key="last_error_at")
    # Confirmed pilots that were never seen, less a share of those that ended properly since; NULL: none.
    never_seen: Mapped[int | None] = mapped_column("MissingInRow", Integer, key="never_seen")
    created_at: Mapped[datetime] = mapped_column("CreatedAt", UTCDateTime, key="created_at")
    updated_at: Mapped[datetime] = mapped_column("UpdatedAt", UTCDateTime, key="updated_at")


_ces = cast(Table, ComputeElements.__table__)
_ces.append_constraint(CheckConstraint(_ces.c.capacity >= 0, name="capacity_not_negative"))
_ces.append_constraint(CheckConstraint(_ces.c.success_rate.between(0, 1), name="success_rate_is_a_share"))


class CECircuits(MyPilotDBBase):
    """Circuit breaker of one kind of call to a compute element; no row: the last such call succeeded."""

    __tablename__ = "CECircuits"
    __table_args__ = UTF8

    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), primary_key=True, key="ce_name"
    )
    call: Mapped[CECall] = mapped_column("CallKind", _choice(CECall, "circuit_call"), primary_key=True, key="call")
    # VO of the calls, at a compute element where VOs have their own settings; else empty.
    vo: Mapped[str] = mapped_column("VO", _VO, primary_key=True, default="", key="vo")
    # Consecutive failures.
    failures: Mapped[int] = mapped_column("Failures", Integer, key="failures")
    # End of the pause; NULL: there were too few failures for one.
    open_until: Mapped[datetime | None] = mapped_column("OpenUntil", UTCDateTime, key="open_until")
    # Expiry of the current probe; NULL: none.
    probe_until: Mapped[datetime | None] = mapped_column("ProbeUntil", UTCDateTime, key="probe_until")
    last_error: Mapped[str | None] = mapped_column("LastError", _Reason, key="last_error")
    last_error_at: Mapped[datetime | None] = mapped_column("LastErrorAt", UTCDateTime, key="last_error_at")


class CEQuotas(MyPilotDBBase):
    """Last refusal for a quota of the site."""

    __tablename__ = "CEQuotas"
    __table_args__ = UTF8

    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), primary_key=True, key="ce_name"
    )
    # VO that was refused, at a compute element where VOs have their own settings; else empty.
    vo: Mapped[str] = mapped_column("VO", _VO, primary_key=True, default="", key="vo")
    # Number of its pilots at that time.
    quota: Mapped[int] = mapped_column("Quota", Integer, key="quota")
    quota_at: Mapped[datetime] = mapped_column("QuotaAt", UTCDateTime, key="quota_at")


class CEDowntimes(MyPilotDBBase):
    """Downtime of a compute element: no submissions and no alerts."""

    __tablename__ = "CEDowntimes"

    id: Mapped[int] = mapped_column("DowntimeID", _Id, primary_key=True, autoincrement=True, key="id")
    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), key="ce_name"
    )
    starts_at: Mapped[datetime] = mapped_column("StartsAt", UTCDateTime, key="starts_at")
    ends_at: Mapped[datetime] = mapped_column("EndsAt", UTCDateTime, key="ends_at")
    # Start of the time without submissions.
    drain_from: Mapped[datetime] = mapped_column("DrainFrom", UTCDateTime, key="drain_from")
    reason: Mapped[str] = mapped_column("Reason", _Reason, key="reason")
    added_by: Mapped[str] = mapped_column("AddedBy", _Reason, key="added_by")
    # Origin of an imported downtime; NULL: added by a user.
    source: Mapped[str | None] = mapped_column("Source", AnyName(64), key="source")

    __table_args__ = (Index("idx_downtimes_ce", "ce_name"), Index("idx_downtimes_end", "ends_at"), UTF8)


class Pilots(MyPilotDBBase):
    """A pilot, active or ended."""

    __tablename__ = "Pilots"

    id: Mapped[int] = mapped_column("PilotID", _Id, primary_key=True, autoincrement=True, key="id")
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, ForeignKey(ComputeElements.name), key="ce_name")
    status: Mapped[MyPilotStatus] = mapped_column(
        "Status", _choice(MyPilotStatus, "pilot_status"), default=MyPilotStatus.SUBMITTED, key="status"
    )
    # Our name of the pilot, known to the CE; identifies repeated submissions.
    stamp: Mapped[str] = mapped_column("Stamp", String(32), unique=True, key="stamp")
    # Name of the pilot at the CE; NULL until the CE has confirmed the submission.
    reference: Mapped[str | None] = mapped_column("Reference", AnyText(MAX_REFERENCE_CHARS), key="reference")
    submitted_at: Mapped[datetime] = mapped_column("SubmittedAt", UTCDateTime, key="submitted_at")
    started_at: Mapped[datetime | None] = mapped_column("StartedAt", UTCDateTime, key="started_at")
    ended_at: Mapped[datetime | None] = mapped_column("EndedAt", UTCDateTime, key="ended_at")
    last_update: Mapped[datetime] = mapped_column("LastUpdate", UTCDateTime, key="last_update")
    # Since when the CE does not know the pilot; NULL: it does.
    missing_since: Mapped[datetime | None] = mapped_column("MissingSince", UTCDateTime, key="missing_since")
    cancel_requested_at: Mapped[datetime | None] = mapped_column(
        "CancelRequestedAt", UTCDateTime, key="cancel_requested_at"
    )
    last_error: Mapped[str | None] = mapped_column("LastError", _Reason, key="last_error")
    # Waiting reason reported by the CE; NULL: none.
    waiting_reason: Mapped[str | None] = mapped_column("WaitingReason", _Reason, key="waiting_reason")
    # PilotID in the pilot registry; NULL: not registered yet.
    registry_id: Mapped[int | None] = mapped_column("RegistryID", BigInteger, key="registry_id")
    # Last status written to the registry; NULL: to be written.
    registered: Mapped[PilotStatus | None] = mapped_column("Registered", _choice(PilotStatus), key="registered")

    __table_args__ = (
        Index("idx_pilots_ce_status", "ce_name", "status"),
        Index("idx_pilots_ce_missing", "ce_name", "missing_since"),
        Index("idx_pilots_status_ce_vo", "status", "ce_name", "vo"),
        Index("idx_pilots_vo_status_ce", "vo", "status", "ce_name"),
        Index("idx_pilots_vo_id", "vo", "id"),
        Index("idx_pilots_vo_registered", "vo", "registered", "id"),
        Index("idx_pilots_ended", "ended_at"),
        UTF8,
    )


class _WithPilotId:
    """Primary key of a table of details of pilots, or its first part."""

    pilot_id: Mapped[int] = mapped_column(
        "PilotID",
        _Id,
        ForeignKey(Pilots.id, ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        key="pilot_id",
        sort_order=-1,  # the first column, of the primary key, too
    )


class PilotHistory(_WithPilotId, MyPilotDBBase):
    """States that pilots have entered; each at most once, for the state machine has no cycles."""

    __tablename__ = "PilotHistory"
    __table_args__ = UTF8

    status: Mapped[MyPilotStatus] = mapped_column(
        "Status", _choice(MyPilotStatus, "history_status"), primary_key=True, key="status"
    )
    at: Mapped[datetime] = mapped_column("At", UTCDateTime, key="at")
    reason: Mapped[str | None] = mapped_column("Reason", _Reason, key="reason")


class PilotRequests(MyPilotDBBase):
    """Request of a pilot without a slot yet, for which a `MyPilotTask` was spawned."""

    __tablename__ = "PilotRequests"

    id: Mapped[int] = mapped_column("RequestID", _Id, primary_key=True, autoincrement=True, key="id")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, key="ce_name")
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    # Stamp of its future pilot.
    stamp: Mapped[str] = mapped_column("Stamp", String(32), key="stamp")
    requested_at: Mapped[datetime] = mapped_column("RequestedAt", UTCDateTime, key="requested_at")
    # Error of the compute element, for the task of the request; NULL: the request is pending.
    refusal: Mapped[str | None] = mapped_column("Refusal", _Reason, key="refusal")

    __table_args__ = (
        Index("idx_requests_ce_vo", "ce_name", "vo"),
        Index("idx_requests_stamp", "stamp", unique=True),
        Index("idx_requests_at", "requested_at"),
        UTF8,
    )


class PilotDemand(MyPilotDBBase):
    """Demand of a VO at a compute element, for fair shares."""

    __tablename__ = "PilotDemand"
    __table_args__ = UTF8

    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), primary_key=True, key="ce_name"
    )
    vo: Mapped[str] = mapped_column("VO", _VO, primary_key=True, key="vo")
    # Number of further pilots.
    wanted: Mapped[int] = mapped_column("Wanted", Integer, key="wanted")
    requested_at: Mapped[datetime] = mapped_column("AskedAt", UTCDateTime, key="requested_at")
    # Time of the last granted slot; NULL: never.
    granted_at: Mapped[datetime | None] = mapped_column("GrantedAt", UTCDateTime, key="granted_at")
    # Since when more of its pilots wait there than there are jobs for; NULL: no surplus.
    surplus_since: Mapped[datetime | None] = mapped_column("SurplusSince", UTCDateTime, key="surplus_since")


class _OfPilot(_WithPilotId):
    """Columns of a table with at most one row for each pilot."""

    # Copied from the pilot, so that queries need no join.
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, key="ce_name")


class PilotOutputs(_OfPilot, MyPilotDBBase):
    """Output of an ended pilot, or the request to fetch it."""

    __tablename__ = "PilotOutputs"

    # NULL: to be fetched.
    fetched_at: Mapped[datetime | None] = mapped_column("FetchedAt", UTCDateTime, key="fetched_at")
    expires_at: Mapped[datetime | None] = mapped_column("ExpiresAt", UTCDateTime, key="expires_at")
    # UTF-8, compressed by zlib, which any character set of the server can store.
    out: Mapped[bytes | None] = mapped_column("Out", _Compressed, key="out")
    err: Mapped[bytes | None] = mapped_column("Err", _Compressed, key="err")
    # Reason why there is no output.
    error: Mapped[str | None] = mapped_column("Error", _Reason, key="error")
    # True: to be written to the pilot registry; else NULL.
    owed: Mapped[bool | None] = mapped_column("Owed", Boolean, key="owed")

    __table_args__ = (
        Index("idx_outputs_queue", "vo", "ce_name", "fetched_at", "pilot_id"),
        Index("idx_outputs_expires", "expires_at"),
        Index("idx_outputs_owed", "vo", "owed", "pilot_id"),
        UTF8,
    )


class UndoneRegistrations(MyPilotDBBase):
    """A registered pilot whose submission was undone, and whose entry in the pilot registry is still open."""

    __tablename__ = "UndoneRegistrations"
    __table_args__ = UTF8

    id: Mapped[int] = mapped_column("UndoneID", _Id, primary_key=True, autoincrement=True, key="id")
    registry_id: Mapped[int] = mapped_column("RegistryID", BigInteger, key="registry_id")
    stamp: Mapped[str] = mapped_column("Stamp", String(32), key="stamp")


class PilotIdentities(_OfPilot, MyPilotDBBase):
    """Identity of a pilot with a secret, and its reports. Heartbeats lock no other row."""

    __tablename__ = "PilotIdentities"

    # SHA-256 (hexadecimal) of the secrets of all attempts of its submission, separated by blanks.
    secret_hashes: Mapped[str] = mapped_column("SecretHashes", String(MAX_HASHES_CHARS), key="secret_hashes")
    # Number of exchanges of the secret; only tokens of the last one are valid.
    starts: Mapped[int] = mapped_column("Starts", Integer, default=0, key="starts")
    exchanged_at: Mapped[datetime | None] = mapped_column("ExchangedAt", UTCDateTime, key="exchanged_at")
    exchanged_from: Mapped[str | None] = mapped_column("ExchangedFrom", AnyText(64), key="exchanged_from")
    # First use of a token, which invalidates the secret; NULL: the response may have been lost.
    used_at: Mapped[datetime | None] = mapped_column("UsedAt", UTCDateTime, key="used_at")
    # SHA-256 of the common prefix of all refresh tokens of the last exchange, and of the valid one.
    family_hash: Mapped[str | None] = mapped_column("FamilyHash", String(64), key="family_hash")
    refresh_hash: Mapped[str | None] = mapped_column("RefreshHash", String(64), key="refresh_hash")
    # Time of the reuse of an old refresh token; NULL: valid.
    revoked_at: Mapped[datetime | None] = mapped_column("RevokedAt", UTCDateTime, key="revoked_at")
    host: Mapped[str | None] = mapped_column("Host", AnyText(255), key="host")
    cores: Mapped[int | None] = mapped_column("Cores", Integer, key="cores")
    memory_mb: Mapped[int | None] = mapped_column("MemoryMB", Integer, key="memory_mb")
    heartbeat_at: Mapped[datetime | None] = mapped_column("HeartbeatAt", UTCDateTime, key="heartbeat_at")
    # A running pilot is stale from then on; NULL: it has sent no heartbeat.
    stale_at: Mapped[datetime | None] = mapped_column("StaleAt", UTCDateTime, key="stale_at")
    # Reported by the pilot, as the following columns; NULL: not reported.
    outcome: Mapped[PilotOutcome | None] = mapped_column(
        "Outcome", _choice(PilotOutcome, "pilot_outcome"), key="outcome"
    )
    exit_code: Mapped[int | None] = mapped_column("ExitCode", Integer, key="exit_code")
    jobs_done: Mapped[int | None] = mapped_column("JobsDone", Integer, key="jobs_done")
    detail: Mapped[str | None] = mapped_column("Detail", AnyText(MAX_DETAIL_CHARS), key="detail")

    __table_args__ = (
        Index("idx_identities_outcome", "outcome", "vo", "ce_name"),
        UTF8,
    )


def columns_of(table: type[MyPilotDBBase], *keys: str) -> tuple[Label[Any], ...]:
    """Columns of a table (none given: all), labelled with their Python names."""
    columns = cast(Table, table.__table__).columns
    return tuple(columns[key].label(key) for key in keys or columns.keys())


def if_given(column: Any, value: object) -> tuple[ColumnElement[bool], ...]:
    """Condition that a column has this value, for `where(*…)`; no condition if the value is None."""
    return () if value is None else (column == value,)


def count_active_at(ce_name: Any) -> Select[Any]:
    """Select the number of active pilots of all VOs at a compute element, given by name or column."""
    return select(func.count()).select_from(Pilots).where(Pilots.ce_name == ce_name, Pilots.status.in_(ACTIVE))


SELECT_CE = select(*columns_of(ComputeElements))
