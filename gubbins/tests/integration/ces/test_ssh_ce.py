"""Back end `ssh` with a real sshd."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError
from support.pilot_waiters import ENDED, ended, observe, written
from support.recorded_starts import PilotDirectories
from support.sites.sshd import Sshd
from support.waiting import until

from gubbins.ces import CEDescription, NothingDoneError, Observed, PilotAtCE
from gubbins.ces.ssh import SSHBackend, SSHSettings
from gubbins.ces.transports.shell import Completed
from gubbins.ces.transports.ssh import SSHShell
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus
from gubbins.testing.ce_conformance import CERemoteConformance, MakeBackend, Scenario

pytestmark = pytest.mark.event_loops("uvloop")

Make = Callable[..., SSHBackend]


class TestConformance(PilotDirectories, CERemoteConformance):
    pause_seconds: ClassVar[float] = 0.15  # each poll opens a connection

    @pytest.fixture
    def make(self, sshd: Sshd, tmp_path: Path) -> MakeBackend:
        scripts = self.scripts(tmp_path)
        settings = sshd.settings | {"connect_timeout_seconds": 3, "command_timeout_seconds": 5}

        def make(scenario: Scenario) -> SSHBackend:
            return SSHBackend(
                CEDescription("host", 100, 1.0),
                SSHSettings(
                    **settings, workdir=str(tmp_path / "pilots"), default_script=scripts[scenario], keep="all"
                ),
            )

        return make

    @pytest.fixture
    def down(self, sshd: Sshd) -> AbstractContextManager[object]:
        return sshd.down()

    @pytest.fixture
    def hanging(self, sshd: Sshd) -> AbstractContextManager[object]:
        return sshd.frozen()


class TestConformanceOfCsh(TestConformance):
    """The same promises on a host where the user has tcsh that prints at each log-in."""

    many = 10

    @pytest.fixture
    def sshd(self, csh_sshd: Sshd) -> Sshd:
        return csh_sshd

    @pytest.fixture
    def unreadable(self) -> None:
        """Not supported: the host has its own mounts, and does not see those of the test."""

    @pytest.fixture
    def uncertain(self) -> None:
        """Not supported, as `unreadable`."""


@pytest.fixture
async def make(sshd: Sshd, tmp_path: Path) -> AsyncIterator[Make]:
    """A new back end each time, as after a restart of the worker; all are closed with the test, which takes
    its pilots with it."""
    made: list[SSHBackend] = []

    def _make(name: str = "ce", **settings: Any) -> SSHBackend:
        values = sshd.settings | {"workdir": str(tmp_path / "pilots"), "keep": "all"} | settings
        made.append(SSHBackend(CEDescription(name, 10, 1.0), SSHSettings(**values)))
        return made[-1]

    yield _make
    for pid in (tmp_path / "pilots").glob("*/pid"):
        if not pid.is_file() or pid.stat().st_size > 512:
            continue  # a hostile pilot's
        number = pid.read_text().split()[0]
        if number.isdecimal() and _is_wrapper(int(number), pid.parent):
            os.killpg(int(number), signal.SIGKILL)
    for backend in made:
        await backend.close()


def wrapper_of(directory: Path) -> int:
    return int((directory / "pid").read_text().split()[0])


async def test_the_exit_code_determines_the_state_and_the_last_line_is_the_reason(
    make: Make, tmp_path: Path
) -> None:
    scripts = {
        "good": 'echo "$PILOT_VO $PILOT_STAMP $PILOT_CE $EXTRA"',
        "bad": r"printf 'no\nluck\n \t\n\n' >&2; exit 3",
    }
    pilots = [PilotAtCE("s1", "good"), PilotAtCE("s2", "bad")]
    outcomes = await make(scripts=scripts, environment={"EXTRA": "x"}).submit(pilots)
    good = await observe(make(), pilots[0], *ENDED)
    bad = await observe(make(), pilots[1], *ENDED)
    assert (good.state, good.reason, good.reference) == (Observed.DONE, None, outcomes["s1"].reference)
    assert (bad.state, bad.reason) == (Observed.FAILED, "exit code 3: luck")
    assert (await make().output(pilots[0])).stdout == "good s1 ce x\n"
    assert (await make().output(pilots[1])).stderr == "no\nluck\n \t\n\n"


async def test_the_default_workdir_is_below_the_home_directory_there(make: Make, sshd: Sshd) -> None:
    pilot = PilotAtCE("home", "vo")
    await make(name="ce.1", workdir="", default_script="pwd").submit([pilot])
    await observe(make(name="ce.1", workdir=""), pilot, Observed.DONE)
    directory = sshd.home / ".local/state/gubbins/ce.1/home"
    assert (directory / "stdout").read_text() == f"{directory}/work\n"
    assert directory.stat().st_mode & 0o77 == 0  # not readable by others


async def test_a_script_runs_with_the_interpreter_of_its_first_line(make: Make) -> None:
    await make(default_script="#!/usr/bin/env python3\nprint(6 * 7)").submit([PilotAtCE("s", "vo")])
    await observe(make(), PilotAtCE("s", "vo"), Observed.DONE)
    assert (await make().output(PilotAtCE("s", "vo"))).stdout == "42\n"


HOSTILE = (
    "'; touch {0}/owned; '",
    '"$(touch {0}/owned)`touch {0}/owned`',
    "two\nlines\n}}\ntouch {0}/owned\n",
    "\\' \\\" $HOME %s %n * ~ ! \t\r é 🚀 -n",
    "",
)


@pytest.mark.parametrize("template", HOSTILE)
async def test_values_reach_the_pilot_as_they_are_and_run_nothing(
    make: Make, tmp_path: Path, template: str
) -> None:
    value = template.format(tmp_path)
    workdir = tmp_path / "pilots" / f"w{value.replace('/', '_')}"
    script = f'printf "%s|%s|%s" "$PILOT_VO" "$PILOT_CE" "$EXTRA"\n# {value!r}'
    settings = {"workdir": str(workdir), "environment": {"EXTRA": value}, "scripts": {value: script}}
    pilot = PilotAtCE("s", value)
    backend = make(name=value, **settings)
    assert (await backend.submit([pilot]))["s"].error is None
    await observe(backend, pilot, Observed.DONE)
    assert (await backend.output(pilot)).stdout == f"{value}|{value}|{value}"
    assert (workdir / "s" / "script").read_text() == f"#!/bin/sh\n{script}\n"
    await backend.cleanup(ended(s=MyPilotStatus.DONE))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("stamp", ["", ".", "..", "../x", "-rf", "a b", "a;b", "$(id)", "a\nb", "é", "x" * 200])
async def test_a_stamp_that_is_not_a_file_name_is_refused(make: Make, tmp_path: Path, stamp: str) -> None:
    good, bad = PilotAtCE("good", "vo"), PilotAtCE(stamp, "vo")
    backend = make(default_script="exit 0")
    outcomes = await backend.submit([bad, good])
    assert outcomes[stamp].error
    assert outcomes["good"].reference
    await backend.cancel([bad])
    await observe(backend, good, Observed.DONE)
    assert set(await backend.poll([bad, good])) == {"good"}
    await backend.cleanup([bad._replace(status=MyPilotStatus.DONE)])
    with pytest.raises(OutputUnavailableError):
        await backend.output(bad)
    assert [path.name for path in (tmp_path / "pilots").iterdir()] == ["good"]


async def test_output_and_directory_of_login_scripts_are_ignored(make: Make, sshd: Sshd) -> None:
    # bash, for one, reads this file when sshd starts it.
    profile = sshd.home / ".bashrc"
    profile.write_text("cd /; echo 'Welcome!'; echo end; echo 'ended s 0 0'; printf 'no line break'\n")
    try:
        pilot = PilotAtCE("s", "vo")
        backend = make(workdir="below/home", keep="none", default_script="echo out; exit 1")
        await backend.submit([pilot])
        assert (await observe(backend, pilot, *ENDED)).state is Observed.FAILED
        assert (await backend.output(pilot)).stdout == "out\n"
        await backend.cleanup(ended(s=MyPilotStatus.FAILED))
        assert list((sshd.home / "below/home").iterdir()) == []
    finally:
        profile.unlink()


async def test_a_pilot_that_ignores_sigterm_is_killed_by_a_later_request(make: Make, tmp_path: Path) -> None:
    script = f"trap '' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    pilot = PilotAtCE("s", "vo")
    backend = make(default_script=script, kill_after_seconds=1)
    await backend.submit([pilot])
    await until((tmp_path / "ready").exists)
    await backend.cancel([pilot])
    # It stays RUNNING, and keeps its slot, for as long as it really runs.
    assert (await backend.poll([pilot]))["s"].state is Observed.RUNNING
    deadline = time.monotonic() + 30
    while (seen := (await backend.poll([pilot]))["s"]).state is Observed.RUNNING:
        assert time.monotonic() < deadline
        await backend.cancel([pilot])
    assert (seen.state, seen.reason) == (Observed.FAILED, "cancelled")


async def test_a_pilot_with_a_killed_wrapper_fails_after_its_last_process(make: Make, tmp_path: Path) -> None:
    pilot = PilotAtCE("s", "vo")
    await make(default_script=f"echo $$ > {tmp_path}/child; exec sleep 300").submit([pilot])
    await until(lambda: written(tmp_path / "child"))
    os.kill(wrapper_of(tmp_path / "pilots" / "s"), signal.SIGKILL)
    for _ in range(3):
        assert (await make().poll([pilot]))["s"].state is Observed.RUNNING
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    seen = await observe(make(), pilot, *ENDED)
    assert (seen.state, seen.reason) == (Observed.FAILED, "the process vanished without an exit code")


async def test_processes_of_a_killed_wrapper_can_be_cancelled(make: Make, tmp_path: Path) -> None:
    pilot = PilotAtCE("s", "vo")
    await make(default_script="sleep 300").submit([pilot])
    await observe(make(), pilot, Observed.RUNNING)
    await until((tmp_path / "pilots" / "s" / "stdout").exists)
    os.kill(wrapper_of(tmp_path / "pilots" / "s"), signal.SIGKILL)
    await make().cancel([pilot])
    assert (await observe(make(), pilot, *ENDED)).reason == "cancelled"


def _pid_file(tmp_path: Path, **fields: Any) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = {"pid": os.getpid(), "start": 1, "boot": boot_id, "host": os.uname().nodename} | fields
    (tmp_path / "pilots" / "s").mkdir(parents=True)
    line = f"{known['pid']} {known['start']} {known['boot']} {known['host']}\n"
    (tmp_path / "pilots" / "s" / "pid").write_text(line)


@pytest.mark.parametrize(
    ("fields", "state", "reason"),
    [
        ({}, Observed.FAILED, "the process vanished without an exit code"),  # the number of another process
        ({"boot": "another"}, Observed.FAILED, "the host was restarted while it ran"),
        ({"host": "twin"}, Observed.NO_NEWS, "it runs on twin, but 127.0.0.1 is another host now"),
    ],
)
async def test_a_reused_pid_is_not_mistaken_for_the_pilot_after_a_reboot_or_on_another_host(
    make: Make, tmp_path: Path, fields: dict[str, Any], state: Observed, reason: str | None
) -> None:
    _pid_file(tmp_path, **fields)
    pilot = PilotAtCE("s", "vo")
    seen = (await make().poll([pilot]))["s"]
    assert (seen.state, seen.reason) == (state, reason)
    await make(kill_after_seconds=0).cancel([pilot])  # and we are still here


@pytest.mark.parametrize("pid", ["", "0", "1", "-1", "01", "x", "1;id"])
async def test_a_process_of_another_pilot_is_never_signalled(make: Make, tmp_path: Path, pid: str) -> None:
    _pid_file(tmp_path, pid=pid)
    # As if it had not been written; only that is ever signalled which is RUNNING.
    assert (await make().poll([PilotAtCE("s", "vo")]))["s"].state is Observed.WAITING


async def test_an_incomplete_record_of_a_process_counts_as_missing(make: Make, tmp_path: Path) -> None:
    _pid_file(tmp_path)
    file, pilot = tmp_path / "pilots" / "s" / "pid", PilotAtCE("s", "vo")
    for end in range(len(line := file.read_text())):
        file.write_text(line[:end])
        assert (await make().poll([pilot]))["s"].state is Observed.WAITING


async def test_a_directory_without_a_process_was_never_started(make: Make, tmp_path: Path) -> None:
    (tmp_path / "pilots" / "s").mkdir(parents=True)
    pilot = PilotAtCE("s", "vo")
    assert (await make().poll([pilot]))["s"].state is Observed.WAITING
    seen = (await make(start_seconds=0).poll([pilot]))["s"]
    assert (seen.state, seen.reason) == (Observed.FAILED, "the pilot process was never started")


@pytest.mark.event_loops("asyncio", "uvloop")
async def test_a_lost_connection_changes_no_state_and_the_next_call_reconnects(
    make: Make, sshd: Sshd, tmp_path: Path
) -> None:
    pilots = [PilotAtCE(f"s{number}", "vo") for number in range(200)]
    backend = make(default_script="sleep 300")
    await backend.poll(pilots)  # connected
    submission = asyncio.ensure_future(backend.submit(pilots))
    await until(lambda: any((tmp_path / "pilots").glob("*/pid")))
    sshd.cut()
    with pytest.raises(CEUnavailableError, match=f"127.0.0.1:{sshd.port}: .* while /bin/sh was running"):
        await submission
    # Each of them runs or does not, and submitting them again changes nothing for those that do.
    before = await backend.poll(pilots)
    outcomes = await backend.submit(pilots)
    assert all(outcome.reference for outcome in outcomes.values())
    await asyncio.gather(*(observe(backend, pilot, Observed.RUNNING) for pilot in pilots[:3] + pilots[-3:]))
    assert {seen.state for seen in before.values()} <= {Observed.WAITING, Observed.RUNNING}


async def test_a_bulk_call_uses_one_connection(make: Make, sshd: Sshd) -> None:
    pilots = [PilotAtCE(f"s{number}", f"vo{number % 7}") for number in range(50)]
    backend = make(default_script="exit 0", pilots_per_command=3)
    logged_in = sshd.logins()
    await backend.submit(pilots)
    await asyncio.gather(*(observe(backend, pilot, Observed.DONE) for pilot in pilots))
    assert sshd.logins() == logged_in + 1


async def test_a_poll_keeps_what_it_knows_when_a_later_command_fails(make: Make, sshd: Sshd) -> None:
    pilots = [PilotAtCE(f"s{number}", "vo") for number in range(9)]
    backend = make(default_script="exit 0", pilots_per_command=3)
    await backend.submit(pilots)
    await asyncio.gather(*(observe(backend, pilot, Observed.DONE) for pilot in pilots))
    with ExitStack() as until_the_end:

        class Dying(SSHShell):
            async def run(
                self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float | None = None
            ) -> Completed:
                done = await super().run(argv, stdin=stdin, timeout=timeout)
                await self.close()
                until_the_end.enter_context(sshd.down())
                return done

        dying = SSHBackend(backend.ce, backend.settings, Dying(backend.settings))
        seen = await dying.poll(pilots)
        assert [seen[pilot.stamp].state for pilot in pilots] == [Observed.DONE] * 3 + [Observed.NO_NEWS] * 6
        assert "no SSH connection" in str(dying.warning)
        with pytest.raises(CEUnavailableError, match="no SSH connection"):
            await dying.poll(pilots)


async def test_directories_are_kept_as_configured_and_for_the_configured_time(make: Make, tmp_path: Path) -> None:
    def left() -> set[str]:
        return {path.name for path in (tmp_path / "pilots").iterdir()}

    for stamp in ("done", "failed", "other"):
        (tmp_path / "pilots" / stamp).mkdir(parents=True)
        (tmp_path / "pilots" / stamp / "script").touch()
    ends = ended(done=MyPilotStatus.DONE, failed=MyPilotStatus.FAILED)
    await make(keep="failed", keep_days=1 / 24).cleanup(ends)
    assert left() == {"failed", "other"}
    long_ago = time.time() - 3700
    os.utime(tmp_path / "pilots" / "failed" / "ended", (long_ago, long_ago))
    await make(keep="failed", keep_days=2 / 24).cleanup(ends + ended(unknown=MyPilotStatus.FAILED))
    assert left() == {"failed", "other"}
    os.utime(tmp_path / "pilots" / "failed" / "ended", (long_ago, long_ago))
    await make(keep="failed", keep_days=1 / 24).cleanup(ended(other=MyPilotStatus.FAILED))
    assert left() == {"other"}
    await make(keep="none").cleanup(ended(other=MyPilotStatus.FAILED))
    assert left() == set()


async def test_a_command_that_cannot_be_started_is_refused_with_the_error_of_the_host(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NothingDoneError, match="Not a directory"):
        await make(workdir=str(tmp_path / "file" / "below")).submit([PilotAtCE("s", "vo")])
    (tmp_path / "pilots").mkdir()
    (tmp_path / "pilots" / "s").touch()
    outcomes = await make().submit([PilotAtCE("s", "vo"), PilotAtCE("t", "vo")])
    assert "File exists" in str(outcomes["s"].error)
    assert outcomes["t"].reference


async def test_without_the_workdir_only_unconfirmed_pilots_are_unknown(make: Make) -> None:
    new = PilotAtCE("s", "vo")
    assert await make().poll([new]) == {}
    await make().cancel([new])
    with pytest.raises(CEUnavailableError, match="cannot enter"):
        await make().poll([new._replace(reference="ssh://host/s")])


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "-oProxyCommand=x"},
        {"host": "a b"},
        {"username": "-l"},
        {"known_hosts": "relative"},
        {"client_keys": ["relative"]},
        {"password": "secret"},
        {"environment": {"A B": "x"}},
        {"environment": {"A": "\0"}},
        {"default_script": "\0"},
        {"workdir": "a\0b"},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SSHSettings(**({"host": "host"} | wrong))


def test_only_operators_create_compute_elements_of_this_back_end() -> None:
    assert SSHBackend.operator_only


def _is_wrapper(pid: int, directory: Path) -> bool:
    """Beyond doubt: a signal to the wrong group, above all to that of the number 1, would end everything."""
    try:
        return pid > 1 and os.getpgid(pid) == pid and os.readlink(f"/proc/{pid}/cwd") == str(directory)
    except OSError:
        return False


def _link(path: Path) -> None:
    (path.parent.parent.parent / "secret").write_text("the owner's secret")
    path.symlink_to(path.parent.parent.parent / "secret")


def _endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk


@pytest.mark.parametrize(
    "put", [_link, os.mkfifo, Path.mkdir, _endless], ids=["link", "fifo", "directory", "endless"]
)
@pytest.mark.timeout(120)
async def test_files_of_a_pilot_cannot_block_or_mislead_a_read(
    make: Make, tmp_path: Path, put: Callable[[Path], None]
) -> None:
    names = ("stdout", "stderr", "rc", "pid", "cancelled", "ended")
    stamps = [f"s-{name}" for name in names]
    for stamp, name in zip(stamps, names, strict=True):
        job = tmp_path / "pilots" / stamp
        job.mkdir(parents=True)
        if name != "rc":
            (job / "rc").write_text("3\n")
        put(job / name)
    backend = make(kill_after_seconds=0, command_timeout_seconds=20)
    pilots = [PilotAtCE(stamp, "vo", status=MyPilotStatus.FAILED) for stamp in stamps]
    seen = await backend.poll(pilots)
    assert {stamp for stamp in stamps if seen[stamp].state is Observed.FAILED} == {*stamps} - {"s-rc"}
    assert not any("secret" in (each.reason or "") for each in seen.values())
    for _ in range(2):
        await backend.cancel(pilots)
    for pilot in pilots:
        output = await backend.output(pilot)
        assert "secret" not in output.stdout + output.stderr
    await backend.cleanup(pilots)
    if put is _link:
        assert (tmp_path / "secret").read_text() == "the owner's secret"


async def test_a_pilot_cannot_redirect_its_cancellation_to_another_process_group(
    make: Make, tmp_path: Path
) -> None:
    backend, pilot = make(kill_after_seconds=0, default_script="sleep 300"), PilotAtCE("victim", "vo")
    await backend.submit([pilot])
    await observe(backend, pilot, Observed.RUNNING)
    hostile = tmp_path / "pilots" / "hostile"
    hostile.mkdir()
    (hostile / "pid").write_text((tmp_path / "pilots" / "victim" / "pid").read_text())
    for _ in range(3):
        await backend.cancel([PilotAtCE("hostile", "vo")])
    assert (await backend.poll([pilot]))["victim"].state is Observed.RUNNING
    await backend.cancel([pilot])
    await observe(backend, pilot, *ENDED)
