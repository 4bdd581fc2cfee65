"""Routes below `/api/tasks/`: all that the dashboard shows and does, for programs."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from diracx.routers.fastapi_classes import DiracxRouter
from fastapi import Body, Depends, Path, Query
from pydantic import TypeAdapter

from ... import operations
from ...operations import DelayReason, Window
from ...operations.audit import AuditEntry, read_audit
from ...operations.dead_letters import (
    Decided,
    dead_letter_arguments,
    dead_letter_record,
    dead_letter_summary,
    find_dead_letter,
)
from ...operations.settings import settings_records
from ...operations.visibility import no_such_vo
from ...plumbing.broker.groups import GroupStatus, read_group
from ...plumbing.config.active import active_configs
from ...plumbing.persistence import OPEN, DeadLetterReason, DeadLetterStatus
from ...plumbing.persistence.db import DeadLetterFilter
from ...plumbing.scheduler import ScheduleState, schedules
from ...plumbing.task_names import resolve_task_name
from ..context import AppContext
from ..operator import NotPossibleError
from . import models
from .dependencies import AllVOsReader, Reader, Writer, answered, or_404
from .responses import BoundedRoute, database_errors, responses

# DiracX's own factories for tests and clients mount services that are switched off, too.
_ENABLED = TypeAdapter(bool).validate_python(os.environ.get("DIRACX_SERVICE_TASKS_ENABLED") or True)
router = DiracxRouter(dependencies=[Depends(database_errors)], include_in_schema=_ENABLED)
router.route_class = BoundedRoute

_MOST = 1_000
_WRONG = "what is written has mistakes: the settings before it hold; administrators see which"


def _route(method: str, path: str, model: Any, *codes: int) -> Callable[[Callable[..., Awaitable[Any]]], Any]:
    """Make a route of a function.

    Args:
        model: what it returns, for the description of the interface.
        codes: statuses of its errors, beside 401, 403 and 503.
    """
    add = router.api_route(path, methods=[method], response_model=model, responses=responses(503, *codes))
    return lambda endpoint: add(answered(endpoint))


_get = partial(_route, "GET")
_post = partial(_route, "POST")

Limit = Annotated[int, Query(ge=1, le=_MOST, description="At most so many.")]
After = Annotated[str | None, Query(max_length=400, description="`after` of the page before.")]
QueueName = Annotated[str, Path(max_length=40, description="`{priority}:{size}`.", examples=["normal:medium"])]
TaskName = models.TaskName


# --- looking ------------------------------------------------------------------------------------------------


@_get("/summary", operations.Snapshot)
async def get_summary(reader: Reader) -> Any:
    """The whole system at one moment: queues, workers, and what is to be counted."""
    return reader.viewer.snapshot(await reader.system.snapshot())


@_get("/health", models.HealthReport)
async def get_health(reader: Reader) -> Any:
    """Results of the health checks: alerts, the worst first, and what is not looked at."""
    health = (await reader.system.health()).for_viewer(reader.viewer)
    return {"severity": health.severity, "alerts": health.alerts, "unchecked": health.unchecked}


@_get("/queues", list[operations.Queue])
async def get_queues(reader: Reader) -> Any:
    """The nine queues, most urgent first."""
    return await operations.queues(reader.system.redis)


@_get("/queues/{queue}", models.QueuedTaskPage, 404)
async def get_queued_tasks(reader: Reader, queue: QueueName, limit: Limit = 100, after: After = None) -> Any:
    """The backlog of a queue, in the order in which workers will take it."""
    look = partial(operations.peek, reader.system.redis, queue, registry=reader.system.registry)
    return await reader.viewer.page(look, limit, after)


@_get("/running", models.RunningTaskPage)
async def get_running_tasks(reader: Reader, limit: Limit = 100, after: After = None) -> Any:
    """Running tasks, longest first, as workers reported them within the last seconds."""
    look = partial(operations.running, reader.system.redis, registry=reader.system.registry)
    return await reader.viewer.page(look, limit, after)


@_get("/delayed", models.DelayedTaskPage)
async def get_delayed_tasks(
    reader: Reader,
    reason: Annotated[DelayReason | None, Query(description="Only those that wait for this.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> Any:
    """Tasks delayed until a time, for a retry, a lock or quota, in the order in which they are due."""
    look = partial(operations.delayed, reader.system.redis, reason, registry=reader.system.registry)
    return await reader.viewer.page(look, limit, after)


@_get("/workers", list[operations.Worker])
async def get_workers(reader: Reader) -> Any:
    """All workers that live, or were heard of within the last minute."""
    return reader.viewer.workers(await operations.workers(reader.system.redis))


@_get("/stats", list[operations.TaskStats])
async def get_stats(
    reader: Reader, window: Annotated[Window, Query(description="The past hour or day.")] = "hour"
) -> Any:
    """Statistics of each class of tasks: counts, failure rate, run time and time in the queue."""
    return await operations.stats(reader.system.redis, window)


@_get("/history", list[operations.Point])
async def get_history(reader: Reader) -> Any:
    """The past hour, minute by minute, oldest first."""
    return await operations.history(reader.system.redis)


@_get("/failures", models.FailurePage)
async def get_failures(
    reader: Reader,
    task_name: Annotated[
        TaskName | None, Query(description="Only of this task: category:ClassName, or ClassName alone.")
    ] = None,
    limit: Limit = 100,
    after: After = None,
) -> Any:
    """Failed attempts with their tracebacks, newest first. The last 500 or so are kept."""
    look = partial(operations.failures, reader.system.redis, task_name=task_name)
    return await reader.viewer.page(look, limit, after)


@_get("/locks", models.LockPage)
async def get_locks(reader: AllVOsReader, limit: Limit = 100, after: After = None) -> Any:
    """Locks that tasks hold or wait for, and limiters that were used within the last day."""
    return await operations.locks(reader.system.redis, limit, after)


@_get("/locks/one", operations.Lock, 404)
async def get_lock(
    reader: AllVOsReader,
    key: Annotated[models.LockKey, Query(description="Its Redis key.", examples=["lock:mutex:job:42"])],
) -> Any:
    """One lock or limiter: who holds it, until when, how many wait, what is left of a quota."""
    return or_404(await operations.lock(reader.system.redis, key), f"lock {key!r} that anybody holds or waits for")


@_get("/schedules", list[ScheduleState])
async def get_schedules(reader: Reader) -> Any:
    """All schedules of periodic tasks: state, next and last run, how it went, and who says so."""
    settings = await reader.system.settings()
    found = await schedules(reader.system.redis, reader.system.registry, settings.tasks, settings.vos)
    return [state for state in found if reader.viewer.sees(state.vo)]


@_get("/groups", list[GroupStatus])
async def get_groups(reader: AllVOsReader, limit: Limit = 100) -> Any:
    """Callback groups that have not called back, those that expire first first, without their children."""
    return await operations.groups(reader.system.redis, limit)


@_get("/groups/{group_id}", GroupStatus, 404)
async def get_group(
    reader: AllVOsReader, group_id: Annotated[str, Path(max_length=200, description="Its id.")]
) -> Any:
    """One callback group with its children."""
    return or_404(await read_group(reader.system.redis, group_id), f"group {group_id!r} (any more)")


@_get("/configuration", list[models.ConfigurationInForce])
async def get_configuration_in_force(reader: AllVOsReader) -> Any:
    """Configuration with which each worker and scheduler runs, and the problems of the one that is written."""
    return [entry.as_dict() for entry in await active_configs(reader.system.redis)]


@_get("/configuration/settings", models.EffectiveSettings, 404)
async def get_settings(
    reader: Reader,
    task_name: Annotated[
        TaskName | None, Query(description="Only this task: category:ClassName, or ClassName alone.")
    ] = None,
    vo: Annotated[
        models.VOName | None,
        Query(
            description="As they hold for this VO. By default for all, and for each that has something of its "
            "own; for operators, for their VO."
        ),
    ] = None,
) -> Any:
    """The value of every setting of every task that holds in the end, and where it is written."""
    system, viewer = reader.system, reader.viewer
    settings = await system.settings()
    names = sorted(system.registry)
    if task_name is not None:
        if (name := resolve_task_name(task_name, names)) is None:
            raise ValueError(f"there is no task {task_name!r}")
        names = [name]
    vo_shown = viewer.chosen(vo)
    if vo_shown is not None and vo_shown not in settings.vos:
        raise no_such_vo(vo_shown)
    about = {
        "source": system.config_source,
        "vos": [known for known in settings.vos if viewer.sees(known)],
        # They quote what is written, for whatever VO.
        "problems": settings.problems if viewer.sees(None) else [_WRONG] * bool(settings.problems),
    }
    return about | settings_records(settings.tasks, system.registry, names, vo_shown, limits=task_name is None)


@_get("/audit", list[AuditEntry], 404)
async def get_audit_log(
    reader: Reader,
    limit: Limit = 100,
    before: Annotated[
        str | None,
        Query(pattern=r"^\d{1,20}-\d{1,20}$", max_length=41, description="Only entries older than this id."),
    ] = None,
    vo: Annotated[
        models.VOName | None,
        Query(
            description="What members of this VO did. By default what administrators did; for operators, what "
            "their VO did."
        ),
    ] = None,
) -> Any:
    """Actions by dashboard, HTTP or command line, with their users, newest first."""
    return await read_audit(reader.system.redis, limit, before, vo=reader.viewer.chosen(vo))


# --- dead letters -------------------------------------------------------------------------------------------


class _Filter:
    """Filter of dead letters."""

    def __init__(
        self,
        task_name: Annotated[TaskName | None, Query(description="category:ClassName, or ClassName alone.")] = None,
        reason: Annotated[DeadLetterReason | None, Query(description="Why it ended here.")] = None,
        status: Annotated[DeadLetterStatus | None, Query(description="By default those that are open.")] = None,
        since: Annotated[models.Moment | None, Query(description="Stored then or later.")] = None,
        before: Annotated[models.Moment | None, Query(description="Stored earlier.")] = None,
    ) -> None:
        self.where: DeadLetterFilter = {
            "task_name": task_name,
            "reason": reason,
            "status": status or OPEN,
            "since": since,
            "before": before,
        }


@_get("/dead-letters", models.DeadLetterPage, 409)
async def get_dead_letters(
    reader: Reader,
    chosen: Annotated[_Filter, Depends(_Filter)],
    limit: Limit = 100,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="`after` of the page before.")] = 0,
) -> Any:
    """Dead letters, oldest first, without their messages and tracebacks."""
    db = _task_db(reader.system)
    where: DeadLetterFilter = {**chosen.where, "vo": reader.viewer.vo}
    dead_letters = await db.summaries(**where, limit=limit, after_id=after)
    total = sum((await db.count(**where)).values())
    return {
        "items": [dead_letter_summary(dead_letter) for dead_letter in dead_letters],
        "total": total,
        "after": dead_letters[-1]["id"] if len(dead_letters) == limit else None,
    }


@_get("/waiting-dead-letters", models.WaitingDeadLetterPage)
async def get_waiting_dead_letters(reader: Reader, limit: Limit = 100, after: After = None) -> Any:
    """Dead letters that wait in Redis until a worker with a database takes them, oldest first."""
    look = partial(operations.waiting_dead_letters, reader.system.redis, registry=reader.system.registry)
    return await reader.viewer.page(look, limit, after)


@_get("/dead-letters/{key}", models.DeadLetterWithAttempts, 404, 409)
async def get_dead_letter(
    reader: Reader, key: Annotated[str, Path(max_length=255, description="Task id, or the number in the list.")]
) -> Any:
    """One dead letter with its arguments (secrets masked) and all attempts."""
    system = reader.system
    dead_letter = or_404(await find_dead_letter(_task_db(system), key, reader.viewer), f"dead letter {key!r}")
    shown = {
        name: value for name, value in dead_letter_record(dead_letter).items() if name not in ("message", "raw")
    }
    return shown | {"arguments": dead_letter_arguments(dead_letter, system.registry)}


def _task_db(system: AppContext) -> Any:
    if system.task_db is None:
        raise NotPossibleError("no database of dead letters is configured here; set DIRACX_DB_URL_TASKDB")
    return system.task_db


Choice = Annotated[models.DeadLetterChoice, Body()]


@_post("/dead-letters/retry", models.Decision, 409)
async def retry_dead_letters(writer: Writer, choice: Choice) -> Any:
    """Submit dead letters again, under their old task ids: each once, however often this is repeated."""
    return _decision(await writer.operator.retry(choice.ids, choice.where(OPEN), choice.limit))


@_post("/dead-letters/discard", models.Decision, 409)
async def discard_dead_letters(writer: Writer, choice: Choice) -> Any:
    """Decide that dead letters will not run again. Their rows stay, as discarded."""
    where = choice.where(DeadLetterStatus.PENDING)
    return _decision(await writer.operator.discard(choice.ids, where, choice.limit))


def _decision(decided: Decided) -> dict[str, Any]:
    return {
        "done": [dead_letter["id"] for dead_letter in decided.done],
        "already": [dead_letter["id"] for dead_letter in decided.already],
        "refused": [{"id": dead_letter["id"], "why": why} for dead_letter, why in decided.refused],
    }


# --- acting -------------------------------------------------------------------------------------------------


@_post("/cancel", dict[str, str])
async def cancel_tasks(
    writer: Writer,
    task_ids: Annotated[
        list[models.TaskId], Body(embed=True, min_length=1, max_length=1000, description="Which.")
    ],
) -> Any:
    """Cancel tasks wherever they are. Answers where each was found; `unknown`: there is none, or it has ended."""
    return await writer.operator.cancel_tasks(task_ids)


@_post("/queues/{queue}/purge", models.Purged, 404)
async def purge_queue(writer: Writer, queue: QueueName) -> Any:
    """Cancel all that waits in a queue; what runs goes on."""
    return {"cancelled": await writer.operator.purge(queue)}


@_post("/locks/release", operations.Released, 404)
async def release_lock(
    writer: Writer,
    key: Annotated[models.LockKey, Body(description="The Redis key of the lock.")],
    owners: Annotated[
        list[models.Owner] | None,
        Body(
            max_length=1000,
            description="Only from these, as `GET /locks/one` has them; null: of all that hold it by then.",
        ),
    ] = None,
) -> Any:
    """Take a lock away from those who hold it. A task that loses its lock is cancelled, and counts as failed."""
    return await writer.operator.release_lock(key, owners)


ScheduleIds = Annotated[
    list[models.ScheduleId],
    Body(embed=True, min_length=1, max_length=1000, examples=[["my_pilots:MyCheckPilotsTask/lhcb"]]),
]


@_post("/schedules/pause", models.Changed, 409)
async def pause_schedules(writer: Writer, ids: ScheduleIds) -> Any:
    """Submit no more occurrences of these schedules until they are resumed."""
    return {"changed": await writer.operator.pause(ids)}


@_post("/schedules/resume", models.Changed, 409)
async def resume_schedules(writer: Writer, ids: ScheduleIds) -> Any:
    """Let paused schedules go on."""
    return {"changed": await writer.operator.resume(ids)}


@_post("/schedules/run-now", models.Submitted, 409)
async def run_schedule_now(
    writer: Writer, schedule_id: Annotated[models.ScheduleId, Body(embed=True, description="Which schedule.")]
) -> Any:
    """Submit a schedule's task at once. The next run stays as it is."""
    return {"task_id": await writer.operator.run_schedule(schedule_id)}
