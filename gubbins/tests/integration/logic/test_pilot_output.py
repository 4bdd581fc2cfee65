"""Collection, storage and expiry of the output of pilots."""

from __future__ import annotations

import asyncio
import threading
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from diracx.db.sql import PilotAgentsDB
from diracx.db.sql.pilots.schema import PilotAgents
from diracx.db.sql.pilots.schema import PilotOutput as RegistryOutput
from sqlalchemy import select, update

from gubbins.ces import Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.protocol import PilotOutput
from gubbins.db.sql import MyPilotDB, MyPilotStatus
from gubbins.db.sql.schema import PilotOutputs
from gubbins.domain import clock
from gubbins.domain.circuit_breaker import CECall
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.logic import my_pilots as logic
from gubbins.tasks.my_pilots import MyCheckPilotsTask, MyCollectOutputsTask

S = MyPilotStatus


@pytest.fixture
def writing(scripted: Any, install_backend: Any) -> Any:
    """A site whose pilots write."""

    class WritingBackend(scripted):  # type: ignore[misc]  # a class that a fixture made
        outputs: ClassVar[dict[str, Any]] = {}

        async def output(self, pilot: PilotAtCE) -> PilotOutput:
            response = await self._play(
                "output", self.outputs.get(self.ce.name, PilotOutput("hello ü🚀\0\n", "ach"))
            )
            return response  # type: ignore[no-any-return]  # or what a test says in its place

    install_backend("writing", WritingBackend)
    return WritingBackend


async def ended(
    db: MyPilotDB, writing: Any, ends: Sequence[Observed] = (Observed.DONE,), ce: str = "ce", **rules: Any
) -> list[int]:
    """Pilots that a check has found at their ends, with their output still at the site."""
    await db.add_ce(ce, 99, 1.0, backend="writing", rules=rules)
    pilots = []
    for end in ends:
        writing.submissions[ce] = SubmitOutcome(reference="job")
        pilots.append(await logic.submit_pilot(db, ce, "lhcb"))
        writing.observations[ce] = Observation(end)
        for _ in range(2):
            await logic.transition_pilot_states(db, "lhcb")
    return pilots


async def test_output_is_stored_before_the_site_cleans_up(db: MyPilotDB, writing: Any) -> None:
    [pilot] = await ended(db, writing)
    assert writing.forgotten == {}
    assert await logic.collect_outputs(db, "dteam") == 0
    assert await logic.collect_outputs(db, "lhcb") == 1
    assert list(writing.forgotten.values()) == [S.DONE]
    writing.outputs["ce"] = ConnectionError("purged")
    kept = await logic.get_pilot_output(db, pilot)
    assert (kept["stdout"], kept["stderr"]) == ("hello ü🚀\0\n", "ach")
    assert kept["expires_at"] - kept["fetched_at"] == pytest.approx(timedelta(days=7), abs=timedelta(minutes=1))
    assert await logic.collect_outputs(db, "lhcb") == 0


async def test_output_that_cannot_be_fetched_is_retried_and_then_abandoned(db: MyPilotDB, writing: Any) -> None:
    [pilot] = await ended(db, writing)
    writing.outputs["ce"] = ConnectionError("gone fishing")
    assert await logic.collect_outputs(db, "lhcb") == 0
    with pytest.raises(CEUnavailableError, match="gone fishing"):
        await logic.get_pilot_output(db, pilot)
    assert writing.forgotten == {}
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(hours=2)):
        assert await logic.collect_outputs(db, "lhcb") == 1
    with pytest.raises(OutputUnavailableError, match="gone fishing"):
        await logic.get_pilot_output(db, pilot)
    assert len(writing.forgotten) == 1


@pytest.mark.parametrize("invalid", [None, "hello", PilotOutput("hello", None)])  # type: ignore[arg-type]
async def test_invalid_output_is_abandoned_like_unavailable_output_and_delays_no_other(
    sqlite_db: MyPilotDB, writing: Any, invalid: Any
) -> None:
    [pilot], _ = await ended(sqlite_db, writing), await ended(sqlite_db, writing, ce="well")
    writing.outputs["ce"] = invalid
    assert await logic.collect_outputs(sqlite_db, "lhcb") == 1
    with pytest.raises(CEUnavailableError, match="invalid response"):
        await logic.get_pilot_output(sqlite_db, pilot)
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(hours=2)):
        assert await logic.collect_outputs(sqlite_db, "lhcb") == 1
    with pytest.raises(OutputUnavailableError, match="invalid response"):
        await logic.get_pilot_output(sqlite_db, pilot)


