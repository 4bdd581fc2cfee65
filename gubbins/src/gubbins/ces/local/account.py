"""The account of this host that pilots run as."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this host other than the worker's."""

    name: str
    uid: int
    gid: int
    home: str

    @classmethod
    def of(cls, name: str) -> Account:
        """The account of this name.

        Raises:
            PermissionError, LookupError: pilots cannot run as this user; the message says why.
        """
        if os.geteuid() != 0:
            raise PermissionError(f"run_as {name!r} needs a worker that runs as root")
        try:
            entry = pwd.getpwnam(name)
        except KeyError as error:
            raise LookupError(f"run_as {name!r}: this host has no such user") from error
        if entry.pw_uid == 0:
            raise PermissionError(f"run_as {name!r} is root itself")
        return cls(name, entry.pw_uid, entry.pw_gid, entry.pw_dir)

    @property
    def command(self) -> list[str]:
        """Prefix of a command that makes it run as this user, with the user's own group and no other."""
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}"]
        return ["setpriv", *ids, "--clear-groups", "--inh-caps=-all", "--"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of this user."""
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "TMPDIR": "/tmp"}  # noqa: S108

    def prepare(self, job: Path) -> None:
        """Let the user enter the directory of a pilot, and own the one below it in which the pilot runs.

        All else there is the worker's: the pilot can neither write nor replace what the worker reads.
        """
        work = job / "work"
        work.mkdir(mode=0o700)
        os.chown(work, self.uid, self.gid)
        os.chown(job, -1, self.gid)
        job.chmod(0o710)
