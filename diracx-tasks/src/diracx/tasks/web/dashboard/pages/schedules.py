"""Schedules of periodic tasks: when each runs next, how it went last; pause, resume, run now."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from ....operations.views import SCHEDULES
from ....plumbing.broker.scheduling import has_leader
from ....plumbing.scheduler import ScheduleState, schedules
from ..page import (
    Action,
    AppContext,
    Form,
    NotFoundError,
    NotPossibleError,
    Operator,
    Page,
    Question,
    Request,
    viewer_of,
)
from ..rendering import number
from ..tables import Button, Link, Table, TablePage

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    settings = await context.settings()
    viewer = viewer_of(request)
    known = await schedules(context.redis, context.registry, settings.tasks, settings.vos)
    states = [state for state in known if viewer.sees(state.vo)]
    wanted = request.query_params.get("vo", "")
    after = request.query_params.get("after", "")
    vos = sorted({state.vo for state in states if state.vo})
    if wanted and (not viewer.sees(wanted) or wanted not in {*vos, *settings.vos}):
        raise NotFoundError(f"There is no VO {wanted[:40]!r}.")
    chosen = [state for state in states if wanted in ("", state.vo)]
    shown = [state for state in chosen if state.id > after][:_PAGE]
    notes = list(settings.problems) if viewer.sees(None) else []
    if not await has_leader(context.redis):
        notes.insert(0, "No scheduler leads: nothing is submitted. Start one with `diracx-task-run scheduler`.")
    links = [Link(vo, f"/schedules?vo={quote(vo, safe='')}", vo == wanted) for vo in vos]
    return TablePage(
        filters=[Link("All VOs", "/schedules", not wanted), *links] if vos else [],
        filters_label="VO",
        notes=notes,
        table=Table(
            view=SCHEDULES,
            rows=shown,
            caption="" if len(shown) == len(chosen) else f"{len(shown)} of {number(len(chosen))} schedules",
            empty="No periodic task is installed here.",
            after=shown[-1].id if shown and shown[-1] is not chosen[-1] else None,
            actions=_actions,
        ),
    ).values()


def _actions(state: ScheduleState) -> list[Button]:
    fields = {"schedule": state.id}
    buttons = []
    if state.state != "unknown":
        buttons.append(Button("/schedules/run-now", "Run now", fields, f"run-{state.id}"))
    if state.state == "paused":
        buttons.append(Button("/schedules/resume", "Resume", fields, f"pause-{state.id}"))
    elif state.state not in ("disabled", "finished", "unknown"):
        buttons.append(Button("/schedules/pause", "Pause", fields, f"pause-{state.id}"))
    return buttons


def _chosen(form: Form) -> list[str]:
    ids = form.many("schedule")
    if not ids:
        raise NotPossibleError("No schedule was chosen.")
    return ids


def _about(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{len(ids)} schedules"


async def _ask_pause(form: Form, context: AppContext) -> Question:
    ids = _chosen(form)
    return Question(
        f"Pause {_about(ids)}?",
        "No more occurrences are submitted until they are resumed. What has been submitted goes on.",
        "Pause",
        ids,
    )


async def _ask_resume(form: Form, context: AppContext) -> Question:
    ids = _chosen(form)
    return Question(
        f"Resume {_about(ids)}?",
        "A run that was missed meanwhile is made up for, once, unless the schedule says `missed: skip`.",
        "Resume",
        ids,
    )


async def _ask_run(form: Form, context: AppContext) -> Question:
    ids = _chosen(form)
    return Question(
        f"Run {_about(ids)} now?",
        "The task is submitted at once, paused or not. The next run stays as it is.",
        "Run now",
        ids,
    )


async def _pause(form: Form, operator: Operator) -> str:
    changed = await operator.pause(_chosen(form))
    return f"{_about(changed)} paused." if changed else "Nothing changed: paused already."


async def _resume(form: Form, operator: Operator) -> str:
    changed = await operator.resume(_chosen(form))
    return f"{_about(changed)} resumed." if changed else "Nothing changed: not paused."


async def _run(form: Form, operator: Operator) -> str:
    return "Submitted: " + ", ".join([await operator.run_schedule(schedule) for schedule in _chosen(form)])


PAGES = [Page("/schedules", "schedules", "Schedules", _load, section="Steering")]
ACTIONS = [
    Action("/schedules/pause", _ask_pause, _pause),
    Action("/schedules/resume", _ask_resume, _resume),
    Action("/schedules/run-now", _ask_run, _run),
]
