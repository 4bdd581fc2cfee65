"""`dashboard`: the operator's view in a browser, served by this process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CliError, UsageProblem, mask
from ..options import (
    LogLevel,
    LogLevelOption,
    ModuleOption,
    RedisUrlFileOption,
    RedisUrlOption,
    resolve_redis_url,
)

if TYPE_CHECKING:
    from ...web.auth.backends import TokenGate
    from ...web.context import Installation
    from ...web.dashboard.app import DashboardApp

logger = logging.getLogger(__package__)

_TOKEN_VARIABLE = "DIRACX_TASKS_DASHBOARD_TOKEN"  # noqa: S105  # the name of a variable
_LEAST_TOKEN = 16
#: Pages that follow what happens hold connections; those that do not let go are cut off.
_STOP_SECONDS = 3
_WITHOUT_TLS = (
    "warning: {host} is served in plain HTTP, where anybody on the way reads tokens along; give --tls-certificate "
    "and --tls-key, or let nobody but a proxy that speaks TLS come here"
)


def dashboard(
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where it listens; but for loopback, --accounts is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8790,
    accounts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Who may sign in: on each line name, read or write, and a digest."),
    ] = None,
    new_account: Annotated[
        str | None,
        typer.Option(
            "--new-account",
            metavar="NAME:ROLE",
            help="Add an account to that file, print its token, and end. The role is read or write.",
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="With the token printed at the start one may look, not act.")
    ] = False,
    public_name: Annotated[
        list[str] | None,
        typer.Option(
            "--public-name", metavar="NAME", help="A name by which browsers reach it. Needed but for loopback."
        ),
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", metavar="FILE", help="Certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM.")] = None,
    module: ModuleOption = None,
    redis_url: RedisUrlOption = None,
    redis_url_file: RedisUrlFileOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Serve the dashboard until SIGTERM or Ctrl-C: what goes on, and buttons to steer it.

    On loopback it prints an address with a token, to be opened in a browser of this host; the token is new at
    every start, or that of DIRACX_TASKS_DASHBOARD_TOKEN. Elsewhere it starts with --accounts only, and wants TLS,
    its own or that of a proxy before it. /healthz and /readyz answer without a token.

    Example: diracx-task-run dashboard --redis-url redis://localhost
    """
    from ...web.auth.hosts import host_name, is_loopback
    from ..runtime.logs import set_up_logging

    if new_account is not None:
        _add_account(accounts, new_account)
        return
    _needs("jinja2", "uvicorn")
    loopback, public_names = is_loopback(host), _public_names(public_name or [])
    if not loopback and accounts is None:
        raise UsageProblem(
            f"--host {host} can be reached from elsewhere, and nobody would be asked who they are; give "
            "--accounts FILE (--new-account NAME:ROLE makes it), or stay on 127.0.0.1"
        )
    if not loopback and not public_names:
        raise UsageProblem(
            f"--host {host} can be reached by any name; say with --public-name which is in the address that "
            "browsers use"
        )
    if (tls_certificate is None) != (tls_key is None):
        raise UsageProblem("--tls-certificate and --tls-key go together")
    level = set_up_logging(log_level, LogLevel.WARNING)
    url = resolve_redis_url(redis_url, redis_url_file)
    gate, token = _gate(accounts, read_only)
    names: set[str] = {"localhost", "127.0.0.1", "::1", host_name(host)} if loopback else set()
    tls: dict[str, Any] = {}
    if tls_certificate is not None:
        tls = {"ssl_certfile": str(tls_certificate), "ssl_keyfile": str(tls_key)}
    with _listening(host, port) as listening:
        found = listening.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        if not loopback:
            name = public_names[0]
            name = f"[{name}]" if ":" in name else name
        address = f"http{'s' if tls else ''}://{name}:{found}/"

        async def run() -> None:
            from ...web.dashboard import create_app

            async with AsyncExitStack() as stack:
                installation = await _open(stack, url, module)

                async def this() -> Installation:
                    return installation

                app = create_app(this, gate, hosts=names.union(public_names))
                await app.open()
                stack.push_async_callback(app.aclose)
                typer.echo(f"{address}sign-in?token={token}" if token else address)
                if not loopback and not tls:
                    typer.echo(_WITHOUT_TLS.format(host=host), err=True)
                await _serve(app, listening, level, tls)

        asyncio.run(run())


