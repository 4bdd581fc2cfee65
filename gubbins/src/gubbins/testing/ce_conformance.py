"""Conformance tests of CE back ends, to be run with a site of the back end.

Derive from one of the classes, with a name that begins with `Test`, and define a fixture `make`:

    class TestSpool(CESiteConformance):
        @pytest.fixture
        def make(self, tmp_path: Path) -> MakeBackend:
            scripts = pilot_scripts()
            return lambda scenario: SpoolBackend(
                CEDescription("spool", 100, 1.0),
                SpoolSettings(directory=tmp_path, script=scripts[scenario]),
            )

`CEConformance` is for all back ends, `CESiteConformance` for those that run real pilots, `CERemoteConformance` for
those of remote sites, which may be down or hang. All need pytest and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gubbins.ces.protocol import CEBackend, Observed
from gubbins.domain.exceptions import OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.testing.pilot_group import MakeBackend, PilotGroup, Scenario, closing, few, new_pilot

__all__ = [
    "CEConformance",
    "CERemoteConformance",
    "CESiteConformance",
    "MakeBackend",
    "Scenario",
    "pilot_scripts",
]


def pilot_scripts(witness: Path | None = None) -> dict[Scenario, str]:
    """Make a pilot script for /bin/sh for each scenario.

    Args:
        witness: directory in which each pilot records its starts, in a file named by its stamp.
    """
    start = f"echo started >> '{witness}'/\"$PILOT_STAMP\"\n" if witness is not None else ""
    output = 'echo "out of $PILOT_STAMP"\n'
    return {
        Scenario.QUICK: f'{start}{output}echo "err of $PILOT_STAMP" >&2\n',
        Scenario.FAILING: f"{start}{output}echo no luck today >&2\nexit 3\n",
        Scenario.LONG: f"{start}{output}sleep 600\n",
    }


class CEConformance:
    """Conformance tests of all back ends."""

    deadline_seconds: ClassVar[float] = 60
    """Time limit of state changes at the site."""

    pause_seconds: ClassVar[float] = 0.1
    """Interval of polls."""

    many: ClassVar[int] = 50
    """Number of pilots of a bulk call."""

    @pytest.fixture
    def make(self) -> MakeBackend:
        """Override: creates back ends for the site."""
        raise NotImplementedError("give your conformance class a fixture `make`")

    def _pilots(self, make: MakeBackend, scenario: Scenario, number: int = 1) -> PilotGroup:
        return PilotGroup(make, scenario, number, self.deadline_seconds, self.pause_seconds)

    async def test_each_stamp_gets_a_unique_reference(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.QUICK, 3) as group:
            await group.submit()

    async def test_a_successful_pilot_becomes_done(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.QUICK) as group:
            await group.submit()
            await group.until(Observed.DONE)
            # The end stays known, since the first check that sees it may crash.
            assert [seen.state for seen in (await group.poll()).values()] == [Observed.DONE]

    async def test_a_failed_pilot_has_a_reason_of_one_line(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.FAILING) as group:
            await group.submit()
            await group.until(Observed.FAILED)
            group.assert_reasons()

    async def test_a_long_pilot_stays_running(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            await group.until(Observed.RUNNING)
            assert [seen.state for seen in (await group.poll()).values()] == [Observed.RUNNING]

    async def test_a_repeated_submission_returns_the_same_reference(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG, 2) as group:
            first = await group.submit()
            assert await group.submit() == first
            await group.until(Observed.RUNNING)
            assert await group.submit() == first

    async def test_concurrent_submissions_of_one_stamp_return_the_same_reference(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG, 2) as group:
            references = await asyncio.gather(*(group.submit() for _ in range(4)))
            assert all(each == references[0] for each in references), references

    async def test_a_pilot_whose_reference_was_lost_is_found_by_its_stamp(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG, 2) as group:
            references = await group.submit()
            group.lose_references()
            seen = await group.until(Observed.RUNNING)
            assert {stamp: each.reference for stamp, each in seen.items()} == references

    async def test_a_cancelled_pilot_fails_with_a_reason(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            await group.until(Observed.RUNNING)
            await group.cancel()
            await group.until(Observed.FAILED)
            group.assert_reasons()

    async def test_a_pilot_whose_reference_was_lost_can_be_cancelled(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            group.lose_references()
            await group.cancel()
            await group.until(Observed.FAILED)
            group.assert_reasons()

    async def test_cancelling_again_or_after_the_end_has_no_effect(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            await group.cancel()
            await group.cancel()
            await group.until(Observed.FAILED)
            before = group.seen
            await group.cancel()
            assert await group.poll() == before
        assert not any(backend.warning for backend in group._used)
        async with self._pilots(make, Scenario.QUICK) as group:
            await group.submit()
            await group.until(Observed.DONE)
            await group.backend().cancel(group.pilots)
            assert [seen.state for seen in (await group.poll()).values()] == [Observed.DONE]

    async def test_cancelling_an_unknown_pilot_has_no_effect(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            await group.backend().cancel([new_pilot()._replace(cancel_requested=True)])
            await group.until(Observed.RUNNING)

    async def test_many_pilots_are_handled_by_one_call(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG, self.many) as group:
            references = await group.submit()
            assert len(references) == self.many
            assert len(await group.poll()) == self.many
            await group.cancel()
            await group.until(Observed.FAILED)
            group.assert_reasons()

    async def test_calls_without_pilots_succeed(self, make: MakeBackend) -> None:
        async with closing(make(Scenario.QUICK)) as backend:
            assert dict(await backend.submit([])) == {}
            assert dict(await backend.poll([])) == {}
            await backend.cancel([])
            await backend.cleanup([])

    async def test_cleanup_can_be_repeated_and_accepts_unknown_pilots(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.QUICK) as group:
            await group.submit()
            await group.until(Observed.DONE)
            ended = [
                group.pilots[0]._replace(status=MyPilotStatus.DONE),
                new_pilot()._replace(status=MyPilotStatus.FAILED),
            ]
            await group.backend().cleanup(ended)
            await group.backend().cleanup(ended)


class CESiteConformance(CEConformance):
    """Conformance tests of back ends that run real pilots.

    The pilots of `make` write `out of <stamp>` to stdout; successful ones write `err of <stamp>` to stderr,
    failing ones `no luck today`, and exit with 3, as those of `pilot_scripts`.
    """

    fetches_output: ClassVar[bool] = True
    """False: `output` is not supported, and raises `OutputUnavailableError`."""

    def starts(self, stamp: str) -> int | None:
        """Override: number of starts that the pilot has recorded; None: not known."""
        return None

    @pytest.fixture
    def secondary_source_down(self) -> AbstractContextManager[object] | None:
        """Override: context in which a secondary source of the site fails (accounting, a log, a directory).

        None: there is no secondary source.
        """
        return None

    async def test_the_reason_of_a_failed_pilot_contains_its_exit_code(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.FAILING) as group:
            await group.submit()
            (seen,) = (await group.until(Observed.FAILED)).values()
            assert re.search(r"\b3\b", seen.reason or ""), seen

    async def test_a_failing_secondary_source_does_not_affect_pilots_of_the_main_one(
        self, make: MakeBackend, secondary_source_down: AbstractContextManager[object] | None
    ) -> None:
        if secondary_source_down is None:
            return
        async with (
            self._pilots(make, Scenario.LONG) as running,
            self._pilots(make, Scenario.QUICK) as ended,
        ):
            await running.submit()
            await ended.submit()
            await running.until(Observed.RUNNING)
            await ended.until(Observed.DONE)
            with secondary_source_down:
                backend = running.backend()
                seen = await backend.poll([*running.pilots, *ended.pilots])
                await running.cancel()
            assert seen[running.pilots[0].stamp].state is Observed.RUNNING
            # Not unknown, which would end as lost.
            assert seen[ended.pilots[0].stamp].state in (Observed.DONE, Observed.NO_NEWS)
            assert backend.warning
            await running.until(Observed.FAILED)

    @pytest.fixture
    def unreadable(self) -> Callable[[str], AbstractContextManager[object]] | None:
        """Override: makes a context in which the files of a pilot, given by stamp, cannot be read.

        None: there are no files.
        """
        return None

    async def test_a_pilot_with_unreadable_files_is_not_lost_and_does_not_affect_others(
        self, make: MakeBackend, unreadable: Callable[[str], AbstractContextManager[object]] | None
    ) -> None:
        if unreadable is None:
            return
        async with self._pilots(make, Scenario.LONG, 2) as group:
            await group.submit()
            await group.until(Observed.RUNNING)
            unreadable_one, other = group.pilots
            deadline = time.monotonic() + self.deadline_seconds
            for pilot in group.pilots:
                while not (await group.backend().output(pilot)).stdout:
                    assert time.monotonic() < deadline, "it has not started"
                    await asyncio.sleep(self.pause_seconds)
            with unreadable(unreadable_one.stamp):
                for _ in range(2):  # a first poll, and a repeated one
                    backend = group.backend()
                    seen = await backend.poll(group.pilots)
                    assert seen[unreadable_one.stamp].state in (Observed.RUNNING, Observed.NO_NEWS)
                    assert seen[other.stamp].state is Observed.RUNNING
                assert backend.warning or seen[unreadable_one.stamp].state is Observed.RUNNING
                with pytest.raises(Exception, match=r"\S") as raised:
                    await group.backend().output(unreadable_one)
                assert not isinstance(raised.value, OutputUnavailableError), "that is permanent"
                await group.cancel()
                await group.until(Observed.FAILED, of=[other])
            group.pilots = [unreadable_one]
            await group.cancel()
            await group.until(Observed.FAILED)

    @pytest.fixture
    def holding(self) -> AbstractContextManager[object] | None:
        """Override: context in which the site accepts pilots, does not start them, and reports a reason.

        None: not supported.
        """
        return None

    async def test_a_held_pilot_has_a_reason(
        self, make: MakeBackend, holding: AbstractContextManager[object] | None
    ) -> None:
        if holding is None:
            return
        async with self._pilots(make, Scenario.LONG) as group:
            with holding:
                await group.submit()
                deadline = time.monotonic() + self.deadline_seconds
                while not all(seen.reason for seen in (await group.poll()).values()):
                    assert time.monotonic() < deadline, f"no reason: {few(group.seen.values())}"
                    await asyncio.sleep(self.pause_seconds)
                assert [seen.state for seen in group.seen.values()] == [Observed.WAITING]
                group.assert_reasons()
            await group.until(Observed.RUNNING)

    @pytest.fixture
    def uncertain(self) -> Callable[[str], AbstractContextManager[object]] | None:
        """Override: makes a context in which the outcome of submitting a pilot, given by stamp, is not known.

        None: not supported.
        """
        return None

    async def test_an_unknown_outcome_does_not_affect_other_pilots_of_the_call(
        self, make: MakeBackend, uncertain: Callable[[str], AbstractContextManager[object]] | None
    ) -> None:
        if uncertain is None:
            return
        async with self._pilots(make, Scenario.LONG, 3) as group:
            unknown, *others = group.pilots
            with uncertain(unknown.stamp):
                backend = group.backend()
                outcomes = await backend.submit(group.pilots)
                assert set(outcomes) == {pilot.stamp for pilot in others}
                assert all(outcome.reference for outcome in outcomes.values()), outcomes
                assert backend.warning
                with pytest.raises(Exception, match=r"\S"):
                    await group.backend().submit([unknown])
            references = await group.submit()
            assert {stamp: references[stamp] for stamp in outcomes} == {
                stamp: outcome.reference for stamp, outcome in outcomes.items()
            }
            await group.until(Observed.RUNNING)

    @pytest.fixture
    def full(self) -> AbstractContextManager[object] | None:
        """Override: context in which the site refuses a second pilot for its quota; None: not supported."""
        return None

    async def test_a_full_site_is_a_quota_and_not_a_failure(
        self, make: MakeBackend, full: AbstractContextManager[object] | None
    ) -> None:
        if full is None:
            return
        async with (
            self._pilots(make, Scenario.LONG) as group,
            self._pilots(make, Scenario.LONG) as refused,
        ):
            await group.submit()
            await group.until(Observed.RUNNING)
            with full:
                outcomes = await refused.backend().submit(refused.pilots)
            (outcome,) = outcomes.values()
            assert outcome.quota, outcome
            assert outcome.error
            assert outcome.reference is None
            assert await refused.poll() == {}
            await refused.submit()

    async def test_an_unknown_stamp_is_missing_from_the_result(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            seen = await group.backend().poll([*group.pilots, new_pilot()])
            assert set(seen) == {group.pilots[0].stamp}

    async def test_a_repeated_submission_starts_no_second_pilot(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.QUICK, 2) as group:
            await asyncio.gather(*(group.submit() for _ in range(4)))
            await group.until(Observed.DONE)
            await group.submit()
            await group.until(Observed.DONE)
            assert [self.starts(pilot.stamp) for pilot in group.pilots] in ([1, 1], [None, None])

    async def test_output_of_a_pilot_that_has_ended_can_be_fetched(self, make: MakeBackend) -> None:
        async with self._pilots(make, Scenario.QUICK) as group:
            await group.submit()
            await group.until(Observed.DONE)
            pilot = group.pilots[0]
            if not self.fetches_output:
                with pytest.raises(OutputUnavailableError):
                    await group.backend().output(pilot)
                return
            output = await group.backend().output(pilot)
            assert output.stdout == f"out of {pilot.stamp}\n"
            assert f"err of {pilot.stamp}\n" in output.stderr

    async def test_there_is_no_output_of_an_unknown_pilot(self, make: MakeBackend) -> None:
        async with closing(make(Scenario.QUICK)) as backend:
            with pytest.raises(OutputUnavailableError):
                await backend.output(new_pilot())


class CERemoteConformance(CESiteConformance):
    """Conformance tests of back ends of remote sites, which may be down or not respond.

    The settings of `make` should have time-outs of few seconds.
    """

    call_seconds: ClassVar[float] = 20
    """Time limit of any call."""

    @pytest.fixture
    def down(self) -> AbstractContextManager[object]:
        """Override: context in which the site is down."""
        raise NotImplementedError("give your conformance class a fixture `down`")

    @pytest.fixture
    def hanging(self) -> AbstractContextManager[object]:
        """Override: context in which the site accepts calls and does not respond."""
        raise NotImplementedError("give your conformance class a fixture `hanging`")

    async def test_a_site_that_is_down_changes_no_state(
        self, make: MakeBackend, down: AbstractContextManager[object]
    ) -> None:
        await self._check_outage(make, down)

    async def test_a_site_that_hangs_does_not_block_calls_forever(
        self, make: MakeBackend, hanging: AbstractContextManager[object]
    ) -> None:
        await self._check_outage(make, hanging)

    async def _check_outage(self, make: MakeBackend, outage: AbstractContextManager[object]) -> None:
        async with self._pilots(make, Scenario.LONG) as group:
            await group.submit()
            known = group.pilots[0]
            new = new_pilot()
            with outage:
                # Not a cancellation of the known pilot, which might be executed after the outage.
                calls: list[Callable[[CEBackend[Any]], Awaitable[object]]] = [
                    lambda backend: backend.submit([new]),
                    lambda backend: backend.poll([known]),
                    lambda backend: backend.cancel([new]),
                ]
                for call in calls:
                    begin = time.monotonic()
                    with pytest.raises(Exception, match=r"\S"):  # any, with a message
                        async with (
                            closing(make(Scenario.LONG)) as backend,
                            asyncio.timeout(self.deadline_seconds),
                        ):
                            await call(backend)
                    assert time.monotonic() - begin < self.call_seconds
            # The new pilot may have been submitted.
            group.pilots.append(new)
            await group.until(Observed.RUNNING, of=[known])
