"""Compute elements: define, open, close, ban, list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gubbins.ces.registry import load_backend, validate_all_settings
from gubbins.db.sql import MyPilotDB
from gubbins.db.sql.schema import MAX_REASON_CHARS
from gubbins.domain.exceptions import CESettingsError, UnknownCEError
from gubbins.domain.rules import CERules, rules_error, rules_of
from gubbins.domain.text import one_line

from .ce_file import CESpec
from .circuits import missing_pilots, quota_limit


async def get_available_ces(db: MyPilotDB, vo: str) -> list[dict[str, Any]]:
    """The enabled compute elements that serve the VO and have a free slot.

    Each has `name`, `capacity`, `success_rate`, `available_slots` (> 0) and `vos`.
    """
    return await db.get_available_ces(vo)


async def list_ces(db: MyPilotDB, vo: str | None = None) -> list[dict[str, Any]]:
    """Every compute element that serves the VO (None: every one) with its `active` and `available_slots`.

    All of it, for administrators; `as_seen_by` leaves out what members of a VO may not see.
    """
    return [_with_trouble(ce) for ce in await db.list_ces(vo=vo)]


async def get_ce(db: MyPilotDB, name: str, vo: str | None = None) -> dict[str, Any]:
    """One compute element with its `active`, its `available_slots` and all its rules.

    And with `reports`: how many of its pilots are `stale`, and how many reported each outcome. For administrators
    also with `waiting`: the number of its pilots by what they wait for.

    Args:
        db: the database.
        name: which.
        vo: for members of this VO, see `as_seen_by`; None: for administrators.

    Raises:
        UnknownCEError: there is none of that name, or none that serves the VO.
    """
    ce = next((ce for ce in await db.list_ces(vo=vo) if ce["name"] == name), None)
    if ce is None:
        raise UnknownCEError(name)
    rules = rules_of(ce) if vo is None else rules_of(ce).of(vo)
    left_out = None if vo is None else {"vos"}
    waiting = {} if vo is not None else {"waiting": (await db.count_waiting_reasons([name]))[name]}
    reports: Counter[str] = Counter()
    for by_ce in (await db.count_reports(vo)).values():
        reports.update(by_ce.get(name, {}))
    return {
        **as_seen_by(vo, _with_trouble(ce)),
        **waiting,
        "reports": dict(reports),
        "rules": rules.model_dump(mode="json", exclude=left_out),
    }


async def add_ce(db: MyPilotDB, spec: CESpec, *, by_operator: bool) -> dict[str, Any]:
    """Create one compute element and return it.

    Args:
        db: the database.
        spec: what it is.
        by_operator: whether the request comes from an operator, who may run commands on the workers' hosts.

    Raises:
        CEExistsError: the name is taken.
        CESettingsError: unknown back end, or settings it does not understand, or one that only operators may
            use.
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
        await db.add_ce(
            spec.name,
            spec.capacity,
            spec.success_rate,
            spec.enabled is not False,
            backend=spec.backend,
            settings=spec.settings,
            vos=spec.vos,
            rules=_written(spec),
        )
        return await db.get_ce(spec.name)

    return await db.run(add)


async def load_ces(
    db: MyPilotDB, specs: Sequence[CESpec]
) -> dict[str, Literal["created", "updated", "unchanged"]]:
    """Make the compute elements be as specified: all of them or, on any error, none. Others are left alone."""

    async def load() -> dict[str, Literal["created", "updated", "unchanged"]]:
        return {
            spec.name: await db.set_ce(
                spec.name,
                capacity=spec.capacity,
                success_rate=spec.success_rate,
                enabled=spec.enabled,
                backend=spec.backend,
                settings=spec.settings,
                vos=spec.vos,
                rules=_written(spec),
            )
            # By name, as everybody locks them.
            for spec in sorted(specs, key=lambda spec: spec.name)
        }

    changes = await db.run(load)
    return {spec.name: changes[spec.name] for spec in specs}


async def set_ce_enabled(db: MyPilotDB, name: str, enabled: bool) -> bool:
    """Open or close a compute element for new pilots; True when that changed something.

    The pilots that a closed one has are followed to their ends. Either lifts a ban; opening it also ends the
    pause of one that failed too often.

    Raises:
        UnknownCEError: there is none of that name.
    """
    return await db.set_ce_enabled(name, enabled)


async def ban_ce(db: MyPilotDB, name: str, *, reason: str | None = None) -> bool:
    """Ban a compute element; True when it was not banned before.

    It gets no pilots, and those it has are not polled: they stay as they are, until it is opened or closed again.

    Raises:
        UnknownCEError: there is none of that name.
    """
    return await db.ban_ce(name, reason=None if reason is None else one_line(reason, MAX_REASON_CHARS) or None)


def as_seen_by(vo: str | None, ce: Mapping[str, Any]) -> dict[str, Any]:
    """A compute element as members of a VO that it serves may see it; `vo=None`: as administrators do.

    What the site said last may be about pilots of any VO, and rules and the list of VOs name others. A VO sees
    that there are failures, and since when; and the rules that hold for itself.
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


def _with_trouble(ce: Mapping[str, Any]) -> dict[str, Any]:
    """The compute element, with our own reason why it gets no pilots, if there is one, as its last error."""
    if (problem := rules_error(ce)) is None:
        quota = None if quota_limit(ce) is None else f"quota of the site: {ce['quota']}"
        return {**ce, "last_error": missing_pilots(ce, ce["active"]) or quota or ce["last_error"]}
    return {**ce, "last_error": f"its rules in the database are wrong ({problem}), `gubbins ce load` mends them"}


def _written(spec: CESpec) -> dict[str, Any]:
    return spec.rules.model_dump(mode="json", exclude_unset=True)
