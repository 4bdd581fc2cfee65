"""`python -m chaos`: run the storm, print the verdict."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import plan as plans

_EPILOG = """\
What happens: a real Valkey server, N workers (every second one of size small) and 2 schedulers are started through
our own command line. Tasks are submitted all the time: quick, slow, failing, locked, reading and writing, limited,
grouped, delayed, and such that kill their worker. Meanwhile processes are killed, paused beyond their lease, and
restarted, and their connections cut. Then all is left alone until it comes to rest, stopped, and judged (see
chaos/verdict.py for what exactly is counted). The seed decides what is submitted and disturbed, and when.

Exit code: 0 when every promise was kept, 1 when one was broken (files are kept, and named), 2 for wrong usage.
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m chaos",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the storm (default 120)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default 1)")
    parser.add_argument("--tasks", type=int, help="number of tasks (default 20,000 for each 120 s)")
    parser.add_argument("--workers", type=int, default=4, help="worker processes, at least 2 (default 4)")
    parser.add_argument("--schedulers", type=int, default=2, help="scheduler processes (default 2)")
    parser.add_argument("--lease", type=float, default=2.0, help="lease of the workers in seconds (default 2)")
    parser.add_argument("--slots", type=int, default=10, help="tasks at a time in each worker (default 10)")
    parser.add_argument("--patience", type=float, default=240.0, help="seconds to come to rest (default 240)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--keep", action="store_true", help="keep logs and testimony even if all went well")
    parser.add_argument("--plan", action="store_true", help="print what would be disturbed and when, and end")
    arguments = parser.parse_args()
    for name, least in (("seconds", 5), ("workers", 2), ("schedulers", 1), ("lease", 1), ("slots", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(arguments, name):g}")
    if arguments.tasks is None:
        arguments.tasks = round(20_000 * arguments.seconds / 120)
    elif arguments.tasks < 200:
        parser.error(f"--tasks must be at least 200, or some kinds would be missing, not {arguments.tasks}")
    return arguments


def main() -> int:
    arguments = _arguments()
    plan = plans.make(
        seed=arguments.seed,
        seconds=arguments.seconds,
        number=arguments.tasks,
        workers=arguments.workers,
        schedulers=arguments.schedulers,
        lease=arguments.lease,
    )
    if arguments.plan:
        for d in plan.disturbances:
            print(f"{d.at:8.3f} s  {d.what:22} {d.which}" + (f"  {d.seconds:.2f} s" if "pause" in d.what else ""))
        return 0
    # Only now: these import the task system.
    from .drive import Driver, keep, say
    from .verdict import Verdict
    from .witness import read

    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    driver = Driver(
        plan,
        workers=arguments.workers,
        schedulers=arguments.schedulers,
        lease=arguments.lease,
        slots=arguments.slots,
        directory=directory,
        patience=arguments.patience,
    )
    observed = asyncio.run(driver.run())
    verdict = Verdict(plan, observed, read(directory / "witness"), arguments.lease)
    promises = verdict.promises()
    broken = [promise.name for promise in promises if promise.kept is False]
    if arguments.json:
        values: dict[str, Any] = {promise.name: promise.value for promise in promises}
        print(json.dumps({"seed": arguments.seed, **values, "broken": broken, "details": verdict.details}))
    else:
        marks = {True: "kept", False: "BROKEN", None: ""}
        for promise in promises:
            print(f"{promise.name:52} {promise.value!s:>10}  {marks[promise.kept]:6} {promise.note}".rstrip())
        print("\n".join(verdict.details))
    if broken or arguments.keep:
        keep(observed, directory / "observed.json")
        say(f"logs and testimony: {directory}")
    else:
        shutil.rmtree(directory)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
