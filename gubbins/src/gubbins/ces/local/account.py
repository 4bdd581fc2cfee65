"""User account of this host that pilots run as."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Account:
    """A user account of this host, other than that of the worker."""

    name: str
    uid: int
    gid: int
    home: str

    @classmethod
    def of(cls, name: str) -> Account:
        """Look up an account.

        Raises:
            PermissionError, LookupError: pilots cannot run as this user.
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
        """Prefix for commands that run as this user, with the user's primary group only."""
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}"]
        return ["setpriv", *ids, "--clear-groups", "--inh-caps=-all", "--"]

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": self.home, "USER": self.name, "LOGNAME": self.name, "TMPDIR": "/tmp"}  # noqa: S108

    def prepare(self, job: Path) -> None:
        """Make the working directory of a pilot, owned by the user.

        The pilot can neither write nor replace the other files, which the worker reads.
        """
        work = job / "work"
        work.mkdir(mode=0o700)
        os.chown(work, self.uid, self.gid)
        os.chown(job, -1, self.gid)
        job.chmod(0o710)
