"""Run the demo: build a site, start its processes, show what happens, end everything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diracx.tasks.cli.runtime.supervisor import Child, Supervisor
from diracx.tasks.testing.server import ValkeyProcess, free_port

from .api import PORT_VARIABLE
from .site import VOS, DemoSite
from .slurm import SlurmSite

if TYPE_CHECKING:
    from .watch import Watch

_LOOK_SECONDS = 0.25
_STOP_SECONDS = 10.0
_WORKERS = ("medium", "small", "small")
"""Sizes of the workers: single pilots are submitted by small ones."""
_SLOTS = "8"
_SLURM_CPUS = 16


def run_demo(*, seconds: float | None, as_json: bool, directory: Path | None, slurm: bool = False) -> None:
    """Run until Ctrl-C, or for so many seconds; with the usual compute elements, or a Slurm site alone.

    Raises:
        ChildFailedError: a process of the demo cannot start; its log says why.
        SlurmSiteError: there can be no Slurm site here, or it has ended.
        OSError, subprocess.CalledProcessError, RuntimeError: something could not be set up.
    """
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gubbins-demo-")))
        else:
            directory.mkdir(parents=True)
            directory = directory.resolve()
        valkey = ValkeyProcess(directory)
        valkey.start()
        stack.callback(valkey.stop)
        slurm_site = SlurmSite(directory / "slurm", cpus=_SLURM_CPUS) if slurm else None
        if slurm_site is not None:
            stack.callback(slurm_site.stop)
            slurm_site.start()
        site = DemoSite(directory, valkey.url, free_port(), free_port(), slurm_site)
        site.build()
        os.environ |= site.environment
        asyncio.run(site.create_databases())
        asyncio.run(_watch(site, seconds=seconds, as_json=as_json))


def _processes() -> list[Child]:
    """The scheduler, the workers, the API, the dashboard, and the matcher of jobs and pilots."""
    workers = [
        Child(f"worker-{number}", ["worker", "--worker-size", size, "--max-concurrent-tasks", _SLOTS])
        for number, size in enumerate(_WORKERS, start=1)
    ]
    ours = [Child(name, module=f"examples.demo.{name}") for name in ("api", "dashboard", "jobs")]
    return [Child("scheduler", ["scheduler"]), *workers, *ours]


@contextlib.contextmanager
def _log_files(directory: Path, processes: list[Child]) -> Iterator[Callable[[str, str], None]]:
    """Writes lines of each process to a log file of its name."""
    with contextlib.ExitStack() as stack:
        files = {
            child.name: stack.enter_context((directory / f"{child.name}.log").open("w", buffering=1))
            for child in processes
        }
        yield lambda name, line: print(line, file=files[name])


async def _watch(site: DemoSite, *, seconds: float | None, as_json: bool) -> None:
    from gubbins.db.sql import MyPilotDB

    from . import dashboard
    from .watch import watching

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    begin = time.monotonic()
    db = MyPilotDB(site.environment["DIRACX_DB_URL_MYPILOTDB"])
    processes = _processes()
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(db.engine_context())
        supervisor = Supervisor(
            [processes],
            lambda line: print(line, file=sys.stderr),
            every_child_must_start=True,
            output=stack.enter_context(_log_files(site.directory, processes)),
            kill_after_seconds=_STOP_SECONDS,
        )
        ports = {PORT_VARIABLE: str(site.api_port), dashboard.PORT_VARIABLE: str(site.dashboard_port)}
        secrets = {dashboard.TOKEN_VARIABLE: site.dashboard_token}
        running = asyncio.create_task(supervisor.run({**site.environment, **ports, **secrets}))
        stack.push_async_callback(_stopped, supervisor, running)
        watch = await stack.enter_async_context(watching(db, processes))
        with _screen(site, as_json) as show:
            while not stop.is_set() and (seconds is None or time.monotonic() - begin < seconds):
                if running.done():
                    running.result()
                if site.slurm is not None:
                    site.slurm.check()
                await watch.look()
                show(watch, time.monotonic() - begin)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _LOOK_SECONDS)
        await _stopped(supervisor, running)
        await watch.look()
        await _end_local_pilots(db)
        report = await watch.report(VOS)
    print(json.dumps(report)) if as_json else _farewell(report)


async def _stopped(supervisor: Supervisor, running: asyncio.Task[int]) -> None:
    """Stop all processes. An error of their start is raised where it was noticed."""
    supervisor.stop()
    await asyncio.wait([running])


@contextlib.contextmanager
def _screen(site: DemoSite, as_json: bool) -> Iterator[Any]:
    """Show the state: a live table, or a line every two seconds on stderr."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    if as_json or not sys.stdout.isatty():
        print(_greeting(site), file=sys.stderr, flush=True)
        last = 0.0

        def line(watch: Watch, elapsed: float) -> None:
            nonlocal last
            if elapsed - last >= 2:
                last = elapsed
                print(f"{elapsed:5.0f} s  {watch.line()}", file=sys.stderr, flush=True)

        yield line
        return
    console = Console()
    console.print(Text(_greeting(site)), soft_wrap=True)
    with Live(console=console, auto_refresh=False) as live:
        hint = "Ctrl-C ends everything. A process that is killed (kill -9) is started again: "

        def show(watch: Watch, elapsed: float) -> None:
            below = Text(hint + watch.describe_processes(), "dim")
            live.update(Group(watch.table(elapsed), below), refresh=True)

        yield show


def _greeting(site: DemoSite) -> str:
    slurm = f"  export SLURM_CONF={site.slurm.slurm_conf}; squeue\n" if site.slurm is not None else ""
    authorized = '-H "Authorization: Bearer $TOKEN"'
    return f"""\
dashboard: http://127.0.0.1:{site.dashboard_port}/sign-in?token={site.dashboard_token}
API:       {site.api_url}/api/docs
server:    {site.redis_url}
logs: {site.directory}
In another terminal (the API takes a few seconds to start):
  export TOKEN={site.token("lhcb")}
  curl -s {authorized} {site.api_url}/api/my_pilots/summary
  curl -s {authorized} -H "Content-Type: application/json" -d '{{}}' {site.api_url}/api/pilots/search
{slurm}"""


async def _end_local_pilots(db: Any) -> None:
    """Nothing of the demo stays behind: end the processes of the local compute element."""
    from gubbins.domain.pilot_states import ACTIVE
    from gubbins.logic import my_pilots as logic

    for status in ACTIVE:
        _, pilots = await logic.search_pilots(db, vo=None, ce_name="localhost", status=status, per_page=1000)
        for pilot in pilots:
            await logic.cancel_pilot(db, pilot["pilot_id"], by="the end of the demo")


def _farewell(report: dict[str, Any]) -> None:
    ended = sum(states["DONE"] + states["FAILED"] for states in report["pilots"].values())
    print(f"{ended} pilots ended; {report['illegal_transitions']} illegal transitions. Everything is stopped.")
