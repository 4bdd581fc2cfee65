"""Failures of pilots and submissions with a real Slurm."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.pilot_waiters import ENDED, ended, observe
from support.waiting import until

from examples.demo.slurm import SlurmSite
from gubbins.ces import CEDescription, NothingDoneError, Observed, PilotAtCE
from gubbins.ces.slurm import SlurmBackend, SlurmSettings
from gubbins.ces.slurm.batch import batch_script, sbatch_options
from gubbins.ces.transports.shell import Completed, LocalShell, inherited_environment
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus

pytestmark = pytest.mark.event_loops("uvloop")

Make = Callable[..., SlurmBackend]
QUEUE = ("squeue", "-h", "-t", "all", "-o", "%j")


@pytest.fixture
def make(slurm_site: SlurmSite, tmp_path: Path) -> Make:
    def make(**settings: Any) -> SlurmBackend:
        given = {"directory": tmp_path / "pilots", "slurm_conf": slurm_site.slurm_conf, "keep": "all", **settings}
        return SlurmBackend(CEDescription("slurm", 100, 1.0), SlurmSettings(**given))

    return make


def pilot(stamp: str, vo: str = "vo") -> PilotAtCE:
    return PilotAtCE(f"{stamp}-{time.time_ns()}", vo)


async def test_a_pilot_fails_with_its_node(make: Make, slurm_site: SlurmSite) -> None:
    backend, lost = make(default_script="sleep 300"), pilot("node")
    await backend.submit([lost])
    await observe(backend, lost, Observed.RUNNING)
    update = ("scontrol", "update", f"NodeName={slurm_site.node}")
    slurm_site.command(*update, "State=DOWN", "Reason=test")
    try:
        seen = await observe(backend, lost, *ENDED)
    finally:
        slurm_site.command(*update, "State=RESUME")
    assert seen.state is Observed.FAILED
    assert str(seen.reason).startswith("its node failed (NODE_FAIL)")


async def test_a_job_that_slurm_has_removed_is_unknown_without_another_source(
    make: Make, slurm_site: SlurmSite
) -> None:
    blind = {"nodes_see_directory": False}
    seen, bad, unseen = pilot("seen"), pilot("bad"), pilot("unseen")
    await make(default_script="true").submit([seen])
    await make(default_script="echo no luck >&2; exit 3").submit([bad])
    await make(default_script="exit 4", **blind).submit([unseen])
    for each in (seen, bad):
        await observe(make(**blind), each, *ENDED)
    assert (await observe(make(**blind), unseen, *ENDED)).reason == "exit code 4"
    forgotten = (seen, bad, unseen)
    await until(lambda: not any(each.stamp in slurm_site.command(*QUEUE) for each in forgotten))
    response = await make().poll([seen, bad, unseen])
    assert set(response) == {seen.stamp, bad.stamp}
    assert response[seen.stamp].state is Observed.DONE
    assert response[bad.stamp][:2] == (Observed.FAILED, "exit code 3: no luck")
    log = slurm_site.completion_log
    rotated = make(completion_log=log.with_suffix(".1"), **blind)
    assert await rotated.poll([unseen]) == {unseen.stamp: (Observed.NO_NEWS, None, None)}
    assert "grep: " in str(rotated.warning)
    response = await make(completion_log=log, **blind).poll([seen, bad, unseen, pilot("never")])
    assert {stamp: observation[:2] for stamp, observation in response.items()} == {
        seen.stamp: (Observed.DONE, None),
        bad.stamp: (Observed.FAILED, "exit code 3"),
        unseen.stamp: (Observed.FAILED, "exit code 4"),
    }


async def test_an_unconfirmed_submission_is_found_and_not_repeated(
    make: Make, slurm_site: SlurmSite, tmp_path: Path
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("squeue", "scancel"):
        (commands / name).symlink_to(shutil.which(name) or "")
    deaf = commands / "sbatch"
    through = tmp_path / "through"
    deaf.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@" > /dev/null && touch {through}; exec sleep 60\n')
    deaf.chmod(0o755)
    script = f"echo started >> {tmp_path}/starts; sleep 300"
    lost = pilot("lost")
    with pytest.raises(CEUnavailableError, match="sbatch has not responded within 10 s"):
        await make(default_script=script, commands=commands, timeout_seconds=10).submit([lost])
    assert through.exists(), "the machine is too slow: nothing was submitted"
    found = await observe(make(), lost, Observed.RUNNING)
    outcome = (await make(default_script=script).submit([lost]))[lost.stamp]
    assert outcome.reference == found.reference
    assert slurm_site.command("squeue", "-h", "-n", lost.stamp, "-o", "%i").split() == [found.reference]
    await make().cancel([lost])
    assert (await observe(make(), lost, *ENDED))[:2] == (Observed.FAILED, "cancelled")
    assert (tmp_path / "starts").read_text() == "started\n"


@pytest.mark.event_loops("asyncio", "uvloop")
@pytest.mark.parametrize("command", ["sbatch", "squeue"])
async def test_time_outs_of_the_site_and_of_ours_are_reported_alike(
    command: str, make: Make, slurm_site: SlurmSite, tmp_path: Path
) -> None:
    """The host of the site has a clock of its own, and may be the first to give up."""

    class Patient(LocalShell):
        async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
            return await super().run(argv, stdin=stdin, timeout=timeout + 60)

    commands = tmp_path / "commands"
    commands.mkdir()
    for name in ("sbatch", "squeue"):
        (commands / name).write_text("#!/bin/sh\nexec sleep 300\n")
        (commands / name).chmod(0o755)
    shell = Patient(inherited_environment() | {"SLURM_CONF": str(slurm_site.slurm_conf)})
    settings = make(commands=commands, timeout_seconds=0.2).settings
    backend, unconfirmed = SlurmBackend(CEDescription("slurm", 100, 1.0), settings, shell), pilot("unconfirmed")
    if command == "squeue":  # which is asked once sbatch has been called
        directory = backend.settings.directory / unconfirmed.stamp
        directory.mkdir(parents=True)
        (directory / "tried").touch()
    silent = "the queue" if command == "squeue" else command
    with pytest.raises(CEUnavailableError, match=rf"{silent} has not responded within 0\.2 s"):
        await backend.submit([unconfirmed])


async def test_of_two_jobs_of_one_stamp_only_the_first_becomes_a_pilot(
    make: Make, slurm_site: SlurmSite, tmp_path: Path
) -> None:
    backend, twin = make(default_script=f"echo started >> {tmp_path}/starts; sleep 1"), pilot("twin")
    (backend.settings.directory / twin.stamp).mkdir(parents=True)
    for _ in range(2):
        subprocess.run(
            ["sbatch", *sbatch_options(backend.settings, twin)],
            input=batch_script(backend.settings, "slurm", twin),
            env={"PATH": "/usr/bin:/bin", "SLURM_CONF": str(slurm_site.slurm_conf)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    seen = await observe(backend, twin, *ENDED)
    assert seen.state is Observed.DONE
    assert (tmp_path / "starts").read_text() == "started\n"


@pytest.fixture
def sbatch(tmp_path: Path) -> Callable[[str], Path]:
    """Puts a wrapper in place of sbatch: the directory of commands."""

    def wrap(script: str) -> Path:
        commands = tmp_path / "wrapped"
        commands.mkdir(exist_ok=True)
        for name in ("squeue", "scancel"):
            if not (commands / name).exists():
                (commands / name).symlink_to(shutil.which(name) or "")
        (commands / "sbatch").write_text(f"#!/bin/sh\n{script.replace('SBATCH', shutil.which('sbatch') or '')}\n")
        (commands / "sbatch").chmod(0o755)
        return commands

    return wrap


@pytest.mark.parametrize(
    "script",
    [
        'echo "Welcome, 55 jobs"; SBATCH "$@"; echo "quota: 12 %"',
        'SBATCH "$@" | sed "s/^/Submitted batch job /"; echo',
        'SBATCH "$@"; echo "sbatch: lua: project charged" >&2',
    ],
)
async def test_text_around_a_job_number_is_ignored(
    make: Make, slurm_site: SlurmSite, sbatch: Callable[[str], Path], script: str
) -> None:
    backend, talked = make(commands=sbatch(script), default_script="sleep 300"), pilot("talked")
    reference = (await backend.submit([talked]))[talked.stamp].reference
    assert slurm_site.command("squeue", "-h", "-n", talked.stamp, "-o", "%i").split() == [reference]
    assert (await backend.submit([talked]))[talked.stamp].reference == reference
    await backend.cancel([talked])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('SBATCH "$@"; echo 7', r"not the number of a job: .*7"),
        ('echo Job; SBATCH "$@" | sed "s/^/Number /"', r"not the number of a job: .*Number \d"),
        # It fails when there is a job.
        ('SBATCH "$@"; echo "sbatch: error: cli_filter plugin terminated with error" >&2; exit 1', "cli_filter"),
        ('SBATCH "$@"; exit 73', r"\d"),
    ],
)
async def test_output_without_a_job_number_is_quoted_and_the_job_is_found_in_the_queue(
    make: Make, slurm_site: SlurmSite, sbatch: Callable[[str], Path], script: str, words: str
) -> None:
    backend, talked = make(commands=sbatch(script), default_script="sleep 300"), pilot("talked")
    with pytest.raises(CEUnavailableError, match=f"sbatch: {words}"):
        await backend.submit([talked])
    (number,) = slurm_site.command("squeue", "-h", "-n", talked.stamp, "-o", "%i").split()
    assert (await backend.submit([talked]))[talked.stamp].reference == number
    await backend.cancel([talked])


async def test_a_time_out_of_sbatch_does_not_affect_other_submissions_of_the_call(
    make: Make, sbatch: Callable[[str], Path], tmp_path: Path
) -> None:
    timed_out = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    script = f"""case $* in *--job-name=first*) echo "{timed_out}" >&2; exit 1 ;; esac
