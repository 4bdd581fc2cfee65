"""Only `plumbing/broker/` sends commands to Redis."""

from __future__ import annotations

import ast

import pytest
from redis.asyncio import Redis
from support.paths import ROOT

SOURCES = [ROOT / "diracx-tasks/src", ROOT / "gubbins/src"]
BROKER = ROOT / "diracx-tasks/src/diracx/tasks/plumbing/broker"
#: What is no command: closing a client, and the pool of its connections.
HARMLESS = {"aclose", "close", "connection_pool"}
COMMANDS = {name for name in dir(Redis) if not name.startswith("_")} - HARMLESS


def commands_sent(source: str) -> list[str]:
    """Commands that are sent, or passed on to be sent, by a client that goes by the name of redis."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    clients = ("redis", "_redis", "pipe", "pipeline")
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in found
        if node.attr in COMMANDS and ast.unparse(node.value).rpartition(".")[2] in clients
    ]


@pytest.mark.parametrize(
    ("source", "sent"),
    [
        ("await redis.unlink(key)", True),
        ("await self._broker.redis.execute_command('PING')", True),
        ("retry(self._redis.ping)", True),
        ("pipe.xadd(stream, fields)", True),
        ("await locking.release(redis, locks)", False),
        ("await redis.aclose()", False),
        ("settings.get('redis')", False),
    ],
)
def test_a_redis_command_outside_the_broker_is_recognised(source: str, sent: bool) -> None:
    assert bool(commands_sent(source)) is sent


def test_only_the_broker_sends_commands() -> None:
    files = [path for source in SOURCES for path in source.rglob("*.py") if BROKER not in path.parents]
    assert len(files) > 200
    sent = {str(path.relative_to(ROOT)): found for path in files if (found := commands_sent(path.read_text()))}
    assert not sent, "make each of these a function of plumbing/broker"
