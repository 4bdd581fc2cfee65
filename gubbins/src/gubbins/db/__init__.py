"""Databases: that of the pilot system (`sql`), and DiracX's pilot registry (`registry`)."""

from __future__ import annotations

__all__ = ["URL_VARIABLE"]

#: The environment variable that names the database of pilots.
URL_VARIABLE = "DIRACX_DB_URL_MYPILOTDB"
