"""Framing of remote commands: marks around their output separate it from that of log-in scripts and wrappers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line

SHELL = "/bin/sh -s"
"""Command line that reads a framed command from its standard input, in any shell of the user."""


def frame_command(
    argv: Sequence[str], stdin: bytes, environment: Mapping[str, str], mark: str, *, unset: str = ""
) -> bytes:
    """Make the input of `SHELL` from a command and its input, which gets a final newline.

    In braces, which a shell reads completely before it runs anything: truncated input runs nothing. `unset` is an
    extended regular expression of the variables that the command must not inherit from the log-in scripts.
    """
    names = f"$(env | grep -oE {shlex.quote(f'^({unset})=')} | tr -d =)"
    exports = f'for name in {names}; do unset "$name"; done\n' if unset else ""
    exports += "".join(f"{name}={shlex.quote(value)} export {name}\n" for name, value in environment.items())
    begin = f"printf '\\n%s\\n' {mark}"
    source = f"<<'{mark}'\n" if stdin else "< /dev/null\n"
    head = f"{{\n{begin}\n{begin} >&2\n(\n{exports}{shlex.join(argv)}\n) {source}"
    ending = f"{mark}\n" if stdin else ""
    line_end = b"" if stdin.endswith(b"\n") or not stdin else b"\n"
    tail = f"{ending}printf '\\n%s %s\\n' {mark} \"$?\"\n}}\n"
    return head.encode(errors="replace") + stdin + line_end + tail.encode()


def extract_response(response: Completed, mark: str, *, host: str) -> Completed:
    """Extract the result of a framed command.

    Raises:
        CEUnavailableError: it is missing or incomplete: the command may or may not have been run.
    """
    found = re.search(rf"\n{mark}\n(.*)\n{mark} (\d+)\n", f"\n{response.stdout}", re.DOTALL)
    if found is None:
        excerpt = one_line((response.stderr.strip() or response.stdout.strip()).replace(mark, "")[-200:])
        raise CEUnavailableError(
            f"{host}: not the output of a shell (exit code {response.returncode}): {excerpt or 'nothing'}"
        )
    return Completed(int(found[2]), found[1], f"\n{response.stderr}".rpartition(f"\n{mark}\n")[2])
