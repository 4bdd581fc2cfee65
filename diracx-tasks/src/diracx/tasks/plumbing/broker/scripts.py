"""Loads and calls the Lua scripts, the atomic steps of the task system; most have a typed coroutine function.

A script is called by its hash. A server without it (new, restarted, flushed) returns NOSCRIPT and runs nothing, so
sending the source then is safe.
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
from .replies import ACCEPTED, DATA_LOST, TAKEN_OVER, SettleReply, StartReply
from .requests import LOCK_KINDS
from .sizes import CALL_BYTES

if TYPE_CHECKING:
    from redis import Redis as SyncRedis
    from redis.asyncio import Redis

    from .clients import DirectConnection
    from .control import ControlConnection
    from .models import Settlement, SettlingCall
    from .requests import CancelRequest, GroupChild, GroupFields, Resubmission, StartRequest

#: Names of all streams of tasks, for scripts.
EVERY_STREAM = msgpack.packb(keys.EVERY_STREAM)
#: Prefix of lua/settle.lua's error for a settlement that stays pending.
_KEPT = "kept: "
#: Names of the streams of the nine queues, for scripts.
QUEUES = msgpack.packb(keys.ALL_STREAM_NAMES)


def pack(value: Any) -> bytes:
    """Encode as the msgpack that the server's Lua can decode: raw strings only."""
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=False)
    except UnicodeEncodeError:  # lone surrogates, as messages/codec.py encodes them
        packed = msgpack.packb(value, use_bin_type=False, unicode_errors="surrogatepass")
    return packed


class Script:
    """One Lua file, with its includes and key names substituted."""

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
        """Call the script on a blocking connection, for a thread."""
        try:
            return redis.execute_command("EVALSHA", self.sha, len(script_keys), *script_keys, *args)
        except NoScriptError:
            return redis.execute_command("EVAL", self.source, len(script_keys), *script_keys, *args)


@cache
def _files() -> dict[str, str]:
    """All files by name, read at the first use of any: an upgrade may replace them while the process runs."""
    folder = files(__package__) / "lua"
    return {each.name[:-4]: each.read_text("utf-8") for each in folder.iterdir() if each.name.endswith(".lua")}


def _source(name: str) -> str:
    source = _files()[name]
    text = re.sub(
        r"^ *-- #include (.+)$",
        lambda found: "\n".join(_files()[part] for part in found[1].split()),
        source,
        flags=re.MULTILINE,
    )
    # Remove comments and indents, more than half of the source.
    text = re.sub(r"^ *(--.*\n)?|\n+(?=\n)|(?<! ) +-- .*$", "", text, flags=re.MULTILINE)
    constants = {**keys.script_constants(), "LOCK_KINDS": ", ".join(f"'{kind}'" for kind in LOCK_KINDS)}
    text = re.sub(r"\$([A-Z][A-Z_]*)", lambda found: constants[found[1]], text)
    # The server reads flags from the first line. Without memory, it refuses a script with that line and without
    # allow-oom before it starts; without that line, the script would fail at its first write, in the middle.
    # Scripts that end tasks or renew leases and locks have allow-oom: they must work without memory, and most free
    # some.
    flags = re.search(r"^-- #flags (.+)$", source, re.MULTILINE)
    first_line = f"#!lua flags={flags[1]}" if flags else "#!lua"
    return f"{first_line}\n{text}"


@cache
def script(name: str) -> Script:
    """Load the script of that name, once per process."""
    return Script(name)


async def submit(redis: Redis, stream: str, messages: Sequence[bytes]) -> None:
    """Add messages to a stream: all of them or none."""
    await script("submit")(redis, args=[stream, *messages])


async def delay(redis: Redis, messages: Iterable[tuple[str, int, str, str, bytes]]) -> bytes | None:
    """Add messages to the delayed set: all of them or none.

    Args:
        messages: task id, due time (ms since the epoch, the server's clock), stream, reason and data of each.

    Returns:
        The first id that another waiting task has; None: all are added.
    """
    reply: Any = await script("delay")(redis, args=[part for message in messages for part in message])
    return None if reply == 1 else reply


async def start(
    redis: DirectConnection, consumer: str, requests: Sequence[StartRequest], lease_ms: int
) -> list[StartReply]:
    """Take the locks of each delivery, or park it."""
    *replies, token = await script("start")(redis, args=[consumer, pack(requests), lease_ms])
    return [_start_reply(reply, each) for each, reply in enumerate(replies, start=int(token))]


def _start_reply(reply: Sequence[Any], token: int) -> StartReply:
    if reply[0] != 0:
        return StartReply(reply[0] == 1, token)
    return StartReply(False, refusing=int(reply[1]) - 1, next_poll_ms=int(reply[2]))


