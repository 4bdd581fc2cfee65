"""Redis in the chaos tests: one server, or a primary and two replicas with three Sentinels, and their failures.

Each outage is noted with the time for which the configuration may have lost what was written (`Outage`).
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diracx.tasks.testing.server import ValkeyProcess, free_port
from redis import Redis
from redis.exceptions import RedisError

from .plan import Disturbance

SERVICE = "tasks"
#: Interval of snapshots in the configuration `rdb`: short, as runs are.
SNAPSHOT_SECONDS = 5
#: A primary without an acknowledgement of a replica for so long refuses writes; it is measured in whole seconds.
_MAX_LAG_SECONDS = 2
_AOF = ("--appendonly", "yes", "--appendfsync")
#: Configuration -> options of its servers.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "rdb": ("--save", f"{SNAPSHOT_SECONDS} 1"),
    "everysec": (*_AOF, "everysec"),
    "always": (*_AOF, "always"),
    "sentinel": (*_AOF, "everysec"),
    "sentinel-min-replicas": (
        *(*_AOF, "everysec"),
        *("--min-replicas-to-write", "1", "--min-replicas-max-lag", str(_MAX_LAG_SECONDS)),
    ),
}
#: Configuration -> how long before its end a server that is killed may have written what is lost.
_LOST_SECONDS = {
    "none": math.inf,
    "rdb": SNAPSHOT_SECONDS + 2.0,  # and the time that a snapshot takes
    "everysec": 2.0,  # a write waits so long at most while an fsync is under way
    "sentinel": 1.0,
    "sentinel-min-replicas": 1.0,
}
#: What was not synchronised to the disk is lost with the power: with `everysec`, one second.
_NOT_SYNCED_SECONDS = 1.0
#: Shorter than any pause that is to be noticed; longer than a busy machine stands still.
_DOWN_AFTER_MS = 2000
_PATIENCE_SECONDS = 60.0
_TICK_SECONDS = 0.05


@dataclass
class Outage:
    """Times are in seconds on the monotonic clock."""

    what: str
    begin: float
    end: float = math.inf
    """Time when it (or the promoted replica) replied again."""
    lost_from: float = math.inf
    """Time from which writes may be lost; infinity: none may."""
    lost_until: float = -math.inf
    over: float = math.inf
    """Time when no client could talk to a server any more that had been replaced."""

    @property
    def forgets_from(self) -> float:
        """Time from which writes may be lost while those before are kept. Where all is lost, nothing
        of what was before is known.
        """
        return self.begin if self.lost_from == -math.inf else self.lost_from


class Single:
    """One server, with or without persistence. It comes back by itself, as under a supervisor."""

    def __init__(self, configuration: str, directory: Path) -> None:
        self.configuration = configuration
        self._directory = directory
        self._server = ValkeyProcess(directory, options=_OPTIONS[configuration])
        self.outages: list[Outage] = []
        self._busy: asyncio.Task[None] | None = None
        self._sizes: deque[tuple[float, Path, int]] = deque(maxlen=100)

    @property
    def url(self) -> str:
        """For clients."""
        return self._server.url

    @property
    def primary_url(self) -> str:
        """Return the URL of the present primary; links are put in front of it."""
        return self._server.url

    async def start(self) -> None:
        await asyncio.to_thread(self._server.start)

    def look(self) -> None:
        """Note how much of the append-only file there is, for a power cut."""
        for path in self._directory.glob("appendonlydir/*.incr.aof"):
            with suppress(FileNotFoundError):  # it has just been rewritten
                self._sizes.append((time.monotonic(), path, path.stat().st_size))

    def strike(self, disturbance: Disturbance) -> bool:
        """Begin the disturbance, unless one is under way or this configuration does not know it."""
        if disturbance.what == "power cut" and self.configuration != "everysec":
            return False
        if is_under_way(self._busy):
            return False
        self._busy = asyncio.create_task(self.disturb(disturbance))
        return True

    async def settle(self) -> None:
        """Let every disturbance end."""
        if self._busy is not None:
            await self._busy

    async def disturb(self, disturbance: Disturbance) -> None:
        """Disturb the server, and return when that has ended."""
        outage = Outage(disturbance.what, time.monotonic())
        if disturbance.what.startswith("pause"):
            self.outages.append(outage)
            await _paused(self._server, disturbance.seconds)
        else:
            kept = disturbance.what == "restart server" and self.configuration != "none"
            if not kept and (lost := _LOST_SECONDS.get(self.configuration)) is not None:
                outage.lost_from = outage.begin - lost
            self.outages.append(outage)
            (self._server.stop if kept else self._server.kill)()
            if disturbance.what == "power cut":
                self._lose_what_is_not_synced(outage.begin)
            await asyncio.sleep(disturbance.seconds)
            await asyncio.to_thread(self._server.start)
        outage.end = outage.lost_until = outage.over = time.monotonic()

    def _lose_what_is_not_synced(self, at: float) -> None:
        old = [(path, size) for when, path, size in self._sizes if when <= at - _NOT_SYNCED_SECONDS]
        if old and old[-1][0].exists():
            os.truncate(*old[-1])

    def stop(self) -> None:
        if self._busy is not None:
            self._busy.cancel()
        self._server.kill()


class Sentinels:
    """A primary, two replicas, and three sentinels of which two must agree."""

    def __init__(self, configuration: str, directory: Path) -> None:
        self.configuration = configuration
        self._directory = directory
        self._servers = [self._server(directory / name) for name in ("redis-a", "redis-b", "redis-c")]
        self._primary = 0
        self._sentinels: list[subprocess.Popen[bytes]] = []
        self._places: list[str] = []
        self.outages: list[Outage] = []
        self._busy: asyncio.Task[None] | None = None

    def _server(self, directory: Path) -> ValkeyProcess:
        directory.mkdir()
        return ValkeyProcess(directory, options=("--repl-diskless-sync-delay", "0", *_OPTIONS[self.configuration]))

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(self._places)}/{SERVICE}"

    @property
    def primary_url(self) -> str:
        return self._servers[self._primary].url

    async def start(self) -> None:
        for server in self._servers:
            await asyncio.to_thread(server.start)
        for replica in (1, 2):
            await self._follow(replica, 0)
        self._start_sentinels()
        await _until(self._is_complete, "the sentinels know all servers and each other")

    def _start_sentinels(self) -> None:
        for number in range(3):
            home = self._directory / f"sentinel-{number}"
            home.mkdir()
            port = free_port()
            (home / "sentinel.conf").write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\n"
                f"sentinel monitor {SERVICE} 127.0.0.1 {self._servers[0].port} 2\n"
                f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {SERVICE} 3000\n"
            )
            command = [self._servers[0].binary, str(home / "sentinel.conf"), "--sentinel"]
            with (home / "log").open("wb") as log:
                self._sentinels.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            self._places.append(f"127.0.0.1:{port}")

    def look(self) -> None:
        """There is nothing to note."""

    def strike(self, disturbance: Disturbance) -> bool:
        """Begin the disturbance of the primary, unless the last one is not got over yet."""
        if disturbance.what == "power cut" or is_under_way(self._busy):
            return False
        self._busy = asyncio.create_task(self.disturb(disturbance))
        return True

    async def settle(self) -> None:
        """Let every disturbance end."""
        if self._busy is not None:
            await self._busy

    async def disturb(self, disturbance: Disturbance) -> None:
        """Disturb the server, and return when that has ended."""
        try:
            await _until(self._is_complete, "all replicas follow the primary again")
        except RuntimeError as error:
            print(f"no {disturbance.what}: {error}", file=sys.stderr, flush=True)
            return
        old = self._primary
        outage = Outage(disturbance.what, time.monotonic())
        self.outages.append(outage)
        if disturbance.what.endswith("briefly"):
            # Too short for the sentinels to notice.
            await _paused(self._servers[old], min(disturbance.seconds, _DOWN_AFTER_MS / 2000))
            outage.end = outage.over = time.monotonic()
            return
        outage.lost_from = outage.begin - _LOST_SECONDS[self.configuration]
        pausing = None
        if disturbance.what.startswith("pause"):
            pausing = asyncio.create_task(_paused(self._servers[old], disturbance.seconds))
        elif disturbance.what.startswith("kill"):
            self._servers[old].kill()
        else:  # planned, as for maintenance
            await _until(self._failover_has_begun, "a sentinel begins a failover")
        await _until(lambda: self._promoted(old), "a replica is promoted")
        outage.end = time.monotonic()
        moving = asyncio.create_task(self._moved(old))
        if pausing is not None:
            await pausing
        elif disturbance.what.startswith("kill"):
            # A supervisor would start it at once; here only when it cannot be the primary any more.
            await asyncio.to_thread(self._servers[old].start)
            await self._follow(old, self._primary)
        # Until then it may accept writes that no process will ever read.
        await _until(lambda: self._role(old) == "slave", "the old primary has become a replica")
        outage.over = outage.lost_until = time.monotonic()
        if self.configuration == "sentinel-min-replicas":
            # The other replica counts for the old primary until it follows the new one.
            outage.lost_until = min(outage.over, await moving + _MAX_LAG_SECONDS + 1.0)
        moving.cancel()

    async def _moved(self, old: int) -> float:
        """Time when the replicas but for the old primary followed the new one."""
        others = [number for number in range(len(self._servers)) if number not in (old, self._primary)]
        port = self._servers[self._primary].port

        def all_follow() -> bool:
            return all(self._replication(number).get("master_port") == port for number in others)

        await _until(all_follow, "the other replicas follow the new primary")
        return time.monotonic()

    async def _follow(self, replica: int, primary: int) -> None:
        def is_replica() -> bool:
            with Redis.from_url(self._servers[replica].url, socket_timeout=1) as client:
                return bool(client.replicaof("127.0.0.1", self._servers[primary].port))

        await _until(is_replica, "a server that has started follows the primary")  # it may load its data first

    def _failover_has_begun(self) -> bool:
        """A sentinel refuses for a while after the last failover, and while it trusts no replica."""
        with Redis.from_url(f"redis://{self._places[0]}", socket_timeout=1) as sentinel:
            return bool(sentinel.execute_command("SENTINEL", "FAILOVER", SERVICE))

    def _promoted(self, old: int) -> bool:
        for number in range(len(self._servers)):
            if number != old and self._role(number) == "master":
                self._primary = number
                return True
        return False

    def _replication(self, number: int) -> dict[str, Any]:
        with Redis.from_url(self._servers[number].url, socket_timeout=1) as client:
            found: dict[str, Any] = client.info("replication")
            return found

    def _role(self, number: int) -> str:
        return str(self._replication(number)["role"])

    def _is_complete(self) -> bool:
        with Redis.from_url(self.primary_url, socket_timeout=1) as client:
            replicas = client.info("replication")
        if [replicas.get(f"slave{number}", {}).get("state") for number in range(2)] != ["online"] * 2:
            return False
        known = []
        for place in self._places:
            with Redis.from_url(f"redis://{place}", socket_timeout=1) as sentinel:
                known.append(sentinel.sentinel_master(SERVICE))
        port = self._servers[self._primary].port
        return all(
            (state["port"], state["num-slaves"], state["num-other-sentinels"]) == (port, 2, 2)
            and state["flags"] == "master"
            for state in known
        )

    def stop(self) -> None:
        if self._busy is not None:
            self._busy.cancel()
        for process in self._sentinels:
            process.kill()
            process.wait()
        for server in self._servers:
            server.kill()


def make(configuration: str, directory: Path) -> Single | Sentinels:
    """The servers of a configuration; not started yet."""
    return (Sentinels if configuration.startswith("sentinel") else Single)(configuration, directory)


def is_under_way(disturbance: asyncio.Task[None] | None) -> bool:
    """True if it is still running; raises its error."""
    if disturbance is None:
        return False
    if disturbance.done():
        disturbance.result()
    return not disturbance.done()


async def _paused(server: ValkeyProcess, seconds: float) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        why = ""
        try:
            if await asyncio.to_thread(condition):
                return
        except RedisError as error:
            why = f" ({error})"
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {_PATIENCE_SECONDS:g} s: {what}{why}")
        await asyncio.sleep(_TICK_SECONDS)
