"""Commands on a host of pilots: shell text with quoted values, and parser of their responses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

_FUNCTIONS = Path(__file__).with_name("jobs.sh").read_text()
_STAMP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Refused(CEUnavailableError):
    """The command was refused, and nothing was done."""


def is_stamp(stamp: str) -> bool:
    """True if the stamp is a safe name of a directory."""
    return _STAMP.fullmatch(stamp) is not None


def quote(value: str) -> str:
    """Quote any value as one word of a POSIX shell; NUL characters are dropped."""
    return shlex.quote(value.replace("\0", ""))


def exports(variables: Mapping[str, str]) -> str:
    """Make lines that export variables."""
    return "".join(f"{name}={quote(value)}\nexport {name}\n" for name, value in variables.items())


def command(lines: Iterable[str], mark: str) -> bytes:
    """Make the stdin of `sh -s` from lines of shell text, which use the functions of `jobs.sh`.

    In braces, so that truncated text runs nothing. The mark, a random word, begins each record of the response.
    """
    body = "\n".join([f"mark={mark}", _FUNCTIONS, *lines, "say end"])
    return f"{{\n{body}\nprintf '\\n'\n}} < /dev/null\n".encode(errors="replace")


def parse(response: Completed, mark: str, *, host: str) -> list[tuple[str, str]]:
    """Parse the records of a response: the first word, and the rest, which may have many lines.

    Raises:
        Refused: the command was refused.
        CEUnavailableError: the response is incomplete or invalid.
    """
    records = []
    for record in response.stdout.split(f"\n{mark} ")[1:]:
        found = re.match(r"(\w+)[ \n]?(.*)", record, re.DOTALL)
        word, content = found.groups() if found else ("", record)
        if word == "failed":
            raise Refused(f"{host}: {one_line(content)}")
        records.append((word, content))
    if not records or records.pop()[0] != "end":
        excerpt = one_line((response.stderr.strip() or response.stdout.strip())[-200:])
        raise CEUnavailableError(
            f"{host}: not the output of a shell (exit code {response.returncode}): {excerpt or 'nothing'}"
        )
    return records
