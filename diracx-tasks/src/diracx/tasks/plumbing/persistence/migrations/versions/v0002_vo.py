"""VO of a dead letter."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ADDS = {"DeadLetters": ["VO"]}


def upgrade() -> None:
    op.add_column("DeadLetters", sa.Column("VO", sa.String(255), nullable=True))


def downgrade() -> None:
    op.drop_column("DeadLetters", "VO")
