"""The atomic steps of the task system: each `lua/*.lua` file as a typed coroutine function.

A script is called by its hash. A server that does not know it (new, restarted, flushed) answers NOSCRIPT
without having run anything, so sending the source instead is safe.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import msgpack
from redis.exceptions import NoScriptError

from . import keys
from .sizes import CALL_BYTES

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

    from .clients import DirectConnection
    from .control import ControlConnection
    from .models import Settlement
    from .requests import CancelRequest, GroupChild, GroupFields, Resubmission

#: Everything a script may need to know about all streams.
EVERY_STREAM = msgpack.packb(keys.EVERY_STREAM)
#: The nine queues.
QUEUES = msgpack.packb(keys.ALL_STREAM_NAMES)


def pack(value: Any) -> bytes:
    """msgpack as the server's Lua understands it: raw strings only."""
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=False)
    except UnicodeEncodeError:  # halves of surrogate pairs, as wire.py sends them
        packed = msgpack.packb(value, use_bin_type=False, unicode_errors="surrogatepass")
    return packed


class Script:
    """One Lua file, with its includes and key names filled in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source = _source(name)
        self.sha = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(
        self, redis: Redis | DirectConnection, script_keys: Sequence[str] = (), args: Sequence[Any] = ()
    ) -> Any:
        try:
            return await redis.execute_command("EVALSHA", self.sha, len(script_keys), *script_keys, *args)
        except NoScriptError:
            return await redis.execute_command("EVAL", self.source, len(script_keys), *script_keys, *args)

    def run(
        self, redis: SyncRedis | ControlConnection, script_keys: Sequence[str] = (), args: Sequence[Any] = ()
    ) -> Any:
        """The same on a blocking connection: the lease keeper has a thread of its own."""
        try:
            return redis.execute_command("EVALSHA", self.sha, len(script_keys), *script_keys, *args)
        except NoScriptError:
            return redis.execute_command("EVAL", self.source, len(script_keys), *script_keys, *args)


def _source(name: str) -> str:
    folder = files(__package__) / "lua"
    source = (folder / f"{name}.lua").read_text()
    text = re.sub(
        r"^ *-- #include (.+)$",
        lambda found: "\n".join((folder / f"{part}.lua").read_text() for part in found[1].split()),
        source,
        flags=re.MULTILINE,
    )
    # Comments and indents are for us, and more than half of what is sent.
    text = re.sub(r"^ *(--.*\n)?|\n+(?=\n)| +-- .*$", "", text, flags=re.MULTILINE)
    constants = keys.script_constants()
    text = re.sub(r"\$([A-Z][A-Z_]*)", lambda found: constants[found[1]], text)
    # The server wants flags in the first line. A script with that line and without allow-oom is refused as a whole
    # when memory is short; one without that line only if its first write is one that may be refused.
    # allow-oom: what ends tasks, or keeps what they hold, must get through; on the whole it frees some.
    flags = re.search(r"^-- #flags (.+)$", source, re.MULTILINE)
    first_line = f"#!lua flags={flags[1]}" if flags else "#!lua"
    return f"{first_line}\n{text}"


@cache
def script(name: str) -> Script:
    """The script of that name, read once per process."""
    return Script(name)


async def submit(redis: Redis, stream: str, messages: Sequence[bytes]) -> None:
    """Put messages into a stream: all of them or none."""
    await script("submit")(redis, args=[stream, *messages])


async def delay(redis: Redis, messages: Iterable[tuple[str, int, str, str, bytes]]) -> bytes | None:
    """Put messages aside: all of them or none.

    Each is given by task id, when it is due (ms since the epoch, the server's clock), stream, reason and data.

    Returns the first id under which something else waits already; None: they are put aside.
    """
    reply: Any = await script("delay")(redis, args=[part for message in messages for part in message])
    return None if reply == 1 else reply


async def settle(
    redis: Redis, consumer: str, settlements: Sequence[Settlement], dataset_id: str = ""
) -> list[bool | str | None]:
    """Tell the broker how executions ended.

    Args:
        dataset_id: the life of the server's data in which the worker last renewed what it holds.

    Returns:
        Which settlements were accepted; None: the server has lost its data since, renew and ask again; a text:
        what of it the server has refused.
    """
    unsettled = await script("settle")(redis, args=[consumer, dataset_id, *packed_settlements(settlements)])
    accepted: list[bool | str | None] = [True] * len(settlements)
    for position, why in zip(unsettled[::2], unsettled[1::2], strict=True):
        accepted[position - 1] = why.decode(errors="replace") if isinstance(why, bytes) else None if why else False
    return accepted


def packed_settlements(settlements: Sequence[Settlement]) -> tuple[bytes, bytes]:
    """The deliveries, and what follows on them, as lua/settle.lua wants them."""
    places: list[Any] = []
    follows = {}
    for position, settlement in enumerate(settlements, start=1):
        delivery = settlement.delivery
        places += (delivery.stream, delivery.entry, delivery.deliveries)
        if what := settlement.effects():
            follows[position] = what
    return pack(places), pack(follows)


async def promote(redis: Redis, at_most: int) -> tuple[int, int | None, int, int, bool, int]:
    """Move what is due: (how many, next due in ms or None, now in ms, ms for which one leads, is there more, and
    how many could not be read).
    """
    moved, next_due, now, leads_ms, more, unreadable = await script("promote")(redis, args=[at_most, CALL_BYTES])
    next_due_ms = None if int(next_due) < 0 else int(next_due)
    return int(moved), next_due_ms, int(now), int(leads_ms), more == 1, int(unreadable)


async def lines(redis: Redis, at_most: int) -> None:
    """Look at the lines of locks that are due."""
    await script("lines")(redis, args=[at_most])


async def group(
    redis: Redis,
    group_id: str,
    fields: GroupFields | None,
    children: Sequence[GroupChild],
    last: bool,
) -> int:
    """Put children into a callback group; `fields` come with the first. See lua/group.lua for the reply."""
    packed = b"" if fields is None else pack(fields)
    return int(await script("group")(redis, args=[group_id, packed, pack(children), int(last)]))


async def cancel(redis: Redis, keep_ms: int, tasks: Sequence[CancelRequest]) -> list[tuple[str, bytes]]:
    """Cancel tasks: where each was, and its message if that has to be looked at. See lua/cancel.lua.

    Where messages are large, only the first ones: ask again for the others.
    """
    replies = await script("cancel")(redis, args=[keep_ms, pack(tasks), CALL_BYTES])
    return [(place.decode(), message) for place, message in replies]


async def find(redis: Redis, stream: str, begin: str, at_most: int) -> tuple[str, list[tuple[str, str, bytes]]]:
    """Look for marked tasks in a part of a stream: the last entry looked at; task, entry and message of each."""
    last, found = await script("find")(redis, [stream], [begin, at_most, CALL_BYTES])
    return last.decode(), [(task.decode(), entry.decode(), message) for task, entry, message in found]


async def task_ids(redis: Redis, stream: str, begin: str, at_most: int) -> list[bytes]:
    """The ids of the tasks in a part of a stream, behind the last entry looked at. See lua/task_ids.lua."""
    found: list[bytes] = await script("task_ids")(redis, [stream], [begin, at_most, CALL_BYTES])
    return found


async def fail_children(redis: Redis, group_id: str, error: str, children: Sequence[bytes]) -> int:
    """Fail children of a group. Returns how many were still waited for."""
    return int(await script("fail_children")(redis, args=[group_id, error, *children]))


async def resubmit(redis: Redis, requests: Sequence[Resubmission], ttl_ms: int) -> list[bool]:
    """Submit dead letters again. Returns which of them were; the others had been before."""
    return [reply == 1 for reply in await script("resubmit")(redis, args=[ttl_ms, pack(requests)])]
