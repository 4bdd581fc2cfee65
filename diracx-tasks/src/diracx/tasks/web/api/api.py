"""Routes below `/api/tasks/`: all that the dashboard shows and does, for programs."""

from __future__ import annotations

__all__ = ["router"]

from functools import partial
from typing import Annotated, Any

from diracx.routers.fastapi_classes import DiracxRouter
from fastapi import Body, Depends, Path, Query
from fastapi.responses import JSONResponse

from ... import operations
from ...operations import DelayReason, Window
from ...operations.audit import AuditEntry, read_audit
from ...operations.dead_letters import (
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
from ..operator import Decided, NotPossibleError
from . import models
from .dependencies import AllVOsReader, Reader, Writer, or_404
from .responses import BoundedRoute, database_errors, responses

router = DiracxRouter(dependencies=[Depends(database_errors)])
router.route_class = BoundedRoute

_MOST = 1_000
_WRONG = "what is written has mistakes: the settings before it hold; administrators see which"
_responses = partial(responses, 503)

Limit = Annotated[int, Query(ge=1, le=_MOST, description="At most so many.")]
After = Annotated[str | None, Query(max_length=400, description="`after` of the page before.")]
QueueName = Annotated[str, Path(max_length=40, description="`{priority}:{size}`.", examples=["normal:medium"])]
TaskName = models.TaskName


# --- looking ------------------------------------------------------------------------------------------------


@router.get("/summary", response_model=operations.Snapshot, responses=_responses())
async def get_summary(reader: Reader) -> JSONResponse:
    """The whole system at one moment: queues, workers, and what is to be counted."""

    async def ask() -> Any:
        return reader.viewer.snapshot(await reader.system.snapshot())

    return await reader.answer(ask)


@router.get("/health", response_model=models.HealthReport, responses=_responses())
async def get_health(reader: Reader) -> JSONResponse:
    """What the health checks found: alerts, the worst first, and what is not looked at."""

    async def ask() -> Any:
        health = (await reader.system.health()).for_viewer(reader.viewer)
        return {"severity": health.severity, "alerts": health.alerts, "unchecked": health.unchecked}

    return await reader.answer(ask)


@router.get("/queues", response_model=list[operations.Queue], responses=_responses())
async def get_queues(reader: Reader) -> JSONResponse:
    """The nine queues, most urgent first."""
    return await reader.answer(lambda: operations.queues(reader.system.redis))


@router.get("/queues/{queue}", response_model=models.QueuedTaskPage, responses=_responses(404))
async def get_queued_tasks(
    reader: Reader, queue: QueueName, limit: Limit = 100, after: After = None
) -> JSONResponse:
    """The backlog of a queue, in the order in which workers will take it."""
    look = partial(operations.peek, reader.system.redis, queue, registry=reader.system.registry)
    return await reader.answer(lambda: reader.viewer.page(look, limit, after))


@router.get("/running", response_model=models.RunningTaskPage, responses=_responses())
async def get_running_tasks(reader: Reader, limit: Limit = 100, after: After = None) -> JSONResponse:
    """What runs, longest first, as workers reported it within the last seconds."""
    look = partial(operations.running, reader.system.redis, registry=reader.system.registry)
    return await reader.answer(lambda: reader.viewer.page(look, limit, after))


@router.get("/delayed", response_model=models.DelayedTaskPage, responses=_responses())
async def get_delayed_tasks(
    reader: Reader,
    reason: Annotated[DelayReason | None, Query(description="Only those that wait for this.")] = None,
    limit: Limit = 100,
    after: After = None,
) -> JSONResponse:
    """Tasks delayed until a time, for a retry, a lock or quota, in the order in which they are due."""
    look = partial(operations.delayed, reader.system.redis, reason, registry=reader.system.registry)
    return await reader.answer(lambda: reader.viewer.page(look, limit, after))


@router.get("/workers", response_model=list[operations.Worker], responses=_responses())
async def get_workers(reader: Reader) -> JSONResponse:
    """All workers that live, or were heard of within the last minute."""

    async def ask() -> Any:
        return reader.viewer.workers(await operations.workers(reader.system.redis))

    return await reader.answer(ask)


@router.get("/stats", response_model=list[operations.TaskStats], responses=_responses())
async def get_stats(
    reader: Reader, window: Annotated[Window, Query(description="The past hour or day.")] = "hour"
) -> JSONResponse:
    """How each class of tasks did: counts, failure rate, run time and time in the queue."""
    return await reader.answer(lambda: operations.stats(reader.system.redis, window))


@router.get("/history", response_model=list[operations.Point], responses=_responses())
async def get_history(reader: Reader) -> JSONResponse:
    """The past hour, minute by minute, oldest first."""
    return await reader.answer(lambda: operations.history(reader.system.redis))


@router.get("/failures", response_model=models.FailurePage, responses=_responses())
async def get_failures(
    reader: Reader,
    task_name: Annotated[
        TaskName | None, Query(description="Only of this task: category:ClassName, or ClassName alone.")
    ] = None,
    limit: Limit = 100,
    after: After = None,
) -> JSONResponse:
    """Failed attempts with their tracebacks, newest first. The last 500 or so are kept."""
    look = partial(operations.failures, reader.system.redis, task_name=task_name)
    return await reader.answer(lambda: reader.viewer.page(look, limit, after))


@router.get("/locks", response_model=models.LockPage, responses=_responses())
async def get_locks(reader: AllVOsReader, limit: Limit = 100, after: After = None) -> JSONResponse:
    """Locks that tasks hold or wait for, and limiters that were used within the last day."""
    return await reader.answer(lambda: operations.locks(reader.system.redis, limit, after))


@router.get("/locks/one", response_model=operations.Lock, responses=_responses(404))
async def get_lock(
    reader: AllVOsReader,
    key: Annotated[models.LockKey, Query(description="Its Redis key.", examples=["lock:mutex:job:42"])],
) -> JSONResponse:
    """One lock or limiter: who holds it, until when, how many wait, what is left of a quota."""

    async def ask() -> Any:
        return or_404(
            await operations.lock(reader.system.redis, key), f"lock {key!r} that anybody holds or waits for"
        )

    return await reader.answer(ask)


@router.get("/schedules", response_model=list[ScheduleState], responses=_responses())
async def get_schedules(reader: Reader) -> JSONResponse:
    """All schedules of periodic tasks: state, next and last run, how it went, and who says so."""

    async def ask() -> Any:
        settings = await reader.system.settings()
        found = await schedules(reader.system.redis, reader.system.registry, settings.tasks, settings.vos)
        return [state for state in found if reader.viewer.sees(state.vo)]

    return await reader.answer(ask)


@router.get("/groups", response_model=list[GroupStatus], responses=_responses())
async def get_groups(reader: AllVOsReader, limit: Limit = 100) -> JSONResponse:
    """Callback groups that have not called back, those that expire first first, without their children."""
    return await reader.answer(lambda: operations.groups(reader.system.redis, limit))


@router.get("/groups/{group_id}", response_model=GroupStatus, responses=_responses(404))
async def get_group(
    reader: AllVOsReader, group_id: Annotated[str, Path(max_length=200, description="Its id.")]
) -> JSONResponse:
    """One callback group with its children."""

    async def ask() -> Any:
        return or_404(await read_group(reader.system.redis, group_id), f"group {group_id!r} (any more)")

    return await reader.answer(ask)


@router.get("/configuration", response_model=list[models.ConfigurationInForce], responses=_responses())
async def get_configuration_in_force(reader: AllVOsReader) -> JSONResponse:
    """Which configuration each worker and scheduler runs with, and what is wrong with the one that is written."""

    async def ask() -> Any:
        return [entry.as_dict() for entry in await active_configs(reader.system.redis)]

    return await reader.answer(ask)


@router.get("/configuration/settings", response_model=models.EffectiveSettings, responses=_responses(404))
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
) -> JSONResponse:
    """The value of every setting of every task that holds in the end, and where it is written."""

    async def ask() -> Any:
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

    return await reader.answer(ask)


