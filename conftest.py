"""Fixtures of both distributions: a real server for every test that asks, and a look at what it leaves behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, get_args

import fastapi._compat.v2
import fastapi.dependencies.utils
import pytest
import pytest_asyncio
import redis.utils
import uvloop
from diracx.tasks.plumbing.base_task import BINDING
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.testing import embedded_redis
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from support.machine import NotForThisMachine
from support.order_of_files import place
from support.paths import NO_AUTHORITY


def _cached_by_types(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call this once for each annotated type. Annotations are equal if they are printed alike."""
    made: dict[Any, Any] = {}

    def cached(annotated: Any, config: Any) -> Any:
        of, *details = get_args(annotated)
        key = of, *map(repr, details), repr(config)
        if key not in made:
            # The annotations are kept: none that is made later can have the address that one is printed with.
            made[key] = annotated, make(annotated, config=config)
        return made[key][1]

    return cached


# Less often than is usual, while tests are imported and while they run: a full collection takes 0.1 s and more.
gc.set_threshold(10_000, 20, 50)
# Each client of HTTP reads the certificates of all public authorities, for 40 ms. No test needs one of them.
os.environ["SSL_CERT_FILE"] = str(NO_AUTHORITY)
# Each client of Redis reads the metadata of its package, for 1 ms, to tell the server its version.
redis.utils.get_lib_version = functools.cache(redis.utils.get_lib_version)
# FastAPI inspects the same functions for each application, and for each request that depends on DiracX's settings.
fastapi.dependencies.utils.get_typed_signature = functools.cache(fastapi.dependencies.utils.get_typed_signature)
# It also makes the same validators for each application, which takes half of the time of making it.
fastapi._compat.v2.TypeAdapter = _cached_by_types(fastapi._compat.v2.TypeAdapter)

EVENT_LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a test under the event loops of its mark `event_loops`, the closest one; without a mark, asyncio's."""
    mark = item.get_closest_marker("event_loops")
    names = mark.args if mark is not None else ("asyncio",)
    return {name: EVENT_LOOPS[name] for name in names}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(item.nodeid))


def pytest_collection_finish() -> None:
    """Exempt what was imported and collected from garbage collection, which takes half a second to look at it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    excused = call.excinfo is not None and call.excinfo.errisinstance(NotForThisMachine)
    return report if excused else _without_skips(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _without_skips((yield))


def _without_skips(report: _Report) -> _Report:
    """With NO_SKIPS in the environment, what is skipped has failed: there, everything has to be installed."""
    if os.environ.get("NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason} (and NO_SKIPS is set)"
    return report


@pytest.fixture(autouse=True)
def _nothing_stays_bound() -> Iterator[None]:
    """A fixture that fails to end must not leave its broker to the tests that come after."""
    token = BINDING.set(None)
    yield
    BINDING.reset(token)


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    """One server for each process that runs tests."""
    with embedded_redis() as url:
        yield url


@pytest.fixture
def redis_url(_redis_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty server. A test that leaves a key for ever fails (mark it `leaves_keys("pattern")` if it must)."""
    with SyncRedis.from_url(_redis_server) as client:
        client.flushall()
        yield _redis_server
        allowed = [pattern for mark in request.node.iter_markers("leaves_keys") for pattern in mark.args]
        leaked = set(leaked_keys(client))
        for pattern in allowed:
            leaked -= {key.decode() for key in client.keys(pattern)}
        assert not leaked, f"keys left behind without a time to live: {sorted(leaked)}"


def leaked_keys(client: SyncRedis) -> Iterator[str]:
    """Keys that would stay for ever, but for empty streams, which are part of the furniture."""
    for key in client.keys("*"):
        name = key.decode()
        if name in keys.EVERY_STREAM and not _consumers(client, name) and not _queued(client, name):
            continue
        # What the scheduler knows of its schedules is there to outlive every process.
        if name in (keys.NEXT_RUNS, keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.PAUSED, keys.PROBLEMS):
            continue
        if name == keys.SCHEMA:
            continue  # of which version the data are
        if name == keys.DELAYED_REASONS and not client.exists(keys.DELAYED):
            continue  # a test has removed delayed tasks by hand; the count begins anew with the next one
        if client.ttl(name) == -1:
            yield name


#: Installed periodic tasks, of which a real scheduler queues an occurrence whenever the time of one has come.
_BY_THE_CLOCK = re.compile(rb"jobs:CleanSandboxStoreTask|my_pilots:My(?!PilotTask)\w+")


def _queued(client: SyncRedis, stream: str) -> int:
    """Number of queued tasks that do not depend on the time of day."""
    return sum(not _BY_THE_CLOCK.search(entry.get(b"data", b"")) for _, entry in client.xrange(stream))


def _consumers(client: SyncRedis, stream: str) -> list[str]:
    return [
        consumer["name"]
        for group in client.xinfo_groups(stream)
        for consumer in client.xinfo_consumers(stream, group["name"])
    ]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A bare connection to that server."""
    client = Redis.from_url(redis_url)
    yield client
    await client.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    """A Chromium for a file of tests that run in one event loop."""
    from support.dashboard_browser import chromium

    async with chromium() as started:
        yield started


@pytest.fixture
async def no_free_thread() -> AsyncIterator[None]:
    """Calls of tasks occupy all threads of `asyncio.to_thread`."""
    end = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        threads.submit(end.wait, 60)
        yield
        end.set()
