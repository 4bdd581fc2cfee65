"""Visibility of tasks: a viewer sees those of one VO, or all. Enforces docs/reference/who-may-see-what.md."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha512
from secrets import token_hex
from typing import Protocol, TypeVar

from .cursors import wrong_cursor
from .models import Page, Snapshot, Worker

#: Maximum number of pages read to fill one page of a VO, so that a small VO does not read a long queue to its end.
_PAGES_READ = 20


class _OfVO(Protocol):
    @property
    def vo(self) -> str | None: ...


_Item = TypeVar("_Item", bound=_OfVO)


@dataclass(frozen=True, slots=True)
class Viewer:
    """Visibility of tasks for a user."""

    vo: str | None
    """The visible VO; None: all tasks, also those without a VO."""
    secret: str = field(default=token_hex(), repr=False)
    """Encrypts the cursors of a VO, which have ids and times of hidden tasks. Default: of this process."""

    def sees(self, vo: str | None) -> bool:
        """True if tasks of this VO (None: of no VO) are visible."""
        return self.vo is None or vo == self.vo

    def chosen(self, vo: str | None) -> str | None:
        """Return the VO to show if `vo` was requested; raise ValueError if it is not visible."""
        if vo is not None and not self.sees(vo):
            raise no_such_vo(vo)
        return self.vo if vo is None else vo

    def workers(self, workers: Sequence[Worker]) -> list[Worker]:
        """Return the workers; for a viewer of one VO without the tasks that block them."""
        if self.vo is None:
            return list(workers)
        return [
            worker
            if worker.blocked is None
            else replace(worker, blocked=replace(worker.blocked, task_id=None, task_name=None, stack=""))
            for worker in workers
        ]

    def snapshot(self, seen: Snapshot) -> Snapshot:
        """Return the snapshot with `workers` of it."""
        return replace(seen, workers=self.workers(seen.workers))

    def share(self, number: int) -> int:
        """Return what one call of `read` by `page` may search, if a page may search `number` items."""
        return number if self.vo is None else number // _PAGES_READ

    async def page(
        self, read: Callable[[int, str | None], Awaitable[Page[_Item]]], limit: int, after: str | None
    ) -> Page[_Item]:
        """Return the visible items of a page.

        Args:
            read: reads a page of the whole list, given limit and cursor.
            limit: maximum number of items. A page of a VO may have fewer, or none, and not be the last.
        """
        if self.vo is None:
            return await read(limit, after)
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        # Deterministic, so that live pages do not change with each rendering.
        cipher = AESSIV(sha512(f"{self.secret} {self.vo}".encode()).digest())
        try:
            after = after and cipher.decrypt(urlsafe_b64decode(after), None).decode()
        except Exception as error:
            raise wrong_cursor() from error
        found: list[_Item] = []
        for _ in range(_PAGES_READ):
            page = await read(limit - len(found), after)
            found += [item for item in page.items if self.sees(item.vo)]
            after = page.after
            if after is None or len(found) == limit:
                break
        return Page(items=found, after=after and urlsafe_b64encode(cipher.encrypt(after.encode(), None)).decode())


def no_such_vo(vo: str) -> ValueError:
    """Make the error for a VO that does not exist or is not visible, which viewers must not distinguish."""
    return ValueError(f"no VO {vo[:40]!r}")