async def test_output_that_a_site_does_not_have_is_requested_once_and_any_reason_is_readable(
    db: MyPilotDB, writing: Any
) -> None:
    [pilot] = await ended(db, writing)
    writing.outputs["ce"] = OutputUnavailableError("x", "pur\0ged\ud800 " + "x" * 5000)
    assert await logic.collect_outputs(db, "lhcb") == 1
    assert await logic.collect_outputs(db, "lhcb") == 0
    with pytest.raises(OutputUnavailableError, match="pur ged x"):
        await logic.get_pilot_output(db, pilot)


@pytest.mark.parametrize(("keep", "kept"), [("all", 2), ("failed", 1), ("none", 0)])
async def test_the_rule_keep_output_selects_pilots_by_final_state(
    db: MyPilotDB, writing: Any, keep: str, kept: int
) -> None:
    await ended(db, writing, (Observed.DONE, Observed.FAILED), keep_output=keep)
    assert len(writing.forgotten) == 2 - kept
    assert await logic.collect_outputs(db, "lhcb") == kept
    assert len(writing.forgotten) == 2


async def test_output_is_not_fetched_from_a_banned_ce(db: MyPilotDB, writing: Any) -> None:
    [pilot] = await ended(db, writing)
    await db.ban_ce("ce", reason=None)
    assert await logic.collect_outputs(db, "lhcb") == 0
    with pytest.raises(CEUnavailableError, match="banned"):
        await logic.get_pilot_output(db, pilot)
    await db.set_ce_enabled("ce", False)
    assert await logic.collect_outputs(db, "lhcb") == 1


async def test_expired_output_is_deleted(db: MyPilotDB, writing: Any) -> None:
    [pilot] = await ended(db, writing, keep_output_seconds=60)
    await logic.collect_outputs(db, "lhcb")
    assert await db.prune_outputs() == 0
    with clock.simulated(lambda: datetime.now(UTC) + timedelta(seconds=61)):
        await logic.collect_outputs(db, "lhcb")
    assert await db.get_output(pilot) is None


async def test_pilots_waiting_at_a_banned_ce_do_not_count(db: MyPilotDB, writing: Any) -> None:
    old = await ended(db, writing, [Observed.DONE] * 3, ce="banned")
    await ended(db, writing, [Observed.DONE] * 3, ce="well")
    await db.ban_ce("banned", reason=None)
    assert await logic.collect_outputs(db, "lhcb", per_ce=2) == 2
    assert await logic.collect_outputs(db, "lhcb", per_ce=2) == 1
    await db.set_ce_enabled("banned", True)
    assert await logic.collect_outputs(db, "lhcb", per_ce=2) == 2
    assert [await db.get_output(pilot) is None for pilot in old] == [False, False, True], "the oldest first"


async def test_a_site_that_times_out_gets_no_further_calls_in_that_round(
    sqlite_db: MyPilotDB, writing: Any
) -> None:
    db = sqlite_db
    await ended(db, writing, [Observed.DONE] * 20, ce="slow", timeout_seconds=0.05)
    await ended(db, writing, ce="well")
    writing.outputs["slow"] = asyncio.Event()
    writing.calls.clear()
    assert await logic.collect_outputs(db, "lhcb") == 1
    assert writing.calls.count(("slow", "output")) == 8, "those that were under way"
    slow = (await db.get_ce("slow"))["circuits"][CECall.STATUS]
    assert (slow["failures"], slow["last_error"]) == (1, "no response within 0.05 s")
    for _ in range(5):
        await logic.collect_outputs(db, "lhcb")
    assert writing.calls.count(("slow", "output")) == 3 * 8, "then its circuit is open"


