"""Check of the server itself: what keeps the task system from working on it, and which settings can lose tasks."""

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

#: `redis.acl_check_cmd`, flags of scripts and the ids of streams that the scripts rely on came with it.
OLDEST_VERSION = (7, 0)
#: `availability-zone` of the embedded server: it loses its data on purpose.
EMBEDDED = "embedded"
#: The server's own default of `min-replicas-max-lag`; so many seconds of accepted tasks a failover may lose.
LONGEST_LAG_SECONDS = 10
_CHANGED_SECONDS = 30.0
_LISTED = 5
_SECTIONS = ("server", "memory", "persistence", "stats", "replication", "cluster")
_CONFIG = ("appendfsync", "min-replicas-max-lag")
_STREAM = keys.ALL_STREAM_NAMES[0]
_TOUCH = f"EXISTS {keys.DELAYED} {keys.DELAYED_DATA}"
_READ_CONFIG = " ".join(("CONFIG GET", *_CONFIG))


class UnusableServerError(Exception):
    """The task system cannot work on this server; the message says why, and the way out."""


class Role(Enum):
    """Role of a process: the commands without which it cannot work."""

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
    """Properties of a server. What its user may not ask is missing."""

    info: Mapping[str, Any] = field(default_factory=dict)
    """Of INFO."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Of CONFIG GET: `appendfsync`, `min-replicas-max-lag`."""
    hello: Mapping[str, str] = field(default_factory=dict)
    """Of HELLO, which everyone may ask: version, mode, role."""
    refused: tuple[str, ...] = ()
    """Commands of the role that its user may not send."""
    script_error: str | None = None
    """Error of the server for a script that declares no keys."""
    has_sentinels: bool = False
    """True if its address came from Sentinels."""

    @property
    def run_id(self) -> str | None:
        """Another one for each process of a server."""
        return self.info.get("run_id")

    @property
    def version(self) -> str | None:
        """Of Redis, or that of Redis with which a Valkey is compatible."""
        return self.hello.get("version") or self.info.get("redis_version")


#: The only policy that keeps what it was given; with any other the server deletes tasks and locks to free memory.
SAFE_POLICY = "noeviction"


@dataclass(frozen=True, slots=True)
class ServerMemory:
    """Memory use and limit of the server. None where its user may not ask."""

    used_bytes: int | None = None
    limit_bytes: int | None = None
    """None also where no limit is set."""
    policy: str | None = None
    """`maxmemory-policy`."""


async def read_memory(redis: Redis) -> ServerMemory:
    """Ask with INFO, which managed servers allow where CONFIG is forbidden.

    Raises:
        redis.exceptions.RedisError: when the server does not answer.
    """
    try:
        found = await redis.info("memory")
    except NoPermissionError:
        return ServerMemory()
    return ServerMemory(found.get("used_memory"), found.get("maxmemory") or None, found.get("maxmemory_policy"))


def eviction_problem(policy: str | None, limit_bytes: int | None) -> str | None:
    """Describe the problem with the server's `maxmemory-policy`; None when none is known.

    Args:
        policy: None: unknown.
        limit_bytes: None: no limit is set.
    """
    if policy is None or policy == SAFE_POLICY:
        return None
    when = "as soon as a maxmemory is set" if limit_bytes is None else "when its memory is full"
    return f"Redis has maxmemory-policy {policy}: it deletes tasks and locks {when}, and says nothing"


@dataclass(frozen=True, slots=True)
class Risk:
    """A setting with which the server can lose tasks."""

    check: str
    """Name of the health check."""
    problem: str
    remedy: str


async def read_server(redis: Redis, role: Role | None = None, *, settings: bool = True) -> Server:
    """Ask the server in one round trip; one more for CONFIG where that is allowed, and for a script new to it.

    Args:
        role: for which the rights of its user are checked.
        settings: read those, too, which takes the right to use INFO.

    Raises:
        redis.exceptions.RedisError: when the server does not answer, or will be able to a little later.
    """
    wanted = (_TOUCH, *((_READ_CONFIG,) if settings else ()), *(role.value if role else ()))
    check = script("check")
    async with redis.pipeline(transaction=False) as pipe:
        pipe.execute_command("HELLO")
        pipe.execute_command("EVALSHA", check.sha, 0, *wanted)
        if settings:
            pipe.execute_command("INFO", *_SECTIONS)
        hello, refused, *info = await pipe.execute(raise_on_error=False)
    try:
        if isinstance(refused, NoScriptError):
            refused = await check(redis, args=wanted)
        elif isinstance(refused, Exception):
            raise refused
        commands, error = [command.decode() for command in refused], None
    except NoPermissionError:
        commands, error = ["EVAL"], None
    except ResponseError as refusal:
        if is_transient(refusal):
            raise
        commands, error = [], str(refusal)
    if isinstance(hello, ResponseError) and not info:  # before 6.2, HELLO takes no less than a version
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
    """HELLO's pairs, whose last are lists."""
    if isinstance(hello, dict):
        hello = [part for pair in hello.items() for part in pair]
    pairs = list(zip(hello[::2], hello[1::2], strict=True)) if isinstance(hello, list) else []
    return {name.decode(): value.decode() for name, value in pairs if isinstance(value, bytes)}


def obstacle(server: Server) -> str | None:
    """Obstacle to the whole task system, and the way out, on one line; None when none is known."""
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
    return next((problem for problem, is_so in found.items() if is_so), None)


def risks(server: Server) -> list[Risk]:
    """The settings with which the server can lose tasks, as far as it tells."""
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
    """Log in one line which settings of the server can lose tasks, and what could not be checked.

    Raises:
        redis.exceptions.RedisError: when the server does not answer.
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


async def report_changes(redis: Redis, server: Server) -> None:
    """Report again when another server, or the same one started anew, has taken the place of this. Never ends."""
    while True:
        await asyncio.sleep(_CHANGED_SECONDS)
        try:
            if (await redis.info("server")).get("run_id") != server.run_id:
                server = await report_risks(redis)
        except NoPermissionError:
            return
        except (RedisError, OSError):  # logged by what needs the server
            continue
