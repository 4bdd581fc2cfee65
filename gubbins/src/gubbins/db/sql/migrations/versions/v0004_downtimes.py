"""Downtimes of compute elements; since when more pilots wait than jobs justify."""

import sqlalchemy as sa
from alembic import op
from diracx.tasks.plumbing.sql.types import AnyName, AnyText
from sqlalchemy.dialects import mysql

revision = "0004"
down_revision = "0003"

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")


def upgrade() -> None:
    op.add_column("PilotDemand", sa.Column("SurplusSince", _MOMENT))
    op.create_table(
        "CEDowntimes",
        sa.Column(
            "DowntimeID",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column(
            "CEName", AnyName(128), sa.ForeignKey("ComputeElements.Name", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("StartsAt", _MOMENT, nullable=False),
        sa.Column("EndsAt", _MOMENT, nullable=False),
        sa.Column("DrainFrom", _MOMENT, nullable=False),
        sa.Column("Reason", AnyText(1024), nullable=False),
        sa.Column("AddedBy", AnyText(1024), nullable=False),
        sa.Column("Source", AnyName(64)),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )
    op.create_index("idx_downtimes_ce", "CEDowntimes", ["CEName"])
    op.create_index("idx_downtimes_end", "CEDowntimes", ["EndsAt"])


def downgrade() -> None:
    op.drop_table("CEDowntimes")
    op.drop_column("PilotDemand", "SurplusSince")
