"""`dashboard`: serve the web dashboard for one operator."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...operations.audit import user_at_host
from ...plumbing._util.passwords import mask
from ...plumbing.broker.server_check import Role as ServerRole
from ...plumbing.config.reader import ConfigReader
from ...web.auth.backends import Principal, Role, TokenBackend, new_token
from ...web.auth.hosts import host_name, is_loopback
from ...web.context import AppContext
from ..errors import CliError, UsageProblem
from ..options import LogLevelOption
from ..runtime.databases import unchecked_task_db
from ..runtime.logs import set_up_logging
from ..runtime.server import ServerAndTasks, open_broker

if TYPE_CHECKING:
    from ...web.dashboard.app import DashboardApp

logger = logging.getLogger(__package__)

_TOKEN_VARIABLE = "DIRACX_TASKS_DASHBOARD_TOKEN"  # noqa: S105  # the name of a variable
_LEAST_TOKEN = 16
#: Time for event streams to close at shutdown, before their connections are cut.
_STOP_SECONDS = 3
_WITHOUT_TLS = (
    "warning: {host} is served in plain HTTP, where others on the network can read tokens; give --tls-certificate "
    "and --tls-key, or allow connections only from a TLS proxy"
)


def dashboard(
    *,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; off loopback the token must be set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8790,
    read_only: Annotated[bool, typer.Option("--read-only", help="Serve a dashboard without actions.")] = False,
    public_name: Annotated[
        list[str] | None,
        typer.Option("--public-name", metavar="NAME", help="Host name that browsers use. Required off loopback."),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Private key, PEM.")] = None,
    log_level: LogLevelOption = None,
    server: ServerAndTasks,
) -> None:
    """Serve the dashboard until SIGTERM or Ctrl-C.

    On loopback it prints a URL with a token, to be opened in a browser of this host; the token is that of
    DIRACX_TASKS_DASHBOARD_TOKEN, or random. Off loopback that variable must be set and TLS is needed, of the
    dashboard or of a proxy before it. For several users serve it in the DiracX application. /healthz and /readyz
    need no token.

    Example: diracx-task-run dashboard --redis-url redis://localhost
    """
    if missing := [name for name in ("jinja2", "uvicorn") if find_spec(name) is None]:
        raise CliError(
            f"the dashboard needs {' and '.join(missing)}; install it with `pip install 'diracx-tasks[dashboard]'`"
        )
    loopback, public_names = is_loopback(host), list(map(_public_name, public_name or ()))
    if not loopback and not os.environ.get(_TOKEN_VARIABLE):
        raise UsageProblem(
            f"--host {host} can be reached from other hosts: set {_TOKEN_VARIABLE} to the token to sign in with, "
            "or stay on 127.0.0.1; for several users serve the dashboard in the DiracX application"
        )
    if not loopback and not public_names:
        raise UsageProblem(
            f"--host {host} can be reached by any name; set --public-name to the host name that browsers use"
        )
    if (tls_certificate is None) != (tls_key is None):
        raise UsageProblem("--tls-certificate and --tls-key need each other; give both or none")
    level = set_up_logging(log_level, "warning")
    url = server.url
    backend, token = _backend(read_only)
    names: set[str] = {"localhost", "127.0.0.1", "::1", host_name(host)} if loopback else set()
    tls = {} if tls_certificate is None else {"ssl_certfile": tls_certificate, "ssl_keyfile": tls_key}
    with _listening(host, port) as listening:
        name = host if loopback else public_names[0]
        name = f"[{name}]" if ":" in name else name
        address = f"http{'s' if tls else ''}://{name}:{listening.getsockname()[1]}/"

        async def run() -> None:
            from ...web.dashboard import DashboardApp

            async with AsyncExitStack() as stack:
                broker = await stack.enter_async_context(open_broker(url, role=ServerRole.DASHBOARD))
                task_db = await stack.enter_async_context(unchecked_task_db())
                reader = ConfigReader.from_environment(server.registry)
                context = AppContext(broker, server.registry, reader, task_db, mask(url))

                async def get_context() -> AppContext:
                    return context

                app = DashboardApp(get_context, backend, hosts=names.union(public_names))
                await app.open()
                stack.push_async_callback(app.aclose)
                typer.echo(f"{address}sign-in?token={token}" if loopback else address)
                if not loopback and not tls:
                    typer.echo(_WITHOUT_TLS.format(host=host), err=True)
                await _serve(app, listening, level, tls)

        asyncio.run(run())


def _public_name(given: str) -> str:
    try:
        return host_name(given)
    except ValueError as error:
        raise UsageProblem(
            f"--public-name {given}: give a host name without scheme, port and path, as tasks.example.org"
        ) from error


def _backend(read_only: bool) -> tuple[TokenBackend, str]:
    """Return the authentication backend and its token."""
    token = os.environ.get(_TOKEN_VARIABLE) or new_token()
    if len(token) < _LEAST_TOKEN:
        raise CliError(f"{_TOKEN_VARIABLE} is too short: it must have at least {_LEAST_TOKEN} characters")
    name, _, _ = user_at_host().rpartition("@")  # the name may have an @, too
    principal = Principal(name, Role.READ if read_only else Role.WRITE, vo=None)
    hint = f"`diracx-task-run dashboard` printed it at its start, or it was started with it in {_TOKEN_VARIABLE}."
    return TokenBackend({token: principal}, hint), token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CliError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host or --port"
        ) from error


async def _serve(app: DashboardApp, listening: socket.socket, level: int, tls: dict[str, Any]) -> None:
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=level,
        access_log=False,  # the printed URL has the token in it
        proxy_headers=False,
        server_header=False,
        lifespan="off",  # a signal during its startup would print a traceback
        timeout_graceful_shutdown=_STOP_SECONDS,
        **tls,
    )
    server = uvicorn.Server(config)
    # Uvicorn's own handlers raise the signal again after a graceful shutdown.
    server.capture_signals = nullcontext  # type: ignore[assignment]  # called without arguments

    def stop(number: int) -> None:
        app.end_streams()
        server.handle_exit(number, None)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    await server.serve(sockets=[listening])
