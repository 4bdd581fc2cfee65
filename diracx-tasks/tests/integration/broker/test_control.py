"""One connection for commands and channels, in a thread of its own."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from diracx.tasks.plumbing.broker.control import ControlConnection
from redis import Redis
from redis.exceptions import RedisError, ResponseError

CHANNELS = ("diracx:tasks:cancelled", "diracx:tasks:wake")


class Received:
    """Record of the messages and subscriptions of channels."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, bytes]] = []
        self.subscribed = 0
        self.changed = threading.Condition()

    def receive(self, channel: bytes, data: bytes) -> None:
        with self.changed:
            self.messages.append((channel, data))
            self.changed.notify()

    def connected(self) -> None:
        with self.changed:
            self.subscribed += 1
            self.changed.notify()


@contextmanager
def control(url: str) -> Iterator[tuple[ControlConnection, Received, Redis]]:
    received = Received()
    connection = ControlConnection(url, CHANNELS, received.receive, received.connected, socket_timeout=5)
    with Redis.from_url(url) as redis:
        yield connection, received, redis
    connection.close()


def test_a_message_between_a_command_and_its_reply_is_received(redis_url: str) -> None:
    with control(redis_url) as (connection, received, _):
        for number in range(100):
            message = f"return {{redis.call('PUBLISH', '{CHANNELS[number % 2]}', '{number}'), '{number}'}}"
            assert connection.execute_command("EVAL", message, 0) == [1, b"%d" % number]
        connection.execute_command("PING")
        assert received.messages == [(CHANNELS[number % 2].encode(), b"%d" % number) for number in range(100)]
        assert received.subscribed == 1


def test_commands_get_their_replies_while_another_thread_listens(redis_url: str) -> None:
    with control(redis_url) as (connection, received, redis):
        connection.execute_command("PING")
        listening = threading.Thread(target=connection.listen, args=(60.0,))
        listening.start()
        for number in range(200):
            redis.publish(CHANNELS[0], f"{number}")
            assert connection.execute_command("ECHO", f"{number}") == b"%d" % number
        with received.changed:
            assert received.changed.wait_for(lambda: len(received.messages) == 200, 60)
        connection.interrupt()
        listening.join(60)
        assert not listening.is_alive()


def test_an_interrupt_before_the_listening_ends_it(redis_url: str) -> None:
    with control(redis_url) as (connection, _, _):
        for _ in range(100_000):  # more than a pipe takes
            connection.interrupt()
        listening = threading.Thread(target=connection.listen, args=(600.0,))
        listening.start()
        listening.join(60)
        assert not listening.is_alive()


def test_a_lost_connection_ends_the_listening_and_the_next_command_subscribes_again(redis_url: str) -> None:
    with control(redis_url) as (connection, received, redis):
        client = connection.execute_command("CLIENT", "ID")
        listening = threading.Thread(target=connection.listen, args=(600.0,))
        listening.start()
        redis.client_kill_filter(_id=str(client))
        listening.join(60)
        assert not listening.is_alive()
        connection.execute_command("PING")
        assert received.subscribed == 2
        redis.publish(CHANNELS[1], "here")
        connection.execute_command("PING")
        assert received.messages == [(CHANNELS[1].encode(), b"here")]


def test_a_refused_command_leaves_the_connection_as_it_is(redis_url: str) -> None:
    with control(redis_url) as (connection, received, _):
        for _ in range(3):
            with pytest.raises(ResponseError):
                connection.execute_command("NOSUCHCOMMAND")
        assert connection.execute_command("ECHO", "here") == b"here"
        assert received.subscribed == 1


def test_a_user_without_the_right_to_subscribe_may_still_give_commands(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Redis.from_url(redis_url) as redis:
        redis.execute_command("ACL", "SETUSER", "deaf", "on", ">secret", "resetchannels", "~*", "+@all")
        url = redis_url.replace("redis://", "redis://deaf:secret@")
        with control(url) as (connection, received, _):
            for _ in range(2):
                client = connection.execute_command("CLIENT", "ID")
                redis.client_kill_filter(_id=str(client))
                with pytest.raises(RedisError):
                    connection.execute_command("PING")
        redis.execute_command("ACL", "DELUSER", "deaf")
    assert received.subscribed == 0
    assert [record.message.startswith("cannot listen") for record in caplog.records] == [True]


def _serve(server: socket.socket, reply: bytes) -> None:
    """Accept a connection and all of its commands; send `reply` behind that to INFO."""
    replies = {b"HELLO": b"%1\r\n+proto\r\n:3\r\n", b"INFO": b"$8\r\nrun_id:0\r\n" + reply}
    client, _ = server.accept()
    with client:
        while commands := client.recv(65_536):
            for name in re.findall(rb"\*\d+\r\n\$\d+\r\n(\w+)", commands):
                client.sendall(replies.get(name, b"+OK\r\n"))


@pytest.mark.parametrize("reply", [b">1\r\n+message\r\n", b"?\r\n"])
def test_a_reply_that_cannot_be_understood_is_a_lost_connection(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=_serve, args=(server, reply))
        serving.start()
        received = Received()
        connection = ControlConnection(
            f"redis://127.0.0.1:{server.getsockname()[1]}", (), received.receive, received.connected
        )
        assert connection.run_id() == "0"
        connection.listen(600.0)
        serving.join(60)
        assert not serving.is_alive()
        connection.close()
