"""Many pilots in one call to an HTCondor schedd: one spooled directory, and jobs made by the schedd."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.htcondor_pilots import (
    carrier_of,
    carriers,
    changed,
    cleanup,
    factories,
    killed_before,
    make_backend,
    new_pilot,
    submit_all,
    until_ended,
    until_gone,
    with_seconds,
)
from support.pilot_secrets import Place, assert_only_the_pilot_can_read_its_secret
from support.sites.htcondor import HTCondorSite
from support.waiting import until

from gubbins.ces import Observation, Observed, PilotIdentity
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus

pytestmark = [pytest.mark.timeout(240), pytest.mark.event_loops("uvloop")]


async def test_many_pilots_share_one_spooled_directory_and_each_gets_its_own_secret_alone(
    htcondor_site: HTCondorSite,
) -> None:
    hostile = "a'b\"c $HOME $(stamp) $(Process) $ENV(PATH) \\ #x\t ü\nline 2; '"
    backend = make_backend(
        htcondor_site,
        default_script='cat "$PILOT_SECRET_FILE"; printf %s "$HOSTILE"; set -- *.secret; echo $# >&2',
        environment={"HOSTILE": hostile},
        submit_commands={"requirements": "TARGET.Memory > 0 || False", "+Group": '"pilots"'},
        keep="none",
        spool_minutes=0,
    )
    secrets = [PilotIdentity("https://diracx.example.org", f"secret {number}") for number in range(8)]
    pilots = await submit_all(backend, [new_pilot("vo")._replace(identity=each) for each in secrets])
    assert await until_ended(backend, pilots) == [Observation(Observed.DONE)] * 8
    for number, pilot in enumerate(pilots):
        assert await backend.output(pilot) == (f"secret {number}{hostile}", "1\n")

    (carrier,) = {carrier_of(htcondor_site, pilot) for pilot in pilots}
    first, *others = pilots
    await cleanup(backend, dict.fromkeys(others, MyPilotStatus.DONE))
    gone = {pilot.reference for pilot in others}
    await until(lambda: gone.isdisjoint(htcondor_site.run("condor_q", "-all", "-af:j", "Owner").split()))
    await backend.poll(pilots)
    assert (await backend.output(first)).stdout.startswith("secret 0")
    await cleanup(backend, {first: MyPilotStatus.DONE})
    await until_gone(backend, htcondor_site, carrier)


async def test_a_call_beyond_the_quota_submits_the_pilots_below_it_and_no_more_appear_later(
    htcondor_site: HTCondorSite,
) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600", keep="none")
    pilots = [new_pilot("vo") for _ in range(8)]
    there = len(htcondor_site.run("condor_q", "-all", "-af", "ClusterId").split())
    with htcondor_site.configured(f"MAX_JOBS_PER_OWNER = {there + 5}\n"):
        outcomes = await backend.submit(pilots)
        assert 0 < sum(outcome.quota for outcome in outcomes.values()) < 8
    submitted = [
        pilot._replace(reference=outcomes[pilot.stamp].reference)
        for pilot in pilots
        if outcomes[pilot.stamp].reference
    ]
    cluster = str(submitted[0].reference).partition(".")[0]
    assert set(await backend.poll(pilots)) == {pilot.stamp for pilot in submitted}
    await backend.cancel(submitted)
    await until_ended(backend, submitted)
    await cleanup(backend, dict.fromkeys(submitted, MyPilotStatus.FAILED))
    await until(lambda: cluster not in factories(htcondor_site))
    assert set(await backend.poll(pilots)) == {pilot.stamp for pilot in submitted}


async def test_a_call_refused_by_the_quota_leaves_nothing_at_the_schedd(htcondor_site: HTCondorSite) -> None:
    backend = make_backend(htcondor_site)
    before: tuple[set[str], set[str]] = set(), set()

    async def refused() -> bool:
        nonlocal before
        before = carriers(htcondor_site), factories(htcondor_site)
        there = len(htcondor_site.run("condor_q", "-all", "-af", "ClusterId").split())
        with htcondor_site.configured(f"MAX_JOBS_PER_OWNER = {there + 1}\n"):
            outcomes = await backend.submit([new_pilot("vo") for _ in range(6)])
        return all(outcome.quota for outcome in outcomes.values())

    await until(refused, "there is room for none, where no job of before leaves meanwhile", pause=1)
    await until(lambda: carriers(htcondor_site) <= before[0] and factories(htcondor_site) <= before[1])
    rule = "SUBMIT_REQUIREMENT_NAMES = Small\nSUBMIT_REQUIREMENT_Small = RequestMemory < 64\n"
    rule += 'SUBMIT_REQUIREMENT_Small_REASON = "ask for less memory"\n'
    with htcondor_site.configured(rule):
        outcomes = await make_backend(htcondor_site, memory_mb=100).submit([new_pilot("vo") for _ in range(6)])
    assert {outcome.error for outcome in outcomes.values()} == {"ask for less memory"}
    assert carriers(htcondor_site) <= before[0]


async def test_many_pilots_leave_nothing_at_the_schedd_after_the_last_one(
    htcondor_site: HTCondorSite, tmp_path: Path
) -> None:
    backend = with_seconds(5, make_backend(htcondor_site, keep="none"), tmp_path)
    began = time.monotonic()
    pilots = await submit_all(backend, [new_pilot("vo") for _ in range(6)])
    cluster = str(pilots[0].reference).partition(".")[0]
    assert cluster in factories(htcondor_site)
    await until_ended(backend, pilots)
    await until(lambda: time.monotonic() > began + 5)
    await cleanup(backend, dict.fromkeys(pilots, MyPilotStatus.DONE))
    await until(lambda: cluster not in factories(htcondor_site))


@pytest.mark.parametrize(("rule", "seconds"), [("SCHEDD_ALLOW_LATE_MATERIALIZE = False\n", 60), ("", -60)])
async def test_many_pilots_are_submitted_to_a_schedd_without_late_materialization(
    htcondor_site: HTCondorSite, tmp_path: Path, rule: str, seconds: int
) -> None:
    backend = with_seconds(seconds, make_backend(htcondor_site), tmp_path)
    with htcondor_site.configured(rule):
        pilots = await submit_all(backend, [new_pilot("vo") for _ in range(6)])
    assert await until_ended(backend, pilots) == [Observation(Observed.DONE)] * 6


@pytest.mark.parametrize(("before", "submitted"), [("outcomes |= _materialize(", 0), ("wanted, attributes =", 6)])
async def test_a_submission_of_many_that_is_killed_is_found_or_repeated(
    htcondor_site: HTCondorSite, tmp_path: Path, before: str, submitted: int
) -> None:
    backend = make_backend(htcondor_site, spool_minutes=0)
    pilots = [new_pilot("vo") for _ in range(6)]
    other = carriers(htcondor_site)
    with pytest.raises(CEUnavailableError, match="no response from HTCondor's bindings"):
        await killed_before(before, backend, tmp_path).submit(pilots)
    (carrier,) = carriers(htcondor_site) - other
    found = await backend.poll(pilots)
    assert len(found) == submitted
    pilots = await submit_all(backend, pilots)
    assert {pilot.reference for pilot in pilots} >= {each.reference for each in found.values()}
    assert await until_ended(backend, pilots) == [Observation(Observed.DONE)] * 6
    if submitted:
        assert {carrier_of(htcondor_site, pilot) for pilot in pilots} == {carrier}
    else:
        await until_gone(backend, htcondor_site, carrier)


async def test_known_outcomes_of_a_partly_failed_submission_are_reported(
    htcondor_site: HTCondorSite, tmp_path: Path
) -> None:
    fails = 'if commands["+GubbinsStamp"] and len(rows) == 2: raise RuntimeError("no room"'
    backend = changed(
        make_backend(htcondor_site, default_script="sleep 600"),
        tmp_path,
        "    stamps = [row[",
        f"    {fails})\n    stamps = [row[",
    )
    lost, single = [new_pilot("lost"), new_pilot("lost")], new_pilot("single")
    outcomes = await backend.submit([*lost, single])
    assert outcomes.keys() == {single.stamp}
    assert backend.warning == "no room"
    await backend.cancel([single])

    there = len(htcondor_site.run("condor_q", "-all", "-af", "ClusterId").split())
    backend = changed(
        make_backend(htcondor_site, default_script="sleep 600"),
        tmp_path,
        "        _submit(schedd, commands, rest,",
        '        raise RuntimeError("no rest")\n        _submit(schedd, commands, rest,',
    )
    pilots = [new_pilot("vo") for _ in range(8)]
    with htcondor_site.configured(f"MAX_JOBS_PER_OWNER = {there + 5}\n"):
        outcomes = await backend.submit(pilots)
    assert 0 < len(outcomes) < 8
    assert all(outcome.reference for outcome in outcomes.values())
    assert backend.warning == "no rest"
    assert set(await make_backend(htcondor_site).poll(pilots)) == outcomes.keys()
    await backend.cancel(pilots)


@pytest.mark.parametrize("number", [2, 6], ids=["single", "many"])
async def test_only_the_pilot_can_read_its_secret(
    htcondor_site: HTCondorSite, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    where = {"collector": htcondor_site.collector, "schedd": htcondor_site.schedd}
    where |= {"token": str(htcondor_site.token)}
    place = Place("htcondor", where | {"timeout_seconds": 60}, htcondor_site.directory, pilots=number)
    await assert_only_the_pilot_can_read_its_secret(place, caplog)
