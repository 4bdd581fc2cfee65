"""The command `gubbins pilots reconcile`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from diracx.tasks.cli.options import JsonOption
from diracx.tasks.cli.output import echo

from gubbins.domain.audit_actions import AuditAction
from gubbins.logic import my_pilots as logic

from .session import emit, in_database, in_registry, recorded, show_progress, table


def reconcile_pilots(
    vo: Annotated[str | None, typer.Option("--vo", help="Only this VO's.")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", "--fix", help="Write to the registry what it should have.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the pilots here with DiracX's pilot registry, and mend what differs with --apply.

    The registry is the database named in DIRACX_DB_URL_PILOTAGENTSDB. Checks write to it what is new, by
    themselves; this is for what they do not see, as after a backup of it was restored. Pilots that it has at our
    compute elements, that have not ended and that are unknown here are listed and left alone.

    Exit code 1: there are differences, or there are still some after --apply.
    """

    async def reconcile(db: Any) -> logic.Reconciliation:
        return await in_registry(
            lambda registry: logic.reconcile_registry(
                db, registry, vo, apply=apply, progress=show_progress("pilots compared")
            )
        )

    if apply:
        done = recorded(
            AuditAction.RECONCILE_PILOTS,
            vo or "all VOs",
            reconcile,
            lambda done: f"{done.mended} mended, {done.remaining} differences left",
        )
    else:
        done = in_database(reconcile)
    if as_json:
        emit(done.as_dict())
    else:
        _show_reconciliation(done)
    if done.remaining:
        raise typer.Exit(1)


def _show_reconciliation(done: logic.Reconciliation) -> None:
    if done.differences:
        table(
            "Differences",
            ("pilot", "VO", "CE", "status here", "in the registry", "its id there", "stamp"),
            [
                (
                    "-" if each.pilot_id is None else each.pilot_id,
                    each.vo,
                    each.ce_name,
                    each.status or "unknown",
                    each.registry_status or "missing",
                    "-" if each.registry_id is None else each.registry_id,
                    each.stamp,
                )
                for each in done.differences
            ],
        )
    echo(
        f"{done.compared} pilots compared: {done.missing} are not in the registry, {done.different} have another "
        f"status there, {done.unknown} of the registry are unknown here; {done.mended} were mended"
    )
