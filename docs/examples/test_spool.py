import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from spool import SpoolBackend, SpoolSettings

from gubbins.ces import CEDescription
from gubbins.testing.ce_conformance import CEConformance, MakeBackend, Scenario


class TestSpool(CEConformance):
    @pytest.fixture
    async def make(self, tmp_path: Path) -> AsyncIterator[MakeBackend]:
        for scenario in Scenario:
            (tmp_path / scenario).mkdir()
        program = asyncio.create_task(other_program(tmp_path))
        yield lambda scenario: SpoolBackend(
            CEDescription("spool", 100, 1.0), SpoolSettings(directory=tmp_path / scenario)
        )
        program.cancel()
        with suppress(asyncio.CancelledError):
            await program


async def other_program(directory: Path) -> None:
    """Runs what it finds: of each scenario in a directory of its own."""
    while True:
        await asyncio.sleep(0.05)
        move(directory)


def move(directory: Path) -> None:
    for todo in directory.glob("*/*.todo"):
        todo.rename(todo.with_suffix(".running"))
    for running in directory.glob("*/*.running"):
        cancelled = running.with_suffix(".cancel").exists()
        if cancelled or running.parent.name == Scenario.FAILING:
            running.write_text("cancelled" if cancelled else "no luck today")
            running.rename(running.with_suffix(".failed"))
        elif running.parent.name == Scenario.QUICK:
            running.rename(running.with_suffix(".done"))
