"""Annotations with dependencies, imported lazily: FastAPI and the schema of DiracX take a quarter of a second."""

from __future__ import annotations

from typing import Annotated, Any

from diracx.core.config import Config as _Config
from diracx.core.config import ConfigSource
from diracx.core.properties import SecurityProperty
from fastapi.params import Depends

from .broker.models import TaskResult
from .callbacks import SpawnCallback, callback_spawner, child_results

# `fastapi.params.Depends` is the class of the results of `fastapi.Depends`.
Config = Annotated[_Config, Depends(ConfigSource.create)]
AvailableSecurityProperties = Annotated[set[SecurityProperty], Depends(SecurityProperty.available_properties)]
CallbackSpawner = Annotated[SpawnCallback, Depends(callback_spawner)]
ChildResults = Annotated[dict[str, TaskResult[Any]], Depends(child_results)]
"""Results of the children of a group, in order, by task id; for `execute` of its callback or `on_failure`.

    async def execute(self, results: ChildResults) -> int:
        return sum(result.return_value for result in results.values())

Results are stored only if a callback has this parameter, until the callback has ended, including its retries.
Failed children have `is_err` and `error`; so have those whose return value cannot be stored.
"""
