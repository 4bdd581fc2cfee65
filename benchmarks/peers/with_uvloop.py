"""Runs a peer's own command on uvloop: `python -m benchmarks.peers.with_uvloop PROGRAM ARGUMENTS…`.

For systems that leave the choice of the event loop to the program that starts them.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import uvloop


def main() -> None:
    uvloop.install()
    sys.argv = sys.argv[1:]
    runpy.run_path(str(Path(sys.executable).with_name(sys.argv[0])), run_name="__main__")


if __name__ == "__main__":
    main()
