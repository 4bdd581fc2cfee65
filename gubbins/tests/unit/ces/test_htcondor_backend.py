"""Settings, invalid responses and scripts of the back end `htcondor`, without a schedd."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.pilot_waiters import alive
from support.waiting import eventually, until

from gubbins.ces import Observed, PilotAtCE
from gubbins.ces.htcondor import HTCondorBackend, HTCondorSettings
from gubbins.ces.htcondor.description import submission
from gubbins.ces.htcondor.jobs import ATTRIBUTES, judge, parse_jobs, pilots_own
from gubbins.ces.htcondor.process import Bindings
from gubbins.ces.protocol import CEDescription
from gubbins.ces.transports.shell import Completed, LocalShell
from gubbins.domain.exceptions import CEUnavailableError

pytestmark = pytest.mark.event_loops("asyncio", "uvloop")

PILOT = PilotAtCE("stamp", "vo")


def row(**attributes: Any) -> list[Any]:
    known = {"GubbinsStamp": "stamp", "ClusterId": 12, "ProcId": 0}
    return [(known | attributes).get(name) for name in ATTRIBUTES]


@pytest.mark.parametrize(
    ("attributes", "state", "reason"),
    [
        ({"JobStatus": 1}, Observed.WAITING, None),
        ({"JobStatus": 2}, Observed.RUNNING, None),
        ({"JobStatus": 6}, Observed.RUNNING, None),
        ({"JobStatus": 7}, Observed.RUNNING, None),
        ({"JobStatus": 4, "ExitCode": 0}, Observed.DONE, None),
        ({"JobStatus": 4, "ExitCode": 3}, Observed.FAILED, "exit code 3"),
        ({"JobStatus": 4}, Observed.FAILED, "exit code unknown"),
        ({"JobStatus": 4, "ExitBySignal": True, "ExitSignal": 9}, Observed.FAILED, "ended by signal 9"),
        ({"JobStatus": 5, "HoldReasonCode": 16}, Observed.WAITING, None),
        (
            {"JobStatus": 5, "HoldReasonCode": 34, "HoldReason": "too\n much "},
            Observed.WAITING,
            "on hold (code 34): too much",
        ),
        ({"JobStatus": 3, "RemoveReason": "via condor_rm"}, Observed.FAILED, "removed at the site: via condor_rm"),
        ({"JobStatus": 3}, Observed.FAILED, "removed at the site: no reason is given"),
        ({"JobStatus": 99}, Observed.NO_NEWS, "HTCondor: unknown state 99"),
        ({"JobStatus": "2"}, Observed.NO_NEWS, "HTCondor: unknown state None"),
    ],
)
def test_a_job_state_maps_to_a_pilot_state(
    attributes: dict[str, Any], state: Observed, reason: str | None
) -> None:
    (job,) = parse_jobs([row(**attributes)])
    assert judge(PILOT, job) == (state, reason, "12.0")


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"LastHoldReasonCode": 46, "LastHoldReason": "ran too long"}, "put on hold (code 46): ran too long"),
        ({"LastHoldReasonCode": 16}, "interrupted on its node; it is not started a second time"),
    ],
)
def test_a_pilot_removed_by_its_own_rule_has_the_reason(attributes: dict[str, Any], reason: str) -> None:
    rule = "The job attribute PeriodicRemove expression '…' evaluated to TRUE"
    (job,) = parse_jobs([row(JobStatus=3, RemoveReason=rule, **attributes)])
    assert judge(PILOT, job).reason == reason
    assert judge(PILOT._replace(cancel_requested=True), job).reason == "cancelled"


def test_a_job_whose_files_are_not_spooled_is_abandoned_after_a_while() -> None:
    waiting = row(JobStatus=5, HoldReasonCode=16, EnteredCurrentStatus=1000, ServerTime=1600)
    abandoned = row(JobStatus=5, HoldReasonCode=16, EnteredCurrentStatus=1000, ServerTime=1601)
    assert [job.abandoned(600) for each in (waiting, abandoned) for job in parse_jobs([each])] == [False, True]


def test_of_two_jobs_the_recorded_one_is_the_pilot_or_else_the_first() -> None:
    jobs = parse_jobs([row(ClusterId=12), row(ClusterId=9, ProcId=1)])
    assert [pilots_own(PILOT._replace(reference=known), jobs) for known in ("12.0", None)] == jobs[::-1]


_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
_rows = st.lists(_values, min_size=len(ATTRIBUTES), max_size=len(ATTRIBUTES)) | st.lists(_values) | _values


@given(st.lists(_rows) | _values)
def test_any_response_gives_an_observation_or_an_error(rows: object) -> None:
    for job in parse_jobs(rows):
        seen = judge(PILOT, job)
        assert seen.reason is None or seen.reason.isprintable()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either a collector or an address"),
        ({"collector": "ce", "address": "<10.0.0.1:9618>"}, "give either a collector or an address"),
        ({"address": "<10.0.0.1:9618>", "schedd": "ce"}, "of no use with an address"),
        ({"collector": "ce", "token": "token"}, "must be an absolute path"),
        ({"collector": 'ce"'}, "should match pattern"),
        ({"collector": "ce", "submit_commands": {"Executable": "x"}}, "is not for you to set"),
        ({"collector": "ce", "submit_commands": {"MY.GubbinsStamp": "x"}}, "is not for you to set"),
        ({"collector": "ce", "submit_commands": {"rank": "x\nqueue 9"}}, "must be one line"),
        ({"collector": "ce", "submit_commands": {"queue 9 #": "x"}}, "should match pattern"),
        ({"collector": "ce", "configuration": {"A": "x\ny"}}, "must be one line"),
        ({"collector": "ce", "default_script": "\0"}, "must not contain a NUL"),
        ({"collector": "ce", "nonesuch": 1}, "Extra inputs are not permitted"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HTCondorSettings.model_validate(settings)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import nonesuch", r"pip install 'gubbins-pilots\[htcondor\]'"),
        ("print('{\"result\"')", r"no response from HTCondor's bindings \(0\)"),
        ("print('[1]')", r"no response from HTCondor's bindings \(0\)"),
        ("import os; os.kill(os.getpid(), 9)", r"no response from HTCondor's bindings \(-9\)"),
        ('print(\'{"error": "so   what"}\')', "^so what$"),
        ("import sys; sys.exit('11/22/26 05:17:25 who are you?')", r"\(1\); who are you\?$"),
    ],
)
async def test_an_invalid_response_changes_no_state_and_has_a_reason(
    program: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CEUnavailableError, match=message):
        await backend_with(program, tmp_path).poll([PILOT])


@pytest.mark.parametrize(
    "response", [None, [], 7, {}, {"stamp": None}, {"stamp": "12.0"}, {"stamp": {}}, {"stamp": {"reference": 12}}]
)
async def test_a_submission_without_an_outcome_is_neither_a_pilot_nor_a_refusal(
    response: object, tmp_path: Path
) -> None:
    backend = backend_with(f"print({json.dumps({'result': response})!r})", tmp_path)
    with pytest.raises(CEUnavailableError, match="did not respond about the pilot stamp"):
        await backend.submit([PILOT._replace(maybe_submitted=False)])


@pytest.mark.parametrize(
    ("history", "known"),
    [
        ("print(json.dumps({'error': 'not authorized'}))", True),
        ("print(json.dumps({'error': 'Received \"DENIED\" from server for user pilot@x.'}))", True),
        ("print(json.dumps({'error': 'Remote history has been disabled on this schedd'}))", True),
        ("print(json.dumps({'error': 'HISTORY undefined in remote configuration.'}))", True),
        ("print(json.dumps({'error': 'Cowardly refusing to queue more than 1000 requests.'}))", False),
        ("print(json.dumps({'error': 'Failed to launch history helper process'}))", False),
        ("print(json.dumps({'error': 'Failed communication with collector.; Connection refused'}))", False),
        ("sys.exit(1)", False),
        ("time.sleep(600)", False),
    ],
)
async def test_only_a_refused_history_makes_pilots_unknown_and_a_missing_response_changes_no_state(
    history: str, known: bool, tmp_path: Path
) -> None:
    program = (
        "import json, sys, time\n"
        "if json.load(sys.stdin)['call'] == 'queue': print(json.dumps({'result': []}))\n"
        f"else: {history}"
    )

    class ShortTimeout(LocalShell):  # the queue may take its time, on however busy a host
        async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float) -> Completed:
            seconds = 0.2 if "sleep" in history and b'"history"' in stdin else timeout
            return await super().run(argv, stdin=stdin, timeout=seconds)

    backend = backend_with(program, tmp_path, ShortTimeout)
    if known:
        assert await backend.poll([PILOT]) == {}
    else:
        assert await backend.poll([PILOT]) == {PILOT.stamp: (Observed.NO_NEWS, None, None)}
        assert backend.warning
        with pytest.raises(CEUnavailableError):  # who does not know whether there is one must not submit a second
            await backend_with(program, tmp_path, ShortTimeout).submit([PILOT._replace(reference=None)])


async def test_a_call_is_killed_after_the_time_out_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    program = (
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(pids) + '.new'!r}, 'w').write(f'{{os.getpid()}} {{child.pid}} {{os.getcwd()}}')\n"
        f"os.rename({str(pids) + '.new'!r}, {str(pids)!r}); time.sleep(600)"
    )
    call = asyncio.create_task(backend_with(program, tmp_path, timeout_seconds=300).poll([PILOT]))
    await until(pids.exists, "the program runs", 60)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    own, child, directory = pids.read_text().split()
    assert not Path(directory).exists()
    await until(lambda: not any(alive(int(pid)) for pid in (own, child)), "both have ended", 60)

    with pytest.raises(CEUnavailableError, match=r"the schedd \(queue\) has not responded within 0.2 s"):
        await backend_with(program, tmp_path, timeout_seconds=0.2).poll([PILOT])


async def test_the_bindings_have_no_configuration_of_the_host_and_no_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS", "ANONYMOUS")
    monkeypatch.setenv("DIRACX_DB_URL_SECRET", "password")
    token = tmp_path / "token"
    token.write_text("a.b.c\n")
    program = (
        "import json, os, pathlib\n"
        "seen = {name: value for name, value in os.environ.items() if 'CONDOR' in name or 'DIRACX' in name}\n"
        "seen['token'] = pathlib.Path(seen['_CONDOR_SEC_TOKEN_DIRECTORY'], 'token').read_text()\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(json.dumps(seen))\n"
        "print(json.dumps({'result': []}))"
    )
    backend = backend_with(program, tmp_path, token=token, configuration={"sec_default_encryption": "NEVER"})
    await backend.poll([PILOT])
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen.pop("token") == "a.b.c\n"
    assert seen["CONDOR_CONFIG"] == os.devnull
    assert seen["_CONDOR_SEC_CLIENT_AUTHENTICATION_METHODS"] == "IDTOKENS"
    assert seen["_CONDOR_SEC_DEFAULT_ENCRYPTION"] == "NEVER"
    assert not any("DIRACX" in name for name in seen)
    assert not Path(seen["_CONDOR_SEC_TOKEN_DIRECTORY"]).exists()


@pytest.mark.parametrize(
    ("settings", "together"),
    [
        ({}, True),
        ({"submit_commands": {"requirements": "true", "+Project": '"lhcb"'}}, True),
        ({"spool_together": False}, False),
        ({"submit_commands": {"X509UserProxy": "/tmp/x509up_u1000"}}, False),
        ({"submit_commands": {"MY.container_image": "/images/pilot.sif"}}, False),
    ],
)
def test_files_are_spooled_once_unless_a_command_may_name_a_file_of_the_worker(
    settings: dict[str, Any], together: bool
) -> None:
    made = submission(HTCondorSettings(collector="ce", default_script="true", **settings), "ce", [PILOT])
    assert (made["carrier"] is not None) == together


def test_a_cancelled_pilot_gets_sigterm_and_may_finish(tmp_path: Path) -> None:
    script = "trap 'echo stopping; sleep 0.1; exit 7' TERM; touch started; while :; do sleep 0.01; done"
    settings = HTCondorSettings(collector="ce", default_script=script)
    for name, text in submission(settings, "ce", [PILOT])["files"].items():
        (tmp_path / name).write_text(text)
    with subprocess.Popen(["/bin/sh", "run", "stamp"], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as run:
        eventually((tmp_path / "started").exists, "it has started", 60)
        run.terminate()
        out, _ = run.communicate(timeout=60)
    assert (run.returncode, out) == (7, "stopping\n")


def backend_with(
    program: str, directory: Path, shell: type[LocalShell] = LocalShell, **settings: Any
) -> HTCondorBackend:
    """A back end that runs this program in place of the bindings."""
    (directory / "program.py").write_text(program)
    given = HTCondorSettings(**({"collector": "ce", "timeout_seconds": 60} | settings))
    bindings = Bindings(given, directory / "program.py", shell)
    return HTCondorBackend(CEDescription("ce", 1, 1.0), given, bindings)
