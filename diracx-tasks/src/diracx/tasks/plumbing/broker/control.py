"""A connection for commands that hears channels as well (RESP3), for a thread of its own."""

from __future__ import annotations

import logging
import os
import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError, ResponseError

from .connection import sync_client

if TYPE_CHECKING:
    from redis import Redis as SyncRedis

logger = logging.getLogger(__name__)

_RUN_ID = re.compile(rb"^run_id:(\w+)", re.MULTILINE)
_MESSAGE, _SUBSCRIBED = b"message", b"subscribe"


class ControlConnection:
    """Executes commands from any thread, and hears channels while one thread calls `listen`.

    Args:
        url: of the server.
        channels: what to subscribe to, each time the connection is made.
        hear: called with channel and data of each message, in the thread that reads it; must not block nor raise.
        connected: called when the channels are subscribed to: what was said before was not heard.
        options: of the connection.
    """

    def __init__(
        self,
        url: str,
        channels: Sequence[str],
        hear: Callable[[bytes, bytes], None],
        connected: Callable[[], None],
        **options: Any,
    ) -> None:
        self._client: SyncRedis = sync_client(url, channels=True, **options)
        self._connection: Any = self._client.connection_pool.make_connection()
        self._channels = channels
        self._hear, self._connected = hear, connected
        self._deaf = False
        self._run_id = ""
        self._in_use = threading.Lock()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)

    def execute_command(self, *command: Any) -> Any:
        """The answer to a command.

        Raises:
            redis.exceptions.RedisError: when the server refuses, or does not answer.
        """
        with self._in_use:
            connection = self._connection
            try:
                if connection._sock is None:
                    self._connect()
                connection.send_packed_command(connection.pack_command(*command), check_health=False)
                while True:
                    answer = connection.read_response(push_request=True)
                    if not self._is_message(answer):
                        return answer
            except ResponseError:
                raise
            except BaseException:
                connection.disconnect()  # or others would get what is still answered
                raise

    def run_id(self) -> str:
        """Run id of the server's process, another one after each restart or failover; empty when it does not say.

        Raises:
            redis.exceptions.RedisError: when no server answers.
        """
        with self._in_use:
            if self._connection._sock is None:
                self._connect()
            return self._run_id

    def _connect(self) -> None:
        connection = self._connection
        connection.connect()
        connection.send_packed_command(connection.pack_command("INFO", "server"), check_health=False)
        with suppress(ResponseError):
            found = _RUN_ID.search(connection.read_response())
            self._run_id = found[1].decode() if found else ""
        if not self._channels:
            return
        connection.send_packed_command(connection.pack_command("SUBSCRIBE", *self._channels), check_health=False)
        try:
            for _ in self._channels:
                connection.read_response(push_request=True)
        except ResponseError as error:  # commands are what counts
            if not self._deaf:
                logger.warning(
                    "cannot listen for cancellations (%s); they take up to a third of a lease, and without a "
                    "scheduler delayed tasks are late",
                    error,
                )
            self._deaf = True
        else:
            self._deaf = False
            self._connected()

    def _is_message(self, answer: Any) -> bool:
        """True if this is no answer, but the message of a channel, which is passed on."""
        if not (isinstance(answer, list) and answer and answer[0] in (_MESSAGE, _SUBSCRIBED)):
            return False
        if answer[0] == _MESSAGE:
            self._hear(answer[1], answer[2])
        return True

    def listen(self, seconds: float) -> bool:
        """Pass messages on for so long, or until `interrupt` is called or the connection is lost.

        Returns:
            Whether the connection was lost.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            events = select.poll()
            events.register(self._woken, select.POLLIN)
            with self._in_use:
                socket = self._connection._sock
                if socket is not None:
                    events.register(socket, select.POLLIN)
            ready = [descriptor for descriptor, _ in events.poll(1000 * left)]
            if self._woken in ready:
                os.read(self._woken, 4096)
                return False
            if ready and not self._read_messages():
                return True
        return False

    def _read_messages(self) -> bool:
        """Pass on what has come. False when the connection is lost."""
        with self._in_use:
            connection = self._connection
            try:
                while connection._sock is not None and connection.can_read(0):
                    if not self._is_message(connection.read_response(push_request=True)):
                        raise RedisError("an answer that nobody has asked for")
            except RedisError as error:
                logger.debug("a connection is lost: %s", error)
                connection.disconnect()
            return connection._sock is not None

    def interrupt(self) -> None:
        """End the call of `listen`, or the next one; from any thread."""
        with suppress(OSError):  # it was called often, or after the end
            os.write(self._waker, b".")

    def close(self) -> None:
        """Close the connection; nobody may use it any more."""
        with self._in_use:
            self._connection.disconnect()
        self._client.close()
        called, waker = self._woken, self._waker
        self._woken = self._waker = -1
        os.close(called)
        os.close(waker)
