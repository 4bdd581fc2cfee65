"""Simulated time: what the pilot system takes for the present."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo


class Clock:
    """Stands still until it is set forward."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def forward(self, by: timedelta) -> None:
        self.now += by

    @contextmanager
    def rules(self, package: str) -> Iterator[None]:
        """Inside the block, `datetime.now(…)` in the modules of this package, as far as loaded, is the clock's."""
        clock = self

        class Simulated(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # a plain one, for drivers
                return clock.now.astimezone(tz)

        theirs = [
            module
            for name, module in list(sys.modules.items())
            if name.split(".")[0] == package and getattr(module, "datetime", None) is datetime
        ]
        for module in theirs:
            module.datetime = Simulated  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in theirs:
                module.datetime = datetime  # type: ignore[attr-defined]
