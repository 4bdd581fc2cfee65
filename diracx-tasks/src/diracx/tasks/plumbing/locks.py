"""Locks and limiters in Redis, usable alone on a bare connection or declared by a task.

Every decision is made in one script on the server, by the server's clock. Each instance is one owner: a
release by anybody else changes nothing. `ttl_ms` is in milliseconds, everything else in seconds.
Contract: the seed's lock reference.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from functools import cache
from os import urandom
from typing import TYPE_CHECKING, ClassVar

from .lock_registry import LockedObjectType

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .broker.requests import LockNumbers, LockSpec

#: The part of a lease, or of a lock's time to live, that is left for a cancellation to take effect.
SAFETY_MARGIN = 0.1
DEFAULT_LOCK_TTL_MS = 30_000
#: Locks of one task. Each is taken, renewed and given back in one step on the server.
MAX_LOCKS = 100
#: Ten years: no lock lives longer, and no window is wider.
_LONGEST_MS = 315_576_000_000
#: The server counts in doubles.
_LARGEST = 2**53
_KINDS = frozenset({"mutex", "exclusive", "shared", "rate", "concurrency"})


class BaseLock(ABC):  # noqa: B024  # classes derived from it may have abstract methods
    """A lock on one object, known by the object's kind and key.

    A class of yours may bring its own `acquire` and `release`, and `extend`: see `is_custom`.
    """

    _kind: ClassVar[str] = ""
    _prefix: ClassVar[str] = ""

    def __init__(self, obj: LockedObjectType, key: int | str, *extra_keys: int | str) -> None:
        self.obj = LockedObjectType(obj)
        self.key = key
        self.extra_keys = extra_keys
        self._owner_id = urandom(16).hex()
        self.token: int | None = None
        """The fencing token of the last grant; None before. Of two grants of anything, the later has the greater
        token, so that whatever a lock protects can refuse a holder that has lost it: see `held_locks`.
        """

    @property
    def redis_key(self) -> str:
        """`{prefix}:{obj}:{key}:{extra keys}`."""
        prefix = [self._prefix] if self._prefix else []
        return ":".join([*prefix, self.obj, str(self.key), *map(str, self.extra_keys)])

    @property
    def enabled(self) -> bool:
        """False for a limiter without a limit: it grants everything without asking the server."""
        return True

    def spec(self) -> LockSpec:
        """Return this lock as the scripts take it."""
        return {"kind": self._kind, "key": self.redis_key, "owner": self._owner_id, **self._numbers()}

    def _numbers(self) -> LockNumbers:
        """Return the numbers that the scripts need for this kind of lock."""
        return {}

    async def acquire(self, redis: Redis) -> bool:
        """Take the lock if it is free now. True when it was granted."""
        from .broker import locking

        if not self.enabled:
            return True
        token = await locking.acquire(redis, [self.spec()])
        if token is not None:
            self.token = token
        return token is not None

    async def release(self, redis: Redis) -> None:
        """Release the lock. No effect when it is not held by this instance."""
        from .broker import locking

        if self.enabled:
            await locking.release(redis, [self.spec()])

    async def extend(self, redis: Redis) -> bool:
        """Renew the lock to its full time to live. False when it is lost, or has none."""
        from .broker import locking

        if not self._kind:
            return False
        return not self.enabled or (await locking.extend(redis, [self.spec()]))[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.redis_key}>"


class _ExpiringLock(BaseLock):
    """A lock that the server drops `ttl_ms` after its last acquire or extend: the safety net for crashes."""

    def __init__(
        self, obj: LockedObjectType, key: int | str, *extra_keys: int | str, ttl_ms: int = DEFAULT_LOCK_TTL_MS
    ) -> None:
        super().__init__(obj, key, *extra_keys)
        if ttl_ms <= 0:
            raise ValueError(f"ttl_ms must be a positive number of milliseconds, not {ttl_ms!r}")
        self.ttl_ms = ttl_ms

    def _numbers(self) -> LockNumbers:
        return {"ttl_ms": self.ttl_ms}


class MutexLock(_ExpiringLock):
    """At most one owner at a time. Not re-entrant: a second acquire by its owner is refused, too."""

    _kind = "mutex"
    _prefix = "lock:mutex"


class ExclusiveRWLock(_ExpiringLock):
    """The writer's side of a readers-writer lock: granted only with no readers and no writer."""

    _kind = "exclusive"
    _prefix = "lock:rw"


