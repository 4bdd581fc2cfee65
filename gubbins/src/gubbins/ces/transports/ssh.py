"""Execution of commands through SSH, on one connection with a verified host key."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from gubbins.ces.protocol import CESettings, NothingDoneError
from gubbins.ces.transports.framing import SHELL, extract_response, frame_command
from gubbins.ces.transports.shell import MAX_RESPONSE_BYTES, Completed
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

if TYPE_CHECKING:
    import asyncssh

_KEEPALIVE_SECONDS = 10
_SESSION_SECONDS = 0.1  # retry interval if all sessions are in use


def _absolute_or_home(path: Path) -> Path:
    path = path.expanduser()
    # Independent of the working directory of a worker.
    if not path.is_absolute():
        raise ValueError("must be an absolute path, or begin with ~")
    return path


LocalPath = Annotated[Path, AfterValidator(_absolute_or_home)]


class SSHHost(CESettings):
    """Settings of an SSH host. Passwords are not supported."""

    host: str = Field(
        pattern=r"^[A-Za-z0-9_:][A-Za-z0-9_.:-]*$",
        description="Name or address of one host; not an alias of several.",
    )
    port: int = Field(default=22, ge=1, le=65535)
    username: str | None = Field(
        default=None, pattern=r"^[^\s\x00-\x1f-][^\s\x00-\x1f]*$", description="Default: the worker's own."
    )
    known_hosts: LocalPath = Field(
        default=Path("~/.ssh/known_hosts"),
        validate_default=True,
        description="File with trusted host keys, in the format of OpenSSH.",
    )
    client_keys: tuple[LocalPath, ...] = Field(
        default=(),
        description="Private key files without a passphrase; default: the keys of the agent and ~/.ssh/id_*.",
    )
    agent_socket: LocalPath | None = Field(
        default=None, description="Socket of an SSH agent; default: SSH_AUTH_SOCK, unless there are `client_keys`."
    )
    ssh_config: LocalPath | None = Field(
        default=None,
        description="Client configuration of OpenSSH, for settings that are not given here: HostName, Port, User, "
        "IdentityFile, ProxyJump, ProxyCommand…; default: none.",
    )
    jump: SSHHost | None = Field(
        default=None,
        description="Jump host, with its own `host`, `username`, `known_hosts`…, and possibly a `jump`.",
    )
    connect_timeout_seconds: float = Field(
        default=15, gt=0, le=60, description="Time limit of connection and log-in together."
    )
    command_timeout_seconds: float = Field(
        default=40, gt=0, le=600, description="Time limit of one remote command."
    )
    max_sessions: int = Field(
        default=4, ge=1, le=100, description="Concurrent remote commands; sshd's MaxSessions is 10 by default."
    )


class SSHShell:
    """Runs commands on a remote host; see `Shell`.

    The first command opens the connection; after it was lost, the next command opens a new one. A command is never
    repeated. Needs the extra `ssh` of this distribution.

    Args:
        host: settings of the host.
        environment: additional environment variables of the commands.
        max_bytes: limit of stdout, and of stderr.
        unset: extended regular expression of variables that the commands do not inherit from the log-in scripts.
    """

    def __init__(
        self,
        host: SSHHost,
        environment: Mapping[str, str] | None = None,
        max_bytes: int = MAX_RESPONSE_BYTES,
        unset: str = "",
    ) -> None:
        self._max_bytes = max_bytes
        self._unset = unset
        self._host = host
        self._environment = dict(environment or {})
        self._jump = None if host.jump is None else SSHShell(host.jump)
        self._connection: asyncssh.SSHClientConnection | None = None
        self._connecting = asyncio.Lock()
        self._sessions = asyncio.Semaphore(host.max_sessions)

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float | None = None) -> Completed:
        """Run a command by `/bin/sh` of the host, independent of the user's shell and its output.

        `timeout` is in seconds, without the connection; default `command_timeout_seconds`. The host may continue
        the command after it.

        Raises:
            NothingDoneError: the command was not run.
            CEUnavailableError: the command may or may not have been run.
        """
        asyncssh = _asyncssh()
        timeout = self._host.command_timeout_seconds if timeout is None else timeout
        mark = secrets.token_hex(12)
        text = frame_command(argv, stdin, self._environment, mark, unset=self._unset)
        async with self._sessions:
            connection = await self._connected()
            try:
                async with asyncio.timeout(timeout):
                    response = await _run(connection, SHELL, text, self._max_bytes)
                return extract_response(response, mark, host=self._name)
            except TimeoutError as error:
                raise CEUnavailableError(
                    f"{self._name}: no response from {argv[0]} within {timeout:g} s"
                ) from error
            except (OSError, asyncssh.Error) as error:
                raise CEUnavailableError(f"{self._name}: {one_line(error)} while {argv[0]} was running") from error

    async def close(self) -> None:
        """Close the connection, or abort it if the host does not respond."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            try:
                async with asyncio.timeout(2):
                    await connection.wait_closed()
            except TimeoutError:
                connection.abort()
        if self._jump is not None:
            await self._jump.close()

    @property
    def _name(self) -> str:
        return f"{self._host.host}:{self._host.port}"

    async def _connected(self) -> asyncssh.SSHClientConnection:
        async with self._connecting:  # concurrent commands share one connection
            if self._connection is None or self._connection.is_closed():
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> asyncssh.SSHClientConnection:
        import asyncssh

        host = self._host
        tunnel = None if self._jump is None else await self._jump._connected()
        known_hosts = await asyncio.to_thread(self._known_hosts)
        seen: list[asyncssh.SSHKey] = []

        class Client(asyncssh.SSHClient):
            def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
                seen.append(key)
                return False

        options: dict[str, Any] = {} if host.username is None else {"username": host.username}
        if host.client_keys:
            options["client_keys"] = [str(path) for path in host.client_keys]
            options["agent_path"] = None
        if host.agent_socket is not None:
            options["agent_path"] = str(host.agent_socket)
        if host.ssh_config is None or "port" in host.model_fields_set:
            options["port"] = host.port

        async def connect(**more: Any) -> asyncssh.SSHClientConnection:
            return await asyncssh.connect(
                host.host,
                client_factory=Client,
                known_hosts=known_hosts,
                # Never the configuration files of the worker's user.
                config=None if host.ssh_config is None else [str(host.ssh_config)],
                tunnel=tunnel or (),
                preferred_auth=["publickey"],
                agent_forwarding=False,
                keepalive_interval=_KEEPALIVE_SECONDS,
                utf8_decode_errors="replace",  # of banners
                **options,
                **more,
            )

        try:
            async with asyncio.timeout(host.connect_timeout_seconds):
                try:
                    return await connect()
                except (asyncssh.KeyExchangeFailed, asyncssh.ConnectionLost, ConnectionResetError):
                    if not self._known_keys(known_hosts):
                        raise
                    # The host may have no key of the known types: connect again to learn its key.
                    return await connect(server_host_key_algs="default")
        except TimeoutError as error:
            raise NothingDoneError(f"{self._name}: no log-in within {host.connect_timeout_seconds:g} s") from error
        except asyncssh.HostKeyNotVerifiable as error:
            raise NothingDoneError(self._host_key_error(known_hosts, seen, error)) from error
        except asyncssh.PermissionDenied as error:
            keys = ", ".join(map(str, host.client_keys)) or "the agent's, ~/.ssh/id_*"
            user = host.username or "the worker's user name"
            raise NothingDoneError(
                f"{self._name} refuses {user} with the keys tried ({keys}): is one in authorized_keys there?"
            ) from error
        except asyncssh.KeyImportError as error:
            keys = ", ".join(map(str, host.client_keys))
            raise NothingDoneError(
                f"cannot use a key of {keys}: {error}; one with a passphrase belongs in an agent"
            ) from error
        except (OSError, ValueError, asyncssh.Error) as error:
            raise NothingDoneError(f"no SSH connection to {self._name}: {one_line(error)}") from error

    def _known_hosts(self) -> asyncssh.SSHKnownHosts:
        import asyncssh

        path = self._host.known_hosts
        try:
            lines = path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise NothingDoneError(f"cannot read the known hosts in {path}: {error}") from error
        known_hosts = asyncssh.SSHKnownHosts()
        for line in lines:
            with contextlib.suppress(ValueError):  # OpenSSH also skips an invalid line
                known_hosts.load(line)
        return known_hosts

    def _known_keys(self, known_hosts: asyncssh.SSHKnownHosts) -> Sequence[asyncssh.SSHKey]:
        port = None if self._host.port == 22 else self._host.port
        return known_hosts.match(self._host.host, "", port)[0]

    def _host_key_error(
        self, known_hosts: asyncssh.SSHKnownHosts, seen: Sequence[asyncssh.SSHKey], error: Exception
    ) -> str:
        host, path = self._host, self._host.known_hosts
        if not seen:
            name = self._name if host.ssh_config is None else f"{self._name}, or a host on the way to it,"
            return f"cannot verify the host key of {name} with {host.ssh_config or path}: {error}"
        has = f"{self._name} has the host key {seen[0].get_fingerprint()}"
        entry = host.host if host.port == 22 else f"[{host.host}]:{host.port}"
        if self._known_keys(known_hosts):
            return (
                f"{has}, which is not the one in {path}: the host was reinstalled, or it is another one. "
                f"When its operator confirms the key: ssh-keygen -R '{entry}' -f {path}, and add the new one"
            )
        return (
            f"{has}, and {path} knows none: when its operator confirms the key, "
            f"add it: ssh-keyscan -p {host.port} {host.host} >> {path}"
        )


