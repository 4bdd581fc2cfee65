"""A pytest plugin: `slurm_site`, a real Slurm of the tests' own, with one node, on the loopback interface.

It runs for a file of tests, and forgets jobs a few seconds after their end. `accounting_slurm_site` is another,
which keeps accounts in MariaDB. Where Slurm is not installed, their tests are skipped with a line that says so.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import servers
from diracx.tasks.testing.server import free_port
from support.sql_servers import SqlServer

from examples.demo.slurm import SlurmSite

MIN_JOB_AGE = 5

_Site = TypeVar("_Site", bound=SlurmSite)


class AccountingSlurmSite(SlurmSite):
    """A site whose jobs stay in a database: `slurmdbd` writes it, `sacct` reads it."""

    def __init__(self, directory: Path, database: SqlServer, **how: Any) -> None:
        super().__init__(directory, **how)
        self._database = database
        self._port = free_port()

    def start_controller(self) -> None:
        if "slurmdbd" not in self._processes:
            settings = self.directory / "slurmdbd.conf"
            settings.touch(mode=0o600)
            settings.write_text(
                f"DbdHost=localhost\nDbdPort={self._port}\nSlurmUser=root\nPidFile={self.directory}/slurmdbd.pid\n"
                f"AuthType=auth/munge\nAuthInfo=socket={self.directory}/munge.socket\n"
                "StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStorageUser=root\n"
                f"StoragePort={self._database.port}\nStorageLoc=accounts\n"
            )
            self._start_accounts()
            self.command("sacctmgr", "-i", "add", "cluster", "private")
        super().start_controller()

    @contextlib.contextmanager
    def without_accounts(self) -> Iterator[None]:
        """Stop slurmdbd inside this context."""
        self._end("slurmdbd", signal.SIGKILL)
        try:
            yield
        finally:
            self._start_accounts()

    def _start_accounts(self) -> None:
        self._run("slurmdbd", "-D")
        self._wait("slurmdbd", lambda: "root" in self.command("sacctmgr", "-n", "show", "user"))

    def _configuration(self) -> str:
        accounts = (
            "accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={self._port}\nAccountingStoragePass={self.directory}/munge.socket\n"
            "AccountingStorageEnforce=limits"
        )
        return super()._configuration().replace("accounting_storage/none", accounts)


@pytest.fixture(scope="module")
def slurm_site() -> Iterator[SlurmSite]:
    """Slurm."""
    if (obstacle := SlurmSite.obstacle()) is not None:
        pytest.skip(obstacle)
    with _directory() as directory:
        yield from _running(SlurmSite(directory, cpus=32, min_job_age=MIN_JOB_AGE))


@pytest.fixture(scope="module")
def accounting_slurm_site(mariadb_server: SqlServer) -> Iterator[AccountingSlurmSite]:
    """Slurm with accounts."""
    if (obstacle := SlurmSite.obstacle()) is not None:
        pytest.skip(obstacle)
    if (obstacle := servers.obstacle("slurmdbd")) is not None:
        pytest.skip(obstacle)
    with _directory() as directory:
        yield from _running(AccountingSlurmSite(directory, mariadb_server, cpus=4, min_job_age=MIN_JOB_AGE))


def _running(site: _Site) -> Iterator[_Site]:
    try:
        site.start()
        yield site
    finally:
        site.stop()


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Not below pytest's own: paths of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="gubbins-slurm-") as name:
        yield Path(name)
