"""Defines every Redis key of the task system (locks make theirs from their names).

When a script is loaded, `$DELAYED` in a `lua/*.lua` file is replaced by `keys.DELAYED`.
"""

from __future__ import annotations

from functools import cache

from ..enums import Priority, Size

#: Consumer group of all workers, on every stream.
GROUP = "diracx:tasks:workers"

#: Sorted set: task id -> due time (ms since the epoch). Retries, `at_time`, and tasks waiting for a lock (a day
#: on).
DELAYED = "diracx:tasks:delayed"
#: Hash: task id -> "{stream} {reason} {since} {redelivery_count} {lock}\n{message}" of each member of DELAYED.
DELAYED_DATA = "diracx:tasks:delayed:data"
#: Hash: reason for being in DELAYED (`at_time`, `retry`, `lock`, `rate`) -> number of tasks.
DELAYED_REASONS = "diracx:tasks:delayed:reasons"
#: Sorted set per size and lock: tasks waiting for it, by priority and then by the time of their submission.
WAITING_PREFIX = "diracx:tasks:waiting:"
#: Sorted set: key of a lock that tasks wait for -> time of the next attempt to grant it (ms since the epoch).
LINES = "diracx:tasks:lines"
#: String per size and lock: the task that was granted the lock last, until its worker has taken it.
RESERVATION_PREFIX = "diracx:tasks:turn:"

#: Sorted set: worker -> end of its lease (ms since the epoch). Dead worker with messages left -> time of the last
#: attempt to reclaim them, less 10^13 ms times the number of their size.
ALIVE = "diracx:tasks:alive"
#: Sorted set: worker -> length of its lease (ms). Also the channel that announces a lease shorter than all others.
LEASES = "diracx:tasks:leases"
#: String, with a time to live: time of the last renewal of a lease, or of the last search for dead workers (ms).
RENEWED = "diracx:tasks:renewed"
#: String, with a time to live: the worker that last searched for consumers missing in ALIVE.
AUDITOR = "diracx:tasks:auditor"
#: Hash per worker: lock owner -> the lock. The locks are released when the worker is dead.
HELD_PREFIX = "diracx:tasks:held:"
#: Stream per worker, empty, with a time to live: part of its blocking read, which ends when this is deleted.
WAIT_PREFIX = "diracx:tasks:wait:"
#: Set, with a time to live: "{stream} {entry} {deliveries}" of entries reclaimed from workers that were alive.
SURVIVED = "diracx:tasks:survived"
#: String per size of worker (its first stream), with a short time to live: the worker that drains for a poison
#: candidate.
DRAINING_PREFIX = "diracx:tasks:room:"

#: Hash: process -> "{seen (ms)} {JSON}": the configuration it runs with. Deleted with the last process.
CONFIG_IN_FORCE = "diracx:tasks:config-in-force"

#: String, with a time to live: the last fencing token.
FENCE = "diracx:tasks:fence"

#: Sorted set: `version` of the data that was written last, and the `oldest` version that can work with it.
SCHEMA = "diracx:tasks:schema"
#: String: id of the server's data. Another id, or none, means that the data were lost (FLUSHALL, a restart).
DATASET_ID = "diracx:tasks:epoch"

#: String per task, with a time to live: the stored result. Also the name of its pub/sub channel.
RESULT_PREFIX = "diracx:results:"
#: Sorted set: callback group -> time of its expiry (ms since the epoch).
GROUPS = "diracx:groups"
#: Per callback group a hash, and beside it `:pending`, `:failed`, `:children`, `:results`, `:staged`.
GROUPS_PREFIX = "diracx:groups:"
#: String, with a time to live: id of the server at the last audit of the groups.
GROUPS_AUDITED = "diracx:tasks:groups-audited"
#: List: complete callback groups whose children are being moved from `:staged` into their streams.
GROUP_OUTBOX = "diracx:tasks:staged"
#: Sorted set: cancelled task -> expiry of its mark (ms). Also the channel that announces ids of cancelled tasks.
CANCELLED = "diracx:tasks:cancelled"
#: String, with a time to live: CANCELLED may have marks. Read together with DATASET_ID, by one command.
ANY_CANCELLED = "diracx:tasks:any-cancelled"
#: Channel per worker, no key: ids of its running tasks that are cancelled (msgpack list).
CANCELLED_CHANNEL_PREFIX = "diracx:tasks:cancelled:"
#: Stream: dead letters that wait for a worker to import them into the database.
DEAD_LETTERS = "diracx:tasks:dead-letters"
#: String, with a time to live: the worker that imports these into the database.
IMPORTER = "diracx:tasks:importer"
#: String per dead letter of a task, with a time to live: this dead letter has been submitted again.
RESUBMITTED_PREFIX = "diracx:tasks:resubmitted:"

