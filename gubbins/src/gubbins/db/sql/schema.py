"""Tables of `MyPilotDB`; the same on SQLite, MySQL/MariaDB and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

from diracx.core.models.pilot import PilotStatus
from diracx.tasks.plumbing.sql.types import UTF8, AnyName, AnyText
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    Enum,
    ForeignKey,
    Index,
    Integer,
    Label,
    LargeBinary,
    String,
    Table,
    TypeDecorator,
    select,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeEngine

from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.pilot_states import MyPilotStatus, PilotOutcome


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored as naive UTC with microseconds; aware again on the way out.

    (DiracX's own `SmarterDateTime` refuses the dialect name `postgresql`.)
    """

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a datetime without a time zone cannot be stored: {value!r}")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], datetime | None] | None:
        # SQLite keeps text, and a check of 100,000 pilots reads four of them for each.
        return _from_text if dialect.name == "sqlite" else super().result_processor(dialect, coltype)


def _from_text(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value + "+00:00")


# SQLite gives out ids by itself only in a column of type INTEGER.
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


def _status_type(constraint: str) -> Enum:
    # A string with a CHECK constraint; MySQL wants the names of those unique in the whole database.
    return Enum(MyPilotStatus, native_enum=False, length=16, create_constraint=True, name=constraint)


class MyPilotDBBase(DeclarativeBase):
    """The metadata of this database."""


class ComputeElements(MyPilotDBBase):
    """A site where pilots can be submitted."""

    __tablename__ = "ComputeElements"
    __table_args__ = UTF8

    name: Mapped[str] = mapped_column("Name", _CEName, primary_key=True, key="name")
    # Slots: at most this many pilots of all VOs together are SUBMITTED or RUNNING.
    capacity: Mapped[int] = mapped_column("Capacity", Integer, key="capacity")
    # Reliability, 0.0-1.0; only the simulated back end acts on it.
    success_rate: Mapped[float] = mapped_column(
        "SuccessRate",
        Double,
        default=1.0,
        key="success_rate",
    )
    enabled: Mapped[bool] = mapped_column("Enabled", Boolean, default=True, key="enabled")
    # Name of an entry point in the group `gubbins.ces`, and what it was told.
    backend: Mapped[str] = mapped_column("Backend", AnyName(64), default="simulated", key="backend")
    settings: Mapped[dict[str, Any]] = mapped_column("Settings", JSON, default=dict, key="settings")
    # The VOs it serves; NULL: all.
    vos: Mapped[list[str] | None] = mapped_column("VOs", JSON(none_as_null=True), key="vos")
    # How many pilots it gets, how long it is waited for; NULL, and what is not in it: the defaults.
    rules: Mapped[dict[str, Any] | None] = mapped_column("Rules", JSON(none_as_null=True), key="rules")
    # Since when it is not touched at all, and why; NULL: it is not banned.
    banned_at: Mapped[datetime | None] = mapped_column("BannedAt", UTCDateTime, key="banned_at")
    ban_reason: Mapped[str | None] = mapped_column("BanReason", _Reason, key="ban_reason")
    # The last refusal or failed poll, until one succeeds.
    last_error: Mapped[str | None] = mapped_column("LastError", _Reason, key="last_error")
    last_error_at: Mapped[datetime | None] = mapped_column("LastErrorAt", UTCDateTime, key="last_error_at")
    # Confirmed pilots that went missing and were never seen, since one was seen last; NULL: none.
    missing_in_row: Mapped[int | None] = mapped_column("MissingInRow", Integer, key="missing_in_row")
    # Pilots that the site held when it refused more of them, and when that was; NULL: it has not.
    quota: Mapped[int | None] = mapped_column("Quota", Integer, key="quota")
    quota_at: Mapped[datetime | None] = mapped_column("QuotaAt", UTCDateTime, key="quota_at")
    created_at: Mapped[datetime] = mapped_column("CreatedAt", UTCDateTime, key="created_at")
    updated_at: Mapped[datetime] = mapped_column("UpdatedAt", UTCDateTime, key="updated_at")


_ces = cast(Table, ComputeElements.__table__)
_ces.append_constraint(CheckConstraint(_ces.c.capacity >= 0, name="capacity_not_negative"))
_ces.append_constraint(CheckConstraint(_ces.c.success_rate.between(0, 1), name="success_rate_is_a_share"))


