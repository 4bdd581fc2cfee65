"""Compute elements: create, enable, ban, list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gubbins.ces.registry import load_backend, validate_all_settings
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain.exceptions import CESettingsError, UnknownCEError
from gubbins.domain.rules import CERules, rules_error, rules_of, serves
from gubbins.domain.text import one_line

from .ce_file import CESpec
from .circuits import missing_pilots, quota_limit

_INTERNAL = ("circuits_of", "polled")

get_available_ces = MyPilotDB.get_available_ces
set_ce_enabled = MyPilotDB.set_ce_enabled


async def list_ces(db: MyPilotDB, vo: str | None = None) -> list[dict[str, Any]]:
    """List compute elements (of one VO, or all) with their `active` pilots and `available_slots`.

    The result is for administrators; `redact_ce` removes what members of a VO may not see.
    """
    return [_with_last_error(ce) for ce in await db.list_ces(vo=vo)]


async def get_ce(db: MyPilotDB, name: str, vo: str | None = None) -> dict[str, Any]:
    """Get one compute element with `active`, `available_slots`, `rules` and `reports`.

    `reports` counts `stale` pilots and reported outcomes. Administrators also get `waiting`: pilots by waiting
    reason.

    Args:
        vo: VO of the user, see `redact_ce`; None: administrators.

    Raises:
        UnknownCEError: there is no such compute element, or it does not serve the VO.
    """
    ce = await db.get_ce(name, vo)
    if vo is not None and not serves(ce["vos"], vo):
        raise UnknownCEError(name)
    rules = rules_of(ce) if vo is None else rules_of(ce).of(vo)
    waiting = {} if vo is not None else {"waiting": (await db.count_waiting_reasons([name]))[name]}
    reports: Counter[str] = Counter()
    for by_ce in (await db.count_reports(vo)).values():
        reports.update(by_ce.get(name, {}))
    return {
        **redact_ce(vo, _with_last_error(ce)),
        **waiting,
        "reports": dict(reports),
        "rules": rules.model_dump(mode="json", exclude=None if vo is None else {"vos"}),
    }


async def add_ce(db: MyPilotDB, spec: CESpec, *, by_operator: bool) -> dict[str, Any]:
    """Create one compute element and return it.

    Args:
        by_operator: True if the caller may run commands on the workers' hosts.

    Raises:
        CEExistsError: the name is taken.
        CESettingsError: the back end is not installed, or for operators only, or the settings are invalid.
    """
    if load_backend(spec.backend).operator_only and not by_operator:
        raise CESettingsError(
            [
                (
                    "backend",
                    f"compute elements with back end {spec.backend!r} are created by the operator only "
                    "(`gubbins ce load`), for they run commands on the workers' hosts",
                )
            ]
        )
    validate_all_settings(spec.backend, spec.settings)

    async def add() -> dict[str, Any]:
        await db.add_ce(**_fields(spec) | {"enabled": spec.enabled is not False})
        return await db.get_ce(spec.name)

    return await db.run(add)


async def load_ces(
    db: MyPilotDB, specs: Sequence[CESpec]
) -> dict[str, Literal["created", "updated", "unchanged"]]:
    """Create or update the specified compute elements in one transaction. Others do not change."""

    async def load() -> dict[str, Literal["created", "updated", "unchanged"]]:
        return {
            spec.name: await db.set_ce(**_fields(spec))
            # Sorted: the order in which all transactions lock them.
            for spec in sorted(specs, key=lambda spec: spec.name)
        }

    changes = await db.run(load)
    return {spec.name: changes[spec.name] for spec in specs}


async def ban_ce(db: MyPilotDB, name: str, *, reason: str | None = None) -> bool:
    """Ban a compute element: no submissions and no polls until it is enabled or disabled. False: it was banned.

    Raises:
        UnknownCEError: there is no such compute element.
    """
    return await db.ban_ce(name, reason=None if reason is None else one_line(reason, MAX_REASON_CHARS) or None)


def redact_ce(vo: str | None, ce: Mapping[str, Any]) -> dict[str, Any]:
    """Remove what members of the VO may not see: other VOs, their rules, and messages of the site.

    `vo=None`: administrators see everything.
    """
    if vo is None:
        return dict(ce)
    rules = rules_of(ce).of(vo).model_dump(mode="json", exclude={"vos"})
    default = CERules().model_dump(mode="json")
    return {
        **ce,
        "vos": None if ce["vos"] is None else [vo],
        "last_error": None,
        "circuits": {call: {**circuit, "last_error": None} for call, circuit in ce["circuits"].items()},
        "rules": {rule: value for rule, value in rules.items() if value != default[rule]},
    }


def _with_last_error(ce: Mapping[str, Any]) -> dict[str, Any]:
    """Set the last error to invalid rules, missing pilots or the quota, if one of them stops submissions."""
    if (problem := rules_error(ce)) is None:
        quota = None if quota_limit(ce) is None else f"quota of the site: {ce['quota']}"
        error = missing_pilots(ce) or quota or ce["last_error"]
    else:
        error = f"its rules in the database are wrong ({problem}), `gubbins ce load` corrects them"
    return {key: value for key, value in ce.items() if key not in _INTERNAL} | {"last_error": error}


def _fields(spec: CESpec) -> dict[str, Any]:
    """Arguments of `MyPilotDB.set_ce`, which stores only explicit rules."""
    return {**dict(spec), "rules": spec.rules.model_dump(mode="json", exclude_unset=True)}
