"""Identities of pilots: secrets, their exchange for tokens of DiracX, and reports made with these tokens.

Secrets are random, and the database stores hashes only. Each attempt of a submission gets its own secret, since
any of them may have reached the compute element.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
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
#: The exchange can be repeated while its token is unused, for the response may have been lost.
_MAX_EXCHANGES = 5


class Grant(NamedTuple):
    """Data of a new token: its pilot and refresh token."""

    stamp: str
    vo: str
    start: int
    refresh_token: str
    heartbeat_seconds: int


def pilot_api_url() -> str | None:
    """Read the URL of the API for pilots from the environment; None: not set, pilots get no identity.

    Raises:
        ValueError: the URL is invalid.
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
    """Add a secret to each pilot, if identities are configured, and store its hash.

    Args:
        db: in the transaction that reserves the slots.
        ce: the compute element.
        ids: ids of the pilots by stamp.
        pilots: pilots to submit.

    Raises:
        CERefusedError: the URL of the API is invalid.
    """
    try:
        url = pilot_api_url() if rules_of(ce).identity else None
    except ValueError as error:
        raise CERefusedError(ce["name"], str(error), public="its settings are wrong") from error
    if url is None:
        return list(pilots)
    with_secrets, new = [], {}
    for pilot in pilots:
        secret = secrets.token_urlsafe(_SECRET_BYTES)
        with_secrets.append(pilot._replace(identity=PilotIdentity(url, secret)))
        if pilot.maybe_submitted:
            await db.add_retry_secret(ids[pilot.stamp], _hash(secret))
        else:
            new[ids[pilot.stamp]] = _hash(secret)
    await db.add_secrets(new)
    return with_secrets


async def exchange_secret(
    db: MyPilotDB, stamp: str, secret: str, *, vos: Collection[str], address: str | None
) -> Grant:
    """Exchange the secret of a pilot for tokens.

    A repeated exchange is allowed until its token is first used, for the response may have been lost; it
    invalidates the earlier token. A pilot that its site starts a second time gets no token.

    Args:
        vos: VOs of the configuration.
        address: IP address of the client, for the record.

    Raises:
        IdentityMisusedError: the secret was exchanged before, and the token used.
        IdentityRefusedError: wrong secret, the pilot has ended or is being cancelled, or its VO is not configured.
    """
    found = await _authenticate(db, stamp, lambda row: _is_one_of(secret, row.secret_hashes.split()), vos)
    if found.used_at is None and found.revoked_at is None and found.starts < _MAX_EXCHANGES:
        family = secrets.token_urlsafe(_SECRET_BYTES)
        refresh = f"{family}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        hashes = {"family_hash": _hash(family), "refresh_hash": _hash(refresh)}
        if await db.record_exchange(found.pilot_id, starts=found.starts, address=address, **hashes):
            return _grant(found, found.starts + 1, refresh)
    raise IdentityMisusedError("replayed: the secret of this pilot was exchanged before", found.vo, found.pilot_id)


async def refresh_token(db: MyPilotDB, stamp: str, token: str, *, vos: Collection[str]) -> Grant:
    """Exchange a refresh token for the next one. Reuse of an old one revokes all tokens of the pilot.

    Args:
        vos: VOs of the configuration.

    Raises:
        IdentityMisusedError: the token was used before; all tokens are revoked.
        IdentityRefusedError: wrong token, the pilot has ended or is being cancelled, or its VO is not configured.
    """
    family = token.partition(".")[0]
    found = await _authenticate(db, stamp, lambda row: _is_one_of(family, [row.family_hash or ""]), vos)
    if found.revoked_at is not None:
        raise IdentityRefusedError("the tokens of this pilot were revoked")
    if _is_one_of(token, [found.refresh_hash]):
        new = f"{family}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        if await db.rotate_refresh_token(found.pilot_id, old_hash=found.refresh_hash, new_hash=_hash(new)):
            return _grant(found, found.starts, new)
    await db.revoke_identity(found.pilot_id)
    raise IdentityMisusedError(
        "a used refresh token was presented again: all are revoked", found.vo, found.pilot_id
    )


async def record_report(db: MyPilotDB, stamp: str, vo: str, start: int, reported: Mapping[str, Any]) -> int:
    """Record the report of a running pilot, and return its `heartbeat_seconds`.

    A SUBMITTED pilot becomes RUNNING. Its end is reported by its compute element only.

    Args:
        stamp: claim of the token, like `vo` and `start`.
        reported: as for `MyPilotDB.record_heartbeat`.

    Raises:
        IdentityRefusedError: the token was replaced or revoked, or the pilot has ended or is being cancelled.
    """
    found = await _authenticate(
        db, stamp, lambda row: row.vo == vo and row.starts == start and row.revoked_at is None
    )
    rules = _rules(found)
    stale_after = timedelta(seconds=rules.stale_after_seconds)
    if not await db.record_heartbeat(found.pilot_id, starts=start, stale_after=stale_after, reported=reported):
        raise IdentityRefusedError("its token was replaced or revoked")
    if found.status is MyPilotStatus.SUBMITTED:
        try:
            await db.update_pilot_status(found.pilot_id, MyPilotStatus.RUNNING, vo=vo)
        except IllegalTransitionError:
            logger.debug("Pilot %d was polled as running before its first report", found.pilot_id)
        except PilotNotFoundError as error:
            raise IdentityRefusedError("there is no such pilot any more") from error
    return rules.heartbeat_seconds


async def _authenticate(
    db: MyPilotDB, stamp: str, is_valid: Callable[[Row[Any]], bool], vos: Collection[str] | None = None
) -> Row[Any]:
    """Find the active pilot of a stamp, and check the credentials of the request.

    Args:
        vos: VOs of the configuration, for a new token; None: the route has checked the VO of the token.

    Raises:
        IdentityRefusedError: invalid credentials, or no active pilot of these VOs.
    """
    found = await db.find_identity(stamp)
    if found is None:
        raise IdentityRefusedError("there is no pilot of this stamp with an identity", proven=False)
    if not is_valid(found):
        raise IdentityRefusedError("not its secret, or not its token", proven=False)
    if found.status not in ACTIVE:
        raise IdentityRefusedError(f"the pilot has ended ({found.status})")
    if found.cancel_requested_at is not None:
        raise IdentityRefusedError("the pilot is being cancelled")
    if vos is not None and found.vo not in vos:
        raise IdentityRefusedError(f"VO {found.vo!r} is not in the registry of this installation")
    return found


def _grant(found: Row[Any], start: int, refresh: str) -> Grant:
    return Grant(found.stamp, found.vo, start, refresh, _rules(found).heartbeat_seconds)


def _rules(found: Row[Any]) -> CERules:
    return rules_of({"rules": found.rules})


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _is_one_of(secret: str, hashes: Sequence[str]) -> bool:
    """Compare with all hashes in constant time."""
    own = _hash(secret)
    equal = [hmac.compare_digest(own, hash) for hash in hashes]
    return any(equal)