def _asyncssh() -> Any:
    try:
        import asyncssh
    except ModuleNotFoundError as error:
        raise NothingDoneError("SSH is not installed here: pip install 'gubbins-pilots[ssh]'") from error
    if (logger := logging.getLogger("asyncssh")).level == logging.NOTSET:
        logger.setLevel(logging.WARNING)  # it logs every connection and command
    return asyncssh


async def _run(connection: asyncssh.SSHClientConnection, command: str, stdin: bytes, max_bytes: int) -> Completed:
    process = await _open(connection, command)
    try:

        async def feed() -> None:
            # A command may close its input early.
            with contextlib.suppress(BrokenPipeError, ConnectionError):
                process.stdin.write(stdin)
                await process.stdin.drain()
                process.stdin.write_eof()

        out, err, _ = await asyncio.gather(
            _read(process.stdout, max_bytes), _read(process.stderr, max_bytes), feed()
        )
        await process.wait_closed()
        if process.returncode is None:
            raise ConnectionResetError("the connection was lost")
        return Completed(process.returncode, out, err)
    finally:
        process.close()


async def _open(connection: asyncssh.SSHClientConnection, command: str) -> asyncssh.SSHClientProcess[bytes]:
    import asyncssh

    while True:
        try:
            return await connection.create_process(command, encoding=None)
        except asyncssh.ChannelOpenError:
            if connection.is_closed():
                raise
            # All sessions are in use. Nothing was run.
            await asyncio.sleep(_SESSION_SECONDS)


async def _read(stream: asyncssh.SSHReader[bytes], max_bytes: int) -> str:
    parts: list[bytes] = []
    size = 0
    while part := await stream.read(65536):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise OSError(f"a response of more than {max_bytes} bytes")
    return b"".join(parts).decode(errors="replace")
