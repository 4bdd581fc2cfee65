"""A TCP proxy that resets connections."""

from __future__ import annotations

__all__ = ["ResettingProxy"]

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # linger for 0 s: what closes the connection is a reset


class ResettingProxy:
    """Forwards connections to a port of this host."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._clients: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def on_port(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
        """Listen on a free port of loopback inside the block, with TLS if there is a context for it."""
        server = await asyncio.start_server(self._forward, "127.0.0.1", 0, ssl=tls)
        async with self._until_left(server):
            yield server.sockets[0].getsockname()[1]

    @contextlib.asynccontextmanager
    async def on_path(self, path: Path) -> AsyncIterator[None]:
        """Listen on a Unix socket inside the block."""
        async with self._until_left(await asyncio.start_unix_server(self._forward, path)):
            yield

    def reset(self) -> None:
        """Reset all connections of clients."""
        for client in self._clients:
            if client.is_closing():
                continue
            connection = client.get_extra_info("socket")
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.transport.abort()

    @contextlib.asynccontextmanager
    async def _until_left(self, server: asyncio.Server) -> AsyncIterator[None]:
        try:
            yield
        finally:
            server.close()
            self.reset()
            while self._clients:
                await asyncio.sleep(0.01)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            there = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(_pump(reader, there[1]), _pump(there[0], writer))
        finally:
            self._clients.discard(writer)
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: Any) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # uvloop's word for a write to a connection that was reset
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
