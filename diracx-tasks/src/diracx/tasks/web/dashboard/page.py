"""Pages, actions and extensions of the dashboard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from starlette.requests import Request

from ...operations.visibility import Viewer
from ..context import AppContext
from ..forms import Form, integer
from ..operator import NotPossibleError, Operator

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = [
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
    "UnavailableError",
    "integer",
    "viewer_of",
]


class NotFoundError(Exception):
    """The object does not exist; the message has its name."""


class UnavailableError(Exception):
    """The data of a page are unavailable at the moment; the message has the reason."""


Values: TypeAlias = dict[str, Any]


def viewer_of(request: Request) -> Viewer:
    """Return the visibility of tasks for the user of a request."""
    vo, diracx = request.state.principal.vo, getattr(request.state, "diracx", None)
    return Viewer(vo) if diracx is None else Viewer(vo, diracx.settings.state_key.get_secret_value())


@dataclass(frozen=True, slots=True)
class Page:
    """One page. Its templates are `{name}.html` and, for the live part, `_{name}.html`.

    A page whose values are those of a `Table` needs none.
    """

    path: str
    """Path, such as `/queues/{queue}`."""
    name: str
    title: str
    load: Callable[[Request, AppContext], Awaitable[Values]]
    """Loads the values for its templates. They may depend on path, query and `state.principal.vo` of the request
    alone: requests with equal ones share them.

    Raises `NotFoundError`, `UnavailableError`.
    """
    nav: str | None = None
    """Path of its entry in the navigation; by default its own path."""
    section: str | None = None
    """Section of the navigation in which it is listed; None: not listed."""
    live: bool = True
    """Update it by an event stream."""
    per_vo: bool = False
    """It shows a principal of a VO the data of that VO only. Other pages are for principals without a VO."""
    charts: Callable[[Request, AppContext], Awaitable[Values]] | None = None
    """Name of a chart -> `{"t": seconds since the epoch, "series": [{label, values}, …]}`."""


@dataclass(frozen=True, slots=True)
class Question:
    """Confirmation of an action."""

    title: str
    """With a question mark."""
    consequence: str | Markup
    """Consequence of the action."""
    button: str
    """Verb for the action."""
    details: Sequence[str] = ()
    """Affected objects."""
    dangerous: bool = False
    """True if it cannot be undone."""
    reason: str = ""
    """Label of a required text field that is sent as `reason`; empty: no such field."""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Form fields to set when the user confirms, name -> values.

    They identify the affected objects, which may be others at the time of the confirmation.
    """


@dataclass(frozen=True, slots=True)
class Action:
    """Action with a confirmation."""

    path: str
    ask: Callable[[Form, AppContext], Awaitable[Question]]
    """Makes the confirmation. Raises `NotPossibleError`."""
    do: Callable[[Form, Operator], Awaitable[str]]
    """Performs the action and returns a line about the result. Raises `NotPossibleError`."""
    per_vo: bool = False
    """It affects the principal's VO only. Other actions are for principals without a VO."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Pages of another distribution, returned by its entry point in the group `diracx.tasks_dashboard`.

    The entry point is a function without arguments.
    """

    pages: Sequence[Page] = ()
    actions: Sequence[Action] = ()
    templates: Path | None = None
    """Directory of its templates."""
    lifespan: Callable[[], AbstractAsyncContextManager[Any]] = field(default=nullcontext)
    """Context that opens the resources of its pages, before the first one."""
