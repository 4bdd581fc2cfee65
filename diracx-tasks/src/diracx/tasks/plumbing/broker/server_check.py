"""Checks the server: obstacles to the task system, and settings with which the server can lose tasks."""

from __future__ import annotations

__all__ = [
    "Risk",
    "Role",
    "Server",
    "UnusableServerError",
    "obstacle",
    "read_server",
    "report_changes",
    "report_risks",
    "risks",
]

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError

from .._util.retrying import is_transient
from . import keys
from .scripts import script

if TYPE_CHECKING:
    from redis.asyncio import Redis

logger = logging.getLogger(__name__)

#: First version with `redis.acl_check_cmd`, flags of scripts and the stream ids that the scripts use.
OLDEST_VERSION = (7, 0)
#: `availability-zone` of the embedded server, which loses its data on purpose.
EMBEDDED = "embedded"
#: Default of `min-replicas-max-lag`: a failover may lose the accepted tasks of so many seconds.
LONGEST_LAG_SECONDS = 10
CHANGED_SECONDS = 30.0
_LISTED = 5
_SECTIONS = ("server", "memory", "persistence", "stats", "replication", "cluster")
_CONFIG = ("appendfsync", "min-replicas-max-lag")
_STREAM = keys.ALL_STREAM_NAMES[0]
_TOUCH = f"EXISTS {keys.DELAYED} {keys.DELAYED_DATA}"
_READ_CONFIG = " ".join(("CONFIG GET", *_CONFIG))


class UnusableServerError(Exception):
    """The task system cannot work with this server; the message names the reason and the remedy."""


class Role(Enum):
    """Role of a process, with the commands that it must be allowed to send."""

    SUBMITTER = (
        f"XADD {_STREAM} * data x",
        f"ZADD {keys.DELAYED} 1 x",
        f"HSET {keys.DELAYED_DATA} x x",
        f"PUBLISH {keys.WAKE_WORKERS} x",
        "TIME",
    )
    WORKER = (
        *SUBMITTER,
        f"XREADGROUP GROUP {keys.GROUP} x STREAMS {_STREAM} >",
        f"XACK {_STREAM} {keys.GROUP} 1-1",
        f"XCLAIM {_STREAM} {keys.GROUP} x 0 1-1",
        f"XGROUP CREATE {_STREAM} {keys.GROUP} 0",
        f"XDEL {_STREAM} 1-1",
        f"ZADD {keys.ALIVE} 1 x",
        f"ZADD {keys.LEASES} 1 x",
        f"ZADD {keys.LINES} 1 x",
        f"SUBSCRIBE {keys.CANCELLED}",
        f"SUBSCRIBE {keys.LEASES}",
    )
    SCHEDULER = (
        *SUBMITTER,
        f"ZADD {keys.LINES} 1 x",
        f"SET {keys.LEADER} x",
        f"ZADD {keys.NEXT_RUNS} 1 x",
        f"SUBSCRIBE {keys.LEADER}",
    )
    DASHBOARD = (
        f"XADD {_STREAM} * data x",
        f"XRANGE {_STREAM} - +",
        f"ZADD {keys.CANCELLED} 1 x",
        f"HSET {keys.PAUSED} x x",
        f"XADD {keys.AUDIT} * data x",
    )


@dataclass(frozen=True, slots=True)
class Server:
    """Properties of a server, without those that its user may not read."""

    info: Mapping[str, Any] = field(default_factory=dict)
    """Reply to INFO."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Reply to CONFIG GET: `appendfsync`, `min-replicas-max-lag`."""
    hello: Mapping[str, str] = field(default_factory=dict)
    """Reply to HELLO, which every user may send: version, mode, role."""
    refused: tuple[str, ...] = ()
    """Commands of the role that its user may not send."""
    script_error: str | None = None
    """Error of the server for a script that declares no keys."""
    has_sentinels: bool = False
    """True if its address came from Sentinels."""

    @property
    def run_id(self) -> str | None:
        """Id of the server's process."""
        return self.info.get("run_id")

    @property
    def version(self) -> str | None:
        """Version of Redis, or the version of Redis with which a Valkey is compatible."""
        return self.hello.get("version") or self.info.get("redis_version")


