"""Dependencies by type, in signatures and in real DiracX routes."""

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from diracx.core.config import ConfigSource
from diracx.core.properties import SecurityProperty
from diracx.core.settings import AuthSettings, ServiceSettingsBase
from diracx.db.os import JobParametersDB
from diracx.db.sql import JobDB
from diracx.logic.rss.source import SiteStatusSource
from diracx.tasks import depends as public
from diracx.tasks.plumbing import depends
from diracx.tasks.plumbing.base_task import current_broker
from diracx.tasks.plumbing.callbacks import callback_spawner
from diracx.tasks.plumbing.depends import (
    AvailableSecurityProperties,
    CallbackSpawner,
    Config,
    NoTransaction,
    auto_inject,
    auto_inject_depends,
)
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient


def other() -> None: ...


def depends_of(func: Callable[..., Any]) -> dict[str, Any]:
    """Name → (dependency, scope) of each injected parameter."""
    found = {}
    for name, param in inspect.signature(func).parameters.items():
        for item in getattr(param.annotation, "__metadata__", ()):
            if isinstance(item, type(Depends())):
                found[name] = (item.dependency, item.scope)
    return found


# --- signatures -------------------------------------------------------------------------------------------


def test_type_decides_the_dependency() -> None:
    def func(
        db: JobDB,
        bare: Annotated[JobDB, NoTransaction()],
        parameters: JobParametersDB,
        settings: AuthSettings,
        sites: SiteStatusSource,
        config: Config,
        properties: AvailableSecurityProperties,
        spawn: CallbackSpawner,
        documented: Annotated[JobDB, "what for"],
        defaulted: JobDB = None,  # type: ignore[assignment]
        number: int = 3,
        *args: JobDB,
        **kwargs: JobDB,
    ) -> None: ...

    assert auto_inject(func) is func
    assert depends_of(func) == {
        "db": (JobDB.transaction, "function"),
        "bare": (JobDB.no_transaction, "function"),
        "parameters": (JobParametersDB.session, "function"),
        "settings": (AuthSettings.create, None),
        "sites": (SiteStatusSource.create, None),
        "config": (ConfigSource.create, None),
        "properties": (SecurityProperty.available_properties, None),
        "spawn": (callback_spawner, None),
        "documented": (JobDB.transaction, "function"),
        "defaulted": (JobDB.transaction, "function"),
    }
    parameters = inspect.signature(func).parameters
    assert list(parameters) == list(inspect.signature(func).parameters)
    assert parameters["number"].annotation is int
    assert get_args(parameters["documented"].annotation)[1] == "what for"
    assert len(get_args(parameters["bare"].annotation)) == 2  # the marker has done its work


def test_an_explicit_depends_overrides_the_type() -> None:
    def func(a: Annotated[JobDB, Depends(other)], b: JobDB = Depends(other)) -> None: ...  # noqa: B008

    params = list(inspect.signature(func).parameters.values())
    assert auto_inject_depends(params) == params


def test_no_transaction_is_refused_where_there_are_no_transactions() -> None:
    param = Parameter("db", Parameter.KEYWORD_ONLY, annotation=Annotated[JobParametersDB, NoTransaction()])
    with pytest.raises(TypeError, match="'db': JobParametersDB has no transactions"):
        auto_inject_depends([param])


def test_string_annotations_are_resolved() -> None:
    async def func(db: "JobDB", x: "int" = 1) -> "JobDB": ...

    signature = inspect.signature(auto_inject(func))
    assert signature.parameters["x"].annotation is int
    assert signature.return_annotation is JobDB
    assert depends_of(auto_inject(func)) == {"db": (JobDB.transaction, "function")}


def test_annotation_that_cannot_be_resolved_is_named() -> None:
    def func(db: "OnlyForTypeChecking") -> None: ...  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(NameError, match="'OnlyForTypeChecking' of parameter 'db'"):
        auto_inject(func)


class Endpoints:
    async def coroutine(self, db: JobDB) -> "Endpoints":
        return self

    def plain(self, db: JobDB) -> "Endpoints":
        return self

    async def __call__(self, db: JobDB) -> "Endpoints":
        return self


async def test_methods_callable_objects_and_partials_can_be_injected() -> None:
    endpoints = Endpoints()
    for call in (
        endpoints.coroutine,
        endpoints.plain,
        endpoints,
        functools.partial(Endpoints.coroutine, endpoints),
    ):
        injected: Any = auto_inject(call)
        assert depends_of(injected) == {"db": (JobDB.transaction, "function")}
        result = injected(db=None)
        assert (await result if inspect.isawaitable(result) else result) is endpoints
    assert depends_of(auto_inject(Endpoints.coroutine)).keys() == {"db"}


def test_generators_and_sync_functions_come_back_themselves() -> None:
    def plain() -> None: ...
    def generator() -> Iterator[None]:
        yield

    async def async_generator() -> AsyncIterator[None]:
        yield

    for func in (plain, generator, async_generator):
        assert auto_inject(func) is func


def test_coroutine_functions_are_wrapped_transparently() -> None:
    @auto_inject
    async def func(db: JobDB) -> None:
        """Docstring of the function."""

    assert inspect.iscoroutinefunction(func)
    assert (func.__name__, func.__doc__, func.__module__) == ("func", "Docstring of the function.", __name__)
    assert "Docstring of the function." in inspect.getsource(func)
    assert inspect.unwrap(func) is not func
    assert depends_of(auto_inject(func)) == depends_of(func)


def test_public_module_offers_the_same_names() -> None:
    for name in public.__all__:
        assert getattr(public, name) is getattr(depends, name)
    assert {"CallbackSpawner", "NoTransaction", "Config", "auto_inject", "auto_inject_depends"} < set(
        public.__all__
    )