async def settle(
    redis: Redis, consumer: str, settlements: Sequence[Settlement], dataset_id: str = ""
) -> list[SettleReply]:
    """Settle deliveries.

    Args:
        dataset_id: id of the server's data at the worker's last renewal.
    """
    args = [consumer, dataset_id, *packed_settlements(settlements)]
    return _settle_replies(await script("settle")(redis, args=args), settlements)


def settle_command(consumer: str, call: SettlingCall) -> tuple[Any, ...]:
    """The command of `settle`, to be sent with others; `note_settled` gets its reply."""
    packed = packed_settlements(call.settlements)
    return "EVALSHA", script("settle").sha, 0, consumer, call.dataset_id, *packed


def note_settled(call: SettlingCall, reply: Any) -> None:
    """Pass on the reply of `settle_command`."""
    call.on_reply(None if isinstance(reply, Exception) else _settle_replies(reply, call.settlements))


def _settle_replies(unsettled: Sequence[Any], settlements: Sequence[Settlement]) -> list[SettleReply]:
    replies = [ACCEPTED] * len(settlements)
    for position, code in zip(unsettled[::2], unsettled[1::2], strict=True):
        if isinstance(code, bytes):
            text = code.decode(errors="replace")
            replies[position - 1] = SettleReply(not text.startswith(_KEPT), refused=text.removeprefix(_KEPT))
        else:
            replies[position - 1] = DATA_LOST if code else TAKEN_OVER
    return replies


def packed_settlements(settlements: Sequence[Settlement]) -> tuple[bytes, bytes]:
    """Encode the deliveries and their effects for lua/settle.lua."""
    deliveries: list[Any] = []
    effects_by_position = {}
    for position, settlement in enumerate(settlements, start=1):
        delivery = settlement.delivery
        deliveries += (delivery.stream, delivery.entry, delivery.deliveries)
        if effects := settlement.effects():
            effects_by_position[position] = effects
    return pack(deliveries), pack(effects_by_position)


async def promote(redis: Redis, at_most: int) -> tuple[int, int | None, int, int, bool, int]:
    """Promote due tasks. Returns their number, the next due time (ms) or None, the server's time (ms), the
    remaining lease of a leading scheduler (ms), whether more are due, and the number of unreadable ones.
    """
    moved, next_due, now, leads_ms, more, unreadable = await script("promote")(redis, args=[at_most, CALL_BYTES])
    next_due_ms = None if int(next_due) < 0 else int(next_due)
    return int(moved), next_due_ms, int(now), int(leads_ms), more == 1, int(unreadable)


async def lines(redis: Redis, at_most: int) -> None:
    """Poll the locks with waiting tasks that are due."""
    await script("lines")(redis, args=[at_most])


async def group(
    redis: Redis,
    group_id: str,
    fields: GroupFields | None,
    children: Sequence[GroupChild],
    last: bool,
) -> int:
    """Add children to a callback group, with `fields` in the first call. See lua/group.lua for the reply."""
    packed = b"" if fields is None else pack(fields)
    return int(await script("group")(redis, args=[group_id, packed, pack(children), int(last)]))


async def cancel(redis: Redis, keep_ms: int, tasks: Sequence[CancelRequest]) -> list[tuple[str, bytes]]:
    """Cancel tasks. Returns the state of each, and its message if the caller has to add the effects of its end.

    With large messages, only the first tasks are cancelled: repeat the call for the others. See lua/cancel.lua.
    """
    replies = await script("cancel")(redis, args=[keep_ms, pack(tasks), CALL_BYTES])
    return [(place.decode(), message) for place, message in replies]


async def find(redis: Redis, stream: str, begin: str, at_most: int) -> tuple[str, list[tuple[str, str, bytes]]]:
    """Find marked tasks in part of a stream. Returns the last entry examined; task, entry and message of each."""
    last, found = await script("find")(redis, [stream], [begin, at_most, CALL_BYTES])
    return last.decode(), [(task.decode(), entry.decode(), message) for task, entry, message in found]


async def task_ids(redis: Redis, stream: str, begin: str, at_most: int) -> list[bytes]:
    """Task ids in a part of a stream, after the last examined entry as the first item. See lua/task_ids.lua."""
    found: list[bytes] = await script("task_ids")(redis, [stream], [begin, at_most, CALL_BYTES])
    return found


async def fail_children(redis: Redis, group_id: str, error: str, children: Sequence[bytes]) -> int:
    """Fail children of a group. Returns how many of them were pending."""
    return int(await script("fail_children")(redis, args=[group_id, error, *children]))


async def resubmit(redis: Redis, requests: Sequence[Resubmission], ttl_ms: int) -> list[bool]:
    """Submit dead letters again. Returns for each True if it was submitted now, False if it had been before."""
    return [reply == 1 for reply in await script("resubmit")(redis, args=[ttl_ms, pack(requests)])]
