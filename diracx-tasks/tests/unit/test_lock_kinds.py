"""Every list of the kinds of lock has the same kinds."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import get_args

import pytest
from diracx.tasks import operations
from diracx.tasks.plumbing import BaseLimiter, BaseLock
from diracx.tasks.plumbing.broker.requests import LOCK_KINDS
from support.paths import ROOT

LUA = {
    file.name: file.read_text()
    for file in (files("diracx.tasks.plumbing.broker") / "lua").iterdir()
    if file.name.endswith(".lua")
}
TABLES = dict(re.findall(r"^kinds\.(\S+) = {\n(.*?)^}", LUA["_kinds.lua"], re.MULTILINE | re.DOTALL))


def classes_by_kind(cls: type[BaseLock]) -> dict[str, type[BaseLock]]:
    own = {cls._kind: cls} if cls.__module__.startswith("diracx.tasks.") and cls._kind else {}
    for each in cls.__subclasses__():
        own |= classes_by_kind(each)
    return own


def fields_of(table: str) -> set[str]:
    return set(re.findall(r"^  (\w+) = ", table, re.MULTILINE))


def test_each_kind_of_lock_has_a_class_a_table_of_functions_and_an_inspector_and_is_a_value_of_the_api() -> None:
    assert set(LOCK_KINDS) == set(classes_by_kind(BaseLock)) == set(TABLES) == set(get_args(operations.LockKind))
    assert set(LOCK_KINDS) == set(re.findall(r"\binspectors\.(\w+)(?:\(lock\)| =)", LUA["inspect.lua"]))


@pytest.mark.parametrize("kind", LOCK_KINDS)
def test_a_kind_of_lock_has_all_functions_and_the_same_properties_for_scripts_and_python(kind: str) -> None:
    fields = fields_of(TABLES[kind])
    assert not {"take", "keep", "release", "room", "free_in"} - fields
    assert ("limiter" in fields, "quota" in fields) == (LOCK_KINDS[kind].is_limiter, LOCK_KINDS[kind].is_quota)
    assert issubclass(classes_by_kind(BaseLock)[kind], BaseLimiter) == LOCK_KINDS[kind].is_limiter


def test_the_keys_of_all_kinds_of_lock_are_documented() -> None:
    page = (ROOT / "docs/explanation/redis-keys.md").read_text()
    assert [kind.prefix for kind in LOCK_KINDS.values() if f"`{kind.prefix}:{{obj}}" not in page] == []


def test_properties_of_lock_kinds_in_scripts_are_documented() -> None:
    documented = set(re.findall(r"^--   (\w+)[ (]", LUA["_kinds.lua"], re.MULTILINE)) | {"unreserve"}
    assert set().union(*map(fields_of, TABLES.values())) <= documented


def test_names_of_lock_kinds_contain_no_separator_of_redis_keys() -> None:
    assert not [kind for kind in LOCK_KINDS if set(kind) & set(": '\\")]


def test_scripts_and_python_treat_kinds_by_their_properties_and_not_by_their_names() -> None:
    literal = re.compile(rf"""kind"?\]? *([=~!]=|in) *\(?["']({"|".join(LOCK_KINDS)})["']""")
    python = {str(path): path.read_text() for path in (ROOT / "diracx-tasks/src").rglob("*.py")}
    pages = {str(path): path.read_text() for path in (ROOT / "diracx-tasks/src").rglob("*.html")}
    assert [name for name, source in (LUA | python | pages).items() if literal.search(source)] == []


def test_no_script_assumes_that_lock_kinds_are_alphabetic() -> None:
    assert [
        name
        for name in ("_locks.lua", "_wake.lua", "start.lua", "lines.lua", "renew.lua", "reclaim.lua")
        if "%a+" in LUA[name]
    ] == []
