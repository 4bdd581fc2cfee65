"""Logging as people read it in a terminal: time, level, who, what."""

from __future__ import annotations

import logging
import sys
import time

from ..plumbing.printable import printable
from .errors import mask
from .supervisor import own_number

#: Libraries that talk more than an operator wants to hear.
_TALKATIVE = ("aiosqlite", "asyncio", "git", "httpcore", "httpx", "opensearch", "sh", "sqlalchemy", "urllib3")


class _Readable(logging.Formatter):
    """One line per record, in UTC, never with a password. What a text continues with is indented: nothing that is
    logged, such as a name with a line feed in it, can pass for a record.
    """

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        number = own_number()
        process = f"[{number}] " if number else ""
        super().__init__(f"%(asctime)s %(levelname)-8s {process}%(short)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.short = record.name.rpartition(".")[2]
        return printable(mask(super().format(record))).replace("\n", "\n  ")


def set_up_logging(level: str) -> None:
    """Log to stderr what is at least of this level."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Readable())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if level != "debug":
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
