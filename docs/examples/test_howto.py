"""All code of the how-to pages."""

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path

import accounts
import downloads
import fenced
import groups
import injected
import limits
import my_tasks
import plain_code
import pytest
import retries
import schedules
import yaml
from bare_locks import work_on
from diracx.tasks.plumbing import MutexLock
from diracx.tasks.plumbing.config import checked_tasks_config
from diracx.tasks.plumbing.lock_registry import JOB
from diracx.tasks.plumbing.registry import TaskRegistry, load_task_registry, tasks_of_module
from diracx.tasks.testing import TaskSystem, embedded_redis
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from kinds_of_tasks import Count, Replicate, Resize
from redis.asyncio import Redis
from spool import SpoolBackend, SpoolSettings

from gubbins.ces import CEDescription, Observed, PilotAtCE
from gubbins.logic.my_pilots import parse_ce_file

HERE = Path(__file__).parent


async def test_every_kind_of_task_gets_its_arguments_back() -> None:
    async with TaskSystem([Replicate, Resize, Count]) as system:
        replicate = Replicate(Path("/lhcb/file"), targets=["PIC"], deadline=date(2030, 1, 31))
        result = await system.result(await replicate.schedule())
        assert result.return_value == {"PIC": "/lhcb/file by 2030-01-31"}
        assert (await system.result(await Resize(width=3, height=4).schedule())).return_value == 12
        assert (await system.result(await Count(5, step=2).schedule())).return_value == [0, 2, 4]


async def test_a_pydantic_task_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Resize(width=0, height=1)


# --8<-- [start:overrides]
class FakeCatalogue(injected.Catalogue):
    async def sites(self) -> list[str]:
        return ["GRIDKA"]


async def test_a_dependency_is_replaced() -> None:
    async with TaskSystem([injected.CountSites], overrides={injected.catalogue: FakeCatalogue}) as system:
        result = await system.result(await injected.CountSites().schedule())
        assert result.return_value == 1


# --8<-- [end:overrides]


# --8<-- [start:reconfigure]
async def test_an_operator_ends_the_retries() -> None:
    async with TaskSystem([retries.Fetch]) as system:
        system.reconfigure({"common": {"Fetch": {"max_retries": 0}}})
        result = await system.result(await retries.Fetch("https://example.org").schedule())
        assert result.is_err


# --8<-- [end:reconfigure]


async def test_injected_by_type() -> None:
    async with TaskSystem([injected.CountSites]) as system:
        assert (await system.result(await injected.CountSites().schedule())).return_value == 2


async def test_locks_and_limits() -> None:
    async with TaskSystem([limits.Transfer, limits.Empty], workers=2) as system:
        ids = [
            await limits.Transfer("CERN", "PIC").schedule(),
            await limits.Transfer("PIC", "CERN").schedule(),
            await limits.Empty("CERN").schedule(),
        ]
        results = [await system.result(task_id) for task_id in ids]
        assert not any(result.is_err for result in results)


async def test_a_row_refuses_a_writer_that_has_lost_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with fenced.database() as connection:
        await connection.run_sync(fenced.metadata.create_all)
        await connection.execute(fenced.reports.insert().values(name="weekly"))
    async with TaskSystem([fenced.Publish]) as system:
        for _ in range(2):
            assert (await system.result(await fenced.Publish("weekly").schedule())).return_value is True
    async with fenced.database() as connection:
        assert not await fenced.write(connection, "weekly", "late", token=1)


async def test_a_lock_on_a_bare_connection() -> None:
    with embedded_redis() as url:
        async with Redis.from_url(url) as redis:
            assert await work_on(7, redis)
            another = MutexLock(JOB, 7)
            assert await another.acquire(redis)
            assert not await work_on(7, redis)
            await another.release(redis)


def test_schedules_have_a_future() -> None:
    for task in (schedules.Heartbeat, schedules.NightlyReport, schedules.MonthEnd, schedules.Quota):
        assert task.default_schedule.next_occurrence() > datetime.now(UTC)


