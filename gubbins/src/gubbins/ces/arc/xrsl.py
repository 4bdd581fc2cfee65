"""Job descriptions in xRSL, for any content of scripts and names.

A-REX removes line ends from values, and puts `arguments` into a shell script where `$` and backquotes are
expanded. So the pilot is passed as base64 in the environment, and unpacked by a command without such characters.
"""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Mapping, Sequence

from gubbins.ces.settings import SECRET_FILE

AttributeValue = str | int | list[str] | list[list[str]]

VARIABLE = "GUBBINS_PILOT"
_FILE = ".gubbins-pilot"
UNPACK_AND_RUN = f"printenv {VARIABLE} | (umask 077; base64 -d >{_FILE}) && exec /bin/sh {_FILE}"
# The limit of Linux is 128 KiB per variable.
_MAX_PACKED_BYTES = 120 * 1024
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
_JOBNAME = re.compile(r'\(\s*jobname\s*=\s*"([^"]*)"\s*\)')
_RESERVED = frozenset(
    {
        "arguments", "count", "countpernode", "cputime", "environment", "executable", "jobname", "join", "memory",
        "outputfiles", "queue", "stderr", "stdout", "walltime",
    }
)  # fmt: skip


def _quote(value: str | int) -> str:
    """Quote a value of an attribute.

    Raises:
        ValueError: it contains a control character, which A-REX does not support.
    """
    return '"' + check_text(str(value)).replace('"', '""') + '"'


def check_text(text: str) -> str:
    """Return the text unchanged.

    Raises:
        ValueError: it contains a control character.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("must not contain control characters")
    return text


def check_attribute(name: str, value: AttributeValue) -> None:
    """Check an additional attribute.

    Raises:
        ValueError: it is invalid, or derived from other settings.
    """
    if _NAME.match(name) is None:
        raise ValueError(f"{name!r} is not a name of an xRSL attribute")
    if name.lower() in _RESERVED:
        raise ValueError(f"{name} is derived from other settings")
    try:
        relation(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def join(descriptions: Sequence[str]) -> str:
    """Combine descriptions into one request."""
    return descriptions[0] if len(descriptions) == 1 else "+" + "".join(f"({each})" for each in descriptions)


def name_in(description: str) -> str | None:
    """Read the job name from a description; None: there is none."""
    found = _JOBNAME.search(description)
    return found[1] if found else None


def pack(script: str, environment: Mapping[str, str], secret: str | None = None) -> str:
    """Encode a pilot with its environment and secret in one environment variable.

    The CE and the batch system show it only to the owner of the job.

    Raises:
        ValueError: it is too long.
    """
    packed = base64.b64encode(_wrap(script, environment, secret).encode()).decode()
    if len(packed) > _MAX_PACKED_BYTES:
        raise ValueError(
            f"the script with its environment is too long by {len(packed) / _MAX_PACKED_BYTES - 1:.0%}"
        )
    return packed


def relation(name: str, value: AttributeValue) -> str:
    """Format one attribute with its value.

    Raises:
        ValueError: the value is empty, or contains a control character.
    """
    if isinstance(value, str | int):
        return f"({name}={_quote(value)})"
    if not value:
        raise ValueError("is empty")
    written = [
        _quote(item) if isinstance(item, str) else f"({' '.join(_quote(part) for part in item)})" for item in value
    ]
    return f"({name}={' '.join(written)})"


def _wrap(script: str, environment: Mapping[str, str], secret: str | None) -> str:
    """Make a shell script that sets the environment and executes the pilot."""
    lines = [f"unset {VARIABLE}", f"rm -f {_FILE}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    if secret is not None:
        lines += [f"(umask 077 && printf %s {shlex.quote(secret)} >{SECRET_FILE})"]
        lines += [f'export PILOT_SECRET_FILE="$PWD/{SECRET_FILE}"']
    if script.startswith("#!"):
        lines += [f"printf %s {shlex.quote(script)} >{_FILE} && chmod 700 {_FILE} && exec ./{_FILE}"]
    else:
        lines += [f"exec /bin/sh -c {shlex.quote(script)} pilot"]
    return "\n".join(lines) + "\n"
