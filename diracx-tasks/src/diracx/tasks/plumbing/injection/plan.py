"""Dependencies of a task: compiled once per class into a `Plan`, resolved once per execution.

Parameters are declared as in a FastAPI route. Of FastAPI, only the public attributes of ``Depends`` are used: its
resolver is private and needs an HTTP request. In a worker, `setup_dependency_overrides` provides the values for
the DiracX sentinels (``JobDB.transaction``, ``AuthSettings.create``…).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum
from inspect import Parameter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .placeholders import Call, Overrides, innermost, is_async, name_of, sentinel_name
from .signatures import auto_inject_depends, is_depends, resolved_signature, split_annotated

if TYPE_CHECKING:
    from fastapi.params import Depends


class Kind(StrEnum):
    """Way in which the value of a dependency is obtained from its callable."""

    PLAIN = "plain"  # the value returned; called on the event loop, so it must not block
    ASYNC = "async"  # the value awaited
    GENERATOR = "generator"  # the value yielded; also a @contextmanager or @asynccontextmanager function


@dataclass(frozen=True, slots=True)
class Plan:
    """A callable and the plans of its injected parameters.

    `call` and `dependencies` have the names of FastAPI's ``Dependant``, for code that reads both classes.
    """

    call: Call
    kind: Kind
    parameters: tuple[tuple[str, Plan], ...] = ()
    """Name and plan of each injected parameter, in the order of the signature."""
    use_cache: bool = True
    """True if a value that this execution already has for `call` is reused."""
    sentinel: str | None = None
    """Name of the sentinel (``JobDB.transaction``) if `call` is one that needs an override."""
    optional: bool = False
    """True if the parameter has a default, which is used when the sentinel has no override."""

    @property
    def dependencies(self) -> list[Plan]:
        """Plans of the parameters."""
        return [plan for _, plan in self.parameters]


def compile_plan(func: Call, *, skip_first: bool = False) -> Plan:
    """Read the signature of `func`, and those of its dependencies, into a plan.

    Args:
        skip_first: leave out ``self`` of a method taken from its class.

    Raises:
        TypeError: a required parameter can neither be injected nor left out, or a dependency needs itself.
        NameError: an annotation cannot be resolved at run time.
    """
    return _compile(func, (), name_of(func), skip_first=skip_first)


def _compile(
    call: Call,
    parents: tuple[Call, ...],
    name: str,
    *,
    skip_first: bool = False,
    use_cache: bool = True,
    optional: bool = False,
) -> Plan:
    if call in parents:
        raise TypeError(f"{name}: this dependency needs itself")
    if not isinstance(call, Hashable):
        raise TypeError(f"{name}: this dependency has no hash; use @dataclass(frozen=True), or define __hash__")
    try:
        params = list(resolved_signature(call).parameters.values())[1 if skip_first else 0 :]
    except ValueError as error:  # some built-in types have no signature
        raise TypeError(f"{name}: its parameters cannot be inspected ({error})") from error
    children = []
    for param in auto_inject_depends(params):
        if (found := _dependency_of(param)) is not None:
            dependency, depends = found
            if param.kind is Parameter.POSITIONAL_ONLY:
                raise TypeError(
                    f"{name}: parameter {param.name!r} is injected by name and cannot be positional-only"
                )
            child_name = f"{name} → {name_of(dependency)}"
            child = _compile(
                dependency,
                (*parents, call),
                child_name,
                use_cache=depends.use_cache,
                optional=param.default is not Parameter.empty and not is_depends(param.default),
            )
            children.append((param.name, child))
        elif param.default is Parameter.empty and param.kind not in (
            Parameter.VAR_POSITIONAL,
            Parameter.VAR_KEYWORD,
        ):
            annotation = param.annotation
            text = "no annotation" if annotation is Parameter.empty else inspect.formatannotation(annotation)
            raise TypeError(
                f"{name}: parameter {param.name!r} ({text}) cannot be injected; give it a default, "
                "annotate it with a database, a settings class, Config or CallbackSpawner, "
                "or use Annotated[..., Depends(...)]"
            )
    return Plan(call, _kind_of(call), tuple(children), use_cache, sentinel_name(call), optional)


def _dependency_of(param: Parameter) -> tuple[Call, Depends] | None:
    bare, metadata = split_annotated(param.annotation)
    for item in (param.default, *reversed(metadata)):
        if is_depends(item):
            return item.dependency or bare, item  # Depends() without an argument means the annotated type
    return None


def _kind_of(call: Call) -> Kind:
    if is_async(call):
        return Kind.ASYNC
    inner = innermost(call)
    is_generator = inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner)
    return Kind.GENERATOR if is_generator else Kind.PLAIN


_compile_override = functools.lru_cache(maxsize=1024)(compile_plan)


async def resolve(plan: Plan, overrides: Overrides, stack: AsyncExitStack) -> dict[str, Any]:
    """Return the keyword arguments of ``plan.call``, resolved in the order of its signature.

    Contexts are entered on `stack`, in the calling asyncio task (the connection of a DiracX database is in a
    context variable). The owner of `stack` unwinds it, also when this raises. No dependency can swallow the
    exception with which `stack` is unwound.

    Raises:
        RuntimeError: a sentinel has no override (see `find_missing_overrides`).
        Exception: any error of a dependency.
    """
    if not plan.parameters:
        return {}
    return await _arguments(plan, overrides, stack, {})


async def _arguments(
    plan: Plan, overrides: Overrides, stack: AsyncExitStack, cache: dict[Call, Any]
) -> dict[str, Any]:
    return {
        name: await _value(child, overrides, stack, cache)
        for name, child in plan.parameters
        if not (child.optional and child.sentinel is not None and child.call not in overrides)
    }


async def _value(plan: Plan, overrides: Overrides, stack: AsyncExitStack, cache: dict[Call, Any]) -> Any:
    override = overrides.get(plan.call)
    if override is None and plan.sentinel is not None:
        raise RuntimeError(
            f"{plan.sentinel} is not available here; check its environment variables "
            "(DIRACX_DB_URL_…, DIRACX_OS_DB_…, DIRACX_CONFIG_BACKEND_URL, or those of the settings class)"
        )
    source = plan if override is None else _compile_override(override)
    # Cache by the override: a database class and its extension share one override, and one transaction.
    if plan.use_cache and source.call in cache:
        return cache[source.call]
    value = await _obtain(source, await _arguments(source, overrides, stack, cache), stack)
    cache.setdefault(source.call, value)
    return value


async def _obtain(plan: Plan, arguments: dict[str, Any], stack: AsyncExitStack) -> Any:
    produced = plan.call(**arguments)
    if plan.kind is Kind.PLAIN:
        return produced
    if plan.kind is Kind.ASYNC:  # a decorator may have awaited it
        return await produced if inspect.isawaitable(produced) else produced
    manager = produced
    if not isinstance(produced, AbstractContextManager | AbstractAsyncContextManager):
        make = contextlib.asynccontextmanager if hasattr(produced, "__anext__") else contextlib.contextmanager
        manager = make(lambda: produced)()
    awaited = isinstance(manager, AbstractAsyncContextManager)
    value = await manager.__aenter__() if awaited else manager.__enter__()
    stack.push_async_exit(functools.partial(_leave, manager))
    return value


async def _leave(
    manager: Any, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
) -> bool:
    if isinstance(manager, AbstractAsyncContextManager):
        await manager.__aexit__(exc_type, exc, tb)
    else:
        manager.__exit__(exc_type, exc, tb)
    # Never the manager's own result: an exception swallowed here would let the databases below it commit.
    return False
