"""`python -m model`: search all states, print what was found."""

from __future__ import annotations

import argparse
import sys
import time

from diracx.tasks.testing import embedded_redis

_EPILOG = """\
Two workers, three tasks (two of which want the same mutex), one real server with the real scripts. Every order of
fetch, reclaim, recover, start, settle and renew is tried, with up to N disturbances wherever they can happen: a
worker dies, is paused or cut off, an answer is lost, the server is away for longer than all leases. In every state
each task is in one place or has been settled once, a lock has one holder that acts, no worker that has come back
counts as dead, and what needs no lock has begun once if nothing but the server was away.

Assumed: the clocks of workers and server run at the same rate to within a tenth; a worker that goes on after a
pause looks at its lease before it does anything else; the server does each script whole, and loses nothing.

Exit code: 0 when all of that holds, 1 when not (the steps that lead there are printed), 3 when time was too short.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m model",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--disturbances", type=int, default=2, metavar="N", help="at most so many (default 2)")
    parser.add_argument("--seconds", type=float, default=600, help="give up after so long (default 600)")
    parser.add_argument(
        "--without-lease-timer", action="store_true", help="as if locks were given up with a renewal only"
    )
    arguments = parser.parse_args()
    from .search import Found, search
    from .steps import Rules

    def progress(found: Found) -> None:
        print(f"{found.states} states, {found.steps} steps", file=sys.stderr, flush=True)

    rules = Rules(lease_timer=not arguments.without_lease_timer, disturbances=arguments.disturbances)
    started = time.monotonic()
    with embedded_redis() as url:
        found = search(url, rules, seconds=arguments.seconds, progress=progress)
    print(f"{found.states} states, {found.steps} steps in {time.monotonic() - started:.0f} s")
    if found.violation is not None:
        print(f"VIOLATED: {found.violation}")
        for number, label in enumerate(found.trace, start=1):
            print(f"{number:4} {label}")
        return 1
    print("everything holds" if found.complete else "everything holds so far; not all states were visited")
    return 0 if found.complete else 3


if __name__ == "__main__":
    sys.exit(main())
