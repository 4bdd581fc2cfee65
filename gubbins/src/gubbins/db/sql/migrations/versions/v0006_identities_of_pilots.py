"""Pilots have identities, send heartbeats, and say why they end."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0006"
down_revision = "0005"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "PilotIdentities",
        sa.Column("PilotID", _ID, primary_key=True, autoincrement=False),
        sa.Column("VO", sa.String(128), nullable=False),
        sa.Column("CEName", sa.String(128), nullable=False),
        sa.Column("SecretHashes", sa.String(520), nullable=False),
        sa.Column("Starts", sa.Integer, nullable=False),
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
        sa.Column("Outcome", sa.String(16)),
        sa.Column("ExitCode", sa.Integer),
        sa.Column("JobsDone", sa.Integer),
        sa.Column("Detail", sa.String(200)),
        sa.ForeignKeyConstraint(["PilotID"], ["Pilots.PilotID"], ondelete="CASCADE"),
        sa.CheckConstraint(
            sa.column("Outcome").in_(["worked", "no work", "node unfit", "error"]), name="pilot_outcome"
        ),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )
    op.create_index("idx_identities_outcome", "PilotIdentities", ["Outcome", "VO", "CEName"])


def downgrade() -> None:
    op.drop_table("PilotIdentities")
