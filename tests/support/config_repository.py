"""A DiracX configuration in a git repository."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_WHO = {"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@example.org"}
_ENVIRONMENT = {**_WHO, **{name.replace("AUTHOR", "COMMITTER"): value for name, value in _WHO.items()}}
_VO = {
    "IdP": {"URL": "https://idp.example.org", "ClientID": "x"},
    "DefaultGroup": "users",
    "Users": {},
    "Groups": {"users": {"Properties": ["NormalUser"], "Users": []}},
}


def content(vos: Iterable[str] = (), tasks: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration with these VOs, and this as its `Systems.Tasks`."""
    return {
        "DIRAC": {},
        "Operations": {},
        "Registry": dict.fromkeys(vos, _VO),
        "Systems": {"Tasks": tasks or {}},
    }


class ConfigRepository:
    """The repository; `url` is what DIRACX_CONFIG_BACKEND_URL names."""

    def __init__(self, directory: Path, vos: Iterable[str] = (), tasks: Mapping[str, Any] | None = None) -> None:
        directory.mkdir()
        self._directory = directory
        self.url = f"git+file://{directory}"
        self._git("init", "-q", "-b", "master")
        self.commit(vos, tasks)

    def commit(self, vos: Iterable[str] = (), tasks: Mapping[str, Any] | None = None) -> None:
        """Commit a configuration with these VOs, and this as its `Systems.Tasks`."""
        self.commit_text(json.dumps(content(vos, tasks)))  # which is YAML, too

    def commit_text(self, text: str) -> None:
        """Commit whatever this is."""
        (self._directory / "default.yml").write_text(text)
        self._git("add", ".")
        self._git("commit", "-q", "--allow-empty", "-m", "a change")

    def _git(self, *args: str) -> None:
        subprocess.run(["git", *args], cwd=self._directory, check=True, env={**os.environ, **_ENVIRONMENT})
