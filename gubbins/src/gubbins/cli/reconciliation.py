"""The command `gubbins pilots reconcile`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from diracx.tasks.cli.options import JsonOption
from diracx.tasks.cli.output import echo, print_json, show
from diracx.tasks.cli.runtime.databases import open_database

from gubbins.db.registry import REGISTRY, REGISTRY_VARIABLE
from gubbins.domain.audit_actions import AuditAction
from gubbins.logic import my_pilots as logic

from . import tables
from .session import audited, progress_printer, with_database

_NO_REGISTRY = (
    f"no pilot registry is configured: set {REGISTRY_VARIABLE} to the URL of DiracX's {REGISTRY}, as in "
    "mysql+aiomysql://db.example.org/PilotAgentsDB"
)


def reconcile_pilots(
    vo: Annotated[str | None, typer.Option("--vo", help="Only this VO's.")] = None,
    apply: Annotated[bool, typer.Option("--apply", "--fix", help="Correct the registry.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare all pilots with the pilot registry of DiracX.

    --apply corrects the registry, which is the database of DIRACX_DB_URL_PILOTAGENTSDB. Checks write changes to
    it; this command finds other differences, as after a backup was restored. Active pilots at our compute elements
    that only the registry has are listed and not changed.

    Exit code 1: there are differences, or some are left after --apply.
    """

    async def reconcile(db: Any) -> logic.Reconciliation:
        async with open_database(REGISTRY, _NO_REGISTRY) as registry:
            progress = progress_printer("pilots compared")
            return await logic.reconcile_registry(db, registry, vo, apply=apply, progress=progress)

    if apply:
        done = audited(
            AuditAction.RECONCILE_PILOTS,
            vo or "all VOs",
            reconcile,
            lambda done: f"{done.mended} corrected, {done.remaining} differences left",
        )
    else:
        done = with_database(reconcile)
    if as_json:
        print_json(done.as_dict())
    else:
        if done.differences:
            show(tables.DIFFERENCES, done.differences, as_json=False)
        echo(
            f"{done.compared} pilots compared: {done.missing} are not in the registry, {done.different} have "
            f"another status there, {done.unknown} are only in the registry; {done.mended} were corrected"
        )
    if done.remaining:
        raise typer.Exit(1)
