"""Pilots missing in a row and the quota of a compute element; what a pilot waits for."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0002"
down_revision = "0001"

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_COLUMNS = (
    ("ComputeElements", "MissingInRow", sa.Integer),
    ("ComputeElements", "Quota", sa.Integer),
    ("ComputeElements", "QuotaAt", _MOMENT),
    ("Pilots", "WaitingReason", sa.String(1024)),
)


def upgrade() -> None:
    for table, name, kind in _COLUMNS:
        op.add_column(table, sa.Column(name, kind))
    op.create_index("idx_pilots_ce_missing", "Pilots", ["CEName", "MissingSince"])


def downgrade() -> None:
    op.drop_index("idx_pilots_ce_missing", "Pilots")
    for table, name, _ in _COLUMNS:
        op.drop_column(table, name)