# --- P51: a broker in every route -------------------------------------------------------------------------


async def test_P51_wrapped_function_has_a_broker_and_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", "redis://localhost:1")

    @auto_inject
    async def func() -> Any:
        return current_broker()

    assert type(await func()).__name__ == "RedisStreamBroker"
    with pytest.raises(RuntimeError):
        current_broker()


async def test_P51_an_async_decorator_of_a_function_has_a_broker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", "redis://localhost:1")

    def plain() -> Any:
        return current_broker()

    @auto_inject
    @functools.wraps(plain)
    async def decorated() -> Any:
        return plain()

    assert type(await decorated()).__name__ == "RedisStreamBroker"


async def test_P51_without_a_broker_url_a_route_that_schedules_nothing_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("DIRACX_TASKS_REDIS_URL", raising=False)

    @auto_inject
    async def func() -> str:
        return "fine"

    assert await func() == "fine"


def test_P51_routes_sync_or_async_marked_or_not_keep_working(monkeypatch: pytest.MonkeyPatch) -> None:
    from diracx.routers.access_policies import open_access
    from diracx.routers.fastapi_classes import DiracxRouter

    monkeypatch.setenv("DIRACX_TASKS_REDIS_URL", "redis://localhost:1")
    router = DiracxRouter(require_auth=False)

    @open_access
    @router.get("/marked-above")
    async def marked_above(number: int = 1) -> dict[str, str]:
        return {"broker": type(current_broker()).__name__}

    @router.get("/marked-below")
    @open_access
    async def marked_below() -> dict[str, str]:
        return {"broker": type(current_broker()).__name__}

    @router.post("/stacked-post")
    @router.get("/stacked-get")
    async def stacked(spawn: CallbackSpawner) -> dict[str, str]:
        return {"broker": type(current_broker()).__name__}

    @router.get("/sync")
    def sync() -> dict[str, str]:
        return {"broker": "none"}

    @router.get("/closed")
    async def closed() -> dict[str, str]:
        return {"broker": "none"}

    marks = {route.path: getattr(route.endpoint, "diracx_open_access", False) for route in router.routes}
    assert marks == {
        "/marked-above": True,
        "/marked-below": True,
        "/stacked-post": False,
        "/stacked-get": False,
        "/sync": False,
        "/closed": False,
    }
    app = FastAPI()
    app.include_router(router, tags=["test"])
    client = TestClient(app)
    for path in ("/marked-above", "/marked-below", "/stacked-get"):
        assert client.get(path).json() == {"broker": "RedisStreamBroker"}
    assert client.post("/stacked-post").json() == {"broker": "RedisStreamBroker"}
    assert client.get("/sync").json() == {"broker": "none"}
    schema = app.openapi()["paths"]["/marked-above"]["get"]
    assert [param["name"] for param in schema["parameters"]] == ["number"]
    assert schema["operationId"].startswith("marked_above")


async def test_route_commits_and_rolls_back_through_our_overrides(tmp_path: Path) -> None:
    """The overrides made for workers also serve a FastAPI application."""
    from diracx.routers.fastapi_classes import DiracxRouter
    from diracx.tasks.plumbing.injection.providers import sql_overrides
    from httpx import ASGITransport, AsyncClient
    from sqlalchemy import text

    router = DiracxRouter(require_auth=False)

    @router.post("/add/{number}")
    async def add(number: int, db: JobDB) -> int:
        await db.conn.execute(text("INSERT INTO numbers VALUES (:n)"), {"n": number})
        if number < 0:
            raise ValueError(number)
        return (await db.conn.execute(text("SELECT count(*) FROM numbers"))).scalar_one()  # type: ignore[no-any-return]

    db = JobDB(f"sqlite+aiosqlite:///{tmp_path}/jobs.db")
    app = FastAPI()
    app.include_router(router, tags=["test"])
    async with db.engine_context():
        async with db:
            await db.conn.execute(text("CREATE TABLE numbers (n INTEGER)"))
        app.dependency_overrides = sql_overrides(db)
        transport = ASGITransport(app, raise_app_exceptions=False)
        async with AsyncClient(transport=transport, base_url="http://test") as client:
            responses = [await client.post(f"/add/{number}") for number in (1, -1, 2)]
    assert [response.status_code for response in responses] == [200, 500, 200]
    assert [responses[0].json(), responses[2].json()] == [1, 2]


def test_real_application_is_built_with_ours() -> None:
    """The routers of DiracX register their routes through `auto_inject` when they are imported."""
    from diracx.core.extensions import DiracEntryPoint, select_from_extension
    from diracx.routers import factory

    class NoConfig:
        async def read_non_blocking(self) -> None: ...

    def build(system: str) -> Any:
        entry = next(iter(select_from_extension(group=DiracEntryPoint.SERVICES, name=system)))
        wanted = set(factory.find_dependents(entry.load(), ServiceSettingsBase))
        return factory.create_app_inner(
            enabled_systems={system},
            all_service_settings=[cls.model_construct() for cls in wanted],
            database_urls={"PilotAgentsDB": "sqlite+aiosqlite:///:memory:"},
            os_database_conn_kwargs={},
            config_source=NoConfig(),  # type: ignore[arg-type]
            all_access_policies={},
        )

    schema = build("pilots").openapi()
    names = {
        param["name"]
        for item in schema["paths"].values()
        for operation in item.values()
        for param in operation.get("parameters", [])
    }
    assert schema["paths"]
    assert not names & {"pilot_db", "db", "config", "settings", "check_permissions"}
