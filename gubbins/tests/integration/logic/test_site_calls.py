"""Limits of synchronous calls to sites, and shared fetches of output."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.waiting import until

from gubbins import dashboard, routers
from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES, PilotOutput
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import CEUnavailableError, SiteBusyError
from gubbins.logic import my_pilots as logic
from gubbins.logic.my_pilots.site_calls import Limit, SiteCalls

MANY = Limit(1_000, 1_000)


@pytest.fixture
async def site(scripted: Any, install_backend: Any, sqlite_db: MyPilotDB) -> AsyncIterator[Any]:
    """A back end whose responses about output come when `gate` is open."""

    class GatedBackend(scripted):  # type: ignore[misc]  # a class that a fixture made
        gate: ClassVar[asyncio.Event] = asyncio.Event()
        response: ClassVar[Any] = PilotOutput("out", "err")

        async def output(self, pilot: PilotAtCE) -> PilotOutput:
            self.calls.append((self.ce.name, "output"))
            await self.gate.wait()
            if isinstance(self.response, Exception):
                raise self.response
            return self.response  # type: ignore[no-any-return]

    install_backend("gated", GatedBackend)
    for name in ("one", "two"):
        await sqlite_db.add_ce(name, 99, 1.0, backend="gated")
        scripted.submissions[name] = SubmitOutcome(reference="job")
        scripted.observations[name] = Observation(Observed.RUNNING)
    yield GatedBackend
    GatedBackend.gate.set()


async def outputs_asked(site: Any, count: int) -> None:
    await until(lambda: site.calls.count(("one", "output")) >= count)


async def test_concurrent_requests_for_one_output_share_one_call_and_its_failure(
    sqlite_db: MyPilotDB, site: Any
) -> None:
    pilot = await logic.submit_pilot(sqlite_db, "one", "lhcb")
    calls = SiteCalls()
    site.response = ConnectionError("gone fishing")
    requested = [
        asyncio.create_task(calls.output(sqlite_db, pilot, user=f"user {number}")) for number in range(20)
    ]
    await outputs_asked(site, 1)
    site.gate.set()
    responses = await asyncio.gather(*requested, return_exceptions=True)
    assert [type(response) for response in responses] == [CEUnavailableError] * 20
    with pytest.raises(CEUnavailableError, match="gone fishing"):  # and those who come a little later
        await calls.output(sqlite_db, pilot, user="late")
    assert site.calls.count(("one", "output")) == 1


@pytest.mark.parametrize(
    ("limits", "whose"),
    [
        ({"user": Limit(1, 100)}, "user"),
        ({"user": Limit(100, 1)}, "user"),
        ({"ce": Limit(1, 100)}, "compute element"),
        ({"ce": Limit(100, 1)}, "compute element"),
        ({"process": Limit(1, 100)}, "process"),
    ],
)
async def test_a_call_beyond_a_limit_is_refused_with_the_time_to_wait(
    sqlite_db: MyPilotDB, site: Any, limits: dict[str, Limit], whose: str
) -> None:
    pilots = [await logic.submit_pilot(sqlite_db, name, "lhcb") for name in ("one", "one", "two")]
    calls = SiteCalls(**{"user": MANY, "ce": MANY, "process": MANY} | limits)  # type: ignore[arg-type]
    first = asyncio.create_task(calls.output(sqlite_db, pilots[0], user="alice"))
    await outputs_asked(site, 1)
    for ask in (
        calls.output(sqlite_db, pilots[1], user="alice"),
        calls.submit(sqlite_db, "one", "lhcb", user="alice"),
    ):
        with pytest.raises(SiteBusyError, match=f"one {whose}") as refusal:
            await ask
        assert refusal.value.retry_after_seconds >= 1
    site.gate.set()
    assert (await first)["stdout"] == "out"
    elsewhere = calls.output(sqlite_db, pilots[2], user="bob")
    assert (await elsewhere)["stdout"] == "out"


async def test_a_cancellation_beyond_a_limit_is_recorded_and_sent_by_the_next_check(
    sqlite_db: MyPilotDB, site: Any
) -> None:
    pilots = [await logic.submit_pilot(sqlite_db, "one", "lhcb") for _ in range(2)]
    calls = SiteCalls(user=Limit(1, 1))
    for pilot in pilots:
        assert (await calls.cancel(sqlite_db, pilot, by="alice", user="alice"))["cancel_requested_at"]
    assert len(site.cancelled) == 1
    await logic.transition_pilot_states(sqlite_db, "lhcb")
    assert len(set(site.cancelled)) == 2


async def test_output_is_truncated_to_the_limit(sqlite_db: MyPilotDB, site: Any) -> None:
    pilot = await logic.submit_pilot(sqlite_db, "one", "lhcb")
    site.gate.set()
    site.response = PilotOutput("x" * (OUTPUT_LIMIT_BYTES + 5) + "end", "")
    shown = await SiteCalls().output(sqlite_db, pilot, user="alice")
    assert len(shown["stdout"]) == OUTPUT_LIMIT_BYTES
    assert shown["stdout"].endswith("end")


async def test_the_number_of_outputs_in_memory_is_limited(sqlite_db: MyPilotDB, site: Any) -> None:
    calls = SiteCalls()
    site.gate.set()
    for number in range(50):
        pilot = await logic.submit_pilot(sqlite_db, "one", "lhcb")
        await calls.output(sqlite_db, pilot, user=f"user {number}")
    assert len(calls._outputs) <= 16


def test_routes_and_pages_call_sites_only_through_the_limits() -> None:
    reaching = re.compile(r"logic\.(submit\w*pilot|cancel_pilot|get_pilot_output|collect_outputs|transition\w+)\b")
    for package in (dashboard, routers):
        for file in Path(package.__file__ or "").parent.glob("*.py"):
            assert not reaching.search(file.read_text()), file
