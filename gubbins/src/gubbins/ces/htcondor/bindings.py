"""One call of a schedd through HTCondor's bindings: a request on stdin, a response on stdout.

The bindings hold the interpreter lock during network calls and have no time-outs: the caller kills this process
after a time limit. It is run by its path, in an empty directory, and imports no other module of this distribution.
stderr has messages for administrators.
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
# Error codes of HTCondor for a job above a limit.
_LIMITS = {
    "-2": "it has as many jobs as it takes of all users (MAX_JOBS_SUBMITTED)",
    "-3": "we have as many jobs there as we may (MAX_JOBS_PER_OWNER)",
    "-4": "there are more jobs in one submission than it takes (MAX_JOBS_PER_SUBMISSION)",
}
_LIMIT = re.compile(r"expected next ProcId to be (\d+), but Schedd says (-\d+)")
# Errors of submissions that left no job in the queue.
_REFUSALS = re.compile(
    r"^((?=Failed to create new cluster)|Failed to create job ad, errmsg="
    r"|Unable to commit transaction, SCHEDD:\d+:)"
)
_MAX_FILE_BYTES = 64 << 20
_FEW = 5  # number of pilots for which spooling one by one is as fast as spooling once
_MATERIALIZE_SECONDS = 60  # time limit of the schedd for making the jobs
_NO_MORE_ITEMS = "2"
# As in condor_qedit: edit only our own jobs, and also the ads of their clusters.
_OWN_ONLY, _CLUSTERS_TOO = map(htcondor2.TransactionFlag, (1 << 4, 1 << 7))

_ERRORS = (htcondor2.HTCondorException, LookupError, OSError, RuntimeError, TypeError, ValueError)

Rows = list[dict[str, str]]  # values of each job of a submission, with its stamp
Outcomes = dict[str, dict[str, str]]  # by stamp: `reference`, `error` (a refusal) or `unknown` (another error)


def main() -> None:
    """Execute one request, and write its result or error as JSON."""
    request = json.load(sys.stdin)
    # stdout is for the response only: the bindings print to stderr.
    response_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MAX_FILE_BYTES, _MAX_FILE_BYTES))
    htcondor2.enable_debug("D_ERROR")
    call: Callable[..., Any] = _CALLS[request["call"]]
    schedd = None
    try:
        schedd = _schedd(**request["where"])
        response = {"result": call(schedd, **request["arguments"])}
    except _ERRORS as error:
        response = {"error" if schedd else "unreachable": str(error) or type(error).__name__}
    with os.fdopen(response_to, "w") as file:
        json.dump(response, file)


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


def submit(
    schedd: htcondor2.Schedd,
    commands: dict[str, str],
    carrier: dict[str, str] | None,
    files: dict[str, str],
    stamps: list[str],
) -> Outcomes:
    """Submit pilots, and send their files."""
    for name, text in files.items():
        Path(name).touch(mode=0o600)
        Path(name).write_text(text, "utf-8")
    outcomes: Outcomes = {}
    try:
        if carrier is None or len(stamps) <= _FEW:
            _submit(schedd, commands, [{"stamp": stamp} for stamp in stamps], outcomes)
        else:
            _submit_together(schedd, commands, carrier, stamps, outcomes)
    except _ERRORS as error:
        if not outcomes:
            raise
        return {stamp: {"unknown": str(error)} for stamp in stamps} | outcomes
    return outcomes


def _submit(
    schedd: htcondor2.Schedd, commands: dict[str, str], rows: Rows, outcomes: Outcomes, spool: bool = True
) -> None:
    """Submit jobs, with a round trip per job, and more if files are spooled; adds their outcomes."""
    stamps = [row["stamp"] for row in rows]
    try:
        result = schedd.submit(htcondor2.Submit(commands), spool=spool, itemdata=iter(rows))
    except htcondor2.HTCondorException as error:
        words = str(error)
        if (limit := _LIMIT.search(words)) is not None:
            room, code = int(limit[1]), limit[2]
            words = _LIMITS.get(code, f"it takes no more jobs ({code})")
            outcomes |= {stamp: {"error": words} for stamp in stamps[room:]}
            if 0 < room < len(rows):  # HTCondor undoes the whole submission
                _submit(schedd, commands, rows[:room], outcomes, spool)
            return
        if (refusal := _REFUSALS.match(words)) is not None:
            words = words[refusal.end() :].removeprefix("Submit:-1:")
            outcomes |= {stamp: {"error": words} for stamp in stamps}
            return
        raise
    if result.num_procs() != len(stamps):
        raise RuntimeError(f"{result.num_procs()} jobs in place of {len(stamps)}")
    if spool:
        schedd.spool(result)
    cluster, first = result.cluster(), result.first_proc()
    outcomes |= {stamp: {"reference": f"{cluster}.{first + index}"} for index, stamp in enumerate(stamps)}


def _submit_together(
    schedd: htcondor2.Schedd,
    commands: dict[str, str],
    carrier: dict[str, str],
    stamps: list[str],
    outcomes: Outcomes,
) -> None:
    """Spool the files of all pilots with one job that never runs (carrier); the pilots use its directory."""
    carried: Outcomes = {}
    _submit(schedd, commands | carrier, [{"stamp": "carrier"}], carried)
    if "error" in carried["carrier"]:
        outcomes |= dict.fromkeys(stamps, carried["carrier"])
        return
    cluster = carried["carrier"]["reference"].partition(".")[0]
    (ad,) = schedd.query(f"ClusterId == {cluster}", ["Iwd", "ServerTime"])
    directory = ad["Iwd"]
    commands = commands | {
        "executable": f"{directory}/{commands['executable']}",
        # `initialdir` must exist on this host, and jobs made by the schedd do not inherit constants.
        "+Iwd": '"$(directory)"',
        "+SUBMIT_Iwd": f'"{commands["initialdir"]}"',  # destination of fetched files
        "+GubbinsCarrier": cluster,
    }
    rows = [{"stamp": stamp, "directory": directory} for stamp in stamps]
    outcomes |= _materialize(schedd, commands, rows, until=ad["ServerTime"] + _MATERIALIZE_SECONDS)
    if rest := [row for row in rows if row["stamp"] not in outcomes]:
        _submit(schedd, commands, rest, outcomes, spool=False)
    if not any("reference" in outcome for outcome in outcomes.values()):
        _remove(schedd, f"ClusterId == {cluster}", "no pilot was submitted")


def _materialize(schedd: htcondor2.Schedd, commands: dict[str, str], rows: Rows, until: int) -> Outcomes:
    """Let the schedd make the jobs (late materialization), without a round trip per job.

    It makes jobs up to its limits; the others have no outcome, since it gives no reason.
    """
    # Otherwise the schedd would make more jobs later, even if this process dies before it closes the cluster. At
    # the last row it needs room for one more, or it would keep the cluster without jobs.
    room = f"ifThenElse(time() < {until} || JobMaterializeNextProcId >= {len(rows)}, {len(rows) + 1}, 0)"
    factory = {"max_materialize": str(len(rows)), "+JobMaterializeMaxIdle": room}
    try:
        result = schedd.submit(htcondor2.Submit(commands | factory), itemdata=iter(rows))
    except htcondor2.HTCondorException as error:
        if "(late materialization)" in str(error) or _REFUSALS.match(str(error)):
            return {}
        raise
    wanted, attributes = f"ClusterId == {result.cluster()}", ["GubbinsStamp", "ProcId"]
    made = schedd.query(wanted, attributes)
    if len(made) < len(rows):
        _edit(schedd, wanted, "JobMaterializePaused", _NO_MORE_ITEMS)
        made = schedd.query(wanted, attributes)
        if not made:
            _remove(schedd, wanted, "no pilot was submitted")
    return {str(ad["GubbinsStamp"]): {"reference": f"{result.cluster()}.{ad['ProcId']}"} for ad in made}


def queue(schedd: htcondor2.Schedd, attributes: list[str]) -> list[list[Any]]:
    """List all our pilots in the queue, and the carriers of their files."""
    wanted = "GubbinsStamp =!= undefined || GubbinsCarrier =!= undefined"
    return _rows(schedd.query(wanted, attributes, opts=htcondor2.QueryOpt.DefaultMyJobsOnly), attributes)


def history(schedd: htcondor2.Schedd, attributes: list[str], stamps: list[str]) -> list[list[Any]]:
    """Search the history for jobs of these pilots that have left the queue."""
    found = []
    for some in _members(stamps):
        found += schedd.history(some, attributes, match=2 * min(len(stamps), _AT_ONCE))
    return _rows(found, attributes)


def remove(schedd: htcondor2.Schedd, stamps: list[str]) -> int:
    """Remove the pilots that have not ended; return the number without permission."""
    return sum(_remove(schedd, f"{some} && JobStatus =!= 3 && JobStatus =!= 4") for some in _members(stamps))


def remove_jobs(schedd: htcondor2.Schedd, jobs: list[str], reason: str) -> int:
    """Remove jobs by their ids; return the number without permission."""
    numbers = [tuple(map(int, job.split("."))) for job in jobs]
    wanted = " || ".join(f"(ClusterId == {cluster} && ProcId == {proc})" for cluster, proc in numbers)
    active = "JobStatus =!= 3 && (JobStatus =!= 4 || GubbinsCarrier =?= ClusterId)"
    return _remove(schedd, f"({wanted}) && {active}", reason)


def _remove(schedd: htcondor2.Schedd, constraint: str, reason: str = "by the pilot system") -> int:
    done = schedd.act(htcondor2.JobAction.Remove, constraint, reason=(reason, 0))
    return int(done["TotalPermissionDenied"])


def release(schedd: htcondor2.Schedd, stamps: list[str]) -> None:
    """Let ended pilots leave the queue."""
    for some in _members(stamps):
        _edit(schedd, f"{some} && (JobStatus == 3 || JobStatus == 4)", "LeaveJobInQueue", "false")


def _edit(schedd: htcondor2.Schedd, wanted: str, name: str, value: str) -> None:
    """Edit our jobs and clusters that match; there may be none."""
    try:
        schedd.edit(wanted, name, value, flags=_OWN_ONLY | _CLUSTERS_TOO)
    except htcondor2.HTCondorException:
        # No match is an error, too, and matching jobs leave the queue at any time.
        own = htcondor2.QueryOpt.DefaultMyJobsOnly | htcondor2.QueryOpt.IncludeClusterAd
        if schedd.query(wanted, ["ClusterId"], limit=1, opts=own):
            raise


def output(schedd: htcondor2.Schedd, job: str, names: list[str], limit_bytes: int) -> list[str | None]:
    """Fetch files of a job, and return the last part of each; None: there is no such file."""
    schedd.retrieve([job])
    return [_tail(Path.cwd() / name, limit_bytes) for name in names]


_CALLS = {each.__name__: each for each in (submit, queue, history, remove, remove_jobs, release, output)}


def _members(stamps: list[str]) -> Iterator[str]:
    for start in range(0, len(stamps), _AT_ONCE):
        some = ", ".join(classad2.quote(stamp) for stamp in stamps[start : start + _AT_ONCE])
        yield f"member(GubbinsStamp, {{{some}}})"


def _rows(ads: Iterable[classad2.ClassAd], attributes: list[str]) -> list[list[Any]]:
    return [[_plain(ad, name) for name in attributes] for ad in ads]


def _plain(ad: classad2.ClassAd, name: str) -> str | int | None:
    """Get an attribute that is text, a number or a boolean; None: it has another type."""
    try:
        value = ad.get(name)
    except Exception:
        return None
    # `Value.Undefined` is a subclass of int.
    return value if type(value) in (str, int, bool) else None


def _tail(path: Path, limit_bytes: int) -> str | None:
    try:
        # A pilot may have replaced it by a link or a FIFO.
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