#: The only safe `maxmemory-policy`: with any other, the server deletes tasks and locks to free memory.
SAFE_POLICY = "noeviction"


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Memory use and limit of the server. None if its user may not use INFO."""

    used_bytes: int | None = None
    limit_bytes: int | None = None
    """None also without a limit."""
    policy: str | None = None
    """`maxmemory-policy`."""


async def read_memory(redis: Redis) -> ServerMemory:
    """Read memory use and limit with INFO, which managed servers allow when they forbid CONFIG.

    Raises:
        redis.exceptions.RedisError: when the server does not reply.
    """
    try:
        found = await redis.info("memory")
    except NoPermissionError:
        return ServerMemory()
    return ServerMemory(found.get("used_memory"), found.get("maxmemory") or None, found.get("maxmemory_policy"))


def eviction_problem(policy: str | None, limit_bytes: int | None) -> str | None:
    """Describe the problem with the server's `maxmemory-policy`; None when there is none.

    Args:
        policy: the policy; None: unknown.
        limit_bytes: the server's `maxmemory`; None: no limit.
    """
    if policy is None or policy == SAFE_POLICY:
        return None
    when = "as soon as a maxmemory is set" if limit_bytes is None else "when its memory is full"
    return f"Redis has maxmemory-policy {policy}: it deletes tasks and locks {when}, without an error"


@dataclass(frozen=True, slots=True)
class Risk:
    """A setting with which the server can lose tasks."""

    check: str
    """Name of the health check."""
    problem: str
    remedy: str


async def read_server(redis: Redis, role: Role | None = None, *, settings: bool = True) -> Server:
    """Read the properties in one round trip; one more for CONFIG if that is allowed, and one to load a new script.

    Args:
        role: check that the server's user may send the commands of this role.
        settings: also read settings, which needs the right to use INFO.

    Raises:
        redis.exceptions.RedisError: when the server does not reply, or is temporarily unavailable.
    """
    commands_to_check = (_TOUCH, *((_READ_CONFIG,) if settings else ()), *(role.value if role else ()))
    check = script("check")
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command("HELLO")
        pipe.execute_command("EVALSHA", check.sha, 0, *commands_to_check)
        if settings:
            pipe.execute_command("INFO", *_SECTIONS)
        hello, refused, *info = await pipe.execute(raise_on_error=False)
    try:
        if isinstance(refused, NoScriptError):
            refused = await check(redis, args=commands_to_check)
        elif isinstance(refused, Exception):
            raise refused
        commands, error = [command.decode() for command in refused], None
    except NoPermissionError:
        commands, error = ["EVAL"], None
    except ResponseError as refusal:
        if is_transient(refusal):
            raise
        commands, error = [], str(refusal)
    if isinstance(hello, ResponseError) and not info:  # before 6.2, HELLO requires an argument
        with suppress(NoPermissionError):
            info = [await redis.info("server")]
    config: Any = {}
    if settings and isinstance(refused, list) and _READ_CONFIG not in commands:
        config = await redis.config_get(*_CONFIG)
    return Server(
        info=info[0] if info and isinstance(info[0], dict) else {},
        config=config,
        hello=_as_text(hello),
        refused=tuple(command for command in commands if command != _READ_CONFIG),
        script_error=error,
        has_sentinels=isinstance(redis.connection_pool, SentinelConnectionPool),
    )


def _as_text(hello: Any) -> dict[str, str]:
    """Decode HELLO's reply, without the values that are lists."""
    if isinstance(hello, dict):
        hello = [part for pair in hello.items() for part in pair]
    pairs = list(zip(hello[::2], hello[1::2], strict=True)) if isinstance(hello, list) else []
    return {name.decode(): value.decode() for name, value in pairs if isinstance(value, bytes)}


