"""Test migrations between the published package 0.7.0 and this one, and run its tests against this one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.peers.environments import ROOT, prepare

from .published_tests import report, results
from .scenarios import SCENARIOS, Tally

_COLUMNS = ("lost", "doubled", "stuck", "callbacks", "overlaps")


def main() -> int:
    """Print the table and the tests that fail; 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="make compat", description=__doc__)
    parser.add_argument("scenarios", nargs="*", help=f"{'; '.join(SCENARIOS)} (default: all)")
    parser.add_argument(
        "--at-once",
        type=int,
        default=len(SCENARIOS),
        help="scenarios at a time (default: all, as they mostly wait)",
    )
    options = parser.parse_args()
    prepare("reference")
    names = options.scenarios or list(SCENARIOS)
    with tempfile.TemporaryDirectory(prefix="compat-") as directory, ThreadPoolExecutor(options.at_once) as pool:
        tests = None if options.scenarios else pool.submit(results)
        tallies = list(pool.map(lambda name: _run(name, Path(directory) / name), names))
    unexplained = tests is not None and report(tests.result())
    print(f"{'scenario':22}" + "".join(f"{column:>11}" for column in _COLUMNS))
    for name, tally in zip(names, tallies, strict=True):
        print(f"{name:22}" + "".join(f"{getattr(tally, column):11}" for column in _COLUMNS))
        for problem in tally.problems:
            print(f"  {problem}")
    wrong = any(tally != Tally() for tally in tallies)
    return int(wrong | unexplained)


def _run(name: str, directory: Path) -> Tally:
    command = [sys.executable, "-m", "benchmarks.compat.scenarios", name, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return Tally(problems=[done.stderr[-2000:]])
    return Tally(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