async def test_a_slow_site_is_called_again_in_the_next_round(
    sqlite_db: MyPilotDB, writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = sqlite_db
    await ended(db, writing)
    with monkeypatch.context() as over:
        over.setattr("gubbins.logic.my_pilots.outputs.COLLECTING_SECONDS", 0)
        assert await logic.collect_outputs(db, "lhcb") == 0
    assert (await db.get_ce("ce"))["circuits"][CECall.STATUS]["failures"] == 0
    assert await logic.collect_outputs(db, "lhcb") == 1


async def test_a_check_waits_neither_for_output_nor_for_cleanup(
    sqlite_db: MyPilotDB, writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = sqlite_db
    cancelled = []

    async def cleanup(self: Any, pilots: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(self.ce.name)

    monkeypatch.setattr(writing, "cleanup", cleanup)
    writing.outputs["kept"] = asyncio.Event()
    for ce, keep in (("kept", "all"), ("cleaned", "none")):
        await db.add_ce(ce, 1, 1.0, backend="writing", rules={"keep_output": keep})
        writing.submissions[ce] = SubmitOutcome(reference="job")
        writing.observations[ce] = Observation(Observed.DONE)
        await logic.submit_pilot(db, ce, "lhcb")
    async with asyncio.timeout(30):  # each call may take 60
        for state in (MyPilotStatus.RUNNING, MyPilotStatus.DONE):
            assert await logic.transition_pilot_states(db, "lhcb", prompt_seconds=0.01) == {state: 2}
    assert cancelled == ["cleaned"]


async def test_output_is_compressed_in_a_thread_before_the_transaction(
    sqlite_db: MyPilotDB, writing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress, seen = zlib.compress, []

    def watched(data: bytes) -> bytes:
        seen.append((threading.current_thread() is threading.main_thread(), sqlite_db.in_transaction))
        return compress(data)

    await ended(sqlite_db, writing)
    monkeypatch.setattr("gubbins.db.sql.outputs.zlib.compress", watched)
    assert await logic.collect_outputs(sqlite_db, "lhcb") == 1
    assert seen == [(False, False)] * 2


async def test_the_collecting_task_fetches_output_and_cleans_up(db: MyPilotDB, tmp_path: Path) -> None:
    settings = {"directory": str(tmp_path / "ce"), "default_script": "echo out; echo err >&2", "keep": "none"}
    await db.add_ce("ce", 1, 1.0, backend="local", settings=settings)
    pilot = await logic.submit_pilot(db, "ce", "lhcb")
    stamp = (await db.get_pilot(pilot))["stamp"]
    for _ in range(1000):
        await MyCheckPilotsTask("lhcb").execute(my_pilot_db=db)
        await MyCollectOutputsTask("lhcb").execute(my_pilot_db=db)
        if await db.get_output(pilot) is not None:
            break
    output = await logic.get_pilot_output(db, pilot)
    assert (output["stdout"], output["stderr"]) == ("out\n", "err\n")
    assert not (tmp_path / "ce" / stamp).exists()


async def test_the_pilot_registry_gets_the_end_of_the_output_in_ascii_if_a_rule_says_so(
    db: MyPilotDB, registry: PilotAgentsDB, writing: Any
) -> None:
    writing.outputs["shown"] = PilotOutput("\0hello", "first" + "🚀" * 40_000)
    [shown] = await ended(db, writing, ce="shown", registry_output=True)
    await ended(db, writing, ce="kept")
    collect, check = MyCollectOutputsTask("lhcb"), MyCheckPilotsTask("lhcb")
    # It is not registered yet, and so it stays owed.
    assert await collect.execute(my_pilot_db=db, pilot_registry=registry) == 2
    assert await written(registry) == {}
    await check.execute(my_pilot_db=db, pilot_registry=registry)
    for _ in range(2):
        await collect.execute(my_pilot_db=db, pilot_registry=registry)
        stamp = (await db.get_pilot(shown))["stamp"]
        escaped = r"\U0001f680" * 40_000
        assert await written(registry) == {stamp: (r"\x00hello", escaped[-65_535:])}
        # As when a worker dies before it has noted that it was written.
        async with db:
            await db.conn.execute(update(PilotOutputs).where(PilotOutputs.pilot_id == shown).values(owed=True))


async def written(registry: PilotAgentsDB) -> dict[str, tuple[str, str]]:
    """Outputs in the registry, by stamp."""
    columns = (PilotAgents.pilot_stamp, RegistryOutput.std_output, RegistryOutput.std_error)
    joined = select(*columns).join(RegistryOutput, RegistryOutput.pilot_id == PilotAgents.pilot_id)
    async with registry.engine.begin() as connection:
        return {stamp: (out, err) for stamp, out, err in await connection.execute(joined)}
