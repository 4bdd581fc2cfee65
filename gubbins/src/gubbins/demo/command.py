"""The command line of the demonstration."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gubbins.cli.session import CommandError


class Site(StrEnum):
    """What the pilots are submitted to."""

    MIXED = "mixed"
    SLURM = "slurm"


def demo(
    site: Annotated[
        Site,
        typer.Option(
            "--site",
            help="mixed: a reliable, a flaky and a local compute element; slurm: a real one-node Slurm, "
            "which is started for it (root, on a host where Slurm is installed).",
        ),
    ] = Site.MIXED,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=1, help="Stop by itself after so long.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Progress on stderr; one JSON object on stdout at the end.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            help="Build the installation in this new directory and leave it there; left out: in a temporary one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the whole pilot system on this machine, and watch it.

    Three VOs, a reliable, a flaky and a local compute element (or, with --site slurm, a real batch system), an
    embedded Valkey, SQLite, the API, a scheduler and three workers. Nothing needs to be installed or set up
    before, and nothing is left behind.
    """
    import subprocess

    from diracx.tasks.testing.server import EmbeddedServerError

    from .run import run_demo
    from .services import ServiceDiedError
    from .slurm import SlurmSite, SlurmSiteError

    if directory is not None and directory.exists():
        raise CommandError(f"{directory} exists already: name a directory that is to be made", 2)
    slurm = site is Site.SLURM
    if slurm and (obstacle := SlurmSite.obstacle()) is not None:
        raise CommandError(obstacle)
    try:
        run_demo(seconds=seconds, as_json=as_json, directory=directory, slurm=slurm)
    except (ServiceDiedError, SlurmSiteError, EmbeddedServerError) as error:
        raise CommandError(str(error)) from error
    except subprocess.CalledProcessError as error:
        raise CommandError(f"{' '.join(error.cmd[:1])} failed: {error.stderr.strip()}") from error
    except OSError as error:
        raise CommandError(f"the demonstration cannot be set up: {error}") from error
