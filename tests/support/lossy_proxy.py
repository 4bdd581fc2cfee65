"""A proxy to a server that loses responses and connections."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

__all__ = ["LossyProxy"]


class LossyProxy:
    """Forwards to a server, but breaks the connection instead of passing on the n-th reply after `lose(n, …)`;
    after `stop_replying()` passes nothing on by the connections that there are, and leaves them open;
    `forget()` closes those, and does not tell the server; after `keep_open()` the server hears of no end at all.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._needle = b""
        self._countdown = 0
        self._connections = self._silent = 0
        self._forgotten: float = 0
        self._clients: list[asyncio.StreamWriter] = []
        self._over = asyncio.Event()
        self.lost = asyncio.Event()

    def lose(self, nth: int, needle: bytes) -> None:
        """Lose the n-th reply that contains the needle."""
        self._needle, self._countdown = needle, nth
        self.lost.clear()

    def stop_replying(self) -> None:
        self._silent = self._connections

    def forget(self) -> None:
        self._forgotten = self._connections
        for client in self._clients:
            client.transport.abort()

    def keep_open(self) -> None:
        self._forgotten = math.inf

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        connections: set[asyncio.Task[None]] = set()

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            this = asyncio.current_task()
            assert this is not None
            connections.add(this)
            await self._forward(reader, writer)
            connections.discard(this)

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.close()
            self._over.set()
            if connections:
                await asyncio.wait(connections)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ways, until either side closes."""
        self._connections += 1
        self._clients.append(writer)
        number = self._connections
        server_reader, server_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        ways = [
            asyncio.ensure_future(self._copy(reader, server_writer, number)),
            asyncio.ensure_future(self._copy_replies(server_reader, writer, number)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        writer.close()
        if number <= self._forgotten:
            await self._over.wait()
        server_writer.close()

    async def _copy_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while data := await reader.read(65536):
            if number <= self._silent:
                continue
            if self._countdown and self._needle in data:
                self._countdown -= 1
                if not self._countdown:
                    self.lost.set()
                    return
            writer.write(data)

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while data := await reader.read(65536):
            if number > self._silent:
                writer.write(data)
