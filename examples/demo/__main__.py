"""Command line of the demo: `make demo`, or `python -m examples.demo`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from diracx.tasks.cli.runtime.supervisor import ChildFailedError
from diracx.tasks.testing.server import EmbeddedServerError

from .run import run_demo
from .slurm import SlurmSite, SlurmSiteError

_DESCRIPTION = """\
Run the whole pilot system on this machine, and watch it.

Three VOs, a reliable, a flaky and a local compute element (or, with --site slurm, a real batch system),
an embedded Valkey, SQLite, the API, a scheduler and three workers. Nothing needs to be installed or set
up before, and nothing is left behind."""


def main() -> int:
    """Run the demo; the exit code is 0, 1 (it did not work) or 2 (bad arguments)."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--site",
        choices=("mixed", "slurm"),
        default="mixed",
        help="mixed (default): a reliable, a flaky and a local compute element; slurm: a real one-node Slurm, "
        "which is started for it (root, on a host where Slurm is installed)",
    )
    parser.add_argument("--seconds", type=_seconds, help="stop by itself after so long")
    parser.add_argument(
        "--json", action="store_true", help="progress on stderr; one JSON object on stdout at the end"
    )
    parser.add_argument(
        "--directory", type=Path, help="new directory to build in, which is kept; left out: a temporary one"
    )
    arguments = parser.parse_args()
    if arguments.directory is not None and arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already: name a directory that is to be made")
    slurm = arguments.site == "slurm"
    if slurm and (obstacle := SlurmSite.obstacle()) is not None:
        return _fail(obstacle)
    try:
        run_demo(seconds=arguments.seconds, as_json=arguments.json, directory=arguments.directory, slurm=slurm)
    except (ChildFailedError, SlurmSiteError, EmbeddedServerError) as error:
        return _fail(str(error))
    except subprocess.CalledProcessError as error:
        return _fail(f"{' '.join(error.cmd[:1])} failed: {error.stderr.strip()}")
    except OSError as error:
        return _fail(f"the demo cannot be set up: {error}")
    return 0


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("must be 1 or more")
    return seconds


def _fail(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
