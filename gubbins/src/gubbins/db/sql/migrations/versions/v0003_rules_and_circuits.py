"""Rules, bans and circuit breakers of compute elements; claims of VOs; output of pilots."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0003"
down_revision = "0002"

ADDS = {
    "ComputeElements": ["Rules", "BannedAt", "BanReason"],
    "CECircuits": ["OpenUntil"],
    "PilotClaims": ["Wanted"],
    "PilotOutputs": ["FetchedAt", "idx_outputs_queue", "idx_outputs_expires"],
}

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_COMPRESSED = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_OUTPUT_INDEXES = {
    "idx_outputs_queue": ["VO", "CEName", "FetchedAt", "PilotID"],
    "idx_outputs_expires": ["ExpiresAt"],
}
_COLUMNS: dict[str, Any] = {"Rules": sa.JSON(), "BannedAt": _MOMENT, "BanReason": sa.String(1024)}


def upgrade() -> None:
    # MySQL cannot undo what was done before a crash: what is there already is not made again.
    inspector = sa.inspect(op.get_bind())
    there = {column["name"] for column in inspector.get_columns("ComputeElements")}
    for name, kind in _COLUMNS.items():
        if name not in there:
            op.add_column("ComputeElements", sa.Column(name, kind))
    tables = {name.casefold() for name in inspector.get_table_names()}
    for table, make in (("CECircuits", _circuits), ("PilotClaims", _claims), ("PilotOutputs", _outputs)):
        if table.casefold() not in tables:
            make()
    indexes = {index["name"] for index in sa.inspect(op.get_bind()).get_indexes("PilotOutputs")}
    for name, columns in _OUTPUT_INDEXES.items():
        if name not in indexes:
            op.create_index(name, "PilotOutputs", columns)


def _circuits() -> None:
    op.create_table(
        "CECircuits",
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column(
            "CallKind",
            sa.Enum("submit", "status", native_enum=False, length=16, create_constraint=True, name="circuit_call"),
            nullable=False,
        ),
        sa.Column("Failures", sa.Integer, nullable=False),
        sa.Column("OpenUntil", _MOMENT),
        sa.Column("ProbeUntil", _MOMENT),
        sa.Column("LastError", sa.String(1024)),
        sa.Column("LastErrorAt", _MOMENT),
        sa.PrimaryKeyConstraint("CEName", "CallKind"),
        sa.ForeignKeyConstraint(["CEName"], ["ComputeElements.Name"], ondelete="CASCADE"),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def _claims() -> None:
    op.create_table(
        "PilotClaims",
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column("VO", sa.String(128), nullable=False),
        sa.Column("Wanted", sa.Integer, nullable=False),
        sa.Column("AskedAt", _MOMENT, nullable=False),
        sa.Column("GrantedAt", _MOMENT),
        sa.PrimaryKeyConstraint("CEName", "VO"),
        sa.ForeignKeyConstraint(["CEName"], ["ComputeElements.Name"], ondelete="CASCADE"),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def _outputs() -> None:
    op.create_table(
        "PilotOutputs",
        sa.Column("PilotID", _ID, autoincrement=False, nullable=False),
        sa.Column("VO", sa.String(128), nullable=False),
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column("FetchedAt", _MOMENT),
        sa.Column("ExpiresAt", _MOMENT),
        sa.Column("Out", _COMPRESSED),
        sa.Column("Err", _COMPRESSED),
        sa.Column("Error", sa.String(1024)),
        sa.PrimaryKeyConstraint("PilotID"),
        sa.ForeignKeyConstraint(["PilotID"], ["Pilots.PilotID"], ondelete="CASCADE"),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    tables = {name.casefold() for name in sa.inspect(op.get_bind()).get_table_names()}
    for table in ("PilotOutputs", "PilotClaims", "CECircuits"):
        if table.casefold() in tables:
            op.drop_table(table)
    there = {column["name"] for column in sa.inspect(op.get_bind()).get_columns("ComputeElements")}
    with op.batch_alter_table("ComputeElements") as batch:
        for name in reversed(_COLUMNS):
            if name in there:
                batch.drop_column(name)
