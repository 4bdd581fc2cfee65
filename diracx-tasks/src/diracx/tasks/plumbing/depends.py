"""Annotations for dependency injection in FastAPI routes and tasks.

How the types of parameters are understood is written in `injection.signatures`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ._util.lazy import lazy_names
from .injection.placeholders import innermost
from .injection.signatures import NoTransaction, auto_inject_depends, resolved_signature

if TYPE_CHECKING:
    from .annotated import AvailableSecurityProperties, CallbackSpawner, Config
else:
    __getattr__ = lazy_names(
        __name__, {".annotated": ["AvailableSecurityProperties", "CallbackSpawner", "Config"]}
    )

P = ParamSpec("P")
R = TypeVar("R")

__all__ = [
    "AvailableSecurityProperties",
    "CallbackSpawner",
    "Config",
    "NoTransaction",
    "auto_inject",
    "auto_inject_depends",
]


def auto_inject(func: Callable[P, R]) -> Callable[P, R]:
    """Give `func` a signature with resolved annotations and the dependencies of `auto_inject_depends`.

    A coroutine function comes back wrapped, so that ``schedule()`` finds a broker in every DiracX route; the
    wrapper shares its attributes with `func`. Anything else comes back itself.

    Raises:
        NameError: an annotation names something that does not exist at run time.
    """
    signature = resolved_signature(func)
    injected = signature.replace(parameters=auto_inject_depends(list(signature.parameters.values())))
    target: Any = func
    if inspect.iscoroutinefunction(innermost(func)):
        target = _with_bound_broker(func)
    elif inspect.ismethod(func):
        # Takes no attributes of its own. What it is (generator or not) is still seen through __wrapped__.
        target = functools.wraps(func)(functools.partial(func))
    target.__signature__ = injected
    result: Callable[P, R] = target
    return result


def _with_bound_broker(func: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(func)
    async def with_bound_broker(*args: Any, **kwargs: Any) -> Any:
        from .submission.client import bound_from_environment

        with bound_from_environment():
            return await func(*args, **kwargs)

    if isinstance(func, FunctionType):
        # `@open_access` stands above `@router.get(...)`, which hands back the original function: its mark is
        # set on that one, after the wrapper was registered as the endpoint. One dictionary for both makes
        # it visible on the endpoint. `__wrapped__` is then shared as well and must not be `func`, which
        # would wrap itself; an attribute-less twin takes that place.
        if "__wrapped__" not in func.__dict__:
            twin = FunctionType(
                func.__code__, func.__globals__, func.__name__, func.__defaults__, func.__closure__
            )
            twin.__kwdefaults__ = func.__kwdefaults__
            func.__dict__["__wrapped__"] = twin
        with_bound_broker.__dict__ = func.__dict__
    return with_bound_broker
