"""What people do to pilots and compute elements, as the audit log has it."""

from __future__ import annotations

__all__ = ["Deed"]

from enum import StrEnum


class Deed(StrEnum):
    """What was done, whether by dashboard, HTTP or command line."""

    LOAD_CES = "load compute elements"
    CREATE_CE = "create compute element"
    OPEN_CE = "open compute element"
    CLOSE_CE = "close compute element"
    BAN_CE = "ban compute element"
    SUBMIT_PILOT = "submit pilot"
    CANCEL_PILOT = "cancel pilot"
