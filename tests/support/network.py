"""A network that can be held, delayed and cut: a TCP proxy between a client and a server, both on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

Direction = Literal["to_server", "to_client"]
DIRECTIONS: tuple[Direction, Direction] = ("to_server", "to_client")


class Network:
    """Passes bytes between the clients of `url` and one server. All methods may be called from any thread.

    It runs on a thread and an event loop of its own, so that a test whose loop is blocked does not hold it up.
    """

    def __init__(self, server_url: str) -> None:
        parts = urlsplit(server_url)
        self._server = server_url
        self._parts = parts
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._flows: dict[Direction, asyncio.Event] = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._writers: dict[Direction, set[asyncio.StreamWriter]] = {direction: set() for direction in DIRECTIONS}
        self._cut_after: int | None = None
        self.delay_seconds = 0.0
        """Each piece of data arrives so much later."""
        self.url = ""

    def start(self) -> None:
        self._thread.start()
        port = self._run(self._listen())
        self.url = urlunsplit(self._parts._replace(netloc=f"127.0.0.1:{port}"))
        self.release()

    def stop(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold(self, *directions: Direction) -> None:
        """Pass nothing that way (by default neither way) from now on; connections stay open."""
        for direction in directions or DIRECTIONS:
            self._loop.call_soon_threadsafe(self._flows[direction].clear)

    def release(self) -> None:
        """Pass all data, including held data."""
        for direction in DIRECTIONS:
            self._loop.call_soon_threadsafe(self._flows[direction].set)

    def lead_to(self, server_url: str) -> None:
        """Break all connections and pass new ones to another server, as a load balancer after a failover."""
        self._server = server_url
        self.cut()

    def half_close(self, direction: Direction) -> None:
        """Close one direction, like a peer that shuts its sending half."""
        self._loop.call_soon_threadsafe(self._end, direction)

    def cut(self, after_bytes: int | None = None) -> None:
        """Break all connections: at once, or in the middle of the next reply, after so many bytes of it."""
        self._cut_after = after_bytes
        if after_bytes is None:
            self._loop.call_soon_threadsafe(self._break_all)

    def _run(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    async def _listen(self) -> int:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._listening.sockets[0].getsockname()[1]
        return port

    async def _close(self) -> None:
        self._listening.close()
        self._break_all()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)  # else the loop is closed before they have ended

    def _break_all(self) -> None:
        for writer in set().union(*self._writers.values()):
            writer.transport.abort()

    def _end(self, direction: Direction) -> None:
        for writer in self._writers[direction]:
            with suppress(OSError, RuntimeError):  # it is closed already
                writer.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError), self._aborted_with(writer):
            await self._flows["to_server"].wait()
            server = urlsplit(self._server)
            try:
                from_server, to_server = await asyncio.open_connection(server.hostname, server.port)
            except OSError:
                writer.transport.abort()
                return
            pair = dict(zip(DIRECTIONS, (to_server, writer), strict=True))
            for direction, end in pair.items():
                self._writers[direction].add(end)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, to_server, "to_server"))
                both.create_task(self._pass(from_server, writer, "to_client"))
            for direction, end in pair.items():
                self._writers[direction].discard(end)

    @staticmethod
    @contextmanager
    def _aborted_with(writer: asyncio.StreamWriter) -> Iterator[None]:
        """Abort the connection when the network is stopped."""
        try:
            yield
        except asyncio.CancelledError:
            writer.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction) -> None:
        with suppress(OSError, RuntimeError):  # RuntimeError: half-closed, and cannot be written to
            while data := await source.read(65536):
                await asyncio.sleep(self.delay_seconds)
                await self._flows[direction].wait()
                if direction == "to_client" and self._cut_after is not None:
                    sink.write(data[: self._cut_after])
                    self._cut_after = None
                    await sink.drain()
                    self._break_all()
                sink.write(data)
                await sink.drain()
        with suppress(OSError):
            sink.close()
