"""Back end `local` with hostile pilots."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pilot_waiters import ENDED, observe, written
from support.waiting import until

from gubbins.ces import CEDescription, NothingDoneError, Observed, PilotAtCE, make_backend
from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES
from gubbins.domain.pilot_states import MyPilotStatus

SECRET = "the worker's secret"


def make(directory: Path, **settings: Any) -> Any:
    return make_backend("local", CEDescription("ce", 10, 1.0), {"directory": str(directory), **settings})


def _link(path: Path) -> None:
    (path.parent.parent / "secret").write_text(SECRET)
    path.symlink_to(path.parent.parent / "secret")


def _endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk


HOSTILE: dict[str, Callable[[Path], None]] = {
    "link": _link,
    "dangling": lambda path: path.symlink_to("/nowhere"),
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "terminal": lambda path: path.symlink_to("/dev/zero"),
    "endless": _endless,
    "binary": lambda path: path.write_bytes(b"\xff\0" * 10) and None,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["stdout", "stderr", "rc", "pid", "cancelled", "ended"])
@pytest.mark.timeout(30)
async def test_files_of_a_pilot_cannot_block_or_mislead_a_read(tmp_path: Path, kind: str, name: str) -> None:
    job = tmp_path / "s"
    job.mkdir()
    (job / "script").touch()
    if name != "rc":
        (job / "rc").write_text("3\n")
    HOSTILE[kind](job / name)
    backend, pilot = make(tmp_path, kill_after_seconds=0), PilotAtCE("s", "vo", status=MyPilotStatus.FAILED)
    seen = (await backend.poll([pilot]))["s"]
    assert SECRET not in (seen.reason or "")
    for _ in range(2):
        await backend.cancel([pilot])
    output = await backend.output(pilot)
    assert SECRET not in output.stdout + output.stderr
    assert max(map(len, output)) <= OUTPUT_LIMIT_BYTES
    await backend.cleanup([pilot])
    if kind == "link":
        assert (tmp_path / "secret").read_text() == SECRET


async def test_a_link_is_not_a_directory_of_a_pilot(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("stdout", "stderr", "rc"):
        (elsewhere / name).write_text(SECRET)
    ce = tmp_path / "ce"
    ce.mkdir()
    (ce / "s").symlink_to(elsewhere)
    backend, pilot = make(ce, keep="none"), PilotAtCE("s", "vo")
    assert SECRET not in str(await backend.poll([pilot]))
    await backend.cancel([pilot])
    with pytest.raises(Exception, match="its directory does not exist"):
        await backend.output(pilot)
    await backend.cleanup([pilot])
    assert {path.name for path in elsewhere.iterdir()} == {"stdout", "stderr", "rc"}


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """Start a process of another user, in a session of its own."""
    process = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


async def test_a_pilot_cannot_redirect_its_cancellation_to_another_process(
    tmp_path: Path, victim: subprocess.Popen[bytes]
) -> None:
    fields = Path(f"/proc/{victim.pid}/stat").read_text().rpartition(")")[2].split()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "pid").write_text(f"{victim.pid} {fields[19]} {boot_id} {os.uname().nodename}\n")
    backend = make(tmp_path, kill_after_seconds=0)
    for _ in range(3):
        await backend.cancel([PilotAtCE("s", "vo")])
    assert victim.poll() is None


async def test_a_running_pilot_that_claims_to_have_ended_keeps_its_slot(tmp_path: Path) -> None:
    backend, pilot = (
        make(tmp_path, default_script="echo 0 > ../rc; touch ../ready; sleep 300"),
        PilotAtCE("s", "vo"),
    )
    await backend.submit([pilot])
    await until((tmp_path / "s" / "ready").exists)
    assert (await backend.poll([pilot]))["s"].state is Observed.RUNNING
    await backend.cancel([pilot])
    assert (await observe(backend, pilot, *ENDED)).state is Observed.FAILED


async def test_processes_that_an_ended_pilot_leaves_behind_do_not_keep_its_slot(tmp_path: Path) -> None:
    backend, pilot = (
        make(tmp_path, default_script="sleep 300 > /dev/null 2>&1 & echo $! > ../left"),
        PilotAtCE("s", "vo"),
    )
    await backend.submit([pilot])
    try:
        assert (await observe(backend, pilot, *ENDED)).state is Observed.DONE
    finally:
        os.kill(int((tmp_path / "s" / "left").read_text()), signal.SIGKILL)


async def test_no_content_of_the_mark_of_cancelled_pilots_affects_their_cancellation(tmp_path: Path) -> None:
    """Nor that of other pilots; a mark is empty on a full disk, for example."""
    contents = ["", "08\n", "0x1\n", "9" * 30 + "\n", "-5\n", "$(exit 1)\n"]
    pilots = [PilotAtCE(f"s{number}", "vo") for number in range(len(contents) + 1)]
    backend = make(
        tmp_path, default_script="trap 'exit 9' TERM; touch ready; sleep 300 & wait", kill_after_seconds=3600
    )
    await backend.submit(pilots)
    for pilot in pilots:
        await until((tmp_path / pilot.stamp / "work" / "ready").exists)
    for pilot, content in zip(pilots, contents, strict=False):
        (tmp_path / pilot.stamp / "cancelled").write_text(content)
    await backend.cancel(pilots)
    for pilot in pilots:
        assert (await observe(backend, pilot, *ENDED)).reason == "cancelled (exit code 9)"


@pytest.fixture
def common() -> Iterator[Path]:
    """A directory that every user can reach, as an operator makes it for `run_as`."""
    directory = Path(tempfile.mkdtemp(prefix="gubbins-", dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory / "ce"
    shutil.rmtree(directory)


SCRIPT = """
id -u; id -G; echo "$HOME"; umask; pwd
touch mine || echo "cannot write"
for name in ../rc ../pid ../stdout ../script; do (echo 0 > $name) 2> /dev/null && echo "wrote $name"; done
rm -rf ../pid 2> /dev/null || echo "cannot remove"
cat /proc/$PPID/environ > /dev/null 2>&1 && echo "reads the worker's"
sleep 300 & wait
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run pilots as another user")
async def test_pilots_run_as_the_configured_user_without_access_to_the_worker(common: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    backend = make(common, run_as="nobody", default_script=SCRIPT, kill_after_seconds=0.2, keep="none")
    pilot = PilotAtCE("s", "vo")
    outcome = (await backend.submit([pilot]))["s"]
    assert outcome.reference, outcome.error
    await until(lambda: "cannot remove" in written(common / "s" / "stdout"))
    await observe(backend, pilot, Observed.RUNNING)
    lines = (await backend.output(pilot)).stdout.splitlines()
    assert lines == [
        str(nobody.pw_uid),
        str(nobody.pw_gid),
        nobody.pw_dir,
        "0077",
        str(common / "s" / "work"),
        "cannot remove",
    ]
    assert (common / "s" / "work").stat().st_uid == nobody.pw_uid
    await backend.cancel([pilot])
    seen = await observe(backend, pilot, *ENDED)
    assert (seen.reason or "").startswith("cancelled")
    await backend.cleanup([pilot])
    assert not (common / "s").exists()


@pytest.mark.parametrize(
    ("name", "why"), [("nobody-of-that-name", "no such user"), ("root", "is root itself")], ids=["unknown", "root"]
)
@pytest.mark.skipif(os.geteuid() != 0, reason="another worker refuses before it looks")
async def test_an_unusable_user_is_refused_with_the_reason(common: Path, name: str, why: str) -> None:
    with pytest.raises(NothingDoneError, match=why):
        await make(common, run_as=name).submit([PilotAtCE("s", "vo")])
    assert not common.exists()


async def test_a_worker_that_is_not_root_refuses_to_change_the_user(
    common: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NothingDoneError, match="needs a worker that runs as root"):
        await make(common, run_as="nobody").submit([PilotAtCE("s", "vo")])


def test_another_user_needs_a_directory_that_it_can_enter() -> None:
    with pytest.raises(ValueError, match="run_as needs a `directory`"):
        make_backend("local", CEDescription("ce", 1, 1.0), {"run_as": "nobody"})


async def test_many_hostile_pilots_do_not_delay_the_check_of_others(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"s{number}").mkdir()
        for name in ("pid", "rc", "stderr"):
            os.mkfifo(tmp_path / f"s{number}" / name)
    backend, pilot = make(tmp_path), PilotAtCE("well", "vo")
    await backend.submit([pilot])
    async with asyncio.timeout(60):
        hostile = [PilotAtCE(f"s{number}", "vo") for number in range(20)]
        while (await backend.poll([*hostile, pilot]))["well"].state is not Observed.DONE:
            await asyncio.sleep(0.05)
