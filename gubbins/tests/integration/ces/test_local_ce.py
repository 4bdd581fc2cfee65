"""Back end `local`."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import servers
from support.pilot_waiters import ENDED, alive, ended, observe, written
from support.sites.dead_mount import read_only
from support.waiting import until

from gubbins.ces import CEDescription, NothingDoneError, Observation, Observed, PilotAtCE, make_backend
from gubbins.ces.local import LocalBackend, LocalSettings
from gubbins.ces.transports.shell import Completed, LocalShell
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A new back end each time, as after a restart of the worker."""

    def _make(**settings: Any) -> Any:
        return make_backend("local", CEDescription("ce", 10, 1.0), {"directory": str(tmp_path), **settings})

    return _make


async def test_the_exit_code_determines_the_state_and_survives_a_restart(make: Make, tmp_path: Path) -> None:
    scripts = {"good": 'echo "$PILOT_VO $PILOT_STAMP $PILOT_CE $EXTRA"', "bad": "echo no luck >&2; exit 3"}
    backend = make(scripts=scripts, keep="all", environment={"EXTRA": "x"})
    pilots = [PilotAtCE("s1", "good"), PilotAtCE("s2", "bad")]
    outcomes = await backend.submit(pilots)
    assert all(outcome.reference for outcome in outcomes.values())
    good = await observe(make(), pilots[0], *ENDED)
    bad = await observe(make(), pilots[1], *ENDED)
    assert (good.state, good.reason) == (Observed.DONE, None)
    assert good.reference == outcomes["s1"].reference
    assert (bad.state, bad.reason) == (Observed.FAILED, "exit code 3: no luck")
    assert (tmp_path / "s1" / "stdout").read_text() == "good s1 ce x\n"


