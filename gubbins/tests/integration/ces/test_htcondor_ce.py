"""Back end `htcondor` with a real pool; its cycles take seconds, so all conformance tests run concurrently."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.all_promises import AllPromises
from support.htcondor_pilots import (
    changed,
    cleanup,
    leave_carrier,
    make_backend,
    new_pilot,
    submit,
    submit_all,
    until_ended,
    until_gone,
    until_seen,
)
from support.sites.htcondor import HTCondorSite
from support.waiting import until

from gubbins.ces import Observation, Observed
from gubbins.ces.htcondor import HTCondorBackend
from gubbins.ces.htcondor.process import PROGRAM, Bindings
from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.testing.ce_conformance import Scenario, pilot_scripts

pytestmark = [pytest.mark.timeout(240), pytest.mark.event_loops("uvloop")]


class _Promises(AllPromises):
    many = 10
    call_seconds = 60

    def __init__(self, site: HTCondorSite, witness: Path) -> None:
        super().__init__(witness, down=site.down, hanging=self._frozen, full=self._full, holding=self._holding)
        self._site = site
        self._timeout_seconds = 30
        # Inside, the site's directory has another name.
        self._scripts = pilot_scripts(Path("/srv") / witness.name)

    def make_backend(self, scenario: Scenario) -> HTCondorBackend:
        script = self._scripts[scenario]
        return make_backend(self._site, default_script=script, timeout_seconds=self._timeout_seconds, keep="none")

    def _full(self) -> contextlib.AbstractContextManager[object]:
        return self._site.configured("MAX_JOBS_PER_OWNER = 1\n")

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        words = 'SYSTEM_PERIODIC_HOLD = True\nSYSTEM_PERIODIC_HOLD_REASON = "maintenance"\n'
        with self._site.configured(words):
            yield
        self._site.run("condor_release", "-all")

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        patient, self._timeout_seconds = self._timeout_seconds, 2
        with self._site.frozen():
            yield
        self._timeout_seconds = patient


async def test_all_conformance_tests_ran(htcondor_site: HTCondorSite) -> None:
    witness = htcondor_site.directory / "witness"
    witness.mkdir()
    witness.chmod(0o1777)
    await _Promises(htcondor_site, witness).check()


async def test_hostile_values_arrive_as_they_are_and_nothing_else_is_run(htcondor_site: HTCondorSite) -> None:
    hostile = "a'b\"c $(touch pwned) `touch pwned` $HOME $$(OpSys) $ENV(PATH) \\ @limit@ #x\t ü\nline 2; '"
    backend = make_backend(
        htcondor_site,
        scripts={
            "v'o $(x)": 'printf %s "$HOSTILE"; echo "$PILOT_CE $PILOT_VO" >&2; ls',
            "py": f"#!/usr/bin/env python3\nimport os\nprint(os.environ['HOSTILE'] == {hostile!r}, end='')\n",
        },
        environment={"HOSTILE": hostile},
        submit_commands={"requirements": "TARGET.Memory > 0 || False", "+Group": '"pilots"'},
        memory_mb=20,
        disk_mb=1,
        wall_time_minutes=10,
    )
    shell, python = pilots = await submit(backend, "v'o $(x)", "py")
    await until_ended(backend, pilots)
    out = await backend.output(shell)
    assert out.stdout.startswith(hostile)
    assert "pwned" not in out.stdout.removeprefix(hostile)
    assert out.stderr == "ce v'o $(x)\n"
    assert (await backend.output(python)).stdout == "True"


async def test_long_output_is_truncated_to_its_end_and_the_end_is_known_after_removal_from_the_queue(
    htcondor_site: HTCondorSite, tmp_path: Path
) -> None:
    scripts = {"good": "seq 0 200000", "bad": "echo no luck >&2; exit 3", "killed": "kill -9 $$"}
    backend = make_backend(htcondor_site, scripts=scripts)
    good, bad, killed = pilots = await submit(backend, "good", "bad", "killed")
    ends = [Observation(Observed.DONE), *(Observation(Observed.FAILED, f"exit code {code}") for code in (3, 137))]
    assert await until_ended(backend, pilots) == ends
    written = "".join(f"{n}\n" for n in range(200_001))
    assert (await backend.output(good)).stdout == written[-OUTPUT_LIMIT_BYTES:]
    assert (await backend.output(bad)).stderr == "no luck\n"

    # Another process cleans up at the same time, and they leave the queue in between.
    edit = "schedd.edit(wanted, name,"
    left = f"{edit} value)\n        while schedd.query(wanted): pass"
    leaving = changed(backend, tmp_path, edit, f"{left}\n        {edit}")
    await cleanup(leaving, {good: MyPilotStatus.DONE, bad: MyPilotStatus.FAILED, killed: MyPilotStatus.FAILED})
    assert good.reference not in htcondor_site.run("condor_q", "-all", "-af:j", "Owner").split()
    assert await until_ended(backend, pilots) == ends
    assert (await backend.output(bad)).stderr == "no luck\n"  # failed ones stay, unless the settings say otherwise
    with pytest.raises(OutputUnavailableError, match="no longer"):
        await backend.output(good)


async def test_a_held_pilot_has_the_same_reason_while_waiting_and_when_failed(htcondor_site: HTCondorSite) -> None:
    hold = {"periodic_hold": "JobStatus == 2", "periodic_hold_reason": '"it used too much memory"'}
    patient = make_backend(htcondor_site, submit_commands=hold, default_script="sleep 600")
    (held,) = await submit(patient, "vo")
    reason = "on hold (code 3): it used too much memory"
    await until_seen(patient, held, Observation(Observed.WAITING, reason))

    strict = make_backend(htcondor_site, submit_commands=hold, default_script="sleep 600", held_minutes=0)
    (doomed,) = await submit(strict, "vo")
    failed = Observation(Observed.FAILED, "put on hold (code 3): it used too much memory")
    assert await until_ended(strict, [doomed]) == [failed]

    htcondor_site.run("condor_rm", str(held.reference))
    (seen,) = await until_ended(patient, [held])
    assert (seen.reason or "").startswith("removed at the site: via condor_rm")


async def test_a_pilot_that_was_interrupted_is_not_started_again(htcondor_site: HTCondorSite) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600")
    (pilot,) = await submit(backend, "vo")
    reference = str(pilot.reference)

    def executed() -> bool:
        """It is RUNNING before; a job that a node has not executed is started a second time, rightly."""
        return htcondor_site.run("condor_q", reference, "-af", "JobCurrentStartExecutingDate").strip().isdecimal()

    await until(executed, "its node executes it", 120, 0.5)
    htcondor_site.run("condor_vacate_job", "-fast", reference)
    (seen,) = await until_ended(backend, [pilot])
    assert seen.reason == "interrupted on its node; it is not started a second time"


async def test_a_submission_that_is_killed_before_its_files_are_sent_is_found_and_ends(
    htcondor_site: HTCondorSite, tmp_path: Path
) -> None:
    backend = make_backend(htcondor_site, spool_minutes=0)
    pilot = new_pilot("vo")
    program = PROGRAM.read_text()
    sends = "schedd.spool(result)"
    assert sends in program
    (tmp_path / "bindings.py").write_text(program.replace(sends, "os.kill(os.getpid(), 9)"))
    bindings = Bindings(backend.settings, tmp_path / "bindings.py")
    with pytest.raises(CEUnavailableError, match="no response from HTCondor's bindings"):
        await HTCondorBackend(backend.ce, backend.settings, bindings).submit([pilot])
    assert (await make_backend(htcondor_site).poll([pilot]))[pilot.stamp].state is Observed.WAITING
    (seen,) = await until_ended(backend, [pilot])
    assert seen.reason == "its files have never come to the schedd"
    assert (await backend.submit([pilot]))[pilot.stamp].reference == seen.reference


async def test_a_pilot_that_is_removed_runs_until_its_node_has_ended_it(htcondor_site: HTCondorSite) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600")
    (pilot,) = await submit(backend, "vo")
    await until_seen(backend, pilot, Observation(Observed.RUNNING))
    with htcondor_site.frozen_jobs():
        await backend.cancel([pilot])
        await until(lambda: htcondor_site.run("condor_q", str(pilot.reference), "-af", "JobStatus").strip() == "3")
        assert (await backend.poll([pilot]))[pilot.stamp] == Observation(Observed.RUNNING)
    assert (await until_ended(backend, [pilot]))[0].state is Observed.FAILED


async def test_a_pilot_that_is_removed_by_force_has_ended(htcondor_site: HTCondorSite) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600")
    (pilot,) = await submit(backend, "vo")
    await until_seen(backend, pilot, Observation(Observed.RUNNING))
    with htcondor_site.frozen_jobs():
        await backend.cancel([pilot])
        await until(lambda: htcondor_site.run("condor_q", str(pilot.reference), "-af", "JobStatus").strip() == "3")
        htcondor_site.run("condor_rm", "-forcex", str(pilot.reference))
        with htcondor_site.configured("HISTORY_HELPER = /nowhere\n"):  # it would know
            await until_seen(backend, pilot, Observation(Observed.NO_NEWS))
        (end,) = await until_ended(backend, [pilot])
    assert end.state is Observed.FAILED
    assert str(end.reason).startswith("removed at the site: via condor_rm -forcex")


async def test_a_full_schedd_is_a_quota(htcondor_site: HTCondorSite) -> None:
    pilot = new_pilot("vo")
    with htcondor_site.configured("MAX_JOBS_SUBMITTED = 0\n"):
        outcome = (await make_backend(htcondor_site).submit([pilot]))[pilot.stamp]
    assert outcome.quota, outcome
    assert "MAX_JOBS_SUBMITTED" in str(outcome.error)

    async def submitted() -> str | None:
        return (await make_backend(htcondor_site).submit([pilot]))[pilot.stamp].reference

    await until(submitted, pause=0.2)


async def test_the_second_of_two_jobs_of_one_stamp_is_removed(htcondor_site: HTCondorSite) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600")
    pilot = new_pilot("vo")._replace(maybe_submitted=False)
    first, second = [(await backend.submit([pilot]))[pilot.stamp].reference for _ in range(2)]
    assert first
    assert second not in (first, None)
    assert (await backend.poll([pilot]))[pilot.stamp].reference == first
    assert htcondor_site.run("condor_q", second, "-af", "JobStatus").strip() == "3"
    assert htcondor_site.run("condor_q", first, "-af", "JobStatus").strip() != "3"
    await backend.cancel([pilot])


async def test_a_refused_removal_does_not_prevent_polls(htcondor_site: HTCondorSite, tmp_path: Path) -> None:
    backend = make_backend(htcondor_site, default_script="sleep 600", spool_minutes=0)
    pilot = new_pilot("vo")._replace(maybe_submitted=False)
    first, _ = [(await backend.submit([pilot]))[pilot.stamp].reference for _ in range(2)]
    unused = await leave_carrier(htcondor_site, backend, tmp_path)
    (tmp_path / "token").write_text(htcondor_site.make_token("pilot", "-authz", "READ"))

    async def both_refused() -> HTCondorBackend | None:
        reader = make_backend(htcondor_site, token=tmp_path / "token", spool_minutes=0)
        assert (await reader.poll([pilot]))[pilot.stamp].reference == first
        # For the second job, and for the carrier as soon as it is a second old.
        return reader if str(reader.warning).count("DENIED") == 2 else None

    reader = await until(both_refused)
    with pytest.raises(OutputUnavailableError, match="has not ended"):
        await reader.output(pilot._replace(reference=first))
    await until_gone(backend, htcondor_site, unused)
    await backend.poll([pilot])
    await backend.cancel([pilot])


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_refusal_has_the_message_of_the_site(htcondor_site: HTCondorSite) -> None:
    rule = "SUBMIT_REQUIREMENT_NAMES = Small\nSUBMIT_REQUIREMENT_Small = RequestMemory < 64\n"
    rule += 'SUBMIT_REQUIREMENT_Small_REASON = "ask for less memory"\n'
    with htcondor_site.configured(rule):
        pilots = [new_pilot("vo"), new_pilot("vo")]
        outcomes = await make_backend(htcondor_site, memory_mb=100).submit(pilots)
        assert [outcomes[pilot.stamp].error for pilot in pilots] == ["ask for less memory"] * 2
    outcomes = await make_backend(htcondor_site, submit_commands={"requirements": "(a ="}).submit(pilots)
    assert all((each.error or "").startswith("Parse error in expression") for each in outcomes.values())


async def test_only_as_many_pilots_as_there_is_room_for_are_submitted(htcondor_site: HTCondorSite) -> None:
    with htcondor_site.configured("MAX_JOBS_PER_SUBMISSION = 2\n"):
        pilots = [new_pilot("vo") for _ in range(3)]
        backend = make_backend(htcondor_site)
        given = await backend.submit(pilots)
        outcomes = [given[pilot.stamp] for pilot in pilots]
    assert [outcome.quota for outcome in outcomes] == [False, False, True]
    assert "MAX_JOBS_PER_SUBMISSION" in (outcomes[2].error or "")
    assert set(await backend.poll(pilots)) == {pilot.stamp for pilot in pilots[:2]}


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_token_is_read_for_each_call_and_its_errors_are_reported(
    htcondor_site: HTCondorSite, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    backend = make_backend(htcondor_site, token=token)
    with pytest.raises(CEUnavailableError, match="cannot read the token"):
        await backend.submit([new_pilot("vo")])
    good = htcondor_site.token.read_text()
    token.write_text(good.strip()[:-6] + "AAAAAA")
    with pytest.raises(CEUnavailableError, match="Failed to authenticate using IDTOKENS"):
        await backend.submit([new_pilot("vo")])
    token.write_text(good)
    (pilot,) = await submit(backend, "vo")
    token.write_text("x.eyJleHAiOjF9.x")
    with pytest.raises(CEUnavailableError, match="has expired at 1970-01-01 00:00:01 UTC: renew it"):
        await backend.poll([pilot])


async def test_jobs_of_other_users_are_ignored(htcondor_site: HTCondorSite, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(htcondor_site.make_token("nobody"))
    stranger = make_backend(htcondor_site, token=tmp_path / "token", default_script="sleep 600")
    (pilot,) = await submit(stranger, "vo")
    ours = make_backend(htcondor_site, default_script="sleep 600", keep="none")
    assert await ours.poll([pilot]) == {}
    (own,) = await submit_all(ours, [pilot._replace(reference=None)])
    await ours.cancel([pilot])
    assert "does not let us remove 1 of the jobs" in str(ours.warning)
    await stranger.cancel([pilot])
    await cleanup(ours, {own: MyPilotStatus.FAILED})
    queue = "condor_q", "-all", "-af:j", "Owner"
    await until(lambda: own.reference not in htcondor_site.run(*queue).split(), "our own has left", pause=0.5)
    assert pilot.reference in htcondor_site.run(*queue).split()


async def test_a_schedd_is_found_by_its_collector_or_its_address(htcondor_site: HTCondorSite) -> None:
    (pilot,) = await submit(make_backend(htcondor_site, schedd=None), "vo")
    address = htcondor_site.run("condor_status", "-schedd", "-af", "MyAddress").strip()
    direct = make_backend(htcondor_site, collector=None, schedd=None, address=address)
    assert pilot.stamp in await direct.poll([pilot])
    with pytest.raises(CEUnavailableError, match="knows no schedd nonesuch"):
        await make_backend(htcondor_site, schedd="nonesuch").poll([pilot])
    with pytest.raises(CEUnavailableError, match="Can't resolve collector nonesuch"):
        await make_backend(htcondor_site, collector="nonesuch.invalid").poll([pilot])
