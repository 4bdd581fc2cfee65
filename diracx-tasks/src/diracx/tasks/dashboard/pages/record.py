from __future__ import annotations

from ..page import Page

PAGES: list[Page] = []