async def test_pilots_do_not_inherit_the_workers_secrets(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", "mysql://root:secret@db")
    await make(default_script="env", keep="all").submit([PilotAtCE("s", "vo")])
    await observe(make(), PilotAtCE("s", "vo"), Observed.DONE)
    assert "secret" not in (tmp_path / "s" / "stdout").read_text()


async def test_a_script_runs_with_the_interpreter_of_its_first_line(make: Make, tmp_path: Path) -> None:
    script = "#!/usr/bin/env python3\nprint(6 * 7)"
    await make(default_script=script).submit([PilotAtCE("s", "vo")])
    await observe(make(), PilotAtCE("s", "vo"), Observed.DONE)
    assert (tmp_path / "s" / "stdout").read_text() == "42\n"


async def test_a_repeated_stamp_starts_no_second_pilot(make: Make, tmp_path: Path) -> None:
    backend = make(default_script=f"echo x >> {tmp_path}/count; sleep 0.2")
    first, second = [(await backend.submit([PilotAtCE("s", "vo")]))["s"] for _ in range(2)]
    assert first == second
    await observe(backend, PilotAtCE("s", "vo"), Observed.DONE)
    assert (tmp_path / "count").read_text() == "x\n"


async def test_cancel_ends_the_whole_process_group_and_is_recorded(make: Make, tmp_path: Path) -> None:
    backend = make(default_script=f"sleep 300 & echo $! > {tmp_path}/child; wait")
    pilot = PilotAtCE("s", "vo")
    await backend.submit([pilot])
    await observe(backend, pilot, Observed.RUNNING)
    await until(lambda: written(tmp_path / "child"))
    await make().cancel([pilot])
    seen = await observe(make(), pilot, *ENDED)
    assert seen.state is Observed.FAILED
    assert seen.reason is not None
    assert seen.reason.startswith("cancelled")
    await until(lambda: not alive(int((tmp_path / "child").read_text())))


async def test_a_pilot_that_ignores_sigterm_is_killed_by_a_later_request(make: Make, tmp_path: Path) -> None:
    script = f"trap '' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    backend = make(default_script=script, kill_after_seconds=0.2)
    pilot = PilotAtCE("s", "vo")
    await backend.submit([pilot])
    await until((tmp_path / "ready").exists)
    await backend.cancel([pilot])
    # It stays RUNNING, and keeps its slot, for as long as it really runs.
    assert (await backend.poll([pilot]))["s"].state is Observed.RUNNING
    deadline = time.monotonic() + 20
    while (seen := (await backend.poll([pilot]))["s"]).state is Observed.RUNNING:
        assert time.monotonic() < deadline
        await backend.cancel([pilot])
        await asyncio.sleep(0.05)
    assert (seen.state, seen.reason) == (Observed.FAILED, "cancelled")


async def test_a_pilot_whose_process_has_vanished_fails_with_a_reason(make: Make, tmp_path: Path) -> None:
    backend = make(default_script="sleep 300")
    pilot = PilotAtCE("s", "vo")
    await backend.submit([pilot])
    await observe(backend, pilot, Observed.RUNNING)
    group = int((tmp_path / "s" / "pid").read_text().split()[0])
    assert group > 1
    os.killpg(group, signal.SIGKILL)
    seen = await observe(backend, pilot, *ENDED)
    assert (seen.state, seen.reason) == (Observed.FAILED, "the process vanished without an exit code")


async def test_a_pilot_that_cannot_be_marked_as_cancelled_gets_sigterm_and_is_not_killed(
    make: Make, tmp_path: Path
) -> None:
    script = f"trap 'echo >> {tmp_path}/terms' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    backend, pilot = make(default_script=script), PilotAtCE("s", "vo")
    await backend.submit([pilot])
    await until((tmp_path / "ready").exists)
    with read_only(tmp_path / "s"):
        await backend.cancel([pilot])
        await until((tmp_path / "terms").exists)
        assert "Read-only file system" in backend.warning
        assert (await backend.poll([pilot]))["s"].state is Observed.RUNNING
    await make(kill_after_seconds=0).cancel([pilot])
    assert (await observe(backend, pilot, *ENDED)).reason == "cancelled"


@pytest.fixture
def parent_of_orphans() -> Iterator[None]:
    """Orphaned processes become children of this process, and zombies until it waits for them."""
    set_child_subreaper = 36
    prctl = ctypes.CDLL(None).prctl
    assert prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    yield
    prctl(set_child_subreaper, 0, 0, 0, 0)


class Busybox(LocalShell):
    """Runs our scripts by the shell and the programs of busybox, as on a host with Alpine Linux."""

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        return await super().run(["busybox", "sh", *argv[1:]], stdin=stdin, timeout=timeout)


@pytest.mark.usefixtures("parent_of_orphans")
@pytest.mark.parametrize(("zombie", "shell"), [(True, LocalShell), (False, LocalShell), (False, Busybox)])
async def test_a_pilot_goes_on_without_its_wrapper_and_can_be_cancelled(
    tmp_path: Path, zombie: bool, shell: type[LocalShell]
) -> None:
    if shell is Busybox and (obstacle := servers.obstacle("busybox")) is not None:
        pytest.skip(obstacle)
    settings = LocalSettings(directory=tmp_path, default_script="echo $$ > child; sleep 600 & wait")
    backend = LocalBackend(CEDescription("ce", 10, 1.0), settings, shell())
    pilot = PilotAtCE("s", "vo")
    await backend.submit([pilot])
    child = tmp_path / "s" / "work" / "child"
    await until(lambda: child.exists() and child.read_text().strip(), "it runs")
    wrapper = int((tmp_path / "s" / "pid").read_text().split()[0])
    os.kill(wrapper, signal.SIGKILL)
    os.waitid(os.P_PID, wrapper, os.WEXITED | (os.WNOWAIT if zombie else 0))
    assert (await backend.poll([pilot]))["s"].state is Observed.RUNNING
    await backend.cancel([pilot])

    async def end() -> Observation | None:
        seen = (await backend.poll([pilot]))["s"]
        return None if seen.state is Observed.RUNNING else seen

    assert (await until(end, "it ends"))[:2] == (Observed.FAILED, "cancelled")
    if zombie:
        os.waitpid(wrapper, 0)
    os.waitpid(int(child.read_text()), 0)


async def test_a_reused_pid_is_not_mistaken_for_the_pilot(make: Make, tmp_path: Path) -> None:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "s").mkdir()
    # This test process has that number, and started at another time.
    (tmp_path / "s" / "pid").write_text(f"{os.getpid()} 1 {boot_id} {os.uname().nodename}\n")
    pilot = PilotAtCE("s", "vo")
    assert (await make().poll([pilot]))["s"].state is Observed.FAILED
    await make().cancel([pilot])  # and we are still here


