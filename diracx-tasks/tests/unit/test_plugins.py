"""Plug-ins that cannot be imported: lock types, dashboard pages, metrics and health checks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from diracx.tasks.operations.collectors import open_collectors
from diracx.tasks.operations.health.runner import health_checks
from diracx.tasks.plumbing.lock_registry import validate_registry
from diracx.tasks.web.dashboard.app import installed_extensions
from redis.asyncio import Redis
from support.distributions import install_distribution

MODULES = {
    "raises": "raise ValueError('too old')",
    "exits": "import sys\nsys.exit('too old')",
    "panics": "class Panic(BaseException): ...\nraise Panic('too old')",
}


@pytest.fixture(params=MODULES)
def plugin(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of an installed distribution, all of whose plug-ins fail when they are imported."""
    module = f"diracx.{request.param}"
    groups = ("lock_object_types", "tasks_dashboard", "tasks_metrics", "tasks_health")
    install_distribution(
        tmp_path, module, MODULES[request.param], {f"diracx.{group}": "Broken = It" for group in groups}
    )
    monkeypatch.syspath_prepend(tmp_path)
    return module


def test_a_plugin_of_lock_types_that_fails_is_named(plugin: str) -> None:
    with pytest.raises(RuntimeError, match=rf"lock object types 'Broken' \({plugin}:It\) .*too old"):
        validate_registry()


async def test_a_plugin_of_an_operator_that_fails_is_named_and_others_are_used(
    plugin: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        others = installed_extensions()
        async with open_collectors(None):
            pass
    assert f"the pages '{plugin}:It' of the dashboard cannot be loaded" in caplog.text
    assert "no metrics of Broken" in caplog.text
    assert [page.name for extension in others for page in extension.pages]  # of gubbins
    async with Redis(port=1) as nowhere, health_checks(nowhere, None) as checks:
        alerts = {alert.subject: alert.summary for alert in (await checks.run()).alerts}
    assert "too old" in alerts["Broken"]
