"""Ports for servers of tests."""

from __future__ import annotations

import subprocess
import sys

import pytest
from diracx.tasks.testing.server import free_port

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