class SharedRWLock(BaseLock):
    """The readers' side: granted whenever there is no writer, to any number of readers.

    Readers are counted, without a time to live. A reader that is a task gives its count back even when
    its worker dies; a reader on a bare connection must release.
    """

    _kind = "shared"
    _prefix = "lock:rw"

    async def extend(self, redis: Redis) -> bool:
        """Always False: a shared lock has no time to live that could be extended."""
        return False


def _check_whole(lock: BaseLock, name: str, number: float) -> None:
    """Refuse parts of a unit, which the server would round, and numbers that it cannot count up to."""
    if not (abs(number) <= _LARGEST and number == int(number)):
        raise ValueError(f"{lock.redis_key}: {name} must be a whole number up to {_LARGEST}, not {number!r}")


class BaseLimiter(BaseLock):
    """A lock that limits instead of excluding. Limiters are skipped in interactive mode (`call`)."""


class RateLimiter(BaseLimiter):
    """Limiter: at most `limit` units in any window of `window_seconds`.

    Both ends belong to a window: a unit granted exactly `window_seconds` ago still counts.
    `release()` gives no quota back.

    Args:
        n_items: units of quota that one acquire spends.

    Raises:
        ValueError: on acquire, when `n_items` is more than `limit`, so that it could never be granted, or one of
            them is no whole number.
    """

    limit: int | None = None
    window_seconds: float | None = None
    _kind = "rate"
    _prefix = "limiter:rate"

    def __init__(self, obj: LockedObjectType, key: int | str, *extra_keys: int | str, n_items: int = 1) -> None:
        super().__init__(obj, key, *extra_keys)
        if n_items <= 0:
            raise ValueError(f"n_items must be a positive number of units, not {n_items!r}")
        self.n_items = n_items

    @property
    def enabled(self) -> bool:
        """False while `limit` or `window_seconds` is None."""
        return self.limit is not None and self.window_seconds is not None

    def _numbers(self) -> LockNumbers:
        assert self.limit is not None
        assert self.window_seconds is not None
        _check_whole(self, "n_items", self.n_items)
        _check_whole(self, "limit", self.limit)
        if self.n_items > self.limit:
            raise ValueError(
                f"{self.redis_key} asks for n_items={self.n_items} at once but its limit is {self.limit}: "
                "it could never be granted"
            )
        return {
            "limit": self.limit,
            "window_us": round(self.window_seconds * 1_000_000),
            "n_items": self.n_items,
        }

    async def release(self, redis: Redis) -> None:
        """No effect: spent quota is not returned."""

    async def extend(self, redis: Redis) -> bool:
        """Always False: there is nothing to extend."""
        return False


class ConcurrencyLimiter(BaseLimiter, _ExpiringLock):
    """At most `limit` holders at a time. A holder's slot ends `ttl_ms` after its last acquire or extend.

    Raises:
        ValueError: on acquire, when `limit` is less than 1, so that it could never be granted, or no whole number.
    """

    limit: int | None = None
    _kind = "concurrency"
    _prefix = "limiter:conc"

    @property
    def enabled(self) -> bool:
        """False while `limit` is None."""
        return self.limit is not None

    def _numbers(self) -> LockNumbers:
        assert self.limit is not None
        _check_whole(self, "limit", self.limit)
        if self.limit < 1:
            raise ValueError(f"{self.redis_key} has a limit of {self.limit}: it could never be granted")
        return {"limit": self.limit, "ttl_ms": self.ttl_ms}


