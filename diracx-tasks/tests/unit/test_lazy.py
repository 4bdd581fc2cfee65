"""Lazy imports, and annotations with lazily imported names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from diracx.tasks.plumbing.injection.signatures import loads_at_first_use, resolved_signature

MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from diracx.tasks.plumbing.lazy import lazy_names

if TYPE_CHECKING:
    from {home} import Heavy
else:
    __getattr__ = lazy_names(__name__, {{"{home}": ["Heavy"], "not_there_at_all": ["Lost"]}})


def wants(a: int, b: Annotated[Heavy, "mark"], **kwargs: Nowhere) -> Heavy: ...
def light(a: int) -> None: ...
def wrong(a: Nowhere) -> None: ...
def lost(a: Lost) -> None: ...
"""


@pytest.fixture
def lazy_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module that names `Heavy`, of a module that is not imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lazy_heavy.py").write_text("class Heavy: ...\n")
    (tmp_path / "lazy_module.py").write_text(MODULE.format(home="lazy_heavy"))
    import lazy_module

    yield lazy_module
    for name in ("lazy_heavy", "lazy_module"):
        sys.modules.pop(name, None)


def parameters(func: Any) -> dict[str, Any]:
    return {name: found.annotation for name, found in resolved_signature(func).parameters.items()}


def test_a_lazy_name_is_imported_at_its_first_use(lazy_module: ModuleType) -> None:
    assert "lazy_heavy" not in sys.modules
    heavy = lazy_module.Heavy
    assert heavy is sys.modules["lazy_heavy"].Heavy
    assert vars(lazy_module)["Heavy"] is heavy


def test_a_name_that_is_not_declared_is_an_attribute_error_of_the_module(lazy_module: ModuleType) -> None:
    with pytest.raises(AttributeError, match="module 'lazy_module' has no attribute 'Nowhere'"):
        lazy_module.Nowhere  # noqa: B018


def test_annotations_find_lazy_names_and_builtins(lazy_module: ModuleType) -> None:
    assert loads_at_first_use(lazy_module.wants)
    found = parameters(lazy_module.wants)
    assert found["a"] is int
    assert found["b"].__origin__ is sys.modules["lazy_heavy"].Heavy
    assert found["kwargs"] == "Nowhere"
    assert not loads_at_first_use(lazy_module.light)


def test_the_name_of_an_imported_module_is_not_lazy(lazy_module: ModuleType) -> None:
    def light(a: int) -> None: ...

    assert lazy_module.Heavy
    assert not loads_at_first_use(lazy_module.light)
    assert not loads_at_first_use(light)


def test_an_annotation_that_cannot_be_resolved_is_named_with_its_parameter(lazy_module: ModuleType) -> None:
    with pytest.raises(NameError, match=r"wrong: the annotation 'Nowhere' of parameter 'a' cannot be resolved"):
        resolved_signature(lazy_module.wrong)
    with pytest.raises(NameError, match=r"'Lost' of parameter 'a' cannot be resolved .No module named 'not_there"):
        resolved_signature(lazy_module.lost)


@pytest.mark.parametrize("name", ["AvailableSecurityProperties", "CallbackSpawner", "Config"])
def test_injected_annotations_are_found_under_their_public_names(name: str) -> None:
    from diracx.tasks import depends as public
    from diracx.tasks.plumbing import depends

    assert getattr(depends, name) is getattr(public, name)
