"""Every Redis key of the task system, made here and nowhere else (locks make theirs from their names).

Scripts get these names when they are loaded: `$DELAYED` in a `lua/*.lua` file is `keys.DELAYED`.
"""

from __future__ import annotations

from functools import cache

from ..enums import Priority, Size

#: Consumer group of all workers, on every stream.
GROUP = "diracx:tasks:workers"

#: Sorted set: task id -> due time (ms since the epoch). Retries, `at_time`; tasks waiting for a lock, a day ahead.
DELAYED = "diracx:tasks:delayed"
#: Hash: task id -> "{stream} {reason} {since} {redelivery_count} {lock}\n{message}" of each member of DELAYED.
DELAYED_DATA = "diracx:tasks:delayed:data"
#: Hash: why tasks are in DELAYED (`at_time`, `retry`, `lock`, `rate`) -> how many of them.
DELAYED_REASONS = "diracx:tasks:delayed:reasons"
#: Sorted set per size and lock: tasks waiting for it, by priority and then by the time of their submission.
WAITING_PREFIX = "diracx:tasks:waiting:"
#: Sorted set: key of a lock that tasks wait for -> when to look whether it can be had (ms since the epoch).
LINES = "diracx:tasks:lines"
#: String per size and lock: the task that was granted the turn last, until it has asked for the lock.
TURN_PREFIX = "diracx:tasks:turn:"

#: Sorted set: worker -> when its lease ends (ms since the epoch). One that is dead and has left messages -> when
#: they were last looked at, less 10^13 ms times the number of their size.
ALIVE = "diracx:tasks:alive"
#: Sorted set: worker -> how long its lease is (ms). Also the channel on which a worker says that its lease is the
#: shortest of all.
LEASES = "diracx:tasks:leases"
#: String, with a time to live: when a lease was last renewed, or dead workers were looked for (ms).
RENEWED = "diracx:tasks:renewed"
#: String, with a time to live: the worker that looked last for consumers that are on no list.
AUDITOR = "diracx:tasks:auditor"
#: Hash per worker: lock owner -> the lock. Given back when the worker is dead.
HELD_PREFIX = "diracx:tasks:held:"
#: Stream per worker, empty, with a time to live: part of its wait for tasks, which ends when this is deleted.
WAIT_PREFIX = "diracx:tasks:wait:"
#: Set, with a time to live: "{stream} {entry} {deliveries}" of what was taken over from workers that lived.
SURVIVED = "diracx:tasks:survived"
#: String per size of worker (its first stream): the worker that drains for a poison candidate; lives a moment.
ROOM_PREFIX = "diracx:tasks:room:"

#: Hash: process -> "{seen (ms)} {JSON}": the configuration it runs with. Goes with the last process.
CONFIG_IN_FORCE = "diracx:tasks:config-in-force"

#: String, with a time to live: the fencing token that was given last.
FENCE = "diracx:tasks:fence"

#: Sorted set: `version` of the data that was written last, and `oldest` that can work beside it.
SCHEMA = "diracx:tasks:schema"
#: String: which life of the data this is. Another value, or none: the data were lost (FLUSHALL, a restart).
EPOCH = "diracx:tasks:epoch"

#: String per task, with a time to live: the stored result. Also the name of its pub/sub channel.
RESULT_PREFIX = "diracx:results:"
#: Sorted set: callback group -> until when it is kept (ms since the epoch).
GROUPS = "diracx:groups"
#: Per callback group a hash, and beside it `:pending`, `:failed`, `:children`, `:results`, `:staged`.
GROUPS_PREFIX = "diracx:groups:"
#: String, with a time to live: the server whose groups were audited last.
GROUPS_AUDITED = "diracx:tasks:groups-audited"
#: List: complete callback groups whose children are on their way from `:staged` into their streams.
GROUP_OUTBOX = "diracx:tasks:staged"
#: Sorted set: cancelled task -> until when its mark is kept (ms). Also a channel: the id of one that is cancelled.
CANCELLED = "diracx:tasks:cancelled"
#: String, with a time to live: CANCELLED may have marks. Read together with EPOCH, by one command.
ANY_CANCELLED = "diracx:tasks:any-cancelled"
#: Channel per worker, no key: ids of tasks that it runs and that are cancelled (msgpack list).
CANCELLED_CHANNEL_PREFIX = "diracx:tasks:cancelled:"
#: Stream: dead letters that wait for a worker to import them into the database.
DEAD_LETTERS = "diracx:tasks:dead-letters"
#: String, with a time to live: the worker that imports these into the database.
IMPORTER = "diracx:tasks:importer"
#: String per dead letter of a task, with a time to live: this dead letter has been submitted again.
RESUBMITTED_PREFIX = "diracx:tasks:resubmitted:"

