"""Create the table of dead letters."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

revision = "0001"
down_revision = None

_MOMENT = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
_LONG_TEXT = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")
_LONG_BINARY = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "DeadLetters",
        sa.Column("ID", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("TaskID", sa.String(255), nullable=False),
        sa.Column("TaskName", sa.String(255), nullable=False),
        sa.Column("VO", sa.String(255), nullable=True),
        sa.Column("Reason", sa.String(32), nullable=False),
        sa.Column("Detail", _LONG_TEXT, nullable=False),
        sa.Column("Message", _LONG_BINARY, nullable=False),
        sa.Column("Attempts", _LONG_TEXT, nullable=False),
        sa.Column("Burial", sa.String(255), nullable=False),
        sa.Column("History", _LONG_TEXT, nullable=False),
        sa.Column("Status", sa.String(16), nullable=False),
        sa.Column("BuriedAt", _MOMENT, nullable=False),
        sa.Column("ChangedAt", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("ID"),
        sa.UniqueConstraint("TaskID"),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )
    op.create_index("ix_DeadLetters_Status_BuriedAt", "DeadLetters", ["Status", "BuriedAt"])
    op.create_index("ix_DeadLetters_TaskName", "DeadLetters", ["TaskName"])


def downgrade() -> None:
    op.drop_table("DeadLetters")
