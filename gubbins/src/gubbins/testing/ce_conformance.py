"""The promises of a CE back end, as tests that any back end can run against its own site.

Derive from the class that fits, with a name that begins with `Test`, and give it a fixture `make`:

    class TestSpool(CESiteConformance):
        @pytest.fixture
        def make(self, tmp_path: Path) -> MakeBackend:
            scripts = pilot_scripts()
            return lambda scenario: SpoolBackend(
                CEDescription("spool", 100, 1.0),
                SpoolSettings(directory=tmp_path, script=scripts[scenario]),
            )

`CEConformance` is for every back end, `CESiteConformance` for those that run real pilots,
`CERemoteConformance` for those that speak to a site that may be down or hang. All need pytest and
pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gubbins.ces.protocol import CEBackend, Observation, Observed, PilotAtCE
from gubbins.domain.exceptions import OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus


class Scenario(StrEnum):
    """The way all pilots of a back end end."""

    QUICK = "QUICK"  # ends well, soon
    FAILING = "FAILING"  # ends badly, soon; says why
    LONG = "LONG"  # runs until it is cancelled, ten minutes at least


MakeBackend = Callable[[Scenario], CEBackend[Any]]
"""A new instance at each call, as after a restart of the worker, all for the same site."""

_ENDS = (Observed.DONE, Observed.FAILED)


def pilot_scripts(witness: Path | None = None) -> dict[Scenario, str]:
    """A pilot script (for /bin/sh) of each scenario, for sites that have shells.

    Args:
        witness: a directory that pilots can write to; each notes its start there, in a file named by its stamp.
    """
    note = f"echo started >> '{witness}'/\"$PILOT_STAMP\"\n" if witness is not None else ""
    speak = 'echo "out of $PILOT_STAMP"\n'
    return {
        Scenario.QUICK: f'{note}{speak}echo "err of $PILOT_STAMP" >&2\n',
        Scenario.FAILING: f"{note}{speak}echo no luck today >&2\nexit 3\n",
        Scenario.LONG: f"{note}{speak}sleep 600\n",
    }


class CEConformance:
    """Promises of every back end."""

    deadline_seconds: ClassVar[float] = 60
    """Longest duration of anything that a site does by itself (s)."""

    pause_seconds: ClassVar[float] = 0.1
    """Between two polls."""

    many: ClassVar[int] = 50
    """The number of pilots that are submitted, polled and cancelled in one go."""

    @pytest.fixture
    def make(self) -> MakeBackend:
        """Override: makes back ends for the site."""
        raise NotImplementedError("give your conformance class a fixture `make`")

    async def test_every_stamp_gets_an_outcome_with_a_reference_of_its_own(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.QUICK, 3) as watch:
            await watch.submit()

    async def test_a_pilot_that_succeeds_is_done_in_the_end(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.QUICK) as watch:
            await watch.submit()
            await watch.until(Observed.DONE)
            # Its end stays known for a while: the check that hears of it first may be lost.
            assert [seen.state for seen in (await watch.poll()).values()] == [Observed.DONE]

    async def test_a_pilot_that_fails_says_why_in_one_line(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.FAILING) as watch:
            await watch.submit()
            await watch.until(Observed.FAILED)
            watch.assert_reasons()

    async def test_a_pilot_runs_for_as_long_as_it_takes(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            await watch.until(Observed.RUNNING)
            assert [seen.state for seen in (await watch.poll()).values()] == [Observed.RUNNING]

    async def test_a_repeated_submission_returns_the_same_reference(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG, 2) as watch:
            first = await watch.submit()
            assert await watch.submit() == first
            await watch.until(Observed.RUNNING)
            assert await watch.submit() == first

    async def test_concurrent_submissions_of_one_stamp_return_the_same_reference(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG, 2) as watch:
            references = await asyncio.gather(*(watch.submit() for _ in range(4)))
            assert all(each == references[0] for each in references), references

    async def test_a_pilot_whose_reference_was_lost_is_found_by_its_stamp(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG, 2) as watch:
            references = await watch.submit()
            watch.lose_references()
            seen = await watch.until(Observed.RUNNING)
            assert {stamp: each.reference for stamp, each in seen.items()} == references

    async def test_a_cancelled_pilot_ends_and_says_why(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            await watch.until(Observed.RUNNING)
            await watch.cancel()
            await watch.until(Observed.FAILED)
            watch.assert_reasons()

    async def test_a_pilot_whose_reference_was_lost_can_be_cancelled(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            watch.lose_references()
            await watch.cancel()
            await watch.until(Observed.FAILED)
            watch.assert_reasons()

    async def test_cancelling_again_and_cancelling_what_has_ended_is_harmless(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            await watch.cancel()
            await watch.cancel()
            await watch.until(Observed.FAILED)
            before = watch.seen
            await watch.cancel()
            assert await watch.poll() == before
        assert not any(backend.warning for backend in watch._used)
        async with _Watch(self, make, Scenario.QUICK) as watch:
            await watch.submit()
            await watch.until(Observed.DONE)
            await watch.backend().cancel(watch.pilots)
            assert [seen.state for seen in (await watch.poll()).values()] == [Observed.DONE]

    async def test_cancelling_what_the_site_has_never_had_is_harmless(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            await watch.backend().cancel([_new_pilot()._replace(cancel_requested=True)])
            await watch.until(Observed.RUNNING)

    async def test_many_pilots_go_in_one_call_each(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG, self.many) as watch:
            references = await watch.submit()
            assert len(references) == self.many
            assert len(await watch.poll()) == self.many
            await watch.cancel()
            await watch.until(Observed.FAILED)
            watch.assert_reasons()

    async def test_no_pilots_are_no_work_and_no_error(self, make: MakeBackend) -> None:
        async with _closing(make(Scenario.QUICK)) as backend:
            assert dict(await backend.submit([])) == {}
            assert dict(await backend.poll([])) == {}
            await backend.cancel([])
            await backend.cleanup([])

    async def test_pilots_can_be_forgotten_twice_and_unknown_ones_too(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.QUICK) as watch:
            await watch.submit()
            await watch.until(Observed.DONE)
            ended = [
                watch.pilots[0]._replace(status=MyPilotStatus.DONE),
                _new_pilot()._replace(status=MyPilotStatus.FAILED),
            ]
            await watch.backend().cleanup(ended)
            await watch.backend().cleanup(ended)


class CESiteConformance(CEConformance):
    """Promises of a back end that runs real pilots.

    The pilots of `make` write `out of <stamp>` to stdout, those that succeed also `err of <stamp>` to stderr,
    and those that fail there `no luck today`, as `pilot_scripts` does.
    """

    fetches_output: ClassVar[bool] = True
    """True if stdout and stderr can be had; if not, `output` is to raise `OutputUnavailableError`."""

    def starts(self, stamp: str) -> int | None:
        """Override: how often that pilot was started, as it has noted itself; None: that cannot be known."""
        return None

    @pytest.fixture
    def half_down(self) -> AbstractContextManager[object] | None:
        """Override: inside this context a side source of the site fails (accounts, a log, a directory).

        None: it has none.
        """
        return None

    async def test_a_side_source_that_fails_silences_no_pilot_that_the_main_one_knows(
        self, make: MakeBackend, half_down: AbstractContextManager[object] | None
    ) -> None:
        if half_down is None:
            return
        async with _Watch(self, make, Scenario.LONG) as running, _Watch(self, make, Scenario.QUICK) as ended:
            await running.submit()
            await ended.submit()
            await running.until(Observed.RUNNING)
            await ended.until(Observed.DONE)
            with half_down:
                backend = running.backend()
                seen = await backend.poll([*running.pilots, *ended.pilots])
                await running.cancel()
            assert seen[running.pilots[0].stamp].state is Observed.RUNNING
            # Unknown it is not: that would be the beginning of its loss.
            assert seen[ended.pilots[0].stamp].state in (Observed.DONE, Observed.NO_NEWS)
            assert backend.warning
            await running.until(Observed.FAILED)

    @pytest.fixture
    def unreadable(self) -> Callable[[str], AbstractContextManager[object]] | None:
        """Override: makes a context in which what the site keeps of the pilot of that stamp cannot be read.

        None: it keeps nothing that could be.
        """
        return None

    async def test_a_pilot_whose_files_cannot_be_read_silences_no_other_and_is_not_lost(
        self, make: MakeBackend, unreadable: Callable[[str], AbstractContextManager[object]] | None
    ) -> None:
        if unreadable is None:
            return
        async with _Watch(self, make, Scenario.LONG, 2) as watch:
            await watch.submit()
            await watch.until(Observed.RUNNING)
            ill, well = watch.pilots
            deadline = time.monotonic() + self.deadline_seconds
            while not (await watch.backend().output(ill)).stdout:
                assert time.monotonic() < deadline, "it has not begun"
                await asyncio.sleep(self.pause_seconds)
            with unreadable(ill.stamp):
                for _ in range(2):  # as asked for the first time, and again
                    backend = watch.backend()
                    seen = await backend.poll(watch.pilots)
                    assert seen[ill.stamp].state in (Observed.RUNNING, Observed.NO_NEWS)
                    assert seen[well.stamp].state is Observed.RUNNING
                assert backend.warning or seen[ill.stamp].state is Observed.RUNNING
                with pytest.raises(Exception, match=r"\S") as raised:
                    await watch.backend().output(ill)
                assert not isinstance(raised.value, OutputUnavailableError), "that is permanent"
                await watch.backend().cancel([ill, well])
                await watch.until(Observed.FAILED, of=[well])
            watch.pilots = [ill]
            await watch.cancel()
            await watch.until(Observed.FAILED)

    @pytest.fixture
    def holding(self) -> AbstractContextManager[object] | None:
        """Override: inside this context the site takes pilots, starts none, and can say why.

        None: it starts what it takes, or says nothing.
        """
        return None

    async def test_a_site_that_holds_a_pilot_says_why(
        self, make: MakeBackend, holding: AbstractContextManager[object] | None
    ) -> None:
        if holding is None:
            return
        async with _Watch(self, make, Scenario.LONG) as watch:
            with holding:
                await watch.submit()
                deadline = time.monotonic() + self.deadline_seconds
                while not all(seen.reason for seen in (await watch.poll()).values()):
                    assert time.monotonic() < deadline, f"no reason: {_few(watch.seen.values())}"
                    await asyncio.sleep(self.pause_seconds)
                assert [seen.state for seen in watch.seen.values()] == [Observed.WAITING]
                watch.assert_reasons()
            await watch.until(Observed.RUNNING)

    @pytest.fixture
    def full(self) -> AbstractContextManager[object] | None:
        """Override: inside this context the site takes no second pilot of ours; None: it cannot be made to."""
        return None

    async def test_a_site_that_takes_no_more_of_our_pilots_shows_its_quota_and_has_not_failed(
        self, make: MakeBackend, full: AbstractContextManager[object] | None
    ) -> None:
        if full is None:
            return
        async with _Watch(self, make, Scenario.LONG) as watch, _Watch(self, make, Scenario.LONG) as refused:
            await watch.submit()
            await watch.until(Observed.RUNNING)
            with full:
                outcomes = await refused.backend().submit(refused.pilots)
            (outcome,) = outcomes.values()
            assert outcome.quota, outcome
            assert outcome.error
            assert outcome.reference is None
            assert await refused.poll() == {}
            await refused.submit()

    async def test_a_stamp_that_the_site_has_never_had_is_missing_from_the_answer(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            seen = await watch.backend().poll([*watch.pilots, _new_pilot()])
            assert set(seen) == {watch.pilots[0].stamp}

    async def test_no_repetition_of_a_submission_starts_a_second_pilot(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.QUICK, 2) as watch:
            await asyncio.gather(*(watch.submit() for _ in range(4)))
            await watch.until(Observed.DONE)
            await watch.submit()
            await watch.until(Observed.DONE)
            assert [self.starts(pilot.stamp) for pilot in watch.pilots] in ([1, 1], [None, None])

    async def test_output_of_a_pilot_that_has_ended_can_be_fetched(self, make: MakeBackend) -> None:
        async with _Watch(self, make, Scenario.QUICK) as watch:
            await watch.submit()
            await watch.until(Observed.DONE)
            pilot = watch.pilots[0]
            if not self.fetches_output:
                with pytest.raises(OutputUnavailableError):
                    await watch.backend().output(pilot)
                return
            output = await watch.backend().output(pilot)
            assert output.stdout == f"out of {pilot.stamp}\n"
            assert f"err of {pilot.stamp}\n" in output.stderr

    async def test_there_is_no_output_of_a_pilot_that_the_site_has_never_had(self, make: MakeBackend) -> None:
        async with _closing(make(Scenario.QUICK)) as backend:
            with pytest.raises(OutputUnavailableError):
                await backend.output(_new_pilot())


class CERemoteConformance(CESiteConformance):
    """Promises of a back end whose site may be down, or accept a call and never respond.

    Its time-outs are to be set to few seconds in the settings that `make` uses.
    """

    call_seconds: ClassVar[float] = 20
    """Longest time that any call may take."""

    @pytest.fixture
    def down(self) -> AbstractContextManager[object]:
        """Override: inside this context the site is not there."""
        raise NotImplementedError("give your conformance class a fixture `down`")

    @pytest.fixture
    def hanging(self) -> AbstractContextManager[object]:
        """Override: inside this context the site accepts calls and does not answer."""
        raise NotImplementedError("give your conformance class a fixture `hanging`")

    async def test_a_site_that_is_down_says_nothing_about_any_pilot(
        self, make: MakeBackend, down: AbstractContextManager[object]
    ) -> None:
        await self._silent(make, down)

    async def test_a_site_that_hangs_blocks_no_call_for_ever(
        self, make: MakeBackend, hanging: AbstractContextManager[object]
    ) -> None:
        await self._silent(make, hanging)

    async def _silent(self, make: MakeBackend, outage: AbstractContextManager[object]) -> None:
        async with _Watch(self, make, Scenario.LONG) as watch:
            await watch.submit()
            known = watch.pilots[0]
            new = _new_pilot()
            with outage:
                # Not the cancellation of the known one: such a call may arrive when the outage is over.
                calls: list[Callable[[CEBackend[Any]], Awaitable[object]]] = [
                    lambda backend: backend.submit([new]),
                    lambda backend: backend.poll([known]),
                    lambda backend: backend.cancel([new]),
                ]
                for call in calls:
                    begin = time.monotonic()
                    with pytest.raises(Exception, match=r"\S"):  # any, with a message
                        async with (
                            _closing(make(Scenario.LONG)) as backend,
                            asyncio.timeout(self.deadline_seconds),
                        ):
                            await call(backend)
                    assert time.monotonic() - begin < self.call_seconds
            # It was an interruption. The new one may have come through, or not.
            watch.pilots.append(new)
            await watch.until(Observed.RUNNING, of=[known])


class _Watch:
    """Pilots of one test: followed as the checks would, with a new back end for each call, and ended with it."""

    def __init__(self, suite: CEConformance, make: MakeBackend, scenario: Scenario, number: int = 1) -> None:
        self._suite = suite
        self._make = make
        self._fate = scenario
        self._used: list[CEBackend[Any]] = []
        self.pilots = [_new_pilot() for _ in range(number)]
        self.seen: dict[str, Observation] = {}

    async def __aenter__(self) -> _Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self.cancel()
        finally:
            for backend in self._used:
                await backend.close()

    def backend(self) -> CEBackend[Any]:
        """A new one; closed with the test."""
        backend = self._make(self._fate)
        self._used.append(backend)
        return backend

    async def submit(self) -> dict[str, str]:
        """Submit all in one call; the references by stamp."""
        outcomes = await self.backend().submit(self.pilots)
        assert set(outcomes) == {pilot.stamp for pilot in self.pilots}
        references = {}
        for stamp, outcome in outcomes.items():
            assert outcome.error is None, outcome.error
            assert outcome.reference
            references[stamp] = outcome.reference
        assert len(set(references.values())) == len(references)
        self.pilots = [pilot._replace(reference=references[pilot.stamp]) for pilot in self.pilots]
        return references

    def lose_references(self) -> None:
        """Lose the references, as a crash between the response and its record does."""
        self.pilots = [pilot._replace(reference=None) for pilot in self.pilots]

    async def poll(self) -> dict[str, Observation]:
        """Ask about all in one call, and take note as a check does: at most one step for each pilot."""
        self.seen = dict(await self.backend().poll(self.pilots))
        running = {stamp for stamp, seen in self.seen.items() if seen.state in (Observed.RUNNING, *_ENDS)}
        now = datetime.now(tz=UTC)
        self.pilots = [
            pilot._replace(status=MyPilotStatus.RUNNING, started_at=now)
            if pilot.stamp in running and pilot.status is MyPilotStatus.SUBMITTED
            else pilot
            for pilot in self.pilots
        ]
        return self.seen

    async def until(self, wanted: Observed, *, of: Sequence[PilotAtCE] = ()) -> dict[str, Observation]:
        """Poll until all are there; an end that is not wanted fails the test.

        What is to be cancelled is asked to end before each poll, for a first request may come too early.
        """
        stamps = {pilot.stamp for pilot in of or self.pilots}
        deadline = time.monotonic() + self._suite.deadline_seconds
        while True:
            seen = {stamp: each for stamp, each in (await self.poll()).items() if stamp in stamps}
            if set(seen) == stamps and all(each.state is wanted for each in seen.values()):
                return seen
            wrong = [each for each in seen.values() if each.state in _ENDS and each.state is not wanted]
            assert not wrong, f"{wrong[0]} instead of {wanted}"
            assert time.monotonic() < deadline, f"still not {wanted}: {_few(seen.values())}"
            await asyncio.sleep(self._suite.pause_seconds)
            if any(pilot.cancel_requested for pilot in self.pilots):
                await self.cancel()

    async def cancel(self) -> None:
        """Ask for the end of all in one call."""
        self.pilots = [pilot._replace(cancel_requested=True) for pilot in self.pilots]
        await self.backend().cancel(self.pilots)

    def assert_reasons(self) -> None:
        """Each has one line for people."""
        for seen in self.seen.values():
            assert seen.reason
            assert seen.reason.strip() == seen.reason
            assert "\n" not in seen.reason
            assert len(seen.reason) <= 500


class _closing:
    def __init__(self, backend: CEBackend[Any]) -> None:
        self._backend = backend

    async def __aenter__(self) -> CEBackend[Any]:
        return self._backend

    async def __aexit__(self, *_: object) -> None:
        await self._backend.close()


def _new_pilot() -> PilotAtCE:
    return PilotAtCE(stamp=uuid.uuid4().hex, vo="vo", submitted_at=datetime.now(tz=UTC))


def _few(seen: Iterable[Observation]) -> str:
    return ", ".join(str(each) for each in list(seen)[:3]) or "unknown"
