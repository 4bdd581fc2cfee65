"""The server of the model: set to a state, run one step, read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diracx.tasks.plumbing.broker import keys, scripts
from diracx.tasks.plumbing.broker.sizes import CALL_BYTES
from redis import Redis

#: What is no part of a state: it only says when something was.
_LEFT_OUT = {keys.FENCE, keys.DATASET_ID, keys.DELAYED_REASONS, keys.WAKE_SCHEDULER, keys.RENEWED, keys.LEASES}
#: All keys: name, dump, content. Points in time that decide nothing are left out.
_SNAPSHOT = """
local found = {redis.call('TIME')[1]}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, content = redis.call('TYPE', key).ok, nil
  redis.call('PERSIST', key)
  if kind == 'string' then
    content = redis.call('GET', key)
    -- How long a lock is reserved is for the search to decide, not for this clock.
    local ends, grant = string.match(content, '^(%d+)( .*)$')
    if string.sub(key, 1, #ARGV[2]) == ARGV[2] and tonumber(ends) > 0 then
      content = '9999999999999' .. grant
      redis.call('SET', key, content)
    end
  elseif kind == 'hash' then content = redis.call('HGETALL', key)
  elseif kind == 'set' then content = redis.call('SMEMBERS', key); table.sort(content)
  elseif kind == 'zset' then content = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  elseif kind == 'stream' then
    local pending = redis.pcall('XPENDING', key, ARGV[1], '-', '+', 100)
    local owners = {}
    for _, p in ipairs(pending.err and {} or pending) do owners[#owners + 1] = {p[1], p[2], p[4]} end
    content = {redis.call('XRANGE', key, '-', '+'), owners}
  end
  found[#found + 1] = {key, redis.call('DUMP', key), content}
end
return found
"""


class Server:
    """One server, whose data are replaced again and again."""

    def __init__(self, url: str) -> None:
        self.redis = Redis.from_url(url)
        self._snapshot = self.redis.register_script(_SNAPSHOT)
        self._dumps: dict[bytes, bytes] = {}

    def restore(self, dumps: Sequence[tuple[bytes, bytes]]) -> None:
        """Restore a snapshot, by changing the differences."""
        wanted = dict(dumps)
        with self.redis.pipeline(transaction=False) as pipe:
            if gone := self._dumps.keys() - wanted.keys():
                pipe.delete(*gone)
            for name, dump in dumps:
                if self._dumps.get(name) != dump:
                    pipe.restore(name, 0, dump, replace=True)
            pipe.execute()
        self._dumps = wanted

    def read(self) -> tuple[list[tuple[bytes, bytes]], list[Any]]:
        """The dumps to restore, and the content to compare. No key expires: the search controls the time."""
        dumps, content = [], []
        seconds, *found = self._snapshot(args=[keys.GROUP, keys.RESERVATION_PREFIX])
        now = int(seconds) * 1000
        for name, dump, value in sorted(found):
            dumps.append((name, dump))
            if name.decode() not in _LEFT_OUT:
                content.append((name.decode(), _comparable(name.decode(), value, now)))
        self._dumps = dict(dumps)
        return dumps, content

    def end_leases(self, *workers: str) -> None:
        """Their leases expire; after the last one the server has not been contacted for a lease."""
        self.redis.zadd(keys.ALIVE, dict.fromkeys(workers, 1), xx=True)
        if not self.redis.zcount(keys.ALIVE, 2, "+inf"):
            self.redis.set(keys.RENEWED, 1)

    def end_grant(self, grant: str) -> None:
        """Let the reservation of a lock expire."""
        stored: Any = self.redis.get(grant)
        self.redis.set(grant, b"0 " + stored.partition(b" ")[2])

    def end_timer(self, timers: str, name: str) -> None:
        """One delayed task becomes due and is moved, or one line is checked."""
        for line in self.redis.zrange(keys.LINES, 0, -1):
            self.redis.zadd(keys.LINES, {line: "inf"})
        self.redis.zadd(timers, {name: 0}, xx=True)
        for step in ("promote", "lines"):
            self.redis.execute_command("EVAL", scripts.script(step).source, 0, 500, CALL_BYTES)


def _comparable(key: str, value: Any, now_ms: int) -> Any:
    """The relevant content: order is removed where it has no effect."""
    if key in keys.EVERY_STREAM:
        return tuple(value)
    if key in (keys.DELAYED, keys.LINES):
        return value[::2]
    if not isinstance(value, list) or key == keys.SURVIVED:
        return value
    pairs = list(zip(value[::2], value[1::2], strict=True))
    if key != keys.ALIVE:
        return pairs
    return [
        (worker, "lives" if int(ends) > now_ms else "dead" if int(ends) >= 0 else "reclaimed")
        for worker, ends in pairs
    ]
