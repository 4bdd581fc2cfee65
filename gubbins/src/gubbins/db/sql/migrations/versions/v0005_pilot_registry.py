"""Registrations of pilots in DiracX's pilot registry."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.add_column("Pilots", sa.Column("RegistryID", sa.BigInteger))
    op.add_column("Pilots", sa.Column("Registered", sa.String(16)))
    op.create_index("idx_pilots_vo_registered", "Pilots", ["VO", "Registered", "PilotID"])
    op.add_column("PilotOutputs", sa.Column("Owed", sa.Boolean))
    op.create_index("idx_outputs_owed", "PilotOutputs", ["VO", "Owed", "PilotID"])
    op.create_table(
        "UndoneRegistrations",
        sa.Column("UndoneID", _ID, primary_key=True, autoincrement=True),
        sa.Column("RegistryID", sa.BigInteger, nullable=False),
        sa.Column("Stamp", sa.String(32), nullable=False),
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    op.drop_table("UndoneRegistrations")
    op.drop_index("idx_outputs_owed", "PilotOutputs")
    op.drop_column("PilotOutputs", "Owed")
    op.drop_index("idx_pilots_vo_registered", "Pilots")
    op.drop_column("Pilots", "Registered")
    op.drop_column("Pilots", "RegistryID")
