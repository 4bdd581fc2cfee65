"""Page of the schedules of periodic tasks, with actions to pause, resume and run them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from ....operations.formats import number
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
from ..tables import Button, Link, Table

_PAGE = 100


async def _load(request: Request, context: AppContext) -> dict[str, Any]:
    settings = await context.settings()
    viewer = viewer_of(request)
    known = await schedules(context.redis, context.registry, settings.tasks, settings.vos)
    states = [state for state in known if viewer.sees(state.vo)]
    vo = request.query_params.get("vo", "")
    after = request.query_params.get("after", "")
    vos = sorted({state.vo for state in states if state.vo})
    if vo and (not viewer.sees(vo) or vo not in {*vos, *settings.vos}):
        raise NotFoundError(f"No VO {vo[:40]!r}.")
    chosen = [state for state in states if vo in ("", state.vo)]
    shown = [state for state in chosen if state.id > after][:_PAGE]
    notes = list(settings.problems) if viewer.sees(None) else []
    if not await has_leader(context.redis):
        notes.insert(0, "No scheduler leads: nothing is submitted. Start one with `diracx-task-run scheduler`.")
    links = [Link(each, f"/schedules?vo={quote(each, safe='')}", each == vo) for each in vos]
    return Table(
        filters=[Link("All VOs", "/schedules", not vo), *links] if vos else [],
        filters_label="VO",
        notes=notes,
        view=SCHEDULES,
        rows=shown,
        caption="" if len(shown) == len(chosen) else f"{len(shown)} of {number(len(chosen))} schedules",
        after=shown[-1].id if shown and shown[-1] is not chosen[-1] else None,
        actions=_actions,
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
        raise NotPossibleError("No schedule is selected.")
    return ids


def _about(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{len(ids)} schedules"


def _ask(title: str, consequence: str, button: str) -> Callable[[Form, AppContext], Awaitable[Question]]:
    async def ask(form: Form, context: AppContext) -> Question:
        ids = _chosen(form)
        return Question(title.format(_about(ids)), consequence, button, ids)

    return ask


async def _pause(form: Form, operator: Operator) -> str:
    changed = await operator.pause(_chosen(form))
    return f"{_about(changed)} paused." if changed else "Nothing changed: paused already."


async def _resume(form: Form, operator: Operator) -> str:
    changed = await operator.resume(_chosen(form))
    return f"{_about(changed)} resumed." if changed else "Nothing changed: not paused."


async def _run(form: Form, operator: Operator) -> str:
    return "Submitted: " + ", ".join([await operator.run_schedule(schedule) for schedule in _chosen(form)])


PAGES = [Page("/schedules", "schedules", "Schedules", _load, section="Control", per_vo=True)]
_PAUSE = "No occurrences are submitted until they are resumed. Submitted tasks continue."
_RESUME = "A run that was missed meanwhile is submitted once, unless `missed: skip` is set."
_RUN = "The task is submitted now, even if it is paused. The next run does not change."
ACTIONS = [
    Action("/schedules/pause", _ask("Pause {}?", _PAUSE, "Pause"), _pause, per_vo=True),
    Action("/schedules/resume", _ask("Resume {}?", _RESUME, "Resume"), _resume, per_vo=True),
    Action("/schedules/run-now", _ask("Run {} now?", _RUN, "Run now"), _run, per_vo=True),
]
