"""Routes below `/api/tasks/`: the read models and actions of the dashboard, for programs."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from diracx.routers.fastapi_classes import DiracxRouter
from fastapi import Body, Depends, Path, Query
from pydantic import TypeAdapter

from ... import operations
from ...operations import DelayReason, Page, Window
from ...operations.audit import AuditEntry, read_audit
from ...operations.dead_letters import (
    Decided,
    dead_letter_arguments,
    dead_letter_record,
    dead_letter_summary,
    find_dead_letter,
)
from ...operations.queued import DELAYED_SEARCHED
from ...operations.settings import settings_records
from ...operations.visibility import no_such_vo
from ...plumbing.broker.groups import GroupStatus, read_group
from ...plumbing.config.active import active_configs
from ...plumbing.persistence import OPEN, DeadLetterStatus
from ...plumbing.persistence.db import DeadLetterFilter
from ...plumbing.scheduler import ScheduleState, schedules
from ...plumbing.task_names import resolve_task_name
from ..operator import task_db_of
from . import models
from .dependencies import AllVOsReader, Reader, Writer, json_endpoint, or_404
from .responses import BoundedRoute, responses, server_errors

# The factories of DiracX for tests and clients mount disabled services, too.
_ENABLED = TypeAdapter(bool).validate_python(os.environ.get("DIRACX_SERVICE_TASKS_ENABLED") or True)
router = DiracxRouter(dependencies=[Depends(server_errors)], include_in_schema=_ENABLED)
router.route_class = BoundedRoute

_WRONG = "the configuration has mistakes, which administrators see; the last valid settings are in force"


def _route(method: str, path: str, model: Any, *codes: int) -> Callable[[Callable[..., Awaitable[Any]]], Any]:
    """Return a decorator that registers a route.

    Args:
        model: model of its response, for the OpenAPI document.
        codes: status codes of its errors, besides 401, 403 and 503.
    """
    add = router.api_route(path, methods=[method], response_model=model, responses=responses(503, *codes))
    return lambda endpoint: add(json_endpoint(endpoint))


_get = partial(_route, "GET")
_post = partial(_route, "POST")

Limit = Annotated[int, Query(ge=1, le=models.MOST, description="Maximum number of items.")]
After = Annotated[str | None, Query(max_length=1500, description="`after` of the previous page.")]
QueueName = Annotated[str, Path(max_length=40, description="`{priority}:{size}`.", examples=["normal:medium"])]


# --- read models --------------------------------------------------------------------------------------------


@_get("/summary", operations.Snapshot)
async def get_summary(reader: Reader) -> Any:
    """The state of the whole system: queues, workers, counts."""
    return reader.viewer.snapshot(await reader.system.snapshot())


@_get("/health", models.HealthReport)
async def get_health(reader: Reader) -> Any:
    """Results of the health checks: alerts by descending severity, and checks that are not configured."""
    health = (await reader.system.health()).for_viewer(reader.viewer)
    return {"severity": health.severity, "alerts": health.alerts, "unchecked": health.unchecked}


@_get("/queues", list[operations.Queue])
async def get_queues(reader: Reader) -> Any:
    """The nine queues by priority."""
    return await operations.queues(reader.system.redis)


@_get("/queues/{queue}", Page[operations.QueuedTask], 404)
async def get_queued_tasks(reader: Reader, queue: QueueName, limit: Limit = 100, after: After = None) -> Any:
    """Tasks that wait in a queue, in the order of delivery."""
    read = partial(operations.peek, reader.system.redis, queue, registry=reader.system.registry)
    return await reader.viewer.page(read, limit, after)


@_get("/running", Page[operations.RunningTask])
async def get_running_tasks(reader: Reader, limit: Limit = 100, after: After = None) -> Any:
    """Running tasks, longest first, as of the last reports of the workers."""
    read = partial(operations.running, reader.system.redis, registry=reader.system.registry)
    return await reader.viewer.page(read, limit, after)


@_get("/delayed", Page[operations.DelayedTask])
async def get_delayed_tasks(
    reader: Reader,
    reason: Annotated[DelayReason | None, Query(description="Only tasks delayed for this reason.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> Any:
    """Tasks that wait for a time, a retry, a lock or quota, by due time."""
    at_most = reader.viewer.share(DELAYED_SEARCHED)
    system = reader.system
    read = partial(operations.delayed, system.redis, reason, registry=system.registry, at_most=at_most)
    return await reader.viewer.page(read, limit, after)


@_get("/workers", list[operations.Worker])
async def get_workers(reader: Reader) -> Any:
    """Workers that are alive, hold tasks, or reported within the last three minutes."""
    return reader.viewer.workers(await operations.workers(reader.system.redis))


@_get("/stats", list[operations.TaskStats])
async def get_stats(
    reader: Reader, window: Annotated[Window, Query(description="The past hour or day.")] = "hour"
) -> Any:
    """Statistics by task class: counts, failure rate, run time and time in the queue."""
    return await operations.stats(reader.system.redis, window)


@_get("/history", list[operations.Point])
async def get_history(reader: Reader) -> Any:
    """Counters of the past hour by minute, oldest first."""
    return await operations.history(reader.system.redis)


@_get("/failures", Page[operations.Failure])
async def get_failures(
    reader: Reader,
    task_name: Annotated[
        models.Name | None, Query(description="Only of this task: category:ClassName, or ClassName alone.")
    ] = None,
    limit: Limit = 100,
    after: After = None,
) -> Any:
    """Failed attempts with their tracebacks, newest first. About 500 are kept."""
    read = partial(operations.failures, reader.system.redis, task_name=task_name)
    return await reader.viewer.page(read, limit, after)


@_get("/locks", Page[operations.Lock])
async def get_locks(reader: AllVOsReader, limit: Limit = 100, after: After = None) -> Any:
    """Locks that tasks hold or wait for, and limiters that were used within the last day."""
    return await operations.locks(reader.system.redis, limit, after)


@_get("/locks/one", operations.Lock, 404)
async def get_lock(
    reader: AllVOsReader,
    key: Annotated[models.Key, Query(description="Redis key of the lock.", examples=["lock:mutex:job:42"])],
) -> Any:
    """One lock or limiter: holders, expiry, number of waiting tasks, used quota."""
    return or_404(await operations.lock(reader.system.redis, key), f"lock {key!r} with holders or waiting tasks")


@_get("/schedules", list[ScheduleState])
async def get_schedules(reader: Reader) -> Any:
    """All schedules of periodic tasks: state, next and last run, last outcome, rule and its source."""
    settings = await reader.system.settings()
    found = await schedules(reader.system.redis, reader.system.registry, settings.tasks, settings.vos)
    return [state for state in found if reader.viewer.sees(state.vo)]


@_get("/groups", list[GroupStatus])
async def get_groups(reader: AllVOsReader, limit: Limit = 100) -> Any:
    """Pending callback groups by expiry, without their children."""
    return await operations.groups(reader.system.redis, limit)


@_get("/groups/{group_id}", GroupStatus, 404)
async def get_group(
    reader: AllVOsReader, group_id: Annotated[str, Path(max_length=200, description="Id of the group.")]
) -> Any:
    """One callback group with its children."""
    return or_404(await read_group(reader.system.redis, group_id), f"group {group_id!r}")


@_get("/configuration", list[models.ConfigurationInForce])
async def get_configuration_in_force(reader: AllVOsReader) -> Any:
    """Active configuration of each worker and scheduler, and the problems of the current one."""
    return [entry.as_dict() for entry in await active_configs(reader.system.redis)]


@_get("/configuration/settings", models.EffectiveSettings, 404)
async def get_settings(
    reader: Reader,
    task_name: Annotated[
        models.Name | None, Query(description="Only this task: category:ClassName, or ClassName alone.")
    ] = None,
    vo: Annotated[
        models.Name | None,
        Query(
            description="Values for this VO. Default: the general values and those of each VO with its own "
            "settings; for operators, those for their VO."
        ),
    ] = None,
) -> Any:
    """Resolved values of all settings of tasks, and where they are set."""
    system, viewer = reader.system, reader.viewer
    settings = await system.settings()
    names = sorted(system.registry)
    if task_name is not None:
        if (name := resolve_task_name(task_name, names)) is None:
            raise ValueError(f"no task {task_name!r}")
        names = [name]
    vo_shown = viewer.chosen(vo)
    if vo_shown is not None and vo_shown not in settings.vos:
        raise no_such_vo(vo_shown)
    about = {
        "source": system.reader.source,
        "vos": [known for known in settings.vos if viewer.sees(known)],
        # Problems quote settings of all VOs.
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
        models.Name | None,
        Query(
            description="Actions of this VO's members. Default: those of administrators; for operators, those of "
            "their VO."
        ),
    ] = None,
) -> Any:
    """Actions by dashboard, HTTP or command line, with their users, newest first."""
    return await read_audit(reader.system.redis, limit, before, vo=reader.viewer.chosen(vo))


# --- dead letters -------------------------------------------------------------------------------------------


@_get("/dead-letters", models.DeadLetterPage, 409)
async def get_dead_letters(reader: Reader, query: Annotated[models.DeadLetterQuery, Query()]) -> Any:
    """Dead letters, oldest first, without their messages and tracebacks."""
    db = task_db_of(reader.system)
    where: DeadLetterFilter = {**query.where(query.status or OPEN), "vo": reader.viewer.vo}
    dead_letters = await db.summaries(**where, limit=query.limit, after_id=query.after)
    total = sum((await db.count(**where)).values())
    return {
        "items": [dead_letter_summary(dead_letter) for dead_letter in dead_letters],
        "total": total,
        "after": dead_letters[-1]["id"] if len(dead_letters) == query.limit else None,
    }


@_get("/waiting-dead-letters", Page[operations.WaitingDeadLetter])
async def get_waiting_dead_letters(reader: Reader, limit: Limit = 100, after: After = None) -> Any:
    """Dead letters in Redis that no worker has stored in the database yet, oldest first."""
    read = partial(operations.waiting_dead_letters, reader.system.redis, registry=reader.system.registry)
    return await reader.viewer.page(read, limit, after)


@_get("/dead-letters/{key}", models.DeadLetterWithAttempts, 404, 409)
async def get_dead_letter(
    reader: Reader, key: Annotated[str, Path(max_length=255, description="Task id, or the number in the list.")]
) -> Any:
    """One dead letter with its arguments (secrets masked) and all attempts."""
    system = reader.system
    dead_letter = or_404(await find_dead_letter(task_db_of(system), key, reader.viewer), f"dead letter {key!r}")
    shown = {
        name: value for name, value in dead_letter_record(dead_letter).items() if name not in ("message", "raw")
    }
    return shown | {"arguments": dead_letter_arguments(dead_letter, system.registry)}


Choice = Annotated[models.DeadLetterChoice, Body()]


@_post("/dead-letters/retry", models.Decision, 409)
async def retry_dead_letters(operator: Writer, choice: Choice) -> Any:
    """Submit dead letters again, with their task ids; each once, even if repeated."""
    return _decision(await operator.retry(choice.ids, choice.where(OPEN), choice.limit))


@_post("/dead-letters/discard", models.Decision, 409)
async def discard_dead_letters(operator: Writer, choice: Choice) -> Any:
    """Mark dead letters as discarded. Their rows stay."""
    where = choice.where(DeadLetterStatus.PENDING)
    return _decision(await operator.discard(choice.ids, where, choice.limit))


def _decision(decided: Decided) -> dict[str, Any]:
    return {
        "done": [dead_letter["id"] for dead_letter in decided.done],
        "already": [dead_letter["id"] for dead_letter in decided.already],
        "refused": [{"id": dead_letter["id"], "why": why} for dead_letter, why in decided.refused],
    }


# --- actions ------------------------------------------------------------------------------------------------


@_post("/cancel", dict[str, str])
async def cancel_tasks(
    operator: Writer,
    task_ids: Annotated[
        list[models.TaskId], Body(embed=True, min_length=1, max_length=1000, description="Task ids.")
    ],
) -> Any:
    """Cancel tasks in any state. Returns the state of each; `unknown`: it has ended or does not exist."""
    return await operator.cancel_tasks(task_ids)


@_post("/queues/{queue}/purge", models.Purged, 404)
async def purge_queue(operator: Writer, queue: QueueName) -> Any:
    """Cancel all tasks that wait in a queue, not those that run."""
    return {"cancelled": await operator.purge(queue)}


@_post("/locks/release", operations.Released, 404)
async def release_lock(
    operator: Writer,
    key: Annotated[models.Key, Body(description="The Redis key of the lock.")],
    owners: Annotated[
        list[models.Name] | None,
        Body(max_length=1000, description="Only these holders, as of `GET /locks/one`; null: all."),
    ] = None,
) -> Any:
    """Take a lock from its holders. A task that loses its lock is cancelled and counts as failed."""
    return await operator.release_lock(key, owners)


ScheduleIds = Annotated[
    list[models.Key],
    Body(embed=True, min_length=1, max_length=1000, examples=[["my_pilots:MyCheckPilotsTask/lhcb"]]),
]


@_post("/schedules/pause", models.Changed, 409)
async def pause_schedules(operator: Writer, ids: ScheduleIds) -> Any:
    """Pause schedules: no occurrences are submitted until they are resumed."""
    return {"changed": await operator.pause(ids)}


@_post("/schedules/resume", models.Changed, 409)
async def resume_schedules(operator: Writer, ids: ScheduleIds) -> Any:
    """Resume paused schedules."""
    return {"changed": await operator.resume(ids)}


@_post("/schedules/run-now", models.Submitted, 409)
async def run_schedule_now(
    operator: Writer,
    schedule_id: Annotated[models.Key, Body(embed=True, description="Id of the schedule.")],
) -> Any:
    """Submit the task of a schedule now. Does not change the next run."""
    return {"task_id": await operator.run_schedule(schedule_id)}
