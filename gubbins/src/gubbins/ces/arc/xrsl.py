"""Job descriptions in xRSL, safe for any content of scripts and names.

A-REX drops line ends from the values of a description and puts `arguments` into a shell script of its own where
`$` and backquotes still mean something. So the pilot travels as base64 in the environment, and the command that
unpacks it needs no character that means anything to any of them.
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
UNPACK_AND_RUN = f"printenv {VARIABLE} | base64 -d >{_FILE} && exec /bin/sh {_FILE}"
# Linux passes no single variable of more than 128 KiB to a program.
_MAX_PACKED_BYTES = 120 * 1024
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*\Z")
_JOBNAME = re.compile(r'\(\s*jobname\s*=\s*"([^"]*)"\s*\)')
_OURS = frozenset(
    {
        "arguments", "count", "countpernode", "cputime", "environment", "executable", "jobname", "join", "memory",
        "outputfiles", "queue", "stderr", "stdout", "walltime",
    }
)  # fmt: skip


def _quote(value: str | int) -> str:
    """A value of an attribute.

    Raises:
        ValueError: it holds a control character, which A-REX would drop or stumble over.
    """
    return '"' + check_text(str(value)).replace('"', '""') + '"'


def check_text(text: str) -> str:
    """The text itself.

    Raises:
        ValueError: it holds a control character.
    """
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("must not contain control characters")
    return text


def check_attribute(name: str, value: AttributeValue) -> None:
    """Check that an attribute can be added to a description.

    Raises:
        ValueError: it cannot.
    """
    if _NAME.match(name) is None:
        raise ValueError(f"{name!r} is no name of an xRSL attribute")
    if name.lower() in _OURS:
        raise ValueError(f"{name} is made from other settings")
    try:
        relation(name, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def join(descriptions: Sequence[str]) -> str:
    """One request for several jobs."""
    return descriptions[0] if len(descriptions) == 1 else "+" + "".join(f"({each})" for each in descriptions)


def name_in(description: str) -> str | None:
    """The name in a description of ours, as written here or by A-REX; None: there is none."""
    found = _JOBNAME.search(description)
    return found[1] if found else None


def pack(script: str, environment: Mapping[str, str], secret: str | None = None) -> str:
    """A pilot with its environment and its secret, as the one variable that it travels in.

    A CE shows the description of a job to its owner alone, and the batch system the environment likewise.

    Raises:
        ValueError: it is too long for that.
    """
    packed = base64.b64encode(_wrap(script, environment, secret).encode()).decode()
    if len(packed) > _MAX_PACKED_BYTES:
        raise ValueError(
            f"the script with its environment is too long by {len(packed) / _MAX_PACKED_BYTES - 1:.0%}"
        )
    return packed


def relation(name: str, value: AttributeValue) -> str:
    """One attribute with its value.

    Raises:
        ValueError: the value is empty, or holds a control character.
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
    """A shell script that sets the environment and becomes the pilot."""
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
