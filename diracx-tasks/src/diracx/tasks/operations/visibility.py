"""Visibility of tasks: a viewer sees those of a VO, or those of the whole installation.

docs/reference/who-may-see-what.md is the table that this enforces.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from .models import Page, Snapshot, Worker

#: Pages that are read to fill one page of a VO: a small VO must not make the server read a long queue to its end.
_PAGES_READ = 20


class _OfVO(Protocol):
    @property
    def vo(self) -> str | None: ...


_Item = TypeVar("_Item", bound=_OfVO)


@dataclass(frozen=True, slots=True)
class Viewer:
    """A user who looks at tasks, as far as the user's role lets them be seen."""

    vo: str | None
    """The VO whose things are shown; None: those of all VOs, and those of none."""

    def sees(self, vo: str | None) -> bool:
        """True if things of this VO (None: of no VO) are shown."""
        return self.vo is None or vo == self.vo

    def chosen(self, vo: str | None) -> str | None:
        """The VO to show, where one was asked for.

        Raises:
            ValueError: it is another than the viewer's; the words are those for a VO that there is not.
        """
        if vo is not None and not self.sees(vo):
            raise no_such_vo(vo)
        return self.vo if vo is None else vo

    def workers(self, workers: Sequence[Worker]) -> list[Worker]:
        """Workers; to the viewer of one VO without the task that blocks one."""
        if self.vo is None:
            return list(workers)
        return [
            worker
            if worker.blocked is None
            else replace(worker, blocked=replace(worker.blocked, task_id=None, task_name=None, stack=""))
            for worker in workers
        ]

    def snapshot(self, seen: Snapshot) -> Snapshot:
        """The numbers of the installation, with its workers likewise."""
        return replace(seen, workers=self.workers(seen.workers))

    async def page(
        self, look: Callable[[int, str | None], Awaitable[Page[_Item]]], limit: int, after: str | None
    ) -> Page[_Item]:
        """The part of a list that the viewer sees.

        Args:
            look: reads a page of the whole list: at most how many items, and after which place.
            limit: at most so many. A page of a VO may have fewer, or none, and not be the last.
        """
        if self.vo is None:
            return await look(limit, after)
        found: list[_Item] = []
        for _ in range(_PAGES_READ):
            page = await look(limit - len(found), after)
            found += [item for item in page.items if self.sees(item.vo)]
            after = page.after
            if after is None or len(found) == limit:
                break
        return Page(items=found, after=after)


def no_such_vo(vo: str) -> ValueError:
    """One answer for a VO that there is not, and for one that is not to be seen."""
    return ValueError(f"there is no VO {vo[:40]!r}")
