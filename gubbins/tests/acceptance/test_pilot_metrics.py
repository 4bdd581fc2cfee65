"""Metrics of pilots at the `--metrics-port` of a real scheduler."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from diracx.tasks.testing.server import free_port
from support.warm_commands import WarmCommands

from gubbins.db.sql import MyPilotDB

DEADLINE_SECONDS = 60.0


@contextmanager
def _scheduler(commands: WarmCommands, redis_url: str, database_url: str, port: int, log: Path) -> Iterator[None]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIRACX_")}
    environment |= {"DIRACX_TASKS_REDIS_URL": redis_url, "DIRACX_DB_URL_MYPILOTDB": database_url}
    with log.open("wb") as output:
        command = ["diracx-task-run", "scheduler", "--metrics-port", str(port)]
        process = commands.start(command, env=environment, stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)


async def test_the_leading_scheduler_exports_metrics_of_pilots(
    sqlite_db: MyPilotDB, sqlite_url: str, redis_url: str, tmp_path: Path, warm_commands: WarmCommands
) -> None:
    await sqlite_db.add_ce("ce01", 5, 1.0)
    await sqlite_db.submit_pilot("ce01", "lhcb")
    port, log = free_port(), tmp_path / "scheduler.log"
    with _scheduler(warm_commands, redis_url, sqlite_url, port, log):
        async with asyncio.timeout(DEADLINE_SECONDS), httpx.AsyncClient() as client:
            text = ""
            while 'pilots{ce="ce01",state="SUBMITTED",vo="lhcb"} 1.0\n' not in text:
                with suppress(httpx.HTTPError):
                    text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
                await asyncio.sleep(0.1)
    assert "scheduler_leader 1.0\n" in text
    assert 'compute_element_slots_used{ce="ce01"} 1.0\n' in text
    assert 'metrics_source_up{source="pilots"} 1.0\n' in text
