"""Leftover keys on the server, and a dump of all keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diracx.tasks.plumbing.broker import keys

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Empty streams aside: what schedulers must not forget, and the version of the data.
_FURNITURE = {keys.NEXT_RUNS, keys.FINGERPRINTS, keys.LAST_RUNS, keys.OUTCOMES, keys.SCHEMA}
#: Things of one key, and characters of one thing, that are written down.
_MOST, _LONGEST = 200, 200


async def leftovers(redis: Redis) -> list[str]:
    """Keys that would stay for ever, but for empty streams and what schedulers must not forget."""
    found = []
    for name in await _names(redis):
        if name in keys.EVERY_STREAM:
            has_group = bool(await redis.xinfo_groups(name))
            consumers = await redis.xinfo_consumers(name, keys.GROUP) if has_group else []
            if (length := await redis.xlen(name)) or consumers:
                names = ", ".join(_text(consumer["name"]) for consumer in consumers)
                found.append(f"{name} ({length} entries; consumers: {names or 'none'})")
        elif name not in _FURNITURE and await redis.ttl(name) == -1:
            found.append(name)
    return found


async def everything(redis: Redis) -> dict[str, Any]:
    """All keys with their content: fields, scores, consumers; of messages only the headers."""
    return {name: await _content(redis, name) for name in await _names(redis)}


async def _names(redis: Redis) -> list[str]:
    return sorted(_text(key) for key in await redis.keys())


async def _content(redis: Redis, name: str) -> Any:
    match _text(await redis.type(name)):
        case "string":
            return _text(await redis.get(name))
        case "hash":
            _, fields = await redis.hscan(name, count=_MOST)
            return {_text(field): _text(value) for field, value in fields.items()}
        case "zset":
            return [
                (_text(member), score) for member, score in await redis.zrange(name, 0, _MOST, withscores=True)
            ]
        case "stream":
            groups = await redis.xinfo_groups(name)
            pending = await redis.xpending_range(name, keys.GROUP, "-", "+", _MOST) if groups else []
            held = [
                (_text(each["message_id"]), _text(each["consumer"]), each["times_delivered"]) for each in pending
            ]
            return {"length": await redis.xlen(name), "pending": held}
        case "set":
            return [_text(member) for member in await redis.srandmember(name, _MOST)]
        case "list":
            return [_text(item) for item in await redis.lrange(name, 0, _MOST)]
        case other:
            return other


def _text(value: Any) -> str:
    """The first line: behind it is a message, where there is one."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return str(value).partition("\n")[0][:_LONGEST]
