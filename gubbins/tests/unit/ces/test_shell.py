"""Execution of commands on this host."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from support.pilot_waiters import alive, written
from support.waiting import until

from gubbins.ces.transports.shell import LocalShell
from gubbins.domain.exceptions import CEUnavailableError

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")


async def test_a_command_gets_its_input_and_returns_output_and_exit_code() -> None:
    done = await LocalShell().run(["/bin/sh", "-c", "cat; echo no >&2; exit 4"], stdin=b"hello", timeout=10)
    assert done == (4, "hello", "no\n")


@pytest.mark.parametrize("size_bytes", [0, 1, 1_000_000])
async def test_commands_that_do_not_read_their_input_succeed(size_bytes: int) -> None:
    """Commands may close the pipe before anything is written to it."""
    for _ in range(10):
        runs = (LocalShell().run(["/bin/true"], stdin=b"x" * size_bytes, timeout=60) for _ in range(3))
        assert await asyncio.gather(*runs) == 3 * [(0, "", "")]


async def test_large_input_and_output_pass_at_the_same_time() -> None:
    data = b"0123456789abcde\n" * 200_000
    done = await LocalShell().run(["/bin/sh", "-c", "tee /dev/stderr"], stdin=data, timeout=60)
    assert done == (0, data.decode(), data.decode())


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_command_with_endless_output_is_killed_with_its_children(stream: str, tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/child; exec cat /dev/zero > /dev/{stream}"
    with pytest.raises(CEUnavailableError, match="/bin/sh: a response of more than 1000000 bytes"):
        await LocalShell(max_bytes=1_000_000).run(["/bin/sh", "-c", script], timeout=300)
    await until(lambda: not alive(int(written(tmp_path / "child"))))


@pytest.mark.usefixtures("no_free_thread")
async def test_commands_run_while_calls_of_tasks_occupy_all_threads() -> None:
    assert await LocalShell().run(["/bin/echo", "done"], timeout=10) == (0, "done\n", "")


async def test_binary_output_is_accepted() -> None:
    done = await LocalShell().run(["printf", r"\377x"], timeout=10)
    assert done.stdout == "\ufffdx"


async def test_commands_do_not_inherit_secrets_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRACX_DB_URL_MYPILOTDB", "mysql://root:secret@db")
    assert "secret" not in (await LocalShell().run(["env"], timeout=10)).stdout
    assert (await LocalShell({"A": "1"}).run(["/usr/bin/env"], timeout=10)).stdout == "A=1\n"


async def test_commands_inherit_no_file_descriptors() -> None:
    """A daemon would hold the pipes of its command, and could read the input."""
    done = await LocalShell().run(["/bin/sh", "-c", "ls /proc/$$/fd"], timeout=10)
    assert done.stdout.split() == ["0", "1", "2"]


async def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(CEUnavailableError, match="sbitch cannot be started: No such file"):
        await LocalShell().run(["sbitch"], timeout=10)


async def test_a_command_is_killed_after_the_time_out_with_its_children(tmp_path: Path) -> None:
    script = f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; wait"
    begin = time.monotonic()
    with pytest.raises(CEUnavailableError, match=r"has not responded within 0\.5 s"):
        await LocalShell().run(["/bin/sh", "-c", script], timeout=0.5)
    assert time.monotonic() - begin < 20
    await until(lambda: not alive(int((tmp_path / "child").read_text())))


async def test_a_command_is_abandoned_after_the_time_out_although_a_daemon_holds_its_output(
    tmp_path: Path,
) -> None:
    script = f"setsid sh -c 'echo $$ > {tmp_path}/daemon; exec sleep 300' & sleep 300"
    call = asyncio.ensure_future(LocalShell().run(["/bin/sh", "-c", script], timeout=300))
    await until(lambda: written(tmp_path / "daemon"))
    try:
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(call, 60)
    finally:
        os.kill(int(written(tmp_path / "daemon")), signal.SIGKILL)


async def test_a_cancelled_command_is_killed(tmp_path: Path) -> None:
    call = asyncio.ensure_future(
        LocalShell().run(["/bin/sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 300"], timeout=300)
    )
    await until(lambda: written(tmp_path / "pid"))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: not alive(int((tmp_path / "pid").read_text())))
