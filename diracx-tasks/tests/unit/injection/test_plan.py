"""Injection plans of signatures: found at registration, or refused by name."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated

import pytest
from diracx.db.sql import JobDB
from diracx.tasks.plumbing.base_task import BaseTask
from diracx.tasks.plumbing.depends import auto_inject
from diracx.tasks.plumbing.injection.plan import Kind, compile_plan, resolve
from diracx.tasks.plumbing.worker.task_spec import check_execute
from fastapi import Depends, Request
from support.library import LibraryDB, run

# --- compiling --------------------------------------------------------------------------------------------


class Options:
    def __init__(self, name: str = "default") -> None:
        self.name = name


class SomeTask:
    async def execute(self, limit: int) -> None: ...

    async def relaxed(self, limit: int = 3, *args: int, **kwargs: "NotImported") -> "Missing": ...  # noqa: F821

    async def unresolvable(self, db: "NotImported") -> None: ...  # noqa: F821


def test_a_parameter_that_cannot_be_injected_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"SomeTask\.execute: parameter 'limit' \(int\)"):
        compile_plan(SomeTask.execute, skip_first=True)


def wants_request(request: Request) -> Request:
    return request


def test_dependency_that_needs_a_request_is_refused_by_name() -> None:
    async def execute(request: Annotated[Request, Depends(wants_request)]) -> None: ...

    with pytest.raises(TypeError, match=r"execute → wants_request: parameter 'request'"):
        compile_plan(execute)


def test_defaults_and_kwargs_are_allowed() -> None:
    assert compile_plan(SomeTask.relaxed, skip_first=True).dependencies == []


def test_annotation_that_cannot_be_resolved_is_named() -> None:
    with pytest.raises(NameError, match=r"SomeTask\.unresolvable: .*'NotImported' of parameter 'db'"):
        compile_plan(SomeTask.unresolvable, skip_first=True)


def test_a_constructor_from_another_module_is_resolved_there() -> None:
    base = ModuleType("base")
    vars(base).update(Elsewhere=Annotated[Options, Depends(Options)])
    exec("class Base:\n    def __init__(self, options: 'Elsewhere'): self.options = options", vars(base))

    class Derived(base.Base):  # type: ignore[misc, name-defined]  # made by `exec`
        pass

    assert [dependency.call for dependency in compile_plan(Derived).dependencies] == [Options]


def test_injected_positional_only_parameter_is_refused() -> None:
    def execute(db: LibraryDB, /) -> None: ...

    with pytest.raises(TypeError, match="positional-only"):
        compile_plan(execute)


def loops(value: Annotated[int, Depends(lambda: 1)]) -> int:
    return value


loops.__annotations__["value"] = Annotated[int, Depends(loops)]


def test_a_dependency_on_itself_is_refused() -> None:
    with pytest.raises(TypeError, match="needs itself"):
        compile_plan(loops)


def test_plan_recognises_kinds_of_decorated_functions() -> None:
    @contextmanager
    def manager() -> Iterator[None]:
        yield

    @auto_inject
    async def coroutine() -> None: ...

    assert compile_plan(manager).kind is Kind.GENERATOR
    assert compile_plan(coroutine).kind is Kind.ASYNC
    assert compile_plan(_async_generator).kind is Kind.GENERATOR
    assert compile_plan(Options).kind is Kind.PLAIN


async def _async_generator() -> AsyncIterator[None]:
    yield


def test_a_dependency_without_a_hash_is_refused_by_name() -> None:
    @dataclass
    class Checker:
        limit: int

        def __call__(self) -> int:
            return self.limit

    async def execute(limit: Annotated[int, Depends(Checker(3))]) -> None: ...

    with pytest.raises(TypeError, match=r"execute → .*Checker.*: this dependency has no hash"):
        compile_plan(execute)


# --- resolving --------------------------------------------------------------------------------------------


async def test_a_dependency_used_twice_is_resolved_once_by_default() -> None:
    calls: list[int] = []

    def counted() -> int:
        calls.append(1)
        return len(calls)

    def nested(value: Annotated[int, Depends(counted)]) -> int:
        return value

    async def execute(
        a: Annotated[int, Depends(counted)],
        b: Annotated[int, Depends(nested)],
        c: Annotated[int, Depends(counted, use_cache=False)],
        d: int = Depends(counted),
    ) -> tuple[int, ...]:
        return a, b, c, d

    assert await run(execute, {}) == (1, 1, 2, 1)
    assert await run(execute, {}) == (3, 3, 4, 3)  # nothing is kept from one execution to the next


async def test_decorators_may_make_a_dependency_async_or_await_it() -> None:
    def in_thread(func: Callable[[], int]) -> Callable[[], Awaitable[int]]:
        @functools.wraps(func)
        async def call() -> int:
            return await asyncio.to_thread(func)

        return call

    def first_of(func: Callable[[], AsyncIterator[int]]) -> Callable[[], Awaitable[int]]:
        @functools.wraps(func)
        async def call() -> int:
            return await anext(func())

        return call

    def already(func: Callable[[], Awaitable[int]]) -> Callable[[], int]:
        @functools.wraps(func)
        def call() -> int:
            return 3

        return call

    @in_thread
    def blocking() -> int:
        return 1

    @first_of
    async def many() -> AsyncIterator[int]:
        yield 2

    @already
    async def known() -> int:
        raise AssertionError("not called")

    async def execute(
        a: Annotated[int, Depends(blocking)], b: Annotated[int, Depends(many)], c: Annotated[int, Depends(known)]
    ) -> tuple[int, ...]:
        return a, b, c

    assert await run(execute, {}) == (1, 2, 3)


async def test_execute_may_be_a_function_that_a_decorator_makes_async() -> None:
    def in_thread(func: Callable[..., int]) -> Callable[..., Awaitable[int]]:
        @functools.wraps(func)
        async def call(*args: int, **kwargs: int) -> int:
            return await asyncio.to_thread(func, *args, **kwargs)

        return call

    class Blocking(BaseTask):
        @in_thread
        def execute(self, limit: Annotated[int, Depends(lambda: 3)]) -> int:
            return limit

    check_execute(Blocking)
    plan = compile_plan(Blocking.execute, skip_first=True)
    async with AsyncExitStack() as stack:
        assert await Blocking().execute(**await resolve(plan, {}, stack)) == 3


async def test_override_has_dependencies_of_its_own() -> None:
    def original() -> str:
        raise AssertionError("overridden")

    def name() -> str:
        return "override"

    async def override(name: Annotated[str, Depends(name)]) -> str:
        return f"the {name}"

    async def execute(value: Annotated[str, Depends(original)]) -> str:
        return value

    assert await run(execute, {original: override}) == "the override"


async def test_depends_without_an_argument_uses_the_annotated_type() -> None:
    async def execute(options: Annotated[Options, Depends()]) -> str:
        return options.name

    assert await run(execute, {}) == "default"


async def test_plan_without_dependencies_needs_neither_stack_nor_overrides() -> None:
    async def execute() -> None: ...

    assert await resolve(compile_plan(execute), None, None) == {}  # type: ignore[arg-type]


async def test_missing_sentinel_is_named_at_run_time() -> None:
    async def execute(db: JobDB) -> None: ...

    with pytest.raises(RuntimeError, match=r"JobDB\.transaction is not available"):
        await run(execute, {})
