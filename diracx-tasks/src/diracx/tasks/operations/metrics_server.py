"""Serves metrics and probes of a worker or scheduler at `--metrics-port`.

The HTTP server runs in a thread; its responses are computed in the event loop that runs the tasks, so that
`/healthz` fails while a task blocks it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from http import HTTPStatus
from socketserver import TCPServer
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import Metric
from prometheus_client.exposition import ThreadingWSGIServer

from ..plumbing._util.tasks import in_own_thread
from .exposition import CONTENT_TYPE, as_text

logger = logging.getLogger(__name__)

Collect: TypeAlias = "Callable[[], Awaitable[list[Metric]]]"

#: Interval at which the server checks whether it must stop.
_POLL_SECONDS = 0.05
#: A request without a response in this time fails.
RESPONSE_SECONDS = 5.0
_TEXT = "text/plain; charset=utf-8"


@asynccontextmanager
async def serve_metrics(
    host: str,
    port: int,
    ready: Callable[[], bool],
    collect: Collect,
    alerts: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[None]:
    """Serve `/metrics`, `/healthz` and `/readyz` inside the block. `/readyz` lists alerts, with status 200.

    Raises:
        OSError: it cannot listen at the port.
    """
    loop = asyncio.get_running_loop()

    async def respond(path: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/healthz":
            return HTTPStatus.OK, _TEXT, b"ok\n"
        if path == "/readyz":
            is_ready = ready()
            text = "\n".join(["ok" if is_ready else "not ready", *alerts(), ""])
            return HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, text.encode()
        if path != "/metrics":
            return HTTPStatus.NOT_FOUND, _TEXT, b"not found; there are /metrics, /healthz and /readyz\n"
        try:
            return HTTPStatus.OK, CONTENT_TYPE, as_text(await collect())
        except Exception as error:
            logger.debug("no metrics", exc_info=True)
            return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"no metrics: {type(error).__name__}\n".encode()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        path = str(environ["PATH_INFO"])
        try:
            if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
                status, kind, body = HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"only GET and HEAD\n"
            else:
                response = asyncio.run_coroutine_threadsafe(respond(path), loop)
                try:
                    status, kind, body = response.result(RESPONSE_SECONDS)
                finally:
                    response.cancel()  # or all late ones would be computed at once when the loop is free again
        except (RuntimeError, TimeoutError, CancelledError):  # the loop has ended or ends, or a task blocks it
            status, kind, body = HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, b"the event loop does not respond\n"
        headers = [("Content-Type", kind), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]

    server = _Server(host, port)
    server.set_app(application)
    threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True).start()
    logger.info("metrics on http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        await in_own_thread(server.shutdown)
        server.server_close()


class _Server(ThreadingWSGIServer):
    """WSGI server with a thread per request."""

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _RequestHandler)

    def server_bind(self) -> None:
        """Bind without the DNS look-up of `HTTPServer`, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # str, int
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log connection errors at debug level, without a traceback on stderr."""
        logger.debug("connection of %s", client_address, exc_info=True)


class _RequestHandler(WSGIRequestHandler):
    timeout = RESPONSE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""