#: Stream, capped, with a time to live: what administrators did by dashboard, HTTP or command line.
AUDIT = "diracx:tasks:audit"
#: The same per VO: what its members did, so that no user can push an administrator's action out of the log.
AUDIT_PREFIX = "diracx:tasks:audit:"

#: String: the leading scheduler's token, with a short lease. Also the channel that says that nobody leads now.
LEADER = "diracx:scheduler:leader"
#: String: who leads among schedulers of version 0.7. Our leading scheduler holds it, too.
PUBLISHED_LEADER = "diracx:scheduler:lock"
#: String, with a time to live: a worker of version 0.7 was seen, which leaves what it has finished in its stream.
PUBLISHED_SEEN = "diracx:tasks:published-seen"
#: Sorted set: schedule -> next run (ms since the epoch).
NEXT_RUNS = "diracx:scheduler:next"
#: Hash: schedule -> fingerprint of the rule its next run was computed from.
FINGERPRINTS = "diracx:scheduler:fingerprints"
#: Hash: schedule -> "{stream} {entry} {task id} {due}" of its last occurrence.
LAST_RUNS = "diracx:scheduler:last"
#: Hash: schedule -> "{when in ms} {JSON}": how its last occurrence that ended, ended.
OUTCOMES = "diracx:scheduler:outcomes"
#: Hash: schedule -> since when it is paused (ms).
PAUSED = "diracx:scheduler:paused"
#: Hash: schedule -> why the leader cannot submit it.
PROBLEMS = "diracx:scheduler:problems"
#: Channel, no key: something earlier is due now, or is paused no more; wakes the leading scheduler.
WAKE_SCHEDULER = "diracx:scheduler:wake"
#: Channel, no key: in how many ms something earlier is due now, of which no scheduler heard; wakes workers.
WAKE_WORKERS = "diracx:tasks:wake"

#: Sorted set: worker -> when it last reported (ms).
REPORTING = "diracx:monitor:reporting"
#: Hash per worker, with a time to live: what it last said of itself and of what it runs.
REPORT_PREFIX = "diracx:monitor:worker:"
#: Hash per minute, with a time to live: task -> what ended in that minute, counted.
MINUTE_PREFIX = "diracx:monitor:minute:"
#: The same per hour.
HOUR_PREFIX = "diracx:monitor:hour:"
#: Hash per minute, with a time to live: how much came into each queue, and how much ended.
FLOW_PREFIX = "diracx:monitor:flow:"
#: List, with a time to live: sums of what ended, as workers tell them between two reports (msgpack). One of the
#: workers adds all of them up some seconds later.
SUMS = "diracx:monitor:sums"
#: Sorted set, with a time to live: worker -> number of the last of its sums that were added up.
SUMS_ADDED = "diracx:monitor:sums:added"
#: Stream, with a time to live: failed attempts, the last 500 or so.
FAILURES = "diracx:monitor:failures"
#: Hash, with a time to live: "{health check} {subject}" -> "{since} {last noticed}" (ms) of what is wrong.
ALERTS = "diracx:monitor:alerts"
#: Sorted set, with a time to live: limiters, and locks that have refused a task -> when (ms).
LOCKS_SEEN = "diracx:monitor:locks"

#: Suffix of the stream that tasks go to when their turn has come: fetched before its elder brother.
HANDOVER = ":handover"


@cache
def stream_name_for(priority: Priority | str, size: Size | str) -> str:
    """The stream of new tasks: `diracx:tasks:{priority}:{size}`."""
    return f"diracx:tasks:{Priority(priority)}:{Size(size)}"


ALL_STREAM_NAMES = [stream_name_for(priority, size) for priority in Priority for size in Size]


def streams_of(size: Size) -> list[str]:
    """The streams a worker of this size drains, in the order in which it drains them.

    Tasks that were granted a lock after waiting for it come before new ones of the same priority: they
    have stood in line already.
    """
    names = [stream_name_for(priority, size) for priority in Priority]
    return [stream for name in names for stream in (name + HANDOVER, name)]


def of_all_sizes(prefix: str, lock_key: str) -> list[str]:
    """The keys of a line (`WAITING_PREFIX`) or of its turns (`TURN_PREFIX`), one for each size of its tasks."""
    return [f"{prefix}{size}:{lock_key}" for size in Size]


#: Every stream that may hold tasks, those of resumed tasks included.
EVERY_STREAM = [stream for size in Size for stream in streams_of(size)]


def script_constants() -> dict[str, str]:
    """The names that scripts may use, each as `$NAME`."""
    return {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, str) and not name.startswith("_")
    }
