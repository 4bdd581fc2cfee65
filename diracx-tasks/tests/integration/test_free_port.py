"""Servers of tests: their ports, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from diracx.tasks.testing.server import free_port
from redis import Redis
from redis.exceptions import ConnectionError
from support.waiting import eventually

_PORTS = range(14_000, 14_008)
_HOLDER = f"from diracx.tasks.testing.server import free_port; print(free_port({_PORTS!r}), flush=True); input()"


@pytest.mark.skipif(sys.platform != "linux", reason="ports are reserved on Linux only")
def test_no_two_processes_are_given_the_same_port() -> None:
    holders = []
    try:
        for _ in _PORTS[:4]:
            command = [sys.executable, "-c", _HOLDER]
            holders.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        given = [int(holder.stdout.readline()) for holder in holders if holder.stdout]
        given += [free_port(_PORTS) for _ in range(3)]
        assert len(set(given)) == 7
    finally:
        for holder in holders:
            holder.communicate("\n")


_WITHOUT_FILES = """
import os, resource
from diracx.tasks.testing.server import EmbeddedServerError, free_port
last = os.dup(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))
os.close(last)  # for the probe; none is left for the reservation
try:
    free_port()
except EmbeddedServerError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ports are reserved on Linux only")
def test_an_error_that_no_other_port_avoids_ends_the_search() -> None:
    command = [sys.executable, "-c", _WITHOUT_FILES]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True
    )
    assert "cannot listen on 127.0.0.1: [Errno 24] Too many open files" in done.stdout


_SERVING = "from diracx.tasks.testing import embedded_redis\nwith embedded_redis() as url: print(url); input()"


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_an_embedded_server_ends_with_a_process_that_is_killed(tmp_path: Path, sent: signal.Signals) -> None:
    command = [sys.executable, "-u", "-c", _SERVING]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout
        redis = Redis.from_url(process.stdout.readline().decode().strip())
        assert redis.ping()
        process.send_signal(sent)
    eventually(lambda: not list(tmp_path.iterdir()), "its data are removed")
    with redis, pytest.raises(ConnectionError):
        redis.ping()