@router.get("/audit", response_model=list[AuditEntry], responses=_responses(404))
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
) -> JSONResponse:
    """Who did what by dashboard, HTTP or command line, newest first."""

    async def ask() -> Any:
        return await read_audit(reader.system.redis, limit, before, vo=reader.viewer.chosen(vo))

    return await reader.answer(ask)


# --- dead letters -------------------------------------------------------------------------------------------


class _Filter:
    """Which dead letters."""

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


@router.get("/dead-letters", response_model=models.DeadLetterPage, responses=_responses(409))
async def get_dead_letters(
    reader: Reader,
    chosen: Annotated[_Filter, Depends(_Filter)],
    limit: Limit = 100,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="`after` of the page before.")] = 0,
) -> JSONResponse:
    """Dead letters, oldest first, without their messages and tracebacks."""

    async def ask() -> Any:
        db = _task_db(reader.system)
        where: DeadLetterFilter = {**chosen.where, "vo": reader.viewer.vo}
        letters = await db.summaries(**where, limit=limit, after_id=after)
        total = sum((await db.count(**where)).values())
        return {
            "items": [dead_letter_summary(letter) for letter in letters],
            "total": total,
            "after": letters[-1]["id"] if len(letters) == limit else None,
        }

    return await reader.answer(ask)


@router.get("/waiting-dead-letters", response_model=models.WaitingDeadLetterPage, responses=_responses())
async def get_waiting_dead_letters(reader: Reader, limit: Limit = 100, after: After = None) -> JSONResponse:
    """Dead letters that wait in Redis until a worker with a database takes them, oldest first."""
    look = partial(operations.waiting_dead_letters, reader.system.redis, registry=reader.system.registry)
    return await reader.answer(lambda: reader.viewer.page(look, limit, after))


