"""Indexes for a million pilots; on MySQL and MariaDB, any text in any column."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

ADDS = {
    "Pilots": ["idx_pilots_status_ce_vo", "idx_pilots_vo_status_ce", "idx_pilots_vo_id", "idx_pilots_ended"],
    "PilotRequests": ["idx_requests_at"],
}

_COLUMNS = {
    "idx_pilots_status_ce_vo": ["Status", "CEName", "VO"],
    "idx_pilots_vo_status_ce": ["VO", "Status", "CEName"],
    "idx_pilots_vo_id": ["VO", "PilotID"],
    "idx_pilots_ended": ["EndedAt"],
    "idx_requests_at": ["RequestedAt"],
}


def upgrade() -> None:
    # MySQL cannot undo what was done before a crash: what is there already is not made again.
    for table, indexes in ADDS.items():
        there = _indexes(table)
        for name in indexes:
            if name not in there:
                op.create_index(name, table, _COLUMNS[name])
    if "idx_pilots_vo_status" in _indexes("Pilots"):
        op.drop_index("idx_pilots_vo_status", "Pilots")
    if op.get_context().dialect.name in ("mysql", "mariadb"):
        _take_any_text()


def _take_any_text() -> None:
    """Else a server's default decides: latin1 refuses what sites say, and most take CE for ce."""
    # Both ends of a foreign key must change, one after the other.
    for key in sa.inspect(op.get_bind()).get_foreign_keys("Pilots"):
        op.drop_constraint(str(key["name"]), "Pilots", type_="foreignkey")
    for table in ("ComputeElements", "Pilots", "PilotHistory", "PilotRequests"):
        op.execute(f"ALTER TABLE `{table}` CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
    op.create_foreign_key(None, "Pilots", "ComputeElements", ["CEName"], ["Name"])


def downgrade() -> None:
    # Any text stays possible: no version minds, and rows may need it.
    if "idx_pilots_vo_status" not in _indexes("Pilots"):
        op.create_index("idx_pilots_vo_status", "Pilots", ["VO", "Status"])
    for table, indexes in ADDS.items():
        there = _indexes(table)
        for name in reversed(indexes):
            if name in there:
                op.drop_index(name, table)


def _indexes(table: str) -> set[str]:
    return {str(index["name"]) for index in sa.inspect(op.get_bind()).get_indexes(table)}
