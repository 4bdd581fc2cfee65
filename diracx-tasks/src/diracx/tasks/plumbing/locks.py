"""Locks and limiters in Redis, declared by a task or used directly on a connection.

Each decision is made by one script, with the clock of the server. Each instance is one owner: a release by another
owner has no effect. `ttl_ms` is in milliseconds, all other times in seconds.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable
from functools import cache
from os import urandom
from typing import TYPE_CHECKING, ClassVar

from .broker.requests import LOCK_KINDS
from .lock_registry import LockedObjectType

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from .broker.requests import LockNumbers, LockSpec

#: Share of a lease, or of the time to live of a lock, reserved for a cancellation to take effect.
SAFETY_MARGIN = 0.1
DEFAULT_LOCK_TTL_MS = 30_000
#: Maximum number of locks of one task, which scripts acquire, renew and release together.
MAX_LOCKS = 100
#: Maximum time to live and window: ten years.
LONGEST_MS = 315_576_000_000
#: Largest integer that the server represents exactly as a double.
LARGEST_LIMIT = 2**53


class BaseLock(ABC):  # noqa: B024  # subclasses may have abstract methods
    """A lock on one object, identified by object type and keys.

    Subclasses may define their own `acquire`, `release` and `extend`: see `is_custom`.
    """

    _kind: ClassVar[str] = ""
    _prefix: ClassVar[str] = ""

    def __init__(self, obj: LockedObjectType, key: int | str, *extra_keys: int | str) -> None:
        self.obj = obj if type(obj) is LockedObjectType else LockedObjectType(obj)
        self.key = key
        self.extra_keys = extra_keys
        self._owner_id = urandom(16).hex()
        self.token: int | None = None
        """Fencing token of the last grant, None before it. Tokens increase with each grant of any lock, so that a
        protected resource can refuse a former holder: see `held_locks`.
        """

    @property
    def redis_key(self) -> str:
        """`{prefix}:{obj}:{key}:{extra keys}`."""
        prefix = [self._prefix] if self._prefix else []
        return ":".join([*prefix, self.obj, str(self.key), *map(str, self.extra_keys)])

    @property
    def enabled(self) -> bool:
        """False for a limiter without a limit, which is always granted without a round trip."""
        return True

    def spec(self) -> LockSpec:
        """Return the lock as an argument of scripts."""
        return {"kind": self._kind, "key": self.redis_key, "owner": self._owner_id, **self._numbers()}

    def _numbers(self) -> LockNumbers:
        """Return the numbers of this kind of lock for scripts."""
        return {}

    async def acquire(self, redis: Redis) -> bool:
        """Acquire the lock if it is free. Returns whether it was granted."""
        from .broker import locking

        if not self.enabled:
            return True
        token = await locking.acquire(redis, [self.spec()])
        if token is not None:
            self.token = token
        return token is not None

    async def release(self, redis: Redis) -> None:
        """Release the lock. No effect if this instance does not hold it."""
        from .broker import locking

        if self.enabled:
            await locking.release(redis, [self.spec()])

    async def extend(self, redis: Redis) -> bool:
        """Renew the lock to its full time to live. Returns False if it is lost, or has no time to live."""
        from .broker import locking

        if not hasattr(self, "ttl_ms"):
            return False
        return not self.enabled or (await locking.extend(redis, [self.spec()]))[0]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.redis_key}>"


class _ExpiringLock(BaseLock):
    """A lock that expires `ttl_ms` after its last acquire or extend."""

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
    """Lock with at most one owner. Not re-entrant: a second acquire by its owner is refused."""

    _kind = "mutex"
    _prefix = LOCK_KINDS[_kind].prefix


class ExclusiveRWLock(_ExpiringLock):
    """Writer's side of a readers-writer lock: granted if there are neither readers nor a writer."""

    _kind = "exclusive"
    _prefix = LOCK_KINDS[_kind].prefix


class SharedRWLock(BaseLock):
    """Readers' side of a readers-writer lock: granted to any number of readers if there is no writer.

    It has no time to live. That of a task is released even if its worker crashes; other readers must release it.
    """

    _kind = "shared"
    _prefix = LOCK_KINDS[_kind].prefix


def _check_whole(lock: BaseLock, name: str, number: float) -> None:
    """Refuse fractions, which the server would round, and numbers that are too large for it."""
    if not (abs(number) <= LARGEST_LIMIT and number == int(number)):
        raise ValueError(f"{lock.redis_key}: {name} must be a whole number up to {LARGEST_LIMIT}, not {number!r}")


