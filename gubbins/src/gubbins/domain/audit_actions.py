"""Audited actions on pilots and compute elements."""

from __future__ import annotations

from enum import StrEnum


class AuditAction(StrEnum):
    """Action of a user in the dashboard, the HTTP API or the command line."""

    LOAD_CES = "load compute elements"
    CREATE_CE = "create compute element"
    OPEN_CE = "open compute element"
    CLOSE_CE = "close compute element"
    BAN_CE = "ban compute element"
    ADD_DOWNTIME = "add downtime"
    REMOVE_DOWNTIME = "remove downtime"
    SUBMIT_PILOT = "submit pilot"
    CANCEL_PILOT = "cancel pilot"
    RECONCILE_PILOTS = "reconcile pilots"
    EXCHANGE_SECRET = "exchange pilot secret"  # noqa: S105
    REFRESH_TOKEN = "refresh pilot token"  # noqa: S105
