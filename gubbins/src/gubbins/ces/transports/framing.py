"""Frame the answer of a command between marks: what log-in scripts, banners and wrappers print is none of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

SHELL = "/bin/sh -s"
"""The command line that takes a framed command on its standard input; csh and others take it as it is."""


def framed(argv: Sequence[str], stdin: bytes, environment: Mapping[str, str], mark: str) -> bytes:
    """A command with its input, as input of `SHELL`; a line of the input that has no end gets one.

    In braces: a shell reads them to their end before it runs anything, so what is cut off on its way does nothing.
    """
    exports = "".join(f"{name}={shlex.quote(value)} export {name}\n" for name, value in environment.items())
    begin = f"printf '\\n%s\\n' {mark}"
    source = f"<<'{mark}'\n" if stdin else "< /dev/null\n"
    head = f"{{\n{begin}\n{begin} >&2\n(\n{exports}{shlex.join(argv)}\n) {source}"
    ending = f"{mark}\n" if stdin else ""
    line_end = b"" if stdin.endswith(b"\n") or not stdin else b"\n"
    tail = f"{ending}printf '\\n%s %s\\n' {mark} \"$?\"\n}}\n"
    return head.encode(errors="replace") + stdin + line_end + tail.encode()


def unframed(answer: Completed, mark: str, *, host: str) -> Completed:
    """The answer of a framed command alone.

    Raises:
        CEUnavailableError: it is not there, or not all of it: the command may or may not have been run.
    """
    found = re.search(rf"\n{mark}\n(.*)\n{mark} (\d+)\n", f"\n{answer.stdout}", re.DOTALL)
    if found is None:
        said = one_line((answer.stderr.strip() or answer.stdout.strip()).replace(mark, "")[-200:])
        raise CEUnavailableError(
            f"{host}: not the answer of a shell (exit code {answer.returncode}): {said or 'nothing'}"
        )
    return Completed(int(found[2]), found[1], f"\n{answer.stderr}".rpartition(f"\n{mark}\n")[2])
