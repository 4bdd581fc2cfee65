"""Stops the embedded server of `dev` and removes its directory, even if `dev` was killed.

Runs as a script with the standard library alone. Its argument is the directory; the last line of its standard
input is the process id to stop, or empty. It cleans up at the end of the input.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

_GRACE_SECONDS = 3.0


def _end(pid: int) -> None:
    """Send SIGTERM, and SIGKILL after the grace period."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Read until the end of the input, then clean up."""
    for number in (signal.SIGINT, signal.SIGHUP):  # handled by `dev`, which closes the input
        signal.signal(number, signal.SIG_IGN)
    pid = ""
    for line in sys.stdin:
        pid = line.strip()
    if pid:
        _end(int(pid))
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