case $* in *--job-name=bad*) set -- "$@" --partition=nowhere ;; esac
SBATCH "$@" || exit"""
    commands = sbatch(script)
    backend = make(commands=commands, default_script="sleep 300", concurrent_submissions=2)
    pilots = [pilot("first"), pilot("bad"), *(pilot(f"good{number}") for number in range(10))]
    outcomes = await backend.submit(pilots)
    assert set(outcomes) == {each.stamp for each in pilots[1:]}
    assert "invalid partition" in str(outcomes[pilots[1].stamp].error)
    assert all(outcomes[each.stamp].reference for each in pilots[2:])
    assert "Socket timed out" in str(backend.warning)
    await backend.cancel(pilots)


async def test_no_further_submissions_are_tried_at_a_site_that_does_not_respond(
    make: Make, sbatch: Callable[[str], Path], tmp_path: Path
) -> None:
    commands = sbatch(f"echo . >> {tmp_path}/calls; echo down >&2; exit 1")
    with pytest.raises(CEUnavailableError, match="sbatch: down"):
        await make(commands=commands, concurrent_submissions=2).submit([pilot(f"s{n}") for n in range(40)])
    assert len((tmp_path / "calls").read_text().splitlines()) < 12


async def test_submissions_before_the_time_limit_of_the_call_are_known(
    make: Make, sbatch: Callable[[str], Path]
) -> None:
    backend = make(
        commands=sbatch('case $* in *--job-name=slow*) exec sleep 300 ;; esac\nSBATCH "$@"'),
        default_script="sleep 300",
        concurrent_submissions=2,
    )
    fast, slow = [pilot(f"fast{number}") for number in range(4)], [pilot(f"slow{number}") for number in range(4)]
    call = asyncio.create_task(backend.submit([*fast, *slow]))
    await until(lambda: len(backend.outcomes) == len(fast))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert call.cancelled()
    assert set(backend.outcomes) == {each.stamp for each in fast}
    assert all(outcome.reference for outcome in backend.outcomes.values())
    await backend.cancel(fast)


async def test_an_invalid_stored_job_number_is_replaced_by_the_next_submission(
    make: Make, slurm_site: SlurmSite, tmp_path: Path
) -> None:
    backend, healed = make(default_script="sleep 300"), pilot("healed")
    number = (await backend.submit([healed]))[healed.stamp].reference
    (tmp_path / "pilots" / healed.stamp / "id").write_text("Welcome\nNo jobs, 3 nodes\n")
    assert (await backend.submit([healed]))[healed.stamp].reference == number
    await backend.cancel([healed])


async def test_a_message_of_sbatch_on_stdout_is_quoted(make: Make, sbatch: Callable[[str], Path]) -> None:
    with pytest.raises(CEUnavailableError, match="sbatch: no budget is left"):
        await make(commands=sbatch("echo no budget is left; exit 1")).submit([pilot("x")])


async def test_a_refused_pilot_has_a_reason_and_leaves_no_files(make: Make, tmp_path: Path) -> None:
    nowhere, greedy = pilot("nowhere"), pilot("greedy")
    outcomes = await make(partition="nowhere").submit([nowhere])
    assert outcomes[nowhere.stamp] == (await make(partition="nowhere").submit([nowhere]))[nowhere.stamp]
    assert str(outcomes[nowhere.stamp].error).startswith("Slurm: ")
    assert "Invalid partition name specified" in str(outcomes[nowhere.stamp].error)
    outcome = (await make(extra_options=["--frobnicate"]).submit([greedy]))[greedy.stamp]
    assert outcome.reference is None
    assert outcome.error
    assert await make().poll([nowhere, greedy]) == {}
    assert list((tmp_path / "pilots").iterdir()) == []


async def test_a_command_that_cannot_be_started_removes_no_directory_of_a_pilot(
    make: Make, slurm_site: SlurmSite
) -> None:
    class Full(LocalShell):
        async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 0) -> Completed:
            if old.stamp in argv:
                raise NothingDoneError("no more processes")
            return await super().run(argv, stdin=stdin, timeout=timeout)

    backend, old, new = make(default_script="sleep 300"), pilot("old"), pilot("new")
    reference = (await backend.submit([old]))[old.stamp].reference
    shell = Full(inherited_environment() | {"SLURM_CONF": str(slurm_site.slurm_conf)})
    full = SlurmBackend(backend.ce, make(partition="nowhere").settings, shell)
    outcomes = await full.submit([old, new])
    assert "no more processes" in str(outcomes[old.stamp].error)
    assert "Invalid partition name specified" in str(outcomes[new.stamp].error)
    assert (await backend.submit([old]))[old.stamp].reference == reference
    await backend.cancel([old])


async def test_an_empty_queue_is_no_failure_whatever_its_wrapper_reports(make: Make, tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text(
        f'#!/bin/sh\n{shutil.which("squeue")} "$@" --user=nobody\n'
        "echo 'squeue: error: Unable to contact the primary controller' >&2\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    assert await make(commands=tmp_path).queue([]) == {}


async def test_a_message_in_place_of_the_queue_is_not_an_empty_queue(make: Make, tmp_path: Path) -> None:
    for name, does in (("squeue", "echo Maintenance on Tuesday"), ("sbatch", f"touch {tmp_path}/called")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    backend, ours = make(commands=tmp_path), pilot("ours")
    (backend.settings.directory / ours.stamp).mkdir(parents=True)
    (backend.settings.directory / ours.stamp / "tried").touch()
    for call in (backend.poll, backend.cancel, backend.submit):
        with pytest.raises(CEUnavailableError, match="Maintenance on Tuesday"):
            await call([ours])
    assert not (tmp_path / "called").exists()


async def test_a_refused_cancellation_of_slurm_is_a_warning(
    make: Make, slurm_site: SlurmSite, tmp_path: Path
) -> None:
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "squeue").symlink_to(shutil.which("squeue") or "")
    (commands / "scancel").write_text(
        f'#!/bin/sh\nexec setpriv --reuid=65534 --regid=65534 --clear-groups {shutil.which("scancel")} "$@"\n'
    )
    (commands / "scancel").chmod(0o755)
    backend, ours = make(default_script="sleep 300"), pilot("ours")
    await backend.submit([ours])
    slurm_site.directory.chmod(0o755)
    try:
        strange = make(commands=commands)
        await strange.cancel([ours])
    finally:
        slurm_site.directory.chmod(0o700)
    assert "scancel: " in str(strange.warning)
    assert "permission denied" in str(strange.warning)
    await backend.cancel([ours])
    await observe(backend, ours, *ENDED)
    assert backend.warning is None


async def test_a_waiting_pilot_has_its_reason_and_can_be_cancelled(make: Make, slurm_site: SlurmSite) -> None:
    settings = {
        "partition": "long",
        "cpus": 2,
        "memory_mb": 300,
        "wall_minutes": 7,
        "extra_options": ["--begin=now+1hour"],
    }
    backend, waiting = make(**settings), pilot("waiting")
    number = (await backend.submit([waiting]))[waiting.stamp].reference
    seen = await observe(backend, waiting, Observed.WAITING)
    assert seen.reason in {"Slurm: BeginTime", None}  # None: the scheduler has not looked yet
    shown = slurm_site.command("scontrol", "show", "job", str(number))
    for expected in ("Partition=long", "NumCPUs=2", "MinMemoryNode=300M", "TimeLimit=00:07:00", "Requeue=0"):
        assert expected in shown
    assert f"Comment={waiting.stamp}" in shown
    await backend.cancel([waiting])
    assert (await observe(backend, waiting, *ENDED))[:2] == (Observed.FAILED, "cancelled")


async def test_a_pilot_cancelled_by_the_site_has_this_reason(make: Make, slurm_site: SlurmSite) -> None:
    backend, victim = make(default_script="sleep 300"), pilot("victim")
    number = (await backend.submit([victim]))[victim.stamp].reference
    await observe(backend, victim, Observed.RUNNING)
    slurm_site.command("scancel", str(number))
    seen = await observe(backend, victim, *ENDED)
    assert seen.state is Observed.FAILED
    assert "cancelled at the site" in str(seen.reason)


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_pilots_get_their_own_script_and_environment_and_no_secrets(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", "mysql://root:secret@db")
    python = "#!/usr/bin/env python3\nimport os\nprint(dict(os.environ))"
    backend = make(scripts={"lhcb": python}, default_script="env", environment={"EXTRA": "it's $HOME"})
    ours, others = pilot("a", "lhcb"), pilot("b")
    await backend.submit([ours, others])
    for each in (ours, others):
        await observe(backend, each, Observed.DONE)
    output = (await backend.output(ours)).stdout
    for expected in ("'PILOT_VO': 'lhcb'", f"'PILOT_STAMP': '{ours.stamp}'", "'PILOT_CE': 'slurm'", "it's $HOME"):
        assert expected in output
    assert "secret" not in output
    assert "PILOT_VO=vo\n" in (await backend.output(others)).stdout


async def test_an_unavailable_site_is_named(make: Make, tmp_path: Path) -> None:
    with pytest.raises(CEUnavailableError, match="squeue cannot be started: No such file"):
        await make(commands=tmp_path, slurm_conf=None).poll([pilot("x")])
    (tmp_path / "file").touch()
    refused = pilot("x")
    # Nothing has been submitted: that is known at once.
    outcome = (await make(directory=tmp_path / "file").submit([refused]))[refused.stamp]
    assert "File exists" in str(outcome.error)


@pytest.mark.parametrize(("keep", "left"), [("none", set()), ("failed", {"f"}), ("all", {"d", "f"})])
async def test_directories_are_kept_as_configured(make: Make, tmp_path: Path, keep: str, left: set[str]) -> None:
    for stamp in ("d", "f"):
        (tmp_path / "pilots" / stamp).mkdir(parents=True)
    await make(keep=keep).cleanup(ended(d=MyPilotStatus.DONE, f=MyPilotStatus.FAILED))
    assert {path.name for path in (tmp_path / "pilots").iterdir()} == left


async def test_directories_are_deleted_after_the_configured_time(make: Make, tmp_path: Path) -> None:
    for stamp in ("old", "new", "active", "unlisted", "never"):
        (tmp_path / "pilots" / stamp).mkdir(parents=True)
    await make().cleanup(ended(old=MyPilotStatus.FAILED, new=MyPilotStatus.FAILED))
    # As a check leaves it whose tidying has failed: it is done once.
    for stamp, mark, days in (("old", "ended", 8), ("unlisted", "rc", 36), ("never", "rc", 38)):
        before = time.time() - days * 24 * 3600
        (tmp_path / "pilots" / stamp / mark).touch()
        os.utime(tmp_path / "pilots" / stamp / mark, (before, before))
    await make().cleanup(ended(new=MyPilotStatus.FAILED))
    assert {path.name for path in (tmp_path / "pilots").iterdir()} == {"new", "active", "unlisted"}