class BaseLimiter(BaseLock):
    """Base class of limiters, which are skipped in interactive mode (`call`)."""


class RateLimiter(BaseLimiter):
    """Limiter of units in a sliding window: at most `limit` units in any window of `window_seconds`.

    A unit that was granted exactly `window_seconds` ago still counts. `release()` does not return quota.

    Args:
        n_items: units of quota of one acquire.

    Raises:
        ValueError: on acquire, `n_items` is more than `limit`, or one of them is not a whole number.
    """

    limit: int | None = None
    window_seconds: float | None = None
    _kind = "rate"
    _prefix = LOCK_KINDS[_kind].prefix

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
                f"{self.redis_key} has n_items={self.n_items}, more than its limit of {self.limit}: "
                "it could never be granted"
            )
        return {
            "limit": self.limit,
            "window_us": round(self.window_seconds * 1_000_000),
            "n_items": self.n_items,
        }

    async def release(self, redis: Redis) -> None:
        """No effect: used quota is not returned."""


class ConcurrencyLimiter(BaseLimiter, _ExpiringLock):
    """Limiter of concurrent holders: at most `limit`. A slot expires `ttl_ms` after its last acquire or extend.

    Raises:
        ValueError: on acquire, `limit` is less than 1, or not a whole number.
    """

    limit: int | None = None
    _kind = "concurrency"
    _prefix = LOCK_KINDS[_kind].prefix

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
    """Return whether a class has its own `acquire`, `release` or `extend`.

    Such locks are acquired one by one after the others are granted, and polled while one refuses.
    """
    bases = [vars(base) for base in lock_class.__mro__ if base.__module__ != __name__]
    return any(name in base for base in bases for name in ("acquire", "release", "extend"))


def needed(locks: Iterable[BaseLock]) -> list[BaseLock]:
    """Return the locks to acquire: without disabled limiters, except those of custom classes."""
    return [lock for lock in locks if lock.enabled or is_custom(type(lock))]


def lock_specs(locks: Iterable[BaseLock]) -> list[LockSpec]:
    """Return the enabled locks of a task as arguments of scripts, without duplicate keys and custom locks.

    Two locks of one kind on one key are merged, with the longer time to live, the lower limit, and the sum of
    units. An exclusive lock includes a shared one.

    Raises:
        TypeError: the `spec()` of a lock is invalid.
        ValueError: they could never be granted together, or are more than `MAX_LOCKS`; names the key.
    """
    specs: dict[str, LockSpec] = {}
    for lock in locks:
        if not lock.enabled or is_custom(type(lock)):
            continue
        spec = _checked_spec(lock)
        key = spec["key"]
        specs[key] = _merged(specs[key], spec) if key in specs else spec
        if len(specs) > MAX_LOCKS:
            raise ValueError(f"more than {MAX_LOCKS} locks: lock a larger object, or split the task")
    return list(specs.values())


def _checked_spec(lock: BaseLock) -> LockSpec:
    """Return the lock as an argument of scripts, validated for classes outside this package."""
    spec = lock.spec()
    texts = isinstance(spec["key"], str) and isinstance(spec["owner"], str)
    ttl_ms, window_us = spec.get("ttl_ms", 1), spec.get("window_us", 1)
    if not (texts and spec["kind"] in LOCK_KINDS and isinstance(ttl_ms, int | float) and ttl_ms > 0):
        raise TypeError(f"the lock {type(lock).__name__} has an invalid spec(): {spec!r:.200}")
    if not (ttl_ms <= LONGEST_MS and ttl_ms == int(ttl_ms)):
        raise ValueError(f"{spec['key']}: ttl_ms must be whole milliseconds up to {LONGEST_MS}, not {ttl_ms!r}")
    if not 0 < window_us <= LONGEST_MS * 1000:
        raise ValueError(f"{spec['key']}: window_seconds must be from 1e-6 to {LONGEST_MS // 1000}")
    return spec


def _merged(one: LockSpec, other: LockSpec) -> LockSpec:
    """Merge two locks of one task on one key."""
    key, kinds = one["key"], {one["kind"], other["kind"]}
    for spec, included in ((one, other), (other, one)):
        if LOCK_KINDS[spec["kind"]].includes == included["kind"]:
            return spec
    if len(kinds) > 1:
        raise ValueError(
            f"{key} is declared as {' and as '.join(sorted(kinds))}: give one of the locks another key"
        )
    if "window_us" in one and (one["limit"], one["window_us"]) != (other["limit"], other["window_us"]):
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
