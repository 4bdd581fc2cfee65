"""The command line in a directory of its own, against an empty server."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from diracx.tasks.testing.server import ValkeyProcess
from redis import Redis
from support.command_line import Cli
from support.databases import with_tables
from support.redis_acl import FILES, PASSWORD, ROLES, Server
from support.waiting import eventually
from support.warm_commands import WarmCommands

from benchmarks.peers.environments import is_ready, prepare


@pytest.fixture
def cli(tmp_path: Path, warm_commands: WarmCommands) -> Iterator[Cli]:
    commands = Cli(tmp_path, warm_commands)
    yield commands
    commands.stop()


@pytest.fixture(scope="session")
def published_commands() -> Iterator[WarmCommands]:
    """Programs of the published package 0.7.0, each of which takes more than two seconds to import it."""
    if not is_ready("reference"):
        pytest.skip("the published package is not installed (`make servers` does it)")
    # The module of its commands reads the environment when it is imported.
    modules = ("diracx.tasks.plumbing.factory", "diracx.tasks.plumbing.scheduler", "diracx.tasks.plumbing.worker")
    commands = WarmCommands(*modules, "diracx.tasks.jobs", python=str(prepare("reference") / "bin/python"))
    yield commands
    commands.close()


@pytest.fixture
def served(cli: Cli, redis_url: str) -> Iterator[Cli]:
    """The command line with an empty server, which is checked at the end."""
    cli.environment["DIRACX_TASKS_REDIS_URL"] = redis_url
    yield cli
    cli.stop()


@pytest.fixture
def one_line() -> Callable[..., str]:
    """Check that a command failed with one line that contains all these texts; return the line."""

    def check(result: subprocess.CompletedProcess[str], code: int, *said: str) -> str:
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert result.returncode == code, result.stderr
        assert lines[0].startswith("error: ")
        for text in said:
            assert text in lines[0]
        return lines[0]

    return check


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return eventually


@pytest.fixture
async def initialised_task_db(tmp_path: Path) -> str:
    """URL of a database with its tables, as `python -m diracx.db init-sql` makes them."""
    from diracx.tasks.plumbing.persistence import TaskDB

    url = f"sqlite+aiosqlite:///{tmp_path}/task.db"
    async with with_tables(TaskDB(url)):
        return url


@pytest.fixture
def acl_server(tmp_path: Path) -> Iterator[Server]:
    digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
    lines = [(FILES / f"{name}.acl").read_text() for name in ("default", *ROLES)]
    text = "".join(lines).replace("SHA256-OF-THE-PASSWORD", digest)
    acl = tmp_path / "users.acl"
    acl.write_text(text + "user test on nopass ~* &* +@all\n")
    process = ValkeyProcess(tmp_path, options=("--aclfile", str(acl)))
    process.start()
    try:
        with Redis.from_url(f"redis://test:any@127.0.0.1:{process.port}", socket_timeout=None) as admin:
            yield Server(process, admin)
    finally:
        process.stop()
