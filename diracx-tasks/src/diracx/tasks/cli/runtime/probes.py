"""`--metrics-port`: metrics for Prometheus, and probes of whether the process lives and is ready.

The server has a thread of its own; the answers come from the event loop that runs the tasks: where a task blocks
that, `/healthz` does not answer with 200.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import Metric

from ...operations.exposition import CONTENT_TYPE, as_text
from ..errors import CliError
from .supervisor import own_number

logger = logging.getLogger(__package__)

#: How often the server looks whether it is to end.
_POLL_SECONDS = 0.05
_ANSWER_SECONDS = 5.0
_TEXT = "text/plain; charset=utf-8"


@asynccontextmanager
async def probes(
    host: str,
    port: int,
    ready: Callable[[], bool],
    collect: Callable[[], Awaitable[Sequence[Metric]]],
    alerts: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[None]:
    """Serve `/metrics`, `/healthz` and `/readyz` inside the block.

    Args:
        collect: returns the metrics.
        alerts: lines that `/readyz` adds: it answers 200 all the same, as they are no reason to take work away
            from the process.

    Raises:
        CliError: when the port is not free.
    """
    port += (own_number() or 1) - 1
    loop = asyncio.get_running_loop()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        path = str(environ["PATH_INFO"])
        try:
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                status, kind, body = HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n"
            else:
                answering = asyncio.run_coroutine_threadsafe(_answer(path, ready, collect, alerts), loop)
                status, kind, body = answering.result(_ANSWER_SECONDS)
        except (RuntimeError, TimeoutError):  # the loop has ended, or a task blocks it
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"the event loop does not answer\n"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    try:
        server = _Server(host, port)
    except OSError as error:
        raise CliError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose another --metrics-port"
        ) from error
    server.set_app(application)
    threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True).start()
    logger.info("metrics on http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


async def _answer(
    path: str,
    ready: Callable[[], bool],
    collect: Callable[[], Awaitable[Sequence[Metric]]],
    alerts: Callable[[], Sequence[str]],
) -> tuple[HTTPStatus, str, bytes]:
    """Return status, content type and body."""
    if path == "/healthz":
        return HTTPStatus.OK, _TEXT, b"ok\n"
    if path == "/readyz":
        is_ready = ready()
        text = "\n".join(["ok" if is_ready else "not ready", *alerts(), ""])
        return HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, text.encode()
    if path != "/metrics":
        return HTTPStatus.NOT_FOUND, _TEXT, b"there are /metrics, /healthz and /readyz\n"

    try:
        return HTTPStatus.OK, CONTENT_TYPE, as_text(await collect())
    except Exception as error:
        logger.debug("no metrics", exc_info=True)
        return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"no metrics: {type(error).__name__}\n".encode()


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each request in a thread."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _RequestHandler)

    def server_bind(self) -> None:
        """Bind without the look-up of the host's name that `HTTPServer` makes: it may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # str, int
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what breaks a connection: no traceback for a client that goes away."""
        logger.debug("connection of %s", client_address, exc_info=True)


class _RequestHandler(WSGIRequestHandler):
    timeout = _ANSWER_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""
