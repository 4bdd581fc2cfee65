"""The metrics server of a worker whose event loop is late."""

from __future__ import annotations

import asyncio
import time
from http.client import HTTPConnection

import pytest
from diracx.tasks.operations import metrics_server
from diracx.tasks.testing.server import free_port
from prometheus_client import Metric
from support.waiting import until


@pytest.mark.parametrize("blocked_seconds", [0, 1], ids=["slow metrics", "blocked event loop"])
async def test_scrapes_that_get_no_response_in_time_leave_no_work_behind(
    monkeypatch: pytest.MonkeyPatch, blocked_seconds: int
) -> None:
    monkeypatch.setattr(metrics_server, "RESPONSE_SECONDS", 0.2)
    port, collecting = free_port(), 0

    async def collect() -> list[Metric]:
        nonlocal collecting
        collecting += 1
        try:
            await asyncio.Event().wait()
        finally:
            collecting -= 1
        return []

    def scrape(path: str) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    async with metrics_server.serve_metrics("127.0.0.1", port, lambda: True, collect):
        scrapes = [asyncio.create_task(asyncio.to_thread(scrape, "/metrics")) for _ in range(3)]
        await asyncio.sleep(0)  # the scrapes begin
        time.sleep(blocked_seconds)
        assert await asyncio.gather(*scrapes) == [(503, b"the event loop does not respond\n")] * 3
        await until(lambda: not collecting, "no scrape without a client is computed")
        assert await asyncio.to_thread(scrape, "/healthz") == (200, b"ok\n")
