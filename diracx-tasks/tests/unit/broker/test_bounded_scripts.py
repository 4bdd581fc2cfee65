"""Documented bounds of all scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
from diracx.tasks.plumbing.broker import (
    cancel,
    group_audit,
    locking,
    published,
    redis_streams,
    scheduling,
    sizes,
    submitting,
)
from diracx.tasks.plumbing.locks import MAX_LOCKS
from diracx.tasks.plumbing.scheduler.scheduler import OCCUR_BATCH, PLAN_BATCH
from support.paths import ROOT

LUA = files("diracx.tasks.plumbing.broker") / "lua"
SOURCES = {file.name: file.read_text() for file in LUA.iterdir() if file.name.endswith(".lua")}
PAGE = ROOT / "docs" / "explanation" / "scripts.md"

#: How much one call may be asked for, by script.
BATCHES = {
    "submit": submitting.SUBMIT_BATCH,
    "resubmit": submitting.SUBMIT_BATCH,
    "delay": submitting.DELAY_BATCH,
    "group": submitting.GROUP_BATCH,
    "settle": redis_streams.SETTLE_BATCH,
    "promote": redis_streams.PROMOTE_BATCH,
    "lines": redis_streams.LINES_BATCH,
    "fetch_unacknowledged": redis_streams.UNACKNOWLEDGED_BATCH,
    "release": locking.RELEASE_BATCH,
    "extend": locking.RELEASE_BATCH,
    "pause": scheduling.PAUSE_BATCH,
    "cancel": cancel.CANCEL_BATCH,
    "find": cancel.FIND_BATCH,
    "task_ids": group_audit.ENTRIES,
    "fail_children": group_audit.CHILDREN,
    "finished": published.FINISHED_BATCH,
    "plan": PLAN_BATCH,
    "occur": OCCUR_BATCH,
    "start": MAX_LOCKS,
    "acquire": MAX_LOCKS,
}

#: Calls without a limit of their own, and what bounds them.
EXCEPTIONS = {
    (
        "snapshot.lua",
        "'HGETALL', '$THROUGHPUT_PREFIX' .. int(minute - before)",
    ): "three fields for each of nine queues",
    ("snapshot.lua", "'HGETALL', '$THROUGHPUT_PREFIX' .. int(minute)"): "the same",
    ("snapshot.lua", "'HGETALL', '$DELAYED_REASONS'"): "one field for each of four reasons",
    ("alerts.lua", "'HKEYS', '$ALERTS'"): "alerts: each health check names a few subjects",
    (
        "_alive.lua",
        "'ZRANGEBYSCORE', '$ALIVE', '-inf', '+inf', 'WITHSCORES'",
    ): "workers; only after the server was away",
    (
        "_kinds.lua",
        "'ZRANGEBYSCORE', lock.key, '(' .. int(now), '+inf'",
    ): "a log, whose grants are merged; only after the clock was set back",
    ("_pending.lua", "'XPENDING', stream, '$GROUP', first, last, 10000, consumer"): "slots of one worker",
    ("fetch_unacknowledged.lua", "'XPENDING', stream, '$GROUP', '-', '+', 10000, consumer"): "slots of one worker",
    (
        "report.lua",
        "'ZREMRANGEBYRANK', '$LOCKS_SEEN', 0, -LOCKS - 1",
    ): "locks of one report",
    ("_time.lua", "'ZREMRANGEBYRANK', key, 0, math.min(expired, AT_ONCE) - 1"): "AT_ONCE",
}
#: Keys with one value, or with few.
SMALL = {
    "'DEL', lock.key",
    "'DEL', grant",
    "'DEL', '$RESERVATION_PREFIX' .. lock.key",
    "'DEL', '$RESERVATION_PREFIX' .. size .. ':' .. lock.key",
    "'DEL', '$GROUPS_AUDITED'",
    "'DEL', '$DELAYED_REASONS'",
    "'DEL', '$IMPORTER'",
    "'DEL', '$ANY_CANCELLED'",
    "'DEL', '$DEAD_LETTERS'",  # an empty one
    "'DEL', draining_key",
    "'DEL', report",
}


def calls(source: str) -> Iterator[str]:
    """Yield the arguments of each command that a script sends."""
    text = re.sub(r"--.*", "", source)  # no text of ours has two dashes
    for found in re.finditer(r"redis\.p?call\(", text):
        depth, at, quoted = 1, found.end(), False
        while depth:
            quoted ^= text[at] == "'"
            depth += 0 if quoted else {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        yield " ".join(text[found.end() : at - 1].split())


def is_bounded(call: str) -> bool:
    """True if it is clear from the call that it deals with a limited number of items."""
    name, *arguments = [part.strip() for part in call.split(",")]
    command = name.strip("'")
    if command in ("HGETALL", "HKEYS", "HVALS", "SMEMBERS", "KEYS", "SORT", "ZREMRANGEBYSCORE", "ZREMRANGEBYRANK"):
        return False
    if command in ("SINTER", "SUNION", "SDIFF", "ZUNION", "ZINTER", "LREM", "XTRIM", "FLUSHALL", "FLUSHDB"):
        return False
    if command in ("ZRANGE", "ZREVRANGE", "LRANGE"):
        return arguments[1:3] != ["0", "-1"]
    if command in ("ZRANGEBYSCORE", "ZREVRANGEBYSCORE"):
        return "'LIMIT'" in arguments
    if command in ("XRANGE", "XREVRANGE"):
        return "'COUNT'" in arguments or arguments[1] == arguments[2]
    if command in ("XREAD", "XREADGROUP", "SCAN", "HSCAN", "SSCAN", "ZSCAN"):
        return "'COUNT'" in arguments or "unpack(arguments)" in arguments
    if command == "XPENDING":
        return len(arguments) == 2 or not arguments[4].isdigit() or int(arguments[4]) <= 1000
    if command == "XINFO":
        return arguments[0] != "'CONSUMERS'" and "'FULL'" not in arguments
    if command == "DEL":
        return call in SMALL
    return True


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_script_processes_an_unbounded_amount_of_data(name: str) -> None:
    unbounded = {call for call in calls(SOURCES[name]) if not is_bounded(call)}
    explained = {call for file, call in EXCEPTIONS if file == name}
    assert unbounded - explained == set(), "limit these calls (LIMIT, COUNT), or explain their bound in EXCEPTIONS"
    assert explained - unbounded == set(), "exceptions without a call"


@pytest.mark.parametrize(
    "call",
    [
        "'HGETALL', key",
        "'ZRANGE', key, 0, -1",
        "'ZRANGEBYSCORE', key, '-inf', now",
        "'XRANGE', stream, '-', '+'",
        "'XPENDING', stream, group, '-', '+', 10000",
        "'XREADGROUP', 'GROUP', group, consumer, 'STREAMS', stream, '>'",
        "'DEL', key .. ':children'",
        "'XINFO', 'CONSUMERS', stream, group",
    ],
)
def test_a_command_without_a_limit_is_recognised(call: str) -> None:
    assert not is_bounded(call)


def test_the_bound_of_each_script_is_documented() -> None:
    section = PAGE.read_text().partition("## Bounds")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)\.lua` \| (.*)$", section, re.MULTILINE))
    assert set(rows) == {name.removesuffix(".lua") for name in SOURCES if not name.startswith("_")}
    for script, batch in BATCHES.items():
        assert f"{batch:,}" in rows[script], f"{script}: {batch} in one call"


def test_a_call_may_take_all_the_locks_that_a_task_may_have() -> None:
    assert MAX_LOCKS <= sizes.CALL_BYTES / sizes.LOCK_BYTES < 2 * MAX_LOCKS