#: Stream, capped, with a time to live: actions of administrators by dashboard, HTTP or command line.
AUDIT = "diracx:tasks:audit"
#: The same per VO, for its members: separate, so that no user can push an administrator's action out of the log.
AUDIT_PREFIX = "diracx:tasks:audit:"

#: String: the leading scheduler's token, with a short lease. Also the channel that announces a released lead.
LEADER = "diracx:scheduler:leader"
#: String: leader lock of schedulers of version 0.7, which the leading scheduler of this version takes as well.
PUBLISHED_LEADER = "diracx:scheduler:lock"
#: String, with a time to live: a worker of version 0.7 was seen, which leaves finished entries in its stream.
PUBLISHED_SEEN = "diracx:tasks:published-seen"
#: Sorted set: schedule -> next run (ms since the epoch).
NEXT_RUNS = "diracx:scheduler:next"
#: Hash: schedule -> fingerprint of the rule its next run was computed from.
FINGERPRINTS = "diracx:scheduler:fingerprints"
#: Hash: schedule -> "{stream} {entry} {task id} {due}" of its last occurrence.
LAST_RUNS = "diracx:scheduler:last"
#: Hash: schedule -> "{time in ms} {JSON}": outcome of its last occurrence that has ended.
OUTCOMES = "diracx:scheduler:outcomes"
#: Hash: schedule -> start of its pause (ms).
PAUSED = "diracx:scheduler:paused"
#: Hash: schedule -> reason for which the leader cannot submit it.
PROBLEMS = "diracx:scheduler:problems"
#: Channel, no key: wakes the leading scheduler, for an earlier due time, or after a pause.
WAKE_SCHEDULER = "diracx:scheduler:wake"
#: Channel, no key: wakes workers when no scheduler listens, for an earlier due time (in how many ms).
WAKE_WORKERS = "diracx:tasks:wake"

#: Sorted set: worker -> time of its last report (ms).
REPORTING = "diracx:monitor:reporting"
#: Hash per worker, with a time to live: its last report, with its running tasks.
REPORT_PREFIX = "diracx:monitor:worker:"
#: Hash per minute, with a time to live: task -> counters of the executions that ended in that minute.
MINUTE_PREFIX = "diracx:monitor:minute:"
#: The same per hour.
HOUR_PREFIX = "diracx:monitor:hour:"
#: Hash per minute, with a time to live: numbers of submitted and of ended tasks of each queue.
THROUGHPUT_PREFIX = "diracx:monitor:flow:"
#: List, with a time to live: counters that workers send between two reports (msgpack). One of the workers adds all
#: of them up some seconds later.
SUMS = "diracx:monitor:sums"
#: Sorted set, with a time to live: worker -> number of its last counters that were added up.
SUMS_ADDED = "diracx:monitor:sums:added"
#: Stream, with a time to live: failed attempts, the last 500 or so.
FAILURES = "diracx:monitor:failures"
#: Hash, with a time to live: "{health check} {subject}" -> "{since} {last noticed}" (ms) of each alert.
ALERTS = "diracx:monitor:alerts"
#: Sorted set, with a time to live: limiters, and locks that have refused a task -> time (ms).
LOCKS_SEEN = "diracx:monitor:locks"

#: Suffix of the resumed queue: the stream of tasks that were granted a lock, fetched before that of new tasks.
RESUMED_SUFFIX = ":handover"


@cache
def stream_name_for(priority: Priority | str, size: Size | str) -> str:
    """Stream of new tasks: `diracx:tasks:{priority}:{size}`."""
    return f"diracx:tasks:{Priority(priority)}:{Size(size)}"


ALL_STREAM_NAMES = [stream_name_for(priority, size) for priority in Priority for size in Size]


def streams_of(size: Size) -> list[str]:
    """Streams that a worker of this size fetches from, in that order.

    The resumed queue comes before new tasks of the same priority, for its tasks have waited for a lock already.
    """
    names = [stream_name_for(priority, size) for priority in Priority]
    return [stream for name in names for stream in (name + RESUMED_SUFFIX, name)]


def of_all_sizes(prefix: str, lock_key: str) -> list[str]:
    """Keys with `WAITING_PREFIX` or `RESERVATION_PREFIX` of a lock, one for each size of task."""
    return [f"{prefix}{size}:{lock_key}" for size in Size]


#: Every stream of tasks, including the resumed queues.
EVERY_STREAM = [stream for size in Size for stream in streams_of(size)]


def script_constants() -> dict[str, str]:
    """Names that scripts may use, each as `$NAME`."""
    return {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, str) and not name.startswith("_")
    }