class CECircuits(MyPilotDBBase):
    """The circuit breaker of one kind of call to a compute element; no row: the last such call went well."""

    __tablename__ = "CECircuits"
    __table_args__ = UTF8

    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), primary_key=True, key="ce_name"
    )
    call: Mapped[CECall] = mapped_column(
        "CallKind",
        Enum(
            CECall,
            native_enum=False,
            length=16,
            create_constraint=True,
            name="circuit_call",
            values_callable=lambda calls: [str(call) for call in calls],
        ),
        primary_key=True,
        key="call",
    )
    # One after the other, without a success between them.
    failures: Mapped[int] = mapped_column("Failures", Integer, key="failures")
    # Before that no call is made; NULL: there were too few failures to pause.
    open_until: Mapped[datetime | None] = mapped_column("OpenUntil", UTCDateTime, key="open_until")
    # Until then one caller probes whether it works again; NULL: no probe.
    probe_until: Mapped[datetime | None] = mapped_column("ProbeUntil", UTCDateTime, key="probe_until")
    last_error: Mapped[str | None] = mapped_column("LastError", _Reason, key="last_error")
    last_error_at: Mapped[datetime | None] = mapped_column("LastErrorAt", UTCDateTime, key="last_error_at")


class CEDowntimes(MyPilotDBBase):
    """A time in which a compute element gets no pilots and raises no alarms."""

    __tablename__ = "CEDowntimes"

    id: Mapped[int] = mapped_column("DowntimeID", _Id, primary_key=True, autoincrement=True, key="id")
    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), key="ce_name"
    )
    starts_at: Mapped[datetime] = mapped_column("StartsAt", UTCDateTime, key="starts_at")
    ends_at: Mapped[datetime] = mapped_column("EndsAt", UTCDateTime, key="ends_at")
    # No pilots are submitted from then on.
    drain_from: Mapped[datetime] = mapped_column("DrainFrom", UTCDateTime, key="drain_from")
    reason: Mapped[str] = mapped_column("Reason", _Reason, key="reason")
    added_by: Mapped[str] = mapped_column("AddedBy", _Reason, key="added_by")
    # NULL: a user has added it.
    source: Mapped[str | None] = mapped_column("Source", AnyName(64), key="source")

    __table_args__ = (Index("idx_downtimes_ce", "ce_name"), Index("idx_downtimes_end", "ends_at"), UTF8)


class Pilots(MyPilotDBBase):
    """One pilot: submitted once, followed to its end."""

    __tablename__ = "Pilots"

    id: Mapped[int] = mapped_column("PilotID", _Id, primary_key=True, autoincrement=True, key="id")
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, ForeignKey(ComputeElements.name), key="ce_name")
    status: Mapped[MyPilotStatus] = mapped_column(
        "Status", _status_type("pilot_status"), default=MyPilotStatus.SUBMITTED, key="status"
    )
    # Our name for the pilot, known to the CE; makes a repeated submission recognisable.
    stamp: Mapped[str] = mapped_column("Stamp", String(32), unique=True, key="stamp")
    # The CE's name for it; NULL until the CE has confirmed the submission.
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
    # What it waits for, as the CE says; NULL: for its turn.
    waiting_reason: Mapped[str | None] = mapped_column("WaitingReason", _Reason, key="waiting_reason")
    # Its PilotID in the pilot registry; NULL: it is not known to be registered.
    registry_id: Mapped[int | None] = mapped_column("RegistryID", BigInteger, key="registry_id")
    # The status written there last; NULL: something is owed.
    registered: Mapped[PilotStatus | None] = mapped_column(
        "Registered",
        Enum(PilotStatus, native_enum=False, length=16, values_callable=lambda all: [str(each) for each in all]),
        key="registered",
    )

    __table_args__ = (
        # The active ones of a compute element: among a million that ended they are few.
        Index("idx_pilots_ce_status", "ce_name", "status"),
        # Those that a compute element does not know.
        Index("idx_pilots_ce_missing", "ce_name", "missing_since"),
        # Slots held, by compute element and VO.
        Index("idx_pilots_status_ce_vo", "status", "ce_name", "vo"),
        # Those of a VO, by state and compute element.
        Index("idx_pilots_vo_status_ce", "vo", "status", "ce_name"),
        # A VO's newest.
        Index("idx_pilots_vo_id", "vo", "id"),
        # What is owed to the pilot registry.
        Index("idx_pilots_vo_registered", "vo", "registered", "id"),
        # Those to delete.
        Index("idx_pilots_ended", "ended_at"),
        UTF8,
    )


