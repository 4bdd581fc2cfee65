"""Annotations for dependency injection in FastAPI routes and tasks; see `injection.signatures`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .injection.placeholders import is_async
from .injection.signatures import NoTransaction, auto_inject_depends, resolved_signature
from .lazy import lazy_names

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

    Coroutine functions are wrapped, so that ``schedule()`` finds a broker in every DiracX route; the wrapper
    shares its attributes with `func`. Other functions are returned unchanged.

    Raises:
        NameError: an annotation cannot be resolved at run time.
    """
    signature = resolved_signature(func)
    injected = signature.replace(parameters=auto_inject_depends(list(signature.parameters.values())))
    target: Any = func
    if is_async(func):
        target = _with_bound_broker(func)
    elif inspect.ismethod(func):
        # A method takes no attributes. Its kind (generator or not) is found through __wrapped__.
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
        # `@open_access`, above `@router.get(...)`, marks the original function after the wrapper was registered as
        # the endpoint. With a shared `__dict__` the endpoint has the mark, too. `__wrapped__` is then shared as
        # well, and must be a copy of `func`, which else would wrap itself.
        if "__wrapped__" not in func.__dict__:
            copy = FunctionType(
                func.__code__, func.__globals__, func.__name__, func.__defaults__, func.__closure__
            )
            copy.__kwdefaults__ = func.__kwdefaults__
            func.__dict__["__wrapped__"] = copy
        with_bound_broker.__dict__ = func.__dict__
    return with_bound_broker
