"""Annotations that carry their dependency. `depends` and `child_results` import them when asked:
FastAPI and the schema of the DiracX configuration take a quarter of a second.
"""

from __future__ import annotations

from typing import Annotated, Any

from diracx.core.config import Config as _Config
from diracx.core.config import ConfigSource
from diracx.core.properties import SecurityProperty
from fastapi.params import Depends

from .broker.models import TaskResult
from .callbacks import SpawnCallback, callback_spawner
from .child_results import child_results

__all__ = ["AvailableSecurityProperties", "CallbackSpawner", "ChildResults", "Config"]

# `fastapi.params.Depends` is the class behind `fastapi.Depends`, with the same arguments and a type.
Config = Annotated[_Config, Depends(ConfigSource.create)]
AvailableSecurityProperties = Annotated[set[SecurityProperty], Depends(SecurityProperty.available_properties)]
CallbackSpawner = Annotated[SpawnCallback, Depends(callback_spawner)]
ChildResults = Annotated[dict[str, TaskResult[Any]], Depends(child_results)]
"""In the `execute` of a callback or an `on_failure`: task id -> result, for each child in their order.

    async def execute(self, results: ChildResults) -> int:
        return sum(result.return_value for result in results.values())

Results are kept only for callbacks that ask like this, until the callback has ended (retries included). A child
that failed has `is_err` and `error` set. Where a child returned what cannot be stored, its result is that error.
"""
