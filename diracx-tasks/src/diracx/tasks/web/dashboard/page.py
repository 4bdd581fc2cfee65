"""Pages, actions and extensions of the dashboard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.requests import Request

from ...operations import MASK, masked_arguments
from ...operations.visibility import Viewer
from ...plumbing.broker.models import TaskMessage
from ..context import AppContext
from ..forms import Form, integer
from ..operator import NotPossibleError, Operator

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = [
    "MASK",
    "Action",
    "AppContext",
    "Extension",
    "Form",
    "NotFoundError",
    "NotPossibleError",
    "Operator",
    "Page",
    "Question",
    "Request",
    "TaskMessage",
    "UnavailableError",
    "integer",
    "masked_arguments",
    "viewer_of",
]


class NotFoundError(Exception):
    """There is no such thing (any more); the message says which."""


class UnavailableError(Exception):
    """Error of a page whose subject cannot be had at the moment; the message says why."""


Values: TypeAlias = dict[str, Any]


def viewer_of(request: Request) -> Viewer:
    """Return what the user of a request may see."""
    return Viewer(request.state.principal.vo)


@dataclass(frozen=True, slots=True)
class Page:
    """One page. Its templates are `{name}.html` and, for what changes by itself, `_{name}.html`."""

    path: str
    """Path, as `/queues/{queue}`."""
    name: str
    title: str
    load: Callable[[Request, AppContext], Awaitable[Values]]
    """Load the values for its templates. Only path, query and `state.principal.vo` of the request may count:
    requests for which these are equal share it.

    Raises `NotFoundError`, `UnavailableError`.
    """
    nav: str | None = None
    """The path of the entry in the navigation that it belongs to; by default its own, or none."""
    section: str | None = None
    """The heading of the navigation below which it is listed; None: it is not."""
    live: bool = True
    """True if it follows what happens by itself."""
    all_vos: bool = False
    """True if it shows what belongs to all VOs, or to none: only principals without a VO may look at it then."""
    charts: Callable[[Request, AppContext], Awaitable[Values]] | None = None
    """Name of a chart -> `{"t": seconds since the epoch, "series": [{label, values}, …]}`."""


@dataclass(frozen=True, slots=True)
class Question:
    """Confirmation that is asked for before an action."""

    title: str
    """With a question mark."""
    consequence: str | Markup
    """Consequence of the action, and for whom."""
    button: str
    """The action, as a verb."""
    details: Sequence[str] = ()
    """The things it is done to."""
    dangerous: bool = False
    """True if it cannot be undone."""
    reason: str = ""
    """Label of a line of text that is sent along as `reason`; empty: none is asked for."""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Fields that are sent along with the yes: name -> values, in place of what the field had.

    It pins down what the question was about, where that may be another thing by the time of the answer.
    """


@dataclass(frozen=True, slots=True)
class Action:
    """An action: it asks a question first, and reports what came of it."""

    path: str
    ask: Callable[[Form, AppContext], Awaitable[Question]]
    """Raises `NotPossibleError` when there is nothing to ask about."""
    do: Callable[[Form, Operator], Awaitable[str]]
    """Does it, and says what came of it.

    Raises `NotPossibleError`.
    """
    all_vos: bool = False
    """True if it is about all VOs: only principals without a VO are asked about it then, and may do it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Pages that another distribution adds, by an entry point in the group `diracx.tasks_dashboard`.

    The entry point names a function without arguments that returns this.
    """

    pages: Sequence[Page] = ()
    actions: Sequence[Action] = ()
    templates: Path | None = None
    """The directory of its templates."""
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] = field(default=nullcontext)
    """Entered before the first page is shown, left at the end: opens what its pages need."""