async def test_retries() -> None:
    config = {"common": {"Fetch": {"max_retries": 1, "retry_base_delay_seconds": 0}}}
    async with TaskSystem([retries.Ask, retries.Fetch], config=config) as system:
        assert (await system.result(await retries.Ask(200).schedule())).return_value == "fine"
        assert (await system.result(await retries.Ask(404).schedule())).is_err
        fetched = await system.result(await retries.Fetch("https://example.org").schedule())
        assert fetched.error is not None
        async with system.task_db as db:
            [dead_letter] = await db.search()
        assert (dead_letter["reason"], len(dead_letter["attempts"])) == ("exhausted", 2)


async def test_a_group_calls_back() -> None:
    tasks = [groups.Split, groups.Chunk, groups.Assemble, groups.CleanUp]
    async with TaskSystem(tasks) as system:
        await groups.Split(3).schedule()
        await system.drain()
        keys = await system.broker.redis.keys("diracx:results:*")
        values = [(await system.result(key.decode().rpartition(":")[2])).return_value for key in keys]
        assert "survey: chunks [0, 1, 2]" in values


async def test_plain_code() -> None:
    async with TaskSystem({"my_tasks:Hello": my_tasks.Hello}) as system:
        for task_id in await plain_code.main(system.redis_url):
            await asyncio.wait_for(system.result(task_id), 5)


async def test_a_route_submits() -> None:
    from greetings import router

    app = FastAPI()
    app.include_router(router)
    async with TaskSystem([my_tasks.Hello]) as system:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            response = await client.post("/greet/world")
        assert (await system.result(response.json())).return_value == "Hello, world!"


def test_the_configuration_is_valid_and_names_tasks_that_exist() -> None:
    registry = TaskRegistry()
    for module in (accounts, downloads, limits, my_tasks, schedules):
        registry = registry.merged_with(tasks_of_module(module))
    config, warnings = checked_tasks_config(registry, ["lhcb"], path=HERE / "tasks.yaml")
    assert warnings == []
    assert config.get_override("schedules:Quota", "lhcb").periodic.rrule.startswith("FREQ=HOURLY")


def test_the_documented_configuration_of_pilots_is_valid_and_works() -> None:
    config, warnings = checked_tasks_config(load_task_registry(), ["lhcb", "gridpp"], path=HERE / "pilots.yaml")
    assert warnings == []
    lhcb, gridpp = (config.get_override("my_pilots:MySubmitPilotsTask", vo).instances for vo in ("lhcb", "gridpp"))
    assert lhcb["fast-sites"].periodic.schedule == "0 */2 * * *"
    assert lhcb["the-rest"].args == {"all_but": lhcb["fast-sites"].args["compute_elements"]}
    assert [gridpp[name].enabled for name in gridpp] == [True, False]


def test_the_ce_file_is_valid() -> None:
    text = (HERE / "ces.yaml").read_text()
    assert [ce.name for ce in parse_ce_file(text)] == ["ce01.example.org", "ce02.example.org", "this-host"]
    assert yaml.safe_load(text)


async def test_the_spool_back_end(tmp_path: Path) -> None:
    backend = SpoolBackend(CEDescription("spool", 3, 1.0), SpoolSettings(directory=tmp_path))
    pilots = [PilotAtCE("a", "lhcb"), PilotAtCE("b", "lhcb")]
    await backend.submit(pilots)
    assert (await backend.submit(pilots))["a"].reference == "spool://a"
    (tmp_path / "a.todo").rename(tmp_path / "a.done")
    await backend.cancel(pilots)
    seen = await backend.poll([*pilots, PilotAtCE("unknown", "lhcb")])
    assert {stamp: seen[stamp].state for stamp in seen} == {"a": Observed.DONE, "b": Observed.WAITING}
    assert (tmp_path / "b.cancel").exists()
