"""Classes that may be derived from `PeriodicVoAwareBaseTask`, and their arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic.dataclasses
import pytest
from diracx.tasks.plumbing.base_task import PeriodicVoAwareBaseTask
from diracx.tasks.plumbing.messages.arguments import rebuild
from diracx.tasks.plumbing.messages.codec import dumps, loads
from pydantic import BaseModel


class Plain(PeriodicVoAwareBaseTask):
    pass


@dataclass
class More(PeriodicVoAwareBaseTask):
    path: Path | None = None


class Model(PeriodicVoAwareBaseTask, BaseModel):
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Frozen(PeriodicVoAwareBaseTask):  # type: ignore[misc]
    path: Path | None = None


@pydantic.dataclasses.dataclass(frozen=True)
class FrozenWithChecks(PeriodicVoAwareBaseTask):  # type: ignore[misc]
    path: Path | None = None


@dataclass
class OwnOrder(PeriodicVoAwareBaseTask):
    name: str  # type: ignore[misc]
    vo: str = "none"


@dataclass
class Derived(OwnOrder):  # type: ignore[misc]
    number: int = 0


class ModelWithDefault(PeriodicVoAwareBaseTask, BaseModel):
    vo: str = "none"


class DerivedModel(ModelWithDefault):
    number: int = 0


PATH = Path("a")


@pytest.mark.parametrize(
    ("task", "args"),
    [
        (Plain("lhcb"), ("lhcb",)),
        (More("lhcb", PATH), ("lhcb", PATH)),
        (Model(vo="lhcb", path=PATH), ("lhcb", PATH)),
        (Frozen("lhcb", PATH), ("lhcb", PATH)),
        (FrozenWithChecks("lhcb", PATH), ("lhcb", PATH)),
        (OwnOrder("x", "lhcb"), ("x", "lhcb")),
        (OwnOrder(name="x"), ("x", "none")),
        (Derived("x", "lhcb", 1), ("x", "lhcb", 1)),
        (DerivedModel(vo="lhcb"), ("lhcb", 0)),
        (DerivedModel(), ("none", 0)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_P50_periodic_vo_aware_tasks_round_trip(task: PeriodicVoAwareBaseTask, args: tuple[object, ...]) -> None:
    assert task.serialize() == args
    back = rebuild(type(task), loads(dumps(args)), {})
    assert back.serialize() == args
    assert back.execution_locks[0].redis_key == f"lock:mutex:task:{type(task).__name__}:{task.vo}"
