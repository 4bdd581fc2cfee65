"""Requests of pilots, as tests count them."""

from __future__ import annotations

from typing import Any

from gubbins.db.sql import MyPilotDB
from gubbins.logic import my_pilots as logic


async def request_pilots(db: MyPilotDB, vo: str, **how: Any) -> dict[str, int]:
    """Request pilots, and count the requests by compute element."""
    return {name: len(stamps) for name, stamps in (await logic.request_pilots(db, vo, **how)).items()}