@cache
def is_custom(lock_class: type[BaseLock]) -> bool:
    """Return whether a class brings an `acquire`, `release` or `extend` that the scripts cannot run.

    Such locks are taken one by one after the others are granted, and asked again after a while when one refuses.
    """
    bases = [vars(base) for base in lock_class.__mro__ if base.__module__ != __name__]
    return any(name in base for base in bases for name in ("acquire", "release", "extend"))


def needed(locks: Iterable[BaseLock]) -> list[BaseLock]:
    """Return the locks that have to be asked: not limiters without a limit, but for those of custom classes."""
    return [lock for lock in locks if lock.enabled or is_custom(type(lock))]


def lock_specs(locks: Iterable[BaseLock]) -> list[LockSpec]:
    """Return the enabled locks of a task as the scripts take them, each key once; without custom ones.

    Of two locks of one kind on one key, the longer time to live and the lower limit count, and the units of
    both are spent. A writer's lock is a reader's as well.

    Raises:
        TypeError: when the class of a lock makes nothing that the scripts understand.
        ValueError: when they could never be granted together, or are more than `MAX_LOCKS`; names the key.
    """
    specs: dict[str, LockSpec] = {}
    for lock in locks:
        if not lock.enabled or is_custom(type(lock)):
            continue
        spec = _checked_spec(lock)
        key = spec["key"]
        specs[key] = _merged(specs[key], spec) if key in specs else spec
        if len(specs) > MAX_LOCKS:
            raise ValueError(f"more than {MAX_LOCKS} locks: lock something larger, or split the task")
    return list(specs.values())


def _checked_spec(lock: BaseLock) -> LockSpec:
    """Return the lock as the scripts take it, also for classes outside this package."""
    spec = lock.spec()
    texts = isinstance(spec["key"], str) and isinstance(spec["owner"], str)
    ttl_ms, window_us = spec.get("ttl_ms", 1), spec.get("window_us", 1)
    if not (texts and spec["kind"] in _KINDS and isinstance(ttl_ms, int | float) and ttl_ms > 0):
        raise TypeError(f"the lock {type(lock).__name__} has no meaningful spec(): {spec!r:.200}")
    if not (ttl_ms <= _LONGEST_MS and ttl_ms == int(ttl_ms)):
        raise ValueError(f"{spec['key']}: ttl_ms must be whole milliseconds up to {_LONGEST_MS}, not {ttl_ms!r}")
    if not 0 < window_us <= _LONGEST_MS * 1000:
        raise ValueError(f"{spec['key']}: window_seconds must be from 1e-6 to {_LONGEST_MS // 1000}")
    return spec


def _merged(one: LockSpec, other: LockSpec) -> LockSpec:
    """Merge two locks of one task on one key."""
    key, kinds = one["key"], {one["kind"], other["kind"]}
    if kinds == {"shared", "exclusive"}:
        return one if one["kind"] == "exclusive" else other
    if len(kinds) > 1:
        raise ValueError(
            f"{key} is declared as {' and as '.join(sorted(kinds))}: give one of the locks another key"
        )
    if kinds == {"rate"} and (one["limit"], one["window_us"]) != (other["limit"], other["window_us"]):
        raise ValueError(f"{key} is declared with two rates: give one of the limiters another key")
    merged = one.copy()
    if "ttl_ms" in one:
        merged["ttl_ms"] = max(one["ttl_ms"], other["ttl_ms"])
    if "limit" in one:
        merged["limit"] = min(one["limit"], other["limit"])
    if "n_items" in one:
        merged["n_items"] = one["n_items"] + other["n_items"]
    if "n_items" in merged and merged["n_items"] > merged["limit"]:
        raise ValueError(
            f"{key} is declared more than once, with n_items={merged['n_items']} in all but its limit is "
            f"{merged['limit']}: it could never be granted"
        )
    return merged
