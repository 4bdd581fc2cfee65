"""Requests have the stamps of their pilots, and refusals."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("PilotRequests") as table:
        table.add_column(sa.Column("Stamp", sa.String(32)))
        table.add_column(sa.Column("Refusal", sa.String(1024)))
    # Their tasks know no stamp: each takes the oldest of its VO.
    requests = sa.table("PilotRequests", sa.column("RequestID"), sa.column("Stamp"))
    for id in op.get_bind().execute(sa.select(requests.c.RequestID)).scalars().all():
        op.execute(sa.update(requests).where(requests.c.RequestID == id).values(Stamp=uuid.uuid4().hex))
    with op.batch_alter_table("PilotRequests") as table:
        table.alter_column("Stamp", existing_type=sa.String(32), nullable=False)
    op.create_index("idx_requests_stamp", "PilotRequests", ["Stamp"], unique=True)


def downgrade() -> None:
    op.drop_index("idx_requests_stamp", "PilotRequests")
    with op.batch_alter_table("PilotRequests") as table:
        table.drop_column("Refusal")
        table.drop_column("Stamp")