@router.get("/dead-letters/{key}", response_model=models.DeadLetterWithAttempts, responses=_responses(404, 409))
async def get_dead_letter(
    reader: Reader, key: Annotated[str, Path(max_length=255, description="Task id, or the number in the list.")]
) -> JSONResponse:
    """One dead letter with its arguments (secrets masked) and all attempts."""

    async def ask() -> Any:
        system = reader.system
        letter = or_404(await find_dead_letter(_task_db(system), key, reader.viewer), f"dead letter {key!r}")
        shown = {
            name: value for name, value in dead_letter_record(letter).items() if name not in ("message", "raw")
        }
        return shown | {"arguments": dead_letter_arguments(letter, system.registry)}

    return await reader.answer(ask)


def _task_db(system: AppContext) -> Any:
    if system.task_db is None:
        raise NotPossibleError("no database of dead letters is configured here; set DIRACX_DB_URL_TASKDB")
    return system.task_db


Choice = Annotated[models.DeadLetterChoice, Body()]


@router.post("/dead-letters/retry", response_model=models.Decision, responses=_responses(409))
async def retry_dead_letters(writer: Writer, choice: Choice) -> JSONResponse:
    """Submit dead letters again, under their old task ids. Each is submitted once, whoever repeats this."""

    async def do() -> Any:
        return _decision(await writer.operator.retry(choice.ids, choice.where(OPEN), choice.limit))

    return await writer.answer(do)


@router.post("/dead-letters/discard", response_model=models.Decision, responses=_responses(409))
async def discard_dead_letters(writer: Writer, choice: Choice) -> JSONResponse:
    """Decide that dead letters will not run again. Their rows stay, as discarded."""

    async def do() -> Any:
        where = choice.where(DeadLetterStatus.PENDING)
        return _decision(await writer.operator.discard(choice.ids, where, choice.limit))

    return await writer.answer(do)


def _decision(decided: Decided) -> dict[str, Any]:
    return {
        "done": [letter["id"] for letter in decided.done],
        "already": [letter["id"] for letter in decided.already],
        "refused": [{"id": letter["id"], "why": why} for letter, why in decided.refused],
    }


# --- acting -------------------------------------------------------------------------------------------------


@router.post("/cancel", response_model=dict[str, str], responses=_responses())
async def cancel_tasks(
    writer: Writer,
    task_ids: Annotated[
        list[models.TaskId], Body(embed=True, min_length=1, max_length=1000, description="Which.")
    ],
) -> JSONResponse:
    """Cancel tasks wherever they are. Answers where each was found; `unknown`: there is none, or it has ended."""
    return await writer.answer(lambda: writer.operator.cancel_tasks(task_ids))


@router.post("/queues/{queue}/purge", response_model=models.Purged, responses=_responses(404))
async def purge_queue(writer: Writer, queue: QueueName) -> JSONResponse:
    """Cancel all that waits in a queue; what runs goes on."""

    async def do() -> Any:
        return {"cancelled": await writer.operator.purge(queue)}

    return await writer.answer(do)


@router.post("/locks/release", response_model=operations.Released, responses=_responses(404))
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
) -> JSONResponse:
    """Take a lock away from those who hold it. A task that loses its lock is cancelled, and counts as failed."""
    return await writer.answer(lambda: writer.operator.release_lock(key, owners))


ScheduleIds = Annotated[
    list[models.ScheduleId],
    Body(embed=True, min_length=1, max_length=1000, examples=[["my_pilots:MyCheckPilotsTask/lhcb"]]),
]


@router.post("/schedules/pause", response_model=models.Changed, responses=_responses(409))
async def pause_schedules(writer: Writer, ids: ScheduleIds) -> JSONResponse:
    """Submit no more occurrences of these schedules until they are resumed."""

    async def do() -> Any:
        return {"changed": await writer.operator.pause(ids)}

    return await writer.answer(do)


@router.post("/schedules/resume", response_model=models.Changed, responses=_responses(409))
async def resume_schedules(writer: Writer, ids: ScheduleIds) -> JSONResponse:
    """Let paused schedules go on."""

    async def do() -> Any:
        return {"changed": await writer.operator.resume(ids)}

    return await writer.answer(do)


@router.post("/schedules/run-now", response_model=models.Submitted, responses=_responses(409))
async def run_schedule_now(
    writer: Writer, schedule_id: Annotated[models.ScheduleId, Body(embed=True, description="Which schedule.")]
) -> JSONResponse:
    """Submit a schedule's task at once. The next run stays as it is."""

    async def do() -> Any:
        return {"task_id": await writer.operator.run_schedule(schedule_id)}

    return await writer.answer(do)
