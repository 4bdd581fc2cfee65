"""A pytest plugin: `slurm_site`, a real Slurm of the tests' own, with one node, on the loopback interface.

It runs for the session, and forgets jobs a few seconds after their end. Where Slurm is not installed, its
tests are skipped with a line that says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gubbins.demo.slurm import SlurmSite

MIN_JOB_AGE = 5


@pytest.fixture(scope="session")
def slurm_site() -> Iterator[SlurmSite]:
    """Slurm."""
    if (obstacle := SlurmSite.obstacle()) is not None:
        pytest.skip(obstacle)
    # Not below pytest's own: paths of sockets are short.
    with tempfile.TemporaryDirectory(prefix="gubbins-slurm-") as directory:
        site = SlurmSite(Path(directory), cpus=32, min_job_age=MIN_JOB_AGE)
        try:
            site.start()
            yield site
        finally:
            site.stop()
