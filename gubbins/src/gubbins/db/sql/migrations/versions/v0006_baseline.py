"""Create the tables of the pilot database: revisions 0001 to 0006, which were never released, in one."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = None

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_COMPRESSED = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
_NAME = sa.String(128)
_REASON = sa.String(1024)


def _choice(constraint: str, *values: str) -> Any:
    return sa.Enum(*values, native_enum=False, length=16, create_constraint=True, name=constraint)


def _status(constraint: str) -> Any:
    return _choice(constraint, "SUBMITTED", "RUNNING", "DONE", "FAILED")


def _column(name: str, kind: Any, **how: Any) -> Any:
    return sa.Column(name, kind, nullable=False, **how)


def _table(name: str, *parts: Any) -> None:
    op.create_table(name, *parts, mysql_charset="utf8mb4", mysql_collate="utf8mb4_bin")


def _at_ce(**how: Any) -> Any:
    return sa.ForeignKeyConstraint(["CEName"], ["ComputeElements.Name"], **how)


def _of_pilot() -> Any:
    return sa.ForeignKeyConstraint(["PilotID"], ["Pilots.PilotID"], ondelete="CASCADE")


def upgrade() -> None:
    _table(
        "ComputeElements",
        _column("Name", _NAME),
        _column("Capacity", sa.Integer),
        _column("SuccessRate", sa.Double),
        _column("Enabled", sa.Boolean),
        _column("Backend", sa.String(64)),
        _column("Settings", sa.JSON),
        sa.Column("VOs", sa.JSON),
        sa.Column("Rules", sa.JSON),
        sa.Column("BannedAt", _MOMENT),
        sa.Column("BanReason", _REASON),
        sa.Column("LastError", _REASON),
        sa.Column("LastErrorAt", _MOMENT),
        _column("CreatedAt", _MOMENT),
        _column("UpdatedAt", _MOMENT),
        sa.Column("MissingInRow", sa.Integer),
        sa.Column("Quota", sa.Integer),
        sa.Column("QuotaAt", _MOMENT),
        sa.PrimaryKeyConstraint("Name"),
        sa.CheckConstraint(sa.column("Capacity") >= 0, name="capacity_not_negative"),
        sa.CheckConstraint(sa.column("SuccessRate").between(0, 1), name="success_rate_is_a_share"),
    )
    _table(
        "CECircuits",
        _column("CEName", _NAME),
        _column("CallKind", _choice("circuit_call", "submit", "status")),
        _column("Failures", sa.Integer),
        sa.Column("OpenUntil", _MOMENT),
        sa.Column("ProbeUntil", _MOMENT),
        sa.Column("LastError", _REASON),
        sa.Column("LastErrorAt", _MOMENT),
        sa.PrimaryKeyConstraint("CEName", "CallKind"),
        _at_ce(ondelete="CASCADE"),
    )
    _table(
        "Pilots",
        _column("PilotID", _ID, autoincrement=True),
        _column("VO", _NAME),
        _column("CEName", _NAME),
        _column("Status", _status("pilot_status")),
        _column("Stamp", sa.String(32)),
        sa.Column("Reference", sa.String(255)),
        _column("SubmittedAt", _MOMENT),
        sa.Column("StartedAt", _MOMENT),
        sa.Column("EndedAt", _MOMENT),
        _column("LastUpdate", _MOMENT),
        sa.Column("MissingSince", _MOMENT),
        sa.Column("CancelRequestedAt", _MOMENT),
        sa.Column("LastError", _REASON),
        sa.Column("WaitingReason", _REASON),
        sa.Column("RegistryID", sa.BigInteger),
        sa.Column("Registered", sa.String(16)),
        sa.PrimaryKeyConstraint("PilotID"),
        _at_ce(),
        sa.UniqueConstraint("Stamp"),
    )
    _table(
        "PilotHistory",
        _column("PilotID", _ID, autoincrement=False),
        _column("Status", _status("history_status")),
        _column("At", _MOMENT),
        sa.Column("Reason", _REASON),
        sa.PrimaryKeyConstraint("PilotID", "Status"),
        _of_pilot(),
    )
    _table(
        "PilotRequests",
        _column("RequestID", _ID, autoincrement=True),
        _column("CEName", _NAME),
        _column("VO", _NAME),
        _column("RequestedAt", _MOMENT),
        _column("Stamp", sa.String(32)),
        sa.Column("Refusal", _REASON),
        sa.PrimaryKeyConstraint("RequestID"),
    )
    _table(
        "PilotDemand",
        _column("CEName", _NAME),
        _column("VO", _NAME),
        _column("Wanted", sa.Integer),
        _column("AskedAt", _MOMENT),
        sa.Column("GrantedAt", _MOMENT),
        sa.Column("SurplusSince", _MOMENT),
        sa.PrimaryKeyConstraint("CEName", "VO"),
        _at_ce(ondelete="CASCADE"),
    )
    _table(
        "PilotOutputs",
        _column("PilotID", _ID, autoincrement=False),
        _column("VO", _NAME),
        _column("CEName", _NAME),
        sa.Column("FetchedAt", _MOMENT),
        sa.Column("ExpiresAt", _MOMENT),
        sa.Column("Out", _COMPRESSED),
        sa.Column("Err", _COMPRESSED),
        sa.Column("Error", _REASON),
        sa.Column("Owed", sa.Boolean),
        sa.PrimaryKeyConstraint("PilotID"),
        _of_pilot(),
    )
    _table(
        "CEDowntimes",
        _column("DowntimeID", _ID, autoincrement=True),
        _column("CEName", _NAME),
        _column("StartsAt", _MOMENT),
        _column("EndsAt", _MOMENT),
        _column("DrainFrom", _MOMENT),
        _column("Reason", _REASON),
        _column("AddedBy", _REASON),
        sa.Column("Source", sa.String(64)),
        sa.PrimaryKeyConstraint("DowntimeID"),
        _at_ce(ondelete="CASCADE"),
    )
    _table(
        "UndoneRegistrations",
        _column("UndoneID", _ID, autoincrement=True),
        _column("RegistryID", sa.BigInteger),
        _column("Stamp", sa.String(32)),
        sa.PrimaryKeyConstraint("UndoneID"),
    )
    _table(
        "PilotIdentities",
        _column("PilotID", _ID, autoincrement=False),
        _column("VO", _NAME),
        _column("CEName", _NAME),
        _column("SecretHashes", sa.String(520)),
        _column("Starts", sa.Integer),
        sa.Column("ExchangedAt", _MOMENT),
        sa.Column("ExchangedFrom", sa.String(64)),
        sa.Column("UsedAt", _MOMENT),
        sa.Column("FamilyHash", sa.String(64)),
        sa.Column("RefreshHash", sa.String(64)),
        sa.Column("RevokedAt", _MOMENT),
        sa.Column("Host", sa.String(255)),
        sa.Column("Cores", sa.Integer),
        sa.Column("MemoryMB", sa.Integer),
        sa.Column("HeartbeatAt", _MOMENT),
        sa.Column("StaleAt", _MOMENT),
        sa.Column("Outcome", _choice("pilot_outcome", "worked", "no work", "node unfit", "error")),
        sa.Column("ExitCode", sa.Integer),
        sa.Column("JobsDone", sa.Integer),
        sa.Column("Detail", sa.String(200)),
        sa.PrimaryKeyConstraint("PilotID"),
        _of_pilot(),
    )
    for table, name, columns in (
        ("Pilots", "idx_pilots_ce_status", ["CEName", "Status"]),
        ("Pilots", "idx_pilots_ce_missing", ["CEName", "MissingSince"]),
        ("Pilots", "idx_pilots_status_ce_vo", ["Status", "CEName", "VO"]),
        ("Pilots", "idx_pilots_vo_status_ce", ["VO", "Status", "CEName"]),
        ("Pilots", "idx_pilots_vo_id", ["VO", "PilotID"]),
        ("Pilots", "idx_pilots_vo_registered", ["VO", "Registered", "PilotID"]),
        ("Pilots", "idx_pilots_ended", ["EndedAt"]),
        ("PilotRequests", "idx_requests_ce_vo", ["CEName", "VO"]),
        ("PilotRequests", "idx_requests_at", ["RequestedAt"]),
        ("PilotOutputs", "idx_outputs_queue", ["VO", "CEName", "FetchedAt", "PilotID"]),
        ("PilotOutputs", "idx_outputs_expires", ["ExpiresAt"]),
        ("PilotOutputs", "idx_outputs_owed", ["VO", "Owed", "PilotID"]),
        ("CEDowntimes", "idx_downtimes_ce", ["CEName"]),
        ("CEDowntimes", "idx_downtimes_end", ["EndsAt"]),
        ("PilotIdentities", "idx_identities_outcome", ["Outcome", "VO", "CEName"]),
    ):
        op.create_index(name, table, columns)
    op.create_index("idx_requests_stamp", "PilotRequests", ["Stamp"], unique=True)


def downgrade() -> None:
    for table in ("PilotIdentities", "UndoneRegistrations", "CEDowntimes", "PilotOutputs", "PilotDemand"):
        op.drop_table(table)
    for table in ("PilotRequests", "PilotHistory", "Pilots", "CECircuits", "ComputeElements"):
        op.drop_table(table)