def obstacle(server: Server) -> str | None:
    """Describe the first obstacle to the task system, and its remedy, on one line; None when there is none."""
    version = server.version or ""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    mode = server.hello.get("mode") or server.info.get("redis_mode")
    role = server.hello.get("role") or server.info.get("role")
    refused = [" ".join(command.split()[:2]) for command in server.refused]
    more = f" and {len(refused) - _LISTED} more" if len(refused) > _LISTED else ""
    found = {
        "is a Sentinel, not a server: write redis+sentinel://host:port,host:port/service": mode == "sentinel",
        f"has version {version}: Redis 7.0 or newer, or Valkey, is needed": bool(numbers)
        and numbers < OLDEST_VERSION,
        "is in cluster mode: every step needs all keys on one server; use one that is not a cluster": mode
        == "cluster",
        f"refuses scripts that touch keys which they do not declare ({server.script_error}): use a server, or a "
        "way to it, that allows that": server.script_error is not None,
        "is a replica, which takes no writes: name the primary, or the Sentinels with redis+sentinel://": role
        in ("replica", "slave"),
        f"does not allow its user {', '.join(refused[:_LISTED])}{more}: give it the rights of its role "
        "(deploy/redis/acl)": bool(refused),
    }
    return next((problem for problem, applies in found.items() if applies), None)


def risks(server: Server) -> list[Risk]:
    """Settings with which the server can lose tasks, among those that can be read."""
    info, found = server.info, []
    if info.get("aof_enabled") == 0 and info.get("availability_zone") != EMBEDDED:
        found.append(
            Risk(
                "persistence",
                "Redis keeps no append-only file: its restart loses accepted tasks",
                "set `appendonly yes` and `appendfsync everysec`, as deploy/redis/ has them",
            )
        )
    if info.get("aof_enabled") != 0 and server.config.get("appendfsync") == "no":
        found.append(
            Risk(
                "persistence",
                "Redis has appendfsync no: a crash of its machine loses what was accepted in about the last 30 s",
                "set `appendfsync everysec`",
            )
        )
    if info and (server.has_sentinels or info.get("connected_slaves", 0) > 0):
        lag_seconds = int(server.config.get("min-replicas-max-lag", 0))
        way_out = "set `min-replicas-to-write 1` and `min-replicas-max-lag 2` on all servers"
        if "min_slaves_good_slaves" not in info:
            found.append(
                Risk(
                    "replication",
                    "Redis has replicas and min-replicas-to-write or min-replicas-max-lag is 0: a primary that is "
                    "cut off or paused goes on accepting tasks, which a failover loses",
                    way_out,
                )
            )
        elif lag_seconds > LONGEST_LAG_SECONDS:
            found.append(
                Risk(
                    "replication",
                    f"Redis has min-replicas-max-lag {lag_seconds}: a failover loses the tasks that were accepted "
                    f"in up to {lag_seconds} s",
                    way_out,
                )
            )
    return found


async def report_risks(redis: Redis) -> Server:
    """Log a warning about settings with which the server can lose tasks, and about unchecked ones.

    Raises:
        redis.exceptions.RedisError: when the server does not reply.
    """
    server = await read_server(redis)
    memory = eviction_problem(server.info.get("maxmemory_policy"), server.info.get("maxmemory") or None)
    found = [f"{risk.problem}; {risk.remedy}" for risk in risks(server)]
    if lines := [f"{memory}; set `maxmemory-policy {SAFE_POLICY}`", *found] if memory else found:
        logger.warning("%s", "; also: ".join(lines))
    if not server.info:
        logger.info("the settings of the server are not checked: its user may not use INFO")
    elif not server.config:
        logger.info("appendfsync and min-replicas-max-lag are not checked: the user may not use CONFIG GET")
    return server


async def report_changes(redis: Redis, server: Server, every_seconds: float = CHANGED_SECONDS) -> None:
    """Repeat `report_risks` after each restart or failover of the server, until cancelled."""
    while True:
        await asyncio.sleep(every_seconds)
        try:
            if (await redis.info("server")).get("run_id") != server.run_id:
                server = await report_risks(redis)
        except NoPermissionError:
            return
        except (RedisError, OSError):  # other users of the server log this
            continue
