"""Search all states of the delivery protocol for a broken guarantee."""

from __future__ import annotations

import argparse
import os
import sys
import time

from .rules import KINDS, Rules

_EPILOG = """\
Two workers, three tasks (two need the same mutex), for each process one real server with the real scripts.
Every order of fetch, reclaim, fetch_unacknowledged, start, settle and renew is tried, with up to N disturbances
at every possible point: a worker crashes, is paused or disconnected, a reply is lost, the server is
unavailable for longer than all leases. In every state each task is in one place or has been settled once, a
lock has one active holder, no worker that has come back counts as crashed, tasks without locks have started once
if only the server was unavailable, and some step is possible until all tasks are settled.

Assumptions: the clocks of workers and server run at the same rate to within a tenth; a worker checks its lease
first after a pause; the server executes each script completely and loses no data. When no disturbance is left,
steps of a healthy worker with a task without a lock, or with a lost one, affect no others and are not
interleaved.

--without-lease-timer and --without-new-leases disable a part of the protocol: a violation must then be found.

Exit code: 0 if all of that holds, 1 if not (the steps that lead there are printed), 3 after the time limit.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m model",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--disturbances", type=int, default=1, metavar="N", help="maximum number of disturbances (default 1)"
    )
    parser.add_argument(
        "--only",
        choices=KINDS,
        default="",
        metavar="KIND",
        help=f"disturbances of one kind only: {', '.join(KINDS)}",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=Rules().tasks,
        default=Rules().tasks,
        help="queued tasks: t0 and t1 need the same mutex, t2 none (default all)",
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit of the search (default 600)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count(),
        help="processes of the search (default: one for each processor)",
    )
    parser.add_argument(
        "--without-lease-timer", action="store_true", help="release locks with the next renewal only"
    )
    parser.add_argument(
        "--without-new-leases",
        action="store_true",
        help="count all workers as crashed after an outage of the server",
    )
    arguments = parser.parse_args()
    from .search import Found, search

    def progress(found: Found) -> None:
        print(f"{found.states} states, {found.steps} steps", file=sys.stderr, flush=True)

    rules = Rules(
        lease_timer=not arguments.without_lease_timer,
        new_leases=not arguments.without_new_leases,
        disturbances=arguments.disturbances,
        only=arguments.only,
        tasks=tuple(arguments.tasks),
    )
    started = time.monotonic()
    found = search(rules, processes=arguments.processes, seconds=arguments.seconds, progress=progress)
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