def _public_names(given: list[str]) -> list[str]:
    from ...web.auth.hosts import host_name

    names = []
    for name in given:
        try:
            names.append(host_name(name))
        except ValueError as error:
            raise UsageProblem(
                f"--public-name {name}: write the name of the host alone, as tasks.example.org, without scheme, "
                "port or path"
            ) from error
    return names


def _needs(*modules: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        raise CliError(
            f"the dashboard needs {' and '.join(missing)}; install it with `pip install 'diracx-tasks[dashboard]'`"
        )


def _add_account(path: Path | None, wanted: str) -> None:
    from ...web.auth.backends import AccountsError, Role, digest_of, new_token, read_accounts

    if path is None:
        raise UsageProblem("--new-account needs --accounts FILE, the file to add it to")
    name, _, role = wanted.partition(":")
    if role not in [*Role] or not name.isprintable() or not name or "#" in name or name.split() != [name]:
        raise UsageProblem(f"--new-account {wanted!r}: write NAME:read or NAME:write, the name without blanks")
    try:
        if path.exists() and any(account.name == name for account in read_accounts(path)):
            raise UsageProblem(f"{path} has an account {name!r} already; remove its line first")
    except AccountsError as error:
        raise CliError(str(error)) from error
    token = new_token()
    try:
        # Digests of random tokens tell nothing, but who is there is nobody's business.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
            file.write(f"{name} {role} {digest_of(token)}\n")
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from error
    typer.echo(token)


def _gate(path: Path | None, read_only: bool) -> tuple[TokenGate, str | None]:
    """Who comes in, and the token to be printed."""
    import getpass

    from ...web.auth.backends import Account, AccountsError, Role, TokenGate, digest_of, new_token, read_accounts

    if path is not None:
        try:
            accounts = read_accounts(path)
        except AccountsError as error:
            raise CliError(f"--accounts: {error}") from error
        if not accounts:
            raise CliError(f"--accounts: {path} has no account; add one with --new-account NAME:ROLE")
        return TokenGate(accounts, "Whoever runs the dashboard has given you one."), None
    token = os.environ.get(_TOKEN_VARIABLE) or new_token()
    if len(token) < _LEAST_TOKEN:
        raise CliError(f"{_TOKEN_VARIABLE} has less than {_LEAST_TOKEN} characters, which can be guessed")
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        name = f"uid-{os.getuid()}"
    account = Account(name, Role.READ if read_only else Role.WRITE, digest_of(token))
    hint = "It is in the address that `diracx-task-run dashboard` printed at its start."
    return TokenGate([account], hint), token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CliError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host or --port"
        ) from error


async def _open(stack: AsyncExitStack, url: str, module: list[str] | None) -> Installation:
    from ...plumbing.broker.server_check import Role
    from ...plumbing.config.cached import ConfigReader
    from ...web.context import Installation
    from ..runtime.broker import open_broker
    from ..runtime.environment import unchecked_task_db
    from ..runtime.registry import load_registry

    broker = await stack.enter_async_context(open_broker(url, role=Role.DASHBOARD))
    registry = load_registry(module)
    task_db = await stack.enter_async_context(unchecked_task_db())
    return Installation(broker, registry, ConfigReader.of_environment(registry), task_db, mask(url))


async def _serve(app: DashboardApp, listening: socket.socket, level: int, tls: dict[str, Any]) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            # In place of uvicorn's own, which after an orderly end dies of the signal.
            loop, ends = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
            for number in ends:
                loop.add_signal_handler(number, self._end, number)
            try:
                yield
            finally:
                for number in ends:
                    loop.remove_signal_handler(number)

        def _end(self, number: int) -> None:
            app.end_streams()
            self.handle_exit(number, None)

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=level,
        access_log=False,  # the printed address has the token in it
        proxy_headers=False,
        server_header=False,
        lifespan="off",  # a signal during it would be a traceback
        timeout_graceful_shutdown=_STOP_SECONDS,
        **tls,
    )
    await Server(config).serve(sockets=[listening])
