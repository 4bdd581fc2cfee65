"""`--metrics-port`: metrics for Prometheus, and whether the process lives and is ready, over plain HTTP.

It is served by the event loop that runs the tasks: where a task blocks that, nobody answers `/healthz`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import typer

from ..errors import CliError
from .supervisor import own_number

logger = logging.getLogger(__package__)

MetricsPortOption = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        min=1,
        max=65535,
        help="Serve /metrics, /healthz and /readyz there; with --processes, the next ports as well.",
    ),
]
MetricsHostOption = Annotated[
    str, typer.Option("--metrics-host", metavar="ADDRESS", help="Address to serve them on: 0.0.0.0 for all.")
]
LOOPBACK = "127.0.0.1"

_ANSWER_SECONDS = 5.0
_LONGEST_REQUEST = 8192
_TEXT = "text/plain; charset=utf-8"


@asynccontextmanager
async def probes(
    host: str,
    port: int | None,
    ready: Callable[[], bool],
    metrics: Callable[[], Awaitable[str]],
    alerts: Callable[[], Sequence[str]] = tuple,
) -> AsyncIterator[None]:
    """Answer inside the block; do nothing without a port.

    Args:
        alerts: lines that `/readyz` adds: it answers 200 all the same, as they are no reason to leave the process
            alone.

    Raises:
        CliError: when the port cannot be had.
    """
    if port is None:
        yield
        return
    port += (own_number() or 1) - 1

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_ANSWER_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                response = await _response(head, ready, metrics, alerts)
                if not writer.is_closing():  # else uvloop raises a RuntimeError
                    writer.write(response)
                    await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, host, port, limit=_LONGEST_REQUEST)
    except OSError as error:
        raise CliError(
            f"cannot serve metrics on {host}:{port}: {error.strerror or error}; choose another --metrics-port"
        ) from error
    logger.info("metrics on http://%s:%d/metrics", host, port)
    try:
        yield
    finally:
        server.close()


async def _response(
    head: bytes,
    ready: Callable[[], bool],
    metrics: Callable[[], Awaitable[str]],
    alerts: Callable[[], Sequence[str]],
) -> bytes:
    from ...operations.families import CONTENT_TYPE

    method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    status, kind, body = "200 OK", _TEXT, "ok\n"
    if method not in ("GET", "HEAD"):
        status, body = "405 Method Not Allowed", "only GET and HEAD\n"
    elif path == "/readyz":
        if not ready():
            status, body = "503 Service Unavailable", "not ready\n"
        body = "\n".join([body.rstrip(), *alerts(), ""])
    elif path == "/metrics":
        try:
            kind, body = CONTENT_TYPE, await metrics()
        except Exception as error:
            logger.debug("no metrics", exc_info=True)
            status, kind, body = "503 Service Unavailable", _TEXT, f"no metrics: {type(error).__name__}\n"
    elif path != "/healthz":
        status, body = "404 Not Found", "there are /metrics, /healthz and /readyz\n"
    content = body.encode()
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(content)}",
        "Connection: close",
        "\r\n",
    )
    return "\r\n".join(lines).encode() + (b"" if method == "HEAD" else content)
