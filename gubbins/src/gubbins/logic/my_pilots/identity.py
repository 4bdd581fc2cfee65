"""Identities of pilots: a secret for each, exchanged for a token of DiracX; and what pilots report with that.

A secret is random, and each attempt at a submission has one of its own: nobody knows which attempt has reached the
compute element. The database has hashes only, and there is no key of ours that makes secrets and could leak.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy import Row

from gubbins.ces import PilotAtCE, PilotIdentity
from gubbins.db.sql import MyPilotDB
from gubbins.domain.exceptions import (
    CERefusedError,
    IdentityMisusedError,
    IdentityRefusedError,
    IllegalTransitionError,
    PilotNotFoundError,
)
from gubbins.domain.pilot_states import ACTIVE, MyPilotStatus
from gubbins.domain.rules import CERules, rules_of

logger = logging.getLogger(__name__)

API_URL_VARIABLE = "GUBBINS_PILOT_API_URL"
_SECRET_BYTES = 32
#: A start that was never used may be begun anew: its response was lost on the way.
_MOST_STARTS = 5


class Grant(NamedTuple):
    """The pilot that gets a token, and the refresh token that goes with it."""

    stamp: str
    vo: str
    start: int
    refresh_token: str
    heartbeat_seconds: int


class Report(NamedTuple):
    """Answer to the report of a pilot."""

    status: MyPilotStatus
    heartbeat_seconds: int


def pilot_api_url() -> str | None:
    """The address that pilots reach our routes at; None: none is set, and pilots get no identity.

    Raises:
        ValueError: it is no such address.
    """
    url = os.environ.get(API_URL_VARIABLE, "").strip().rstrip("/")
    if not url:
        return None
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    plain = url.isascii() and url.isprintable() and not any(each in url for each in " \"'\\`$<>")
    if not (known and plain) or len(url) > 256 or parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{API_URL_VARIABLE} must be of the form https://host[:port]/api/my_pilots")
    return url


async def with_identities(
    db: MyPilotDB, ce: Mapping[str, Any], ids: Mapping[str, int], pilots: Sequence[PilotAtCE]
) -> list[PilotAtCE]:
    """The pilots, each with a secret of its own where that is configured; its hash is stored.

    Args:
        db: the database, in the transaction that reserves their slots.
        ce: their compute element.
        ids: their ids, by stamp.
        pilots: those to submit.

    Raises:
        CERefusedError: it is configured wrongly.
    """
    try:
        url = pilot_api_url() if rules_of(ce).identity else None
    except ValueError as error:
        raise CERefusedError(ce["name"], str(error), public="its settings are wrong") from error
    if url is None:
        return list(pilots)
    made = [pilot._replace(identity=PilotIdentity(url, secrets.token_urlsafe(_SECRET_BYTES))) for pilot in pilots]
    new = {}
    for pilot in made:
        if pilot.identity is not None:
            hash = _hash(pilot.identity.secret)
            if pilot.maybe_submitted:
                await db.add_secret_of_repeated(ids[pilot.stamp], hash)
            else:
                new[ids[pilot.stamp]] = hash
    await db.add_secrets(new)
    return made


async def exchange_secret(db: MyPilotDB, stamp: str, secret: str, *, address: str | None) -> Grant:
    """Exchange the secret of a pilot, once per start.

    As long as the token that came of it was not used, that may be repeated: the response may have been lost. The
    earlier token is refused from then on. A pilot that its site starts again has no second start.

    Args:
        db: the database.
        stamp: of the pilot, as it says.
        secret: as it says.
        address: where it asks from.

    Raises:
        IdentityMisusedError: the secret was exchanged before, and used.
        IdentityRefusedError: it is not the secret of this pilot, or that has ended or is being cancelled.
    """
    found = await _active(db, stamp, lambda row: _is_one_of(secret, row.secret_hashes.split()))
    if found.used_at is None and found.revoked_at is None and found.starts < _MOST_STARTS:
        family = secrets.token_urlsafe(_SECRET_BYTES)
        refresh = f"{family}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        hashes = {"family_hash": _hash(family), "refresh_hash": _hash(refresh)}
        if await db.begin_start(found.pilot_id, starts=found.starts, address=address, **hashes):
            return _grant(found, found.starts + 1, refresh)
    raise IdentityMisusedError("replayed: the secret of this pilot was exchanged before", found.vo, found.pilot_id)


async def refresh_token(db: MyPilotDB, stamp: str, token: str) -> Grant:
    """Exchange a refresh token for the next one. An old one that is presented again revokes all of the pilot's.

    Raises:
        IdentityMisusedError: it was used before; the pilot gets no token any more.
        IdentityRefusedError: it is none of this pilot, or that has ended or is being cancelled.
    """
    family = token.partition(".")[0]
    found = await _active(db, stamp, lambda row: _is_one_of(family, [row.family_hash or ""]))
    if found.revoked_at is not None:
        raise IdentityRefusedError("the tokens of this pilot were revoked")
    if _is_one_of(token, [found.refresh_hash]):
        new = f"{family}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        if await db.rotate_refresh(found.pilot_id, old_hash=found.refresh_hash, new_hash=_hash(new)):
            return _grant(found, found.starts, new)
    await db.revoke_identity(found.pilot_id)
    raise IdentityMisusedError(
        "a used refresh token was presented again: all are revoked", found.vo, found.pilot_id
    )


async def record_report(db: MyPilotDB, stamp: str, vo: str, start: int, reported: Mapping[str, Any]) -> Report:
    """Record a report of a pilot about itself: that it is alive, where it runs, why it ends.

    One that was SUBMITTED is RUNNING then, at once. Its end is what its compute element says.

    Args:
        db: the database.
        stamp: of the pilot, as its token says.
        vo: as the token says.
        start: as the token says.
        reported: as of `MyPilotDB.record_heartbeat`.

    Raises:
        IdentityRefusedError: the token is of no use any more; or the pilot has ended or is being cancelled.
    """
    found = await _active(db, stamp, lambda row: row.vo == vo and row.starts == start and row.revoked_at is None)
    rules = _rules(found)
    stale_after = timedelta(seconds=rules.stale_after_seconds)
    if not await db.record_heartbeat(found.pilot_id, starts=start, stale_after=stale_after, reported=reported):
        raise IdentityRefusedError("its token was replaced or revoked")
    if found.status is MyPilotStatus.SUBMITTED:
        try:
            await db.update_pilot_status(found.pilot_id, MyPilotStatus.RUNNING, vo=vo)
        except IllegalTransitionError:
            logger.debug("Pilot %d was seen running before it said so", found.pilot_id)
        except PilotNotFoundError as error:
            raise IdentityRefusedError("there is no such pilot any more") from error
    return Report(MyPilotStatus.RUNNING, rules.heartbeat_seconds)


async def _active(db: MyPilotDB, stamp: str, proven: Any) -> Row[Any]:
    """The active pilot of a stamp, for a request that proves to be its own.

    Raises:
        IdentityRefusedError: it is not, or there is none.
    """
    found = await db.find_identity(stamp)
    if found is None:
        raise IdentityRefusedError("there is no pilot of this stamp with an identity", proven=False)
    if not proven(found):
        raise IdentityRefusedError("not its secret, or not its token", proven=False)
    if found.status not in ACTIVE:
        raise IdentityRefusedError(f"the pilot has ended ({found.status})")
    if found.cancel_requested_at is not None:
        raise IdentityRefusedError("the pilot is being cancelled")
    return found


def _grant(found: Row[Any], start: int, refresh: str) -> Grant:
    return Grant(found.stamp, found.vo, start, refresh, _rules(found).heartbeat_seconds)


def _rules(found: Row[Any]) -> CERules:
    return rules_of({"rules": found.rules})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _is_one_of(secret: str, hashes: Sequence[str]) -> bool:
    """Compare in the same time whatever is equal."""
    mine = _hash(secret)
    equal = [hmac.compare_digest(mine, hash) for hash in hashes]
    return any(equal)
