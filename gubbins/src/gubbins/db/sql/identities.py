"""Identities of pilots: secrets, tokens, heartbeats and reported outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from diracx.tasks.plumbing.sql.session import transaction
from sqlalchemy import ColumnElement, Row, func, insert, literal, select, update

from gubbins.domain import clock
from gubbins.domain.pilot_states import MyPilotStatus, PilotOutcome

from .schema import MAX_HASHES_CHARS, ComputeElements, PilotIdentities, Pilots, columns_of, if_given
from .session import PilotSession

_HASH_CHARS = 64
_COLUMNS = (
    *columns_of(Pilots, "stamp", "vo", "ce_name", "status", "cancel_requested_at"),
    *columns_of(PilotIdentities, "pilot_id", "secret_hashes", "starts", "used_at", "family_hash", "refresh_hash"),
    *columns_of(PilotIdentities, "revoked_at"),
    ComputeElements.rules.label("rules"),
)


class IdentitiesMixin(PilotSession):
    """The table PilotIdentities."""

    @transaction
    async def add_secrets(self, hashes: Mapping[int, str]) -> None:
        """Store the secret hashes of new pilots, by id."""
        if hashes:
            these = await self._staged(list(hashes.items()))
            new = select(Pilots.id, Pilots.vo, Pilots.ce_name, these.c.reason, literal(0)).join(
                these, self._is_staged(these)
            )
            columns = ["pilot_id", "vo", "ce_name", "secret_hashes", "starts"]
            await self.conn.execute(insert(PilotIdentities).from_select(columns, new, include_defaults=False))

    @transaction
    async def add_retry_secret(self, pilot_id: int, hash: str) -> None:
        """Add the secret hash of a repeated submission, since any attempt may have reached the compute element."""
        added = await self.conn.execute(
            update(PilotIdentities)
            .where(
                PilotIdentities.pilot_id == pilot_id,
                func.length(PilotIdentities.secret_hashes) < MAX_HASHES_CHARS - _HASH_CHARS,
            )
            .values(secret_hashes=PilotIdentities.secret_hashes.concat(f" {hash}"))
        )
        known = select(PilotIdentities.pilot_id).where(PilotIdentities.pilot_id == pilot_id)
        if not added.rowcount and (await self.conn.execute(known)).one_or_none() is None:
            await self.add_secrets({pilot_id: hash})

    @transaction
    async def find_identity(self, stamp: str) -> Row[Any] | None:
        """Get a pilot with its identity and the rules of its compute element; None: it has no identity."""
        statement = (
            select(*_COLUMNS)
            .join(PilotIdentities, PilotIdentities.pilot_id == Pilots.id)
            .join(ComputeElements, ComputeElements.name == Pilots.ce_name)
            .where(Pilots.stamp == stamp)
        )
        return (await self.conn.execute(statement)).one_or_none()

    @transaction
    async def record_exchange(
        self, pilot_id: int, *, starts: int, family_hash: str, refresh_hash: str, address: str | None
    ) -> bool:
        """Record an exchange of the secret; False: a concurrent request was faster, or a token was used."""
        return await self._update_identity(
            pilot_id,
            PilotIdentities.starts == starts,
            PilotIdentities.used_at.is_(None),
            starts=starts + 1,
            family_hash=family_hash,
            refresh_hash=refresh_hash,
            exchanged_at=clock.now(),
            exchanged_from=address,
        )

    @transaction
    async def rotate_refresh_token(self, pilot_id: int, *, old_hash: str, new_hash: str) -> bool:
        """Replace the refresh token of a pilot; False: a concurrent request was faster."""
        first_use = func.coalesce(PilotIdentities.used_at, clock.now())
        is_current = PilotIdentities.refresh_hash == old_hash
        return await self._update_identity(pilot_id, is_current, refresh_hash=new_hash, used_at=first_use)

    @transaction
    async def revoke_identity(self, pilot_id: int) -> None:
        """Revoke the secret and all tokens of a pilot."""
        await self._update_identity(pilot_id, revoked_at=clock.now())

    @transaction
    async def record_heartbeat(
        self, pilot_id: int, *, starts: int, stale_after: timedelta, reported: Mapping[str, Any]
    ) -> bool:
        """Record a report of a pilot; False: its token was replaced or revoked. One UPDATE by primary key.

        Args:
            starts: number of the exchange that its token is from.
            stale_after: time without a report after which the pilot is stale.
            reported: any of `host`, `cores`, `memory_mb`, `outcome`, `exit_code`, `jobs_done`, `detail`.
        """
        now = clock.now()
        return await self._update_identity(
            pilot_id,
            PilotIdentities.starts == starts,
            heartbeat_at=now,
            stale_at=now + stale_after,
            used_at=func.coalesce(PilotIdentities.used_at, now),
            **reported,
        )

    async def _update_identity(self, pilot_id: int, *where: ColumnElement[bool], **values: Any) -> bool:
        """Update an identity that is not revoked and matches the conditions; False: there is none."""
        valid = (PilotIdentities.pilot_id == pilot_id, PilotIdentities.revoked_at.is_(None))
        updated = await self.conn.execute(update(PilotIdentities).where(*valid, *where).values(**values))
        return bool(updated.rowcount)

    @transaction
    async def count_reports(self, vo: str | None = None) -> dict[str, dict[str, dict[str, int]]]:
        """Count `stale` pilots and outcomes (of one VO, or all), as {VO: {compute element: {name: number}}}."""
        stale = (
            select(Pilots.vo, Pilots.ce_name, func.count())
            .join(PilotIdentities, PilotIdentities.pilot_id == Pilots.id)
            .where(
                *if_given(Pilots.vo, vo),
                Pilots.status == MyPilotStatus.RUNNING,
                PilotIdentities.stale_at < clock.now(),
            )
            .group_by(Pilots.vo, Pilots.ce_name)
        )
        names = (PilotIdentities.vo, PilotIdentities.ce_name, PilotIdentities.outcome)
        ended = (
            select(*names, func.count())
            .where(*if_given(PilotIdentities.vo, vo), PilotIdentities.outcome.in_(list(PilotOutcome)))
            .group_by(*names)
        )
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for vo_name, ce_name, count in await self.conn.execute(stale):
            counts.setdefault(vo_name, {}).setdefault(ce_name, {})["stale"] = count
        for vo_name, ce_name, outcome, count in await self.conn.execute(ended):
            counts.setdefault(vo_name, {}).setdefault(ce_name, {})[str(outcome)] = count
        return counts


def is_stale(status: MyPilotStatus, stale_at: datetime | None) -> bool:
    """True if a running pilot has stopped sending heartbeats."""
    return status is MyPilotStatus.RUNNING and stale_at is not None and stale_at < clock.now()