class PilotHistory(MyPilotDBBase):
    """Every state a pilot entered, once: the state machine has no cycles, so that is the key."""

    __tablename__ = "PilotHistory"
    __table_args__ = UTF8

    pilot_id: Mapped[int] = mapped_column(
        "PilotID",
        _Id,
        ForeignKey(Pilots.id, ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        key="pilot_id",
    )
    status: Mapped[MyPilotStatus] = mapped_column(
        "Status", _status_type("history_status"), primary_key=True, key="status"
    )
    at: Mapped[datetime] = mapped_column("At", UTCDateTime, key="at")
    reason: Mapped[str | None] = mapped_column("Reason", _Reason, key="reason")


class PilotRequests(MyPilotDBBase):
    """A `MyPilotTask` that was spawned and whose pilot has no slot yet: the next round must not spawn it again."""

    __tablename__ = "PilotRequests"

    id: Mapped[int] = mapped_column("RequestID", _Id, primary_key=True, autoincrement=True, key="id")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, key="ce_name")
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    # The stamp that its pilot will have; its task knows it.
    stamp: Mapped[str] = mapped_column("Stamp", String(32), key="stamp")
    requested_at: Mapped[datetime] = mapped_column("RequestedAt", UTCDateTime, key="requested_at")
    # The compute element refused its pilot: its task has not heard of it yet. NULL: it waits.
    refusal: Mapped[str | None] = mapped_column("Refusal", _Reason, key="refusal")

    __table_args__ = (
        Index("idx_requests_ce_vo", "ce_name", "vo"),
        Index("idx_requests_stamp", "stamp", unique=True),
        Index("idx_requests_at", "requested_at"),
        UTF8,
    )


class PilotDemand(MyPilotDBBase):
    """Demand of a VO at a compute element, which fair shares take into account."""

    __tablename__ = "PilotDemand"
    __table_args__ = UTF8

    ce_name: Mapped[str] = mapped_column(
        "CEName", _CEName, ForeignKey(ComputeElements.name, ondelete="CASCADE"), primary_key=True, key="ce_name"
    )
    vo: Mapped[str] = mapped_column("VO", _VO, primary_key=True, key="vo")
    # Further pilots wanted.
    wanted: Mapped[int] = mapped_column("Wanted", Integer, key="wanted")
    requested_at: Mapped[datetime] = mapped_column("AskedAt", UTCDateTime, key="requested_at")
    # When it last got a slot; NULL: never.
    granted_at: Mapped[datetime | None] = mapped_column("GrantedAt", UTCDateTime, key="granted_at")
    # Since when more of its pilots wait there than jobs justify; NULL: no more than that.
    surplus_since: Mapped[datetime | None] = mapped_column("SurplusSince", UTCDateTime, key="surplus_since")


