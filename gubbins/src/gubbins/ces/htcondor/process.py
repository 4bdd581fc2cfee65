"""Calls of HTCondor's bindings, each in a process with a time limit."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gubbins.ces.protocol import NothingDoneError
from gubbins.ces.transports.shell import Completed, LocalShell, Shell, inherited_environment
from gubbins.ces.transports.tokens import TokenIssuer, bearer_token
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

from .settings import HTCondorSettings

PROGRAM = Path(__file__).with_name("bindings.py")
_STAMP_OF_LOG = re.compile(r"^\d\d/\d\d/\d\d \d\d:\d\d:\d\d( \(\S+\))* ")


class BindingsRefusal(CEUnavailableError):
    """The call failed with an error of the bindings."""


class Bindings:
    """Bindings for one schedd. Without state between calls: a token may change at any time.

    Args:
        settings: settings of the schedd.
        program: program that calls the bindings.
        shell: makes a shell that runs it in an environment.
    """

    def __init__(
        self,
        settings: HTCondorSettings,
        program: Path = PROGRAM,
        shell: Callable[[Mapping[str, str]], Shell] = LocalShell,
    ) -> None:
        self._settings = settings
        self._program = program
        self._shell = shell
        self._where = {
            "collector": settings.collector,
            "name": settings.schedd,
            "address": settings.address,
        }

    async def call(self, call: str, **arguments: Any) -> Any:
        """Make one call, and return its response, decoded from JSON.

        Raises:
            BindingsRefusal: an error of the bindings.
            NothingDoneError: the schedd was not found.
            CEUnavailableError: no response within the time limit, or an invalid one.
        """
        token = (
            None if self._settings.token is None else await asyncio.to_thread(bearer_token, self._settings.token)
        )
        # Not in the process, which may be killed.
        with tempfile.TemporaryDirectory(prefix="gubbins-htcondor-", ignore_cleanup_errors=True) as name:
            directory = Path(name)
            await asyncio.to_thread(_prepare, directory, token)
            request = {"where": self._where, "call": call, "arguments": arguments}
            argv = ["/bin/sh", "-c", 'cd "$1" && exec "$2" -S -P "$3"', "sh", str(directory / "work")]
            try:
                done = await self._shell(self._environment(directory)).run(
                    [*argv, sys.executable, str(self._program)],
                    stdin=json.dumps(request).encode(),
                    timeout=self._settings.timeout_seconds,
                )
            except CEUnavailableError as error:
                raise CEUnavailableError(str(error).replace("/bin/sh", f"the schedd ({call})", 1)) from error
        return self._result(done)

    def _environment(self, directory: Path) -> dict[str, str]:
        tokens = str(directory / "tokens")
        settings = {
            "SEC_TOKEN_DIRECTORY": tokens,
            # Otherwise root would use the tokens in /etc, and even sign tokens.
            "SEC_TOKEN_SYSTEM_DIRECTORY": tokens,
            "SEC_PASSWORD_DIRECTORY": str(directory / "none"),
        }
        if isinstance(self._settings.token, TokenIssuer):
            settings |= {"SEC_CLIENT_AUTHENTICATION_METHODS": "SCITOKENS", "SCITOKENS_FILE": f"{tokens}/token"}
        elif self._settings.token is not None:
            settings["SEC_CLIENT_AUTHENTICATION_METHODS"] = "IDTOKENS"
        configuration = settings | {name.upper(): value for name, value in self._settings.configuration.items()}
        return (
            inherited_environment()
            | {"CONDOR_CONFIG": os.devnull, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            | {f"_CONDOR_{name}": value for name, value in configuration.items()}
        )

    def _result(self, done: Completed) -> Any:
        try:
            response = json.loads(done.stdout)
        except ValueError:
            response = None
        if isinstance(response, Mapping) and "result" in response:
            return response["result"]
        if isinstance(response, Mapping):
            for word, kind in (("error", BindingsRefusal), ("unreachable", NothingDoneError)):
                if word in response:
                    raise kind(_error_line(str(response[word]), done.stderr))
        if "ModuleNotFoundError" in done.stderr:
            raise CEUnavailableError(
                "HTCondor's bindings are not installed: pip install 'gubbins-pilots[htcondor]'"
            )
        raise CEUnavailableError(
            _error_line(f"no response from HTCondor's bindings ({done.returncode})", done.stderr)
        )


def _prepare(directory: Path, token: str | None) -> None:
    for name in ("tokens", "work"):
        (directory / name).mkdir(mode=0o700)
    file = directory / "tokens" / "token"
    file.touch(mode=0o600)
    file.write_text(f"{token or ''}\n")


def _error_line(error: str, stderr: str) -> str:
    """Format an error with the last messages of the bindings in one line."""
    lines = [_STAMP_OF_LOG.sub("", line) for line in stderr.splitlines() if line.strip()]
    return one_line("; ".join(part for part in map(one_line, [error, *lines[-2:]]) if part))
