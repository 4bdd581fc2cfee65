"""Limits, and reader and writer locks."""

from dataclasses import dataclass

from diracx.tasks.plumbing import (
    BaseLock,
    BaseTask,
    ConcurrencyLimiter,
    ExclusiveRWLock,
    RateLimiter,
    SharedRWLock,
    register_locked_object_type,
)

SITE = register_locked_object_type("site")


class TransfersPerSite(ConcurrencyLimiter):
    """At most 20 transfers at a time from or to one site."""

    limit = 20


class RequestsPerSite(RateLimiter):
    """At most 100 requests in any minute."""

    limit = 100
    window_seconds = 60


@dataclass
class Transfer(BaseTask):
    """Needs two slots with one request each, while no one drains the sites."""

    source: str
    target: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        # All are taken in one step or none is: no order can make two tasks block each other.
        sites = {self.source, self.target}
        return [
            lock
            for site in sites
            for lock in (SharedRWLock(SITE, site), TransfersPerSite(SITE, site), RequestsPerSite(SITE, site))
        ]

    async def execute(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass
class Empty(BaseTask):
    """Alone at its site: no transfer runs beside it."""

    site: str

    @property
    def execution_locks(self) -> list[BaseLock]:
        return [ExclusiveRWLock(SITE, self.site)]

    async def execute(self) -> str:
        return f"{self.site} is empty"