async def test_unknown_pilots_pilots_on_other_hosts_and_unstarted_pilots_are_distinguished(
    make: Make, tmp_path: Path
) -> None:
    elsewhere = PilotAtCE("there", "vo", reference="local://another-host/there")
    unknown = PilotAtCE("nowhere", "vo")
    of_earlier_backend = PilotAtCE("before", "vo", reference="ssh://another-host/before")
    (tmp_path / "s").mkdir()
    stuck = PilotAtCE("s", "vo")
    seen = await make().poll([elsewhere, unknown, of_earlier_backend, stuck])
    assert seen.keys() == {"there", "s"}
    assert seen["there"].state is Observed.NO_NEWS
    assert seen["s"].state is Observed.WAITING
    assert (await make(start_seconds=0).poll([stuck]))["s"].state is Observed.FAILED


@pytest.mark.parametrize(("keep", "left"), [("none", set()), ("failed", {"f"}), ("all", {"d", "f"})])
async def test_directories_are_kept_as_configured(make: Make, tmp_path: Path, keep: str, left: set[str]) -> None:
    for stamp in ("d", "f"):
        (tmp_path / stamp).mkdir()
    await make(keep=keep).cleanup(ended(d=MyPilotStatus.DONE, f=MyPilotStatus.FAILED))
    assert {path.name for path in tmp_path.iterdir()} == left


async def test_directories_are_deleted_after_the_configured_time(make: Make, tmp_path: Path) -> None:
    for stamp in ("old", "new", "active", "unlisted", "never", "foreign"):
        (tmp_path / stamp).mkdir()
        (tmp_path / stamp / ("notes" if stamp == "foreign" else "script")).touch()
    await make().cleanup(ended(old=MyPilotStatus.FAILED, new=MyPilotStatus.FAILED))
    # As a check leaves it whose tidying has failed: it is done once.
    for stamp, mark, days in (
        ("old", "ended", 8),
        ("unlisted", "rc", 36),
        ("never", "rc", 38),
        ("foreign", "rc", 38),
    ):
        before = time.time() - days * 24 * 3600
        (tmp_path / stamp / mark).touch()
        os.utime(tmp_path / stamp / mark, (before, before))
    await make().cleanup(ended(new=MyPilotStatus.FAILED, unknown=MyPilotStatus.FAILED))
    assert {path.name for path in tmp_path.iterdir()} == {"new", "active", "unlisted", "foreign"}
    await make(keep_days=0).cleanup(ended(unknown=MyPilotStatus.FAILED))
    assert {path.name for path in tmp_path.iterdir()} == {"active", "foreign"}


async def test_a_command_that_cannot_be_started_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NothingDoneError, match="Not a directory"):
        await make(directory=str(tmp_path / "file" / "below")).submit([PilotAtCE("s", "vo")])


class LostResponse(LocalShell):
    """A host whose responses are lost."""

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
        await super().run(argv, stdin=stdin, timeout=timeout)
        raise CEUnavailableError("the response is lost")


async def test_a_pilot_whose_start_is_unknown_keeps_its_state(make: Make, tmp_path: Path) -> None:
    pilot = PilotAtCE("s", "vo")
    settings = LocalSettings(directory=tmp_path, default_script=f"echo x >> {tmp_path}/count")
    with pytest.raises(CEUnavailableError, match="the response is lost"):
        await LocalBackend(CEDescription("ce", 10, 1.0), settings, LostResponse()).submit([pilot])
    assert (await observe(make(), pilot, *ENDED)).state is Observed.DONE
    assert (await make().submit([pilot]))["s"].reference
    assert (tmp_path / "count").read_text() == "x\n"
