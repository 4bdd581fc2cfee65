"""Calls of HTCondor's bindings, each a process that ends in time."""

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

from gubbins.ces.transports.shell import Completed, LocalShell, Shell, inherited_environment
from gubbins.ces.transports.tokens import TokenIssuer, bearer_token
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

from .settings import HTCondorSettings

PROGRAM = Path(__file__).with_name("bindings.py")
_STAMP_OF_LOG = re.compile(r"^\d\d/\d\d/\d\d \d\d:\d\d:\d\d( \(\S+\))* ")


class BindingsRefusal(CEUnavailableError):
    """The bindings were asked, have come to an end, and say why there is no answer."""


class Bindings:
    """The bindings, for one schedd. Nothing is kept between calls, so a token may change at any time.

    Args:
        settings: of the schedd.
        program: the file that calls the bindings.
        shell: makes the shell of an environment, to run it.
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
        """The answer to one call, as JSON has it.

        Raises:
            BindingsRefusal: they say why there is none.
            CEUnavailableError: there is none, within the time-out or at all; why is in the message.
        """
        token = (
            None if self._settings.token is None else await asyncio.to_thread(bearer_token, self._settings.token)
        )
        # Not made by the process itself, which may be killed.
        with tempfile.TemporaryDirectory(prefix="gubbins-htcondor-", ignore_cleanup_errors=True) as name:
            directory = Path(name)
            await asyncio.to_thread(_prepare, directory, token)
            request = {"where": self._where, "call": call, "arguments": arguments}
            argv = ["/bin/sh", "-c", 'cd "$1" && exec "$2" -P "$3"', "sh", str(directory / "work")]
            try:
                done = await self._shell(self._environment(directory)).run(
                    [*argv, sys.executable, str(self._program)],
                    stdin=json.dumps(request).encode(),
                    timeout=self._settings.timeout_seconds,
                )
            except CEUnavailableError as error:
                raise CEUnavailableError(str(error).replace("/bin/sh", f"the schedd ({call})", 1)) from error
        return self._answer(done)

    def _environment(self, directory: Path) -> dict[str, str]:
        tokens = str(directory / "tokens")
        ours = {
            "SEC_TOKEN_DIRECTORY": tokens,
            # Root would otherwise take what it finds in /etc, and even sign tokens itself.
            "SEC_TOKEN_SYSTEM_DIRECTORY": tokens,
            "SEC_PASSWORD_DIRECTORY": str(directory / "none"),
        }
        if isinstance(self._settings.token, TokenIssuer):
            ours |= {"SEC_CLIENT_AUTHENTICATION_METHODS": "SCITOKENS", "SCITOKENS_FILE": f"{tokens}/token"}
        elif self._settings.token is not None:
            ours["SEC_CLIENT_AUTHENTICATION_METHODS"] = "IDTOKENS"
        configuration = ours | {name.upper(): value for name, value in self._settings.configuration.items()}
        return (
            inherited_environment()
            | {"CONDOR_CONFIG": os.devnull, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            | {f"_CONDOR_{name}": value for name, value in configuration.items()}
        )

    def _answer(self, done: Completed) -> Any:
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = None
        if isinstance(answer, Mapping) and "answer" in answer:
            return answer["answer"]
        if isinstance(answer, Mapping) and "error" in answer:
            raise BindingsRefusal(_error_line(str(answer["error"]), done.stderr))
        if "ModuleNotFoundError" in done.stderr:
            raise CEUnavailableError(
                "HTCondor's bindings are not installed: pip install 'gubbins-pilots[htcondor]'"
            )
        raise CEUnavailableError(
            _error_line(f"no answer from HTCondor's bindings ({done.returncode})", done.stderr)
        )


def _prepare(directory: Path, token: str | None) -> None:
    for name in ("tokens", "work"):
        (directory / name).mkdir(mode=0o700)
    file = directory / "tokens" / "token"
    file.touch(mode=0o600)
    file.write_text(f"{token or ''}\n")


def _error_line(error: str, stderr: str) -> str:
    """An error in one line, with what the bindings have said besides."""
    lines = [_STAMP_OF_LOG.sub("", line) for line in stderr.splitlines() if line.strip()]
    return one_line("; ".join(part for part in map(one_line, [error, *lines[-2:]]) if part))
