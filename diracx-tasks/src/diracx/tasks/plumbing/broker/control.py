"""A connection for commands and pub/sub messages (RESP3), for use in a thread."""

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
    """Executes commands from any thread, and receives messages while one thread calls `listen`.

    Args:
        url: URL of the server.
        channels: channels to subscribe to, each time the connection is made.
        receive: called with channel and data of each message, in the thread that reads; must not block or raise.
        connected: called after each subscription: earlier messages were missed.
        options: options of the connection.
    """

    def __init__(
        self,
        url: str,
        channels: Sequence[str],
        receive: Callable[[bytes, bytes], None],
        connected: Callable[[], None],
        **options: Any,
    ) -> None:
        self._client: SyncRedis = sync_client(url, channels=True, **options)
        self._connection: Any = self._client.connection_pool.make_connection()
        self._channels = channels
        self._receive, self._connected = receive, connected
        self._subscription_refused = False
        self._run_id = ""
        self._in_use = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def execute_command(self, *command: Any) -> Any:
        """Return the reply to a command.

        Raises:
            redis.exceptions.RedisError: when the server refuses, or does not reply.
        """
        with self._in_use:
            connection = self._connection
            try:
                if connection._sock is None:
                    self._connect()
                connection.send_packed_command(connection.pack_command(*command), check_health=False)
                while True:
                    reply = connection.read_response(push_request=True)
                    if not self._is_message(reply):
                        return reply
            except ResponseError:
                raise
            except BaseException:
                connection.disconnect()  # or the next command would read the remaining reply
                raise

    def run_id(self) -> str:
        """Run id of the server's process, which changes with each restart or failover; empty if INFO is refused.

        Raises:
            redis.exceptions.RedisError: when no server replies.
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
        except ResponseError as error:  # commands work all the same
            if not self._subscription_refused:
                logger.warning(
                    "cannot listen for cancellations (%s); they take up to a third of a lease, and without a "
                    "scheduler delayed tasks are late",
                    error,
                )
            self._subscription_refused = True
        else:
            self._subscription_refused = False
            self._connected()

    def _is_message(self, reply: Any) -> bool:
        """True for a message of a channel, which is passed to `receive`; False for a reply to a command."""
        if not (isinstance(reply, list) and reply and reply[0] in (_MESSAGE, _SUBSCRIBED)):
            return False
        if reply[0] == _MESSAGE:
            self._receive(reply[1], reply[2])
        return True

    def listen(self, seconds: float) -> None:
        """Receive messages for `seconds`, or until `interrupt` is called or the connection is lost."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            # Before the wait: the reply to a command may have been read together with a message behind it.
            if self._connection._sock is not None and not self._read_messages():
                return
            events = select.poll()
            events.register(self._wake_read, select.POLLIN)
            with self._in_use:
                socket = self._connection._sock
                if socket is not None:
                    events.register(socket, select.POLLIN)
            if self._wake_read in [descriptor for descriptor, _ in events.poll(1000 * left)]:
                os.read(self._wake_read, 4096)
                return

    def _read_messages(self) -> bool:
        """Receive the messages that have arrived. False when the connection is lost."""
        with self._in_use:
            connection = self._connection
            try:
                while connection._sock is not None and connection.can_read(0):
                    if not self._is_message(connection.read_response(push_request=True)):
                        raise RedisError("a reply without a command")
            except Exception as error:  # of any kind, as this thread also renews the lease
                logger.debug("a connection is lost: %s", error)
                connection.disconnect()
            return connection._sock is not None

    def interrupt(self) -> None:
        """End the current or the next call of `listen`, from any thread."""
        with suppress(OSError):  # the pipe is full of earlier calls, or closed
            os.write(self._wake_write, b".")

    def close(self) -> None:
        """Close the connection, which must not be used again."""
        with self._in_use:
            self._connection.disconnect()
        self._client.close()
        read, write = self._wake_read, self._wake_write
        self._wake_read = self._wake_write = -1
        os.close(read)
        os.close(write)
