"""Ends what `dev` started when `dev` itself was killed.

Runs as a plain script with the standard library alone, told by lines on its standard input:
`+PID` a process was started, `-PID` it has ended, `/directory` to be removed at the end. When the input ends
(because whoever wrote to it is gone, however it went), what is left is ended and removed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

_GRACE_SECONDS = 3.0


def _signal(pid: int, number: int) -> bool:
    """Send a signal; False when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _end(pids: list[int]) -> None:
    """SIGTERM, and SIGKILL for what has not ended within the grace period."""
    left = [pid for pid in pids if _signal(pid, signal.SIGTERM)]
    deadline = time.monotonic() + _GRACE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [pid for pid in left if _signal(pid, 0)]
    for pid in left:
        _signal(pid, signal.SIGKILL)


def main() -> None:
    """Read until the end of the input, then clean up."""
    # Ctrl-C is for `dev` to handle, which then ends our input.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pids: list[int] = []
    directories: list[str] = []
    for line in sys.stdin:
        word = line.rstrip("\n")
        if word.startswith("+"):
            pids.append(int(word[1:]))
        elif word.startswith("-"):
            pids.remove(int(word[1:]))
        elif word:
            directories.append(word)
    _end(pids)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
