"""Where a server of the tests may listen."""

from __future__ import annotations

__all__ = ["free_port"]

import contextlib
import random
import socket


def free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections. Of those, a client that keeps trying to
    reach a stopped server would get the server's own some day, and be connected to itself."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
