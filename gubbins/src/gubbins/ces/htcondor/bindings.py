"""One call of a schedd through HTCondor's bindings: a request on stdin, an answer on stdout.

The bindings let no other thread run while they wait for the network, and know no time-outs: the caller kills this
process when it takes too long. It is run by its path and imports nothing of ours. Its working directory is empty
and its own; what is said on stderr is for people.
"""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import classad2
import htcondor2

_AT_ONCE = 500  # stamps in one expression
# HTCondor's numbers for refusing one more job.
_LIMITS = {
    "-2": "it has as many jobs as it takes of all users (MAX_JOBS_SUBMITTED)",
    "-3": "we have as many jobs there as we may (MAX_JOBS_PER_OWNER)",
    "-4": "there are more jobs in one submission than it takes (MAX_JOBS_PER_SUBMISSION)",
}
_LIMIT = re.compile(r"expected next ProcId to be (\d+), but Schedd says (-\d+)")
# What is said before anything is in the queue; for the last, the whole submission was undone.
_REFUSALS = re.compile(
    r"^((?=Failed to create new cluster)|Failed to create job ad, errmsg="
    r"|Unable to commit transaction, SCHEDD:\d+:)"
)
_MAX_FILE_BYTES = 64 << 20


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    # Nothing but the response goes there: what the bindings print goes to stderr.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    htcondor2.enable_debug("D_ERROR")
    call: Callable[..., Any] = _CALLS[request["call"]]
    try:
        answer = {"answer": call(_schedd(**request["where"]), **request["arguments"])}
    except (htcondor2.HTCondorException, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        answer = {"error": str(error) or type(error).__name__}
    with os.fdopen(answer_to, "w") as file:
        json.dump(answer, file)


def _schedd(collector: str | None, name: str | None, address: str | None) -> htcondor2.Schedd:
    if address is not None:
        ad = classad2.ClassAd()
        ad["MyAddress"] = address
        ad["CondorVersion"] = htcondor2.version()
        return htcondor2.Schedd(ad)
    pool = htcondor2.Collector(collector)
    if name is not None:
        ad = pool.locate(htcondor2.DaemonType.Schedd, name)
        if ad is None:
            raise LookupError(f"the collector {collector} knows no schedd {name}")
        return htcondor2.Schedd(ad)
    ads = pool.locateAll(htcondor2.DaemonType.Schedd)
    if len(ads) != 1:
        names = ", ".join(sorted(str(ad.get("Name")) for ad in ads)[:5])
        raise LookupError(
            f"the collector {collector} knows {len(ads)} schedds, name one: {names or 'there is none'}"
        )
    return htcondor2.Schedd(ads[0])


def submit(schedd: htcondor2.Schedd, submissions: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Submit pilots, and send their files; by stamp a `reference` or an `error`."""
    outcomes: dict[str, dict[str, str]] = {}
    for number, each in enumerate(submissions):
        directory = Path.cwd() / str(number)
        directory.mkdir()
        for name, text in each["files"].items():
            (directory / name).touch(mode=0o600)
            (directory / name).write_text(text)
        os.chdir(directory)
        outcomes |= _submit(schedd, each["commands"], each["stamps"])
        os.chdir(directory.parent)
    return outcomes


def _submit(schedd: htcondor2.Schedd, commands: dict[str, str], stamps: list[str]) -> dict[str, dict[str, str]]:
    description = htcondor2.Submit(commands)
    try:
        result = schedd.submit(description, spool=True, itemdata=iter([{"stamp": stamp} for stamp in stamps]))
    except htcondor2.HTCondorException as error:
        words = str(error)
        if (limit := _LIMIT.search(words)) is not None:
            room, code = int(limit[1]), limit[2]
            words = _LIMITS.get(code, f"it takes no more jobs ({code})")
            refused = {stamp: {"error": words} for stamp in stamps[room:]}
            # All of them were refused for the sake of these.
            return refused | (_submit(schedd, commands, stamps[:room]) if 0 < room < len(stamps) else {})
        if (refusal := _REFUSALS.match(words)) is not None:
            words = words[refusal.end() :].removeprefix("Submit:-1:")
            return {stamp: {"error": words} for stamp in stamps}
        raise
    if result.num_procs() != len(stamps):
        raise RuntimeError(f"{result.num_procs()} jobs in place of {len(stamps)}")
    schedd.spool(result)
    cluster, first = result.cluster(), result.first_proc()
    return {stamp: {"reference": f"{cluster}.{first + index}"} for index, stamp in enumerate(stamps)}


def queue(schedd: htcondor2.Schedd, attributes: list[str]) -> list[list[Any]]:
    """All our pilots in the queue."""
    found = schedd.query("GubbinsStamp =!= undefined", attributes, opts=htcondor2.QueryOpt.DefaultMyJobsOnly)
    return [_row(ad, attributes) for ad in found]


def history(schedd: htcondor2.Schedd, attributes: list[str], stamps: list[str]) -> list[list[Any]]:
    """Jobs of these pilots that have left the queue, as far as the history has them."""
    found = []
    for some in _members(stamps):
        found += schedd.history(some, attributes, match=2 * min(len(stamps), _AT_ONCE))
    return [_row(ad, attributes) for ad in found]


def remove(schedd: htcondor2.Schedd, stamps: list[str]) -> int:
    """Have these pilots removed that have not ended; how many we may not."""
    return sum(_remove(schedd, f"{some} && JobStatus =!= 3 && JobStatus =!= 4") for some in _members(stamps))


def remove_jobs(schedd: htcondor2.Schedd, jobs: list[str], reason: str) -> int:
    """Have these jobs removed, given by their numbers; how many we may not."""
    numbers = [tuple(map(int, job.split("."))) for job in jobs]
    wanted = " || ".join(f"(ClusterId == {cluster} && ProcId == {proc})" for cluster, proc in numbers)
    return _remove(schedd, f"({wanted}) && JobStatus =!= 3 && JobStatus =!= 4", reason)


def _remove(schedd: htcondor2.Schedd, constraint: str, reason: str = "by the pilot system") -> int:
    done = schedd.act(htcondor2.JobAction.Remove, constraint, reason=(reason, 0))
    return int(done["TotalPermissionDenied"])


def release(schedd: htcondor2.Schedd, stamps: list[str]) -> None:
    """Let these pilots go from the queue that have ended."""
    for some in _members(stamps):
        wanted = f"{some} && (JobStatus == 3 || JobStatus == 4)"
        # To edit no job is an error.
        if schedd.query(wanted, ["ClusterId"], limit=1, opts=htcondor2.QueryOpt.DefaultMyJobsOnly):
            schedd.edit(wanted, "LeaveJobInQueue", "false")


def output(schedd: htcondor2.Schedd, job: str, names: list[str], limit_bytes: int) -> list[str | None]:
    """The last parts of these files of a job; None where there is none."""
    schedd.retrieve([job])
    return [_tail(Path.cwd() / name, limit_bytes) for name in names]


_CALLS = {each.__name__: each for each in (submit, queue, history, remove, remove_jobs, release, output)}


def _members(stamps: list[str]) -> Iterator[str]:
    for start in range(0, len(stamps), _AT_ONCE):
        some = ", ".join(classad2.quote(stamp) for stamp in stamps[start : start + _AT_ONCE])
        yield f"member(GubbinsStamp, {{{some}}})"


def _row(ad: classad2.ClassAd, attributes: Iterable[str]) -> list[Any]:
    return [_plain(ad, name) for name in attributes]


def _plain(ad: classad2.ClassAd, name: str) -> str | int | None:
    """The value of an attribute that is text or a number, else None."""
    try:
        value = ad.get(name)
    except Exception:
        return None
    # `Value.Undefined` is a number as well.
    return value if type(value) in (str, int, bool) else None


def _tail(path: Path, limit_bytes: int) -> str | None:
    try:
        # A pilot may have put a link or a FIFO in its place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        file.seek(max(0, found.st_size - limit_bytes))
        return file.read(limit_bytes).decode(errors="replace")


if __name__ == "__main__":
    main()
