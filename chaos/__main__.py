"""Command of the chaos tests: inject random failures into a real system, and check all promises."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from . import plan as plans

_EPILOG = """\
profiles:
  processes  workers and schedulers are killed, paused beyond their lease and restarted, connections killed
  net        each worker and scheduler and the submitter connects through a proxy, which stops forwarding (one
             way or both, for up to 3 leases), adds up to 2 s, and closes connections (also within a reply, or one
             direction only)
  server     the Redis server is killed and started again, paused for longer than the lease, or restarted; with
             --redis everysec also a power failure, which loses data that were not on the disk yet
  sentinel   the same with a primary, two replicas and three sentinels: each outage is a failover
  sql        the server of the dead letters (MariaDB) is killed, paused or disconnected
  all        all of these together, with failovers

configurations of Redis (--redis):
  none, rdb (a snapshot every 5 s), everysec and always (append-only file), sentinel, sentinel-min-replicas

A run starts the servers, and workers (every second one of size small) and schedulers by their commands. Half of
the workers simulate a newer version: they accept a message format that the others defer to them. Tasks of all
kinds are submitted continuously: short, long, failing, started at most once, grouped, delayed, limited, with
shared and exclusive locks for shorter and for longer than a lease, and poison tasks, which kill their worker.
During that time, disturbances are injected. Afterwards the system may finish all tasks; it is stopped, and the
promises are checked (chaos/verdict.py defines each figure). The seed determines the tasks and disturbances, and
their times.

examples:
  make chaos ARGS="--profile net --seconds 60 --seed 7"
  make chaos ARGS="--profile server --redis everysec --json"
  make chaos ARGS="--profile all --plan"

Exit code: 0 if all promises were kept, 1 if one was broken (the directory of logs is printed and kept), 2 for
wrong usage, 3 if chaos itself failed: a server did not start, or there was no failover. Nothing is checked then.
"""

#: Tasks for each 120 s of disturbances.
_TASKS = {"processes": 20_000}
_FEWER_TASKS = 8_000


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m chaos",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile", choices=plans.PROFILES, default="processes", help="kinds of disturbances (default processes)"
    )
    parser.add_argument(
        "--redis", choices=plans.CONFIGURATIONS, help="configuration of Redis (default: the profile's)"
    )
    parser.add_argument(
        "--database", choices=plans.DATABASES, help="database of the dead letters (default: the profile's)"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="duration of the disturbances (default 120)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the tasks and disturbances (default 1)")
    parser.add_argument("--tasks", type=int, help="number of tasks (default: enough to keep the workers busy)")
    parser.add_argument("--workers", type=int, default=4, help="worker processes, at least 2 (default 4)")
    parser.add_argument("--schedulers", type=int, default=2, help="scheduler processes (default 2)")
    parser.add_argument("--lease", type=float, default=2.0, help="lease of the workers in seconds (default 2)")
    parser.add_argument("--slots", type=int, default=10, help="tasks at a time in each worker (default 10)")
    parser.add_argument(
        "--rest", type=float, default=60.0, help="fail if no task ends for so many seconds (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="keep logs and records also if all promises were kept")
    parser.add_argument("--plan", action="store_true", help="print the disturbances and their times, and exit")
    arguments = parser.parse_args()
    for name, least in (("seconds", 5), ("workers", 2), ("schedulers", 1), ("lease", 1), ("slots", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(arguments, name):g}")
    _, redis, database = plans.PROFILES[arguments.profile]
    arguments.redis = arguments.redis or redis
    arguments.database = arguments.database or database
    if arguments.profile == "sentinel" and not arguments.redis.startswith("sentinel"):
        parser.error(f"--redis must be sentinel or sentinel-min-replicas with this profile, not {arguments.redis}")
    if arguments.profile == "sql" and arguments.database == "sqlite":
        parser.error("--database must be mariadb or postgresql with this profile: SQLite has no server to disturb")
    if arguments.tasks is None:
        arguments.tasks = round(_TASKS.get(arguments.profile, _FEWER_TASKS) * arguments.seconds / 120)
    elif arguments.tasks < 200:
        parser.error(f"--tasks must be at least 200, or some kinds would be missing, not {arguments.tasks}")
    if not arguments.plan:
        from .databases import obstacle

        if (reason := obstacle(arguments.database)) is not None:
            parser.error(reason)
    return arguments


def causes(error: BaseException) -> str:
    """Describe a failure in one line; of a group, all members."""
    if isinstance(error, BaseExceptionGroup):
        return ", ".join(map(causes, error.exceptions))
    return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> int:
    arguments = _arguments()
    plan = plans.make(
        seed=arguments.seed,
        profile=arguments.profile,
        seconds=arguments.seconds,
        number=arguments.tasks,
        workers=arguments.workers,
        lease=arguments.lease,
    )
    if arguments.plan:
        for d in plan.disturbances:
            print(f"{d.at:8.3f} s  {d.what:22} {d.which:4}" + (f"  {d.seconds:.2f} s" if d.seconds else ""))
        return 0
    # Imported late: these import the task system.
    from .drive import Driver, Settings, keep, say
    from .records import read
    from .verdict import ChaosResult, as_json

    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    settings = Settings(
        profile=arguments.profile,
        redis=arguments.redis,
        database=arguments.database,
        workers=arguments.workers,
        schedulers=arguments.schedulers,
        lease=arguments.lease,
        slots=arguments.slots,
        rest_seconds=arguments.rest,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended, as with Ctrl-C
    try:
        observed = asyncio.run(Driver(plan, settings, directory).run())
    except Exception as error:
        (directory / "failure.txt").write_text("".join(traceback.format_exception(error)))
        say(f"chaos itself failed, and has checked nothing: {causes(error)}; see {directory}/failure.txt")
        return 3
    verdict = ChaosResult(plan, observed, read(directory / "records"), arguments.lease)
    promises = verdict.promises()
    broken = [promise.name for promise in promises if promise.kept is False]
    if arguments.json:
        values: dict[str, Any] = {promise.name: as_json(promise.value) for promise in promises}
        notes = {promise.name: promise.note for promise in promises if promise.note}
        which = {"profile": settings.profile, "redis": settings.redis, "database": settings.database}
        head = {**which, "seed": arguments.seed, "seconds": arguments.seconds}
        print(json.dumps({**head, **values, "broken": broken, "details": verdict.details, "notes": notes}))
    else:
        marks = {True: "kept", False: "BROKEN", None: ""}
        for promise in promises:
            print(f"{promise.name:60} {promise.value!s:>18}  {marks[promise.kept]:6} {promise.note}".rstrip())
        print("\n".join(verdict.details))
    if broken or arguments.keep:
        keep(observed, directory / "observed.json")
        say(f"logs and records: {directory}")
    else:
        shutil.rmtree(directory)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
