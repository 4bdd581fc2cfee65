"""Compute elements, pilots, their history, and requests for pilots."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

ADDS: dict[str, list[str]] = {
    "ComputeElements": ["Backend", "Settings", "VOs", "LastError"],
    "Pilots": ["Stamp", "Reference", "MissingSince", "CancelRequestedAt", "idx_pilots_ce_status"],
    "PilotHistory": ["Reason"],
    "PilotRequests": ["idx_requests_ce_vo"],
}

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _status(constraint: str) -> sa.Enum:
    states = ("SUBMITTED", "RUNNING", "DONE", "FAILED")
    return sa.Enum(*states, native_enum=False, length=16, create_constraint=True, name=constraint)


def upgrade() -> None:
    op.create_table(
        "ComputeElements",
        sa.Column("Name", sa.String(128), nullable=False),
        sa.Column("Capacity", sa.Integer, nullable=False),
        sa.Column("SuccessRate", sa.Double, nullable=False),
        sa.Column("Enabled", sa.Boolean, nullable=False),
        sa.Column("Backend", sa.String(64), nullable=False),
        sa.Column("Settings", sa.JSON, nullable=False),
        sa.Column("VOs", sa.JSON),
        sa.Column("LastError", sa.String(1024)),
        sa.Column("LastErrorAt", _MOMENT),
        sa.Column("CreatedAt", _MOMENT, nullable=False),
        sa.Column("UpdatedAt", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("Name"),
        sa.CheckConstraint(sa.column("Capacity") >= 0, name="capacity_not_negative"),
        sa.CheckConstraint(sa.column("SuccessRate").between(0, 1), name="success_rate_is_a_share"),
    )
    op.create_table(
        "Pilots",
        sa.Column("PilotID", _ID, autoincrement=True, nullable=False),
        sa.Column("VO", sa.String(128), nullable=False),
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column("Status", _status("pilot_status"), nullable=False),
        sa.Column("Stamp", sa.String(32), nullable=False),
        sa.Column("Reference", sa.String(255)),
        sa.Column("SubmittedAt", _MOMENT, nullable=False),
        sa.Column("StartedAt", _MOMENT),
        sa.Column("EndedAt", _MOMENT),
        sa.Column("LastUpdate", _MOMENT, nullable=False),
        sa.Column("MissingSince", _MOMENT),
        sa.Column("CancelRequestedAt", _MOMENT),
        sa.Column("LastError", sa.String(1024)),
        sa.PrimaryKeyConstraint("PilotID"),
        sa.ForeignKeyConstraint(["CEName"], ["ComputeElements.Name"]),
        sa.UniqueConstraint("Stamp"),
    )
    op.create_index("idx_pilots_ce_status", "Pilots", ["CEName", "Status"])
    op.create_index("idx_pilots_vo_status", "Pilots", ["VO", "Status"])
    op.create_table(
        "PilotHistory",
        sa.Column("PilotID", _ID, autoincrement=False, nullable=False),
        sa.Column("Status", _status("history_status"), nullable=False),
        sa.Column("At", _MOMENT, nullable=False),
        sa.Column("Reason", sa.String(1024)),
        sa.PrimaryKeyConstraint("PilotID", "Status"),
        sa.ForeignKeyConstraint(["PilotID"], ["Pilots.PilotID"], ondelete="CASCADE"),
    )
    op.create_table(
        "PilotRequests",
        sa.Column("RequestID", _ID, autoincrement=True, nullable=False),
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column("VO", sa.String(128), nullable=False),
        sa.Column("RequestedAt", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("RequestID"),
    )
    op.create_index("idx_requests_ce_vo", "PilotRequests", ["CEName", "VO"])


def downgrade() -> None:
    for table in ("PilotRequests", "PilotHistory", "Pilots", "ComputeElements"):
        op.drop_table(table)
