"""Reset connections, under both event loops and over TCP, TLS and Unix sockets."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from diracx.tasks.plumbing.broker.clients import DirectConnection
from diracx.tasks.plumbing.broker.connection import async_client
from diracx.tasks.testing import TaskSystem
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from support.resetting_proxy import ResettingProxy
from support.standard_tasks import SEEN, Named
from support.waiting import until

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

MAY_END = asyncio.Event()


@pytest.fixture(params=["tcp", "tls", "unix"])
async def proxy_and_url(
    request: pytest.FixtureRequest, redis_url: str, tmp_path: Path
) -> AsyncIterator[tuple[ResettingProxy, str]]:
    proxy = ResettingProxy(urlsplit(redis_url).port or 0)
    if request.param == "unix":
        async with proxy.on_path(tmp_path / "socket"):
            yield proxy, f"unix://{tmp_path}/socket"
    elif request.param == "tls":
        async with proxy.on_port(_server_context(tmp_path)) as port:
            yield proxy, f"rediss://localhost:{port}?ssl_ca_certs={tmp_path}/certificate"
    else:
        async with proxy.on_port() as port:
            yield proxy, f"redis://localhost:{port}"


def _server_context(directory: Path) -> ssl.SSLContext:
    key, certificate = directory / "key", directory / "certificate"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subprocess.run([*request, *subject, *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


async def test_each_kind_of_connection_reports_a_reset_and_reconnects(
    proxy_and_url: tuple[ResettingProxy, str],
) -> None:
    proxy, url = proxy_and_url
    client = async_client(url)
    line, pubsub = DirectConnection(client), client.pubsub()
    await pubsub.subscribe("first")
    ways: list[Callable[[], Awaitable[object]]] = [
        lambda: line.execute(("ECHO", "1")),
        client.ping,
        lambda: client.pipeline().ping().ping().execute(),
        lambda: pubsub.subscribe("other"),
    ]
    for number in range(40):
        proxy.reset()
        # A reset is noticed in steps: a write between any two of them must not fail in another way.
        for _ in range(number % 8):
            await asyncio.sleep(0)
        for way in ways:
            await _until_it_works(way)
    await pubsub.aclose()  # type: ignore[no-untyped-call]
    await line.close()
    await client.aclose()


async def _until_it_works(way: Callable[[], Awaitable[object]]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            await way()
            return
        except (RedisConnectionError, RedisTimeoutError):
            assert time.monotonic() < deadline


class Waits(Named):
    async def execute(self) -> str:
        await super().execute()
        await MAY_END.wait()
        return self.name


async def test_reset_connections_stop_neither_workers_nor_running_tasks(
    proxy_and_url: tuple[ResettingProxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.MAY_END", asyncio.Event())
    proxy, url = proxy_and_url
    async with TaskSystem([Waits], redis_url=url, settings={"lease_seconds": 30.0}) as system:
        ids = [await Waits(name).schedule() for name in "abc"]
        await until(lambda: len(SEEN) >= 3)
        for _ in range(20):  # while they run: leases are renewed, announcements followed
            proxy.reset()
            await asyncio.sleep(0.05)
        MAY_END.set()
        proxy.reset()
        assert [await system.result(task_id, timeout=60) for task_id in ids]
        for _ in range(10):  # while idle
            proxy.reset()
            await asyncio.sleep(0.02)
        await system.drain(60)
    assert sorted(SEEN) == ["a", "b", "c"]
