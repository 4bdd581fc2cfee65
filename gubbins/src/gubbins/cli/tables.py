"""Tables of the commands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diracx.tasks.operations.views import Column, View

from gubbins.domain.downtimes import Downtime
from gubbins.logic.my_pilots.registry import Difference


def state_of(ce: Mapping[str, Any]) -> str:
    """Return the state of a compute element: `open`, `closed`, `banned` or `downtime`."""
    if ce["enabled"]:
        return "open" if ce["downtime"] is None else "downtime"
    return "closed" if ce["banned_at"] is None else "banned"


def _circuits(ce: Mapping[str, Any]) -> str:
    failing = [f"{call} {c['state']}" for call, c in ce["circuits"].items() if c["state"] != "closed"]
    return ", ".join(failing) or "closed"


COMPUTE_ELEMENTS: View[Mapping[str, Any]] = View(
    "no compute elements",
    (
        Column("name", "name"),
        Column("state", state_of),
        Column("circuit", _circuits),
        Column("backend", "backend"),
        Column("VOs", lambda ce: "all" if ce["vos"] is None else ce["vos"]),
        Column("success rate", "success_rate", right=True),
        Column("capacity", "capacity", right=True),
        Column("active", "active", right=True),
        Column("free", "available_slots", right=True),
        Column("last error", "last_error"),
    ),
)

DOWNTIMES: View[Downtime] = View(
    "no downtimes",
    (
        Column("id", "id"),
        Column("CE", "ce_name"),
        Column("no submissions from (UTC)", "drain_from"),
        Column("start (UTC)", "starts_at"),
        Column("end (UTC)", "ends_at"),
        Column("reason", "reason"),
        Column("added by", "added_by"),
    ),
)

#: Differences of the pilot registry from the database of pilots.
DIFFERENCES: View[Difference] = View(
    "no differences",
    (
        Column("pilot", "pilot_id"),
        Column("VO", "vo"),
        Column("CE", "ce_name"),
        Column("status here", lambda each: each.status or "unknown"),
        Column("in the registry", lambda each: each.registry_status or "missing"),
        Column("its id there", "registry_id"),
        Column("stamp", "stamp"),
    ),
)