class PilotOutputs(MyPilotDBBase):
    """Output of a pilot that ended, or the request to fetch it."""

    __tablename__ = "PilotOutputs"

    pilot_id: Mapped[int] = mapped_column(
        "PilotID",
        _Id,
        ForeignKey(Pilots.id, ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        key="pilot_id",
    )
    # The pilot's, here as well, for the queue of a VO at a compute element is to be read without reading pilots.
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, key="ce_name")
    # NULL: it is still to be fetched.
    fetched_at: Mapped[datetime | None] = mapped_column("FetchedAt", UTCDateTime, key="fetched_at")
    # When a fetched one may go.
    expires_at: Mapped[datetime | None] = mapped_column("ExpiresAt", UTCDateTime, key="expires_at")
    # Compressed (zlib) UTF-8: takes any text, in any character set of the server.
    out: Mapped[bytes | None] = mapped_column("Out", _Compressed, key="out")
    err: Mapped[bytes | None] = mapped_column("Err", _Compressed, key="err")
    # Why there is none.
    error: Mapped[str | None] = mapped_column("Error", _Reason, key="error")
    # True: it is to be written to the pilot registry, too; else NULL.
    owed: Mapped[bool | None] = mapped_column("Owed", Boolean, key="owed")

    __table_args__ = (
        # What is still to be fetched, oldest first.
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


class PilotIdentities(MyPilotDBBase):
    """Identity of a pilot that got a secret, and its reports. Heartbeats write here and lock no other row."""

    __tablename__ = "PilotIdentities"

    pilot_id: Mapped[int] = mapped_column(
        "PilotID",
        _Id,
        ForeignKey(Pilots.id, ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        key="pilot_id",
    )
    # The pilot's, here as well, for outcomes are to be counted without reading pilots.
    vo: Mapped[str] = mapped_column("VO", _VO, key="vo")
    ce_name: Mapped[str] = mapped_column("CEName", _CEName, key="ce_name")
    # SHA-256 of the secret, in hexadecimal; with blanks between them, those of all attempts at its submission.
    secret_hashes: Mapped[str] = mapped_column("SecretHashes", String(MAX_HASHES_CHARS), key="secret_hashes")
    # Times that the secret was exchanged: tokens of an earlier time are refused.
    starts: Mapped[int] = mapped_column("Starts", Integer, default=0, key="starts")
    exchanged_at: Mapped[datetime | None] = mapped_column("ExchangedAt", UTCDateTime, key="exchanged_at")
    exchanged_from: Mapped[str | None] = mapped_column("ExchangedFrom", AnyText(64), key="exchanged_from")
    # When a token was first used: the secret is of no use from then on. NULL: the response may have been lost.
    used_at: Mapped[datetime | None] = mapped_column("UsedAt", UTCDateTime, key="used_at")
    # SHA-256 of what all refresh tokens of this start have in common, and of the valid one.
    family_hash: Mapped[str | None] = mapped_column("FamilyHash", String(64), key="family_hash")
    refresh_hash: Mapped[str | None] = mapped_column("RefreshHash", String(64), key="refresh_hash")
    # An old refresh token was presented; NULL: none was.
    revoked_at: Mapped[datetime | None] = mapped_column("RevokedAt", UTCDateTime, key="revoked_at")
    host: Mapped[str | None] = mapped_column("Host", AnyText(255), key="host")
    cores: Mapped[int | None] = mapped_column("Cores", Integer, key="cores")
    memory_mb: Mapped[int | None] = mapped_column("MemoryMB", Integer, key="memory_mb")
    heartbeat_at: Mapped[datetime | None] = mapped_column("HeartbeatAt", UTCDateTime, key="heartbeat_at")
    # From then on a running pilot is stale; NULL: it has sent no heartbeat.
    stale_at: Mapped[datetime | None] = mapped_column("StaleAt", UTCDateTime, key="stale_at")
    # Why it ends, as it says; NULL: it has not said so.
    outcome: Mapped[PilotOutcome | None] = mapped_column(
        "Outcome",
        Enum(
            PilotOutcome,
            native_enum=False,
            length=16,
            create_constraint=True,
            name="pilot_outcome",
            values_callable=lambda outcomes: [str(outcome) for outcome in outcomes],
        ),
        key="outcome",
    )
    exit_code: Mapped[int | None] = mapped_column("ExitCode", Integer, key="exit_code")
    jobs_done: Mapped[int | None] = mapped_column("JobsDone", Integer, key="jobs_done")
    detail: Mapped[str | None] = mapped_column("Detail", AnyText(MAX_DETAIL_CHARS), key="detail")

    __table_args__ = (
        # Outcomes by VO and compute element.
        Index("idx_identities_outcome", "outcome", "vo", "ce_name"),
        UTF8,
    )


def columns_of(table: type[MyPilotDBBase], *keys: str) -> tuple[Label[Any], ...]:
    """Select columns of a table (none: all), labelled with their names in Python: rows have the database's."""
    columns = cast(Table, table.__table__).columns
    return tuple(columns[key].label(key) for key in keys or columns.keys())


SELECT_CE = select(*columns_of(ComputeElements))
