"""Parsers of PBS and LSF, with output of their manuals."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gubbins.ces import CEDescription, Observation, Observed, PilotAtCE
from gubbins.ces.batch import BatchBackend, BatchSettings
from gubbins.ces.batch.systems import SYSTEMS
from gubbins.ces.slurm.jobs import Job, observe_jobs
from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError

STAMP = "0123456789abcdef0123456789abcdef"

PBS_QSTAT = f"""\
Job Id: 1234.pbs01.example.org
    Job_Name = p0123456789abcd
    Job_Owner = pilot@login1.example.org
    job_state = R
    queue = workq
    Variable_List = PBS_O_HOME=/home/pilot,PBS_O_LANG=en_US.UTF-8,
\tPBS_O_LOGNAME=pilot,PILOT_STAMP={STAMP[:20]}
\t{STAMP[20:]},PBS_O_QUEUE=workq
    comment = Job run at Mon Jun 01 at 10:00 on (node1:ncpus=1)
    exec_host = node1/0

Job Id: 1235.pbs01
    Job_Name = pheld
    job_state = H
    Variable_List = PILOT_STAMP=held
    comment = Job held by root on Mon Jun  1 10:00:00

Job Id: 1236.pbs01
    Job_Name = pgone
    job_state = F
    Exit_status = 0
    Variable_List = PILOT_STAMP=gone

Job Id: 1238[].pbs01
    job_state = ?
    Variable_List = PILOT_STAMP=strange

Job Id: 1237.pbs01
    Job_Name = another
    job_state = Q
    Variable_List = PBS_O_HOME=/home/pilot
"""

LSF_BJOBS = f"""\
101|RUN|p{STAMP}|-|-
102|PEND|pwaits|-|New job is waiting for scheduling;
103|PSUSP|pheld|-|The job was suspended by the user while pending;
104|DONE|pdone|-|-
105|EXIT|pfailed|3|-
106|SSUSP|psuspended|-|-
107|RUN|another|-|-
108|LOST|pstrange|-|-
"""

NUMBERS = {
    "gridengine": {
        "4711": "4711",
        'Your job 4711 ("pab12") has been submitted': "4711",
        "Welcome to the 2 clusters": "",
    },
    "pbs": {"1234.pbs01.example.org": "1234", "22.05 GB are free": "", "1234": "1234"},
    "lsf": {
        "Job <123> is submitted to default queue <normal>.": "123",
        "Job <123> is submitted to queue <short>.": "123",
        "Project <3> is charged": "",
    },
}

# What was said, and whether that is a refusal, a quota, or unknown.
SAID = [
    ("pbs", "qsub: Unknown queue", "refused"),
    ("pbs", "qsub: Unauthorized Request", "refused"),
    ("pbs", "qsub: Job violates queue and/or server resource limits", "refused"),
    ("pbs", "qsub: would exceed queue generic's per-user limit", "quota"),
    ("pbs", "qsub: Maximum number of jobs already in queue", "quota"),
    ("pbs", "qsub: would exceed complex's per-user limit of jobs in 'Q' state", "quota"),
    ("pbs", "qsub: submit error (Maximum number of jobs already in queue MSG=total number of jobs)", "quota"),
    ("pbs", "qsub: submit error (Bad UID for job execution MSG=ruserok failed validating a/a from b)", "refused"),
    ("pbs", "qsub: Job exceeds queue resource limits MSG=cannot locate feasible nodes", "refused"),
    ("pbs", "qsub: Your job has been administratively rejected by the queueing system.", "refused"),
    ("pbs", "qsub: submit filter returned an error code, aborting job submission.", "refused"),
    ("pbs", "qsub: submit error (No default queue specified MSG=requested queue not found)", "refused"),
    ("pbs", "qsub: submit error (Pbs Server is currently too busy to service this request)", "unknown"),
    ("pbs", "Connection refused\nqsub: cannot connect to server pbs01 (errno=111)", "unknown"),
    ("lsf", "nosuch: No such queue. Job not submitted.", "refused"),
    ("lsf", "User cannot use the queue. Job not submitted.", "refused"),
    ("lsf", "Request aborted by esub. Job not submitted.", "refused"),
    ("lsf", "Pending job threshold reached. Retrying in 60 seconds...", "quota"),
    ("lsf", "RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.", "refused"),
    ("lsf", "User's job limit in the queue has been reached. Job not submitted.", "quota"),
    ("lsf", "Maximum number of pending jobs reached. Job not submitted.", "quota"),
    ("lsf", "Communication time out. Job not submitted.", "unknown"),
    ("lsf", "LSF is down. Please wait ...", "unknown"),
    ("lsf", "batch system daemon not responding ... still trying", "unknown"),
    (
        "gridengine",
        'Unable to run job: Job was rejected because job requests unknown queue "x"\nExiting.',
        "refused",
    ),
    (
        "gridengine",
        "Unable to run job: job rejected: Only 1 jobs are allowed per user (current job count: 1)",
        "quota",
    ),
    ("gridengine", "Unable to run job: job rejected: only 9 jobs are allowed per cluster", "quota"),
    ("gridengine", 'Unable to run job: denied: host "n1" is no submit host.\nExiting.', "refused"),
    ("gridengine", "Unable to run job: failed receiving gdi request response for mid=1.\nExiting.", "unknown"),
    ("gridengine", "error: commlib error: got select error (Connection refused)", "unknown"),
    ("gridengine", 'Unable to run job: warning: x\nYour job 2 ("p") has been submitted\nExiting.', "unknown"),
]


def backend(system: str, **more: object) -> BatchBackend:
    settings = BatchSettings.model_validate(
        {"system": system, "directory": "/pilots", "wall_minutes": 90, "memory_mb": 4000} | more
    )
    return BatchBackend(CEDescription("batch", 9, 1.0), settings)


def test_jobs_of_pbs_are_identified_by_the_stamp_in_their_environment() -> None:
    jobs = SYSTEMS["pbs"].parse(PBS_QSTAT)
    held = Observation(Observed.WAITING, "PBS: Job held by root on Mon Jun 1 10:00:00")
    assert observe_jobs(jobs["held"], None, reference="1235") == held
    assert dict(jobs) == {
        STAMP: [Job("1234", "RUNNING", "", "")],
        "held": [Job("1235", "PENDING", "", "PBS: Job held by root on Mon Jun  1 10:00:00")],
        "strange": [Job("1238", "?", "", "")],
    }


def test_jobs_of_lsf_are_identified_by_their_names_and_have_waiting_reasons() -> None:
    assert dict(SYSTEMS["lsf"].parse(LSF_BJOBS)) == {
        STAMP: [Job("101", "RUNNING", "", "")],
        "waits": [Job("102", "PENDING", "", "")],
        "held": [Job("103", "PENDING", "", "LSF: The job was suspended by the user while pending;")],
        "done": [Job("104", "COMPLETED", "", "")],
        "failed": [Job("105", "FAILED", "3", "")],
        "suspended": [Job("106", "RUNNING", "", "")],
        "strange": [Job("108", "LOST", "", "")],
    }


LOGGED = "The use of this system is logged.\n" * 99


@pytest.mark.parametrize("system", ["gridengine", "pbs", "lsf"])
async def test_a_message_in_place_of_the_queue_is_not_an_empty_queue(system: str, tmp_path: Path) -> None:
    for name in ("qstat", "qselect", "bjobs"):
        (tmp_path / name).write_text("#!/bin/sh\necho Maintenance on 3 December\n")
        (tmp_path / name).chmod(0o755)
    ours = backend(system, commands=tmp_path)
    with pytest.raises(CEUnavailableError, match="Maintenance on 3 December"):
        await ours.queue([])
    find = ours.submission(PilotAtCE(STAMP, "vo")).find
    done = subprocess.run(["/bin/sh", "-c", find], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "Maintenance on 3 December\n")


@pytest.mark.parametrize(
    ("system", "said", "stderr", "complete"),
    [
        ("gridengine", "<?xml version='1.0'?><job_info><queue_info>", "", False),
        ("gridengine", f"<job_info></job_info>\n{LOGGED}", "error: unable to contact a shadow master", True),
        ("pbs", f"{LOGGED}\nJob Id: 1.pbs01\n    Job_Name = another\n", "", True),
        ("pbs", "", "Welcome", True),
        ("lsf", f"{LOGGED}\n101|RUN|another|-|-\n", "", True),
    ],
)
async def test_a_queue_with_its_end_and_without_pilots_is_empty(
    system: str, said: str, stderr: str, complete: bool
) -> None:
    settings = BatchSettings.model_validate({"system": system, "directory": "/pilots"})
    query = BatchBackend(CEDescription("batch", 9, 1.0), settings, Says(Completed(0, said, stderr))).queue([])
    if complete:
        assert await query == {}
    else:
        with pytest.raises(CEUnavailableError, match="job_info"):
            await query


@pytest.mark.parametrize(
    ("system", "line", "number"), [(name, line, n) for name, lines in NUMBERS.items() for line, n in lines.items()]
)
def test_only_the_format_of_the_system_is_a_job_number(system: str, line: str, number: str) -> None:
    done = subprocess.run(
        ["sed", "-n", SYSTEMS[system].number], input=f"{line}\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == number


@pytest.mark.parametrize(("system", "said", "what"), SAID)
def test_refusals_quotas_and_unknown_outcomes_are_distinguished(system: str, said: str, what: str) -> None:
    outcome = backend(system).refusal(Completed(1, "", said))
    assert what == ("unknown" if outcome is None else "quota" if outcome.quota else "refused")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_submission_names_the_pilot_and_its_limits(system: str) -> None:
    how = backend(system).submission(PilotAtCE(STAMP, "vo"))
    words = " ".join(how.argv)
    assert f"p{STAMP}"[:15] in words
    limits = {
        "gridengine": "-l h_rt=1:30:00,h_vmem=4000M",
        "pbs": "-l walltime=1:30:00 -l select=1:mem=4000mb",
        "torque": "-l walltime=1:30:00 -l mem=4000mb",
        "lsf": "-M 4000MB -W 90",
    }
    assert limits[system] in words
    assert SYSTEMS[system].variable in how.script.decode()
    assert subprocess.run(["/bin/sh", "-n"], input=how.script, check=True).returncode == 0
    assert subprocess.run(["/bin/sh", "-n", "-c", how.find], check=True).returncode == 0


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("pbs", ["-l", "select=1:ncpus=8:mem=4000mb"]),
        ("torque", ["-l", "nodes=1:ppn=8,mem=4000mb"]),
        ("lsf", ["-n", "8", "-R", "span[hosts=1]", "-M", "4000MB"]),
    ],
)
def test_all_cpus_of_a_pilot_are_on_one_host(system: str, options: list[str]) -> None:
    argv = backend(system, cpus=8).submission(PilotAtCE(STAMP, "vo")).argv
    at = argv.index(options[1]) - 1
    assert argv[at : at + len(options)] == options


def test_cpus_of_grid_engine_are_refused_with_the_option_to_use() -> None:
    with pytest.raises(ValidationError, match=r"parallel environment .* \['-pe', 'smp', '8'\]"):
        backend("gridengine", cpus=8)


class Says:
    """A shell in which every command has the same result."""

    def __init__(self, response: Completed) -> None:
        self._response = response

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 0) -> Completed:
        return self._response

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("stderr", "empty"),
    [
        ("No job found\n", True),
        ("LSF: the licence ends in 5 days\nNo unfinished job found\n", True),
        ("LSF is down. Please wait ...\nNo job found\n", True),
        ("Cannot connect to LSF. Please wait ...\nNo job found\n", False),
        ("LSF is down. Please wait ...\n", False),
    ],
)
async def test_a_queue_of_lsf_without_a_job_is_empty_beside_any_other_message(stderr: str, empty: bool) -> None:
    settings = BatchSettings.model_validate({"system": "lsf", "directory": "/pilots"})
    query = BatchBackend(CEDescription("batch", 9, 1.0), settings, Says(Completed(255, "", stderr))).queue([])
    if empty:
        assert await query == {}
    else:
        with pytest.raises(CEUnavailableError):
            await query


@pytest.mark.parametrize(
    ("system", "stderr", "warning"),
    [
        (
            "pbs",
            "qdel: Server could not connect to MOM 1234.pbs01",
            "qdel: Server could not connect to MOM 1234.pbs01",
        ),
        ("pbs", "qdel: Unknown Job Id 1234.pbs01\nqdel: Job has finished 1235.pbs01", None),
        ("lsf", "Job <1234>: No matching job found\nJob <1235>: Job has already finished", None),
        ("gridengine", 'denied: job "1234" does not exist', None),
        (
            "lsf",
            "Job <1234>: No permission\nJob <1235>: Job has already finished",
            "bkill: Job <1234>: No permission",
        ),
    ],
)
async def test_a_cancellation_that_fails_for_one_job_is_a_warning_at_most(
    system: str, stderr: str, warning: str | None
) -> None:
    settings = BatchSettings.model_validate({"system": system, "directory": "/pilots"})
    canceller = BatchBackend(CEDescription("batch", 9, 1.0), settings, Says(Completed(1, "", stderr)))
    await canceller.cancel_jobs([Job("1234", "RUNNING", "", ""), Job("1235", "RUNNING", "", "")])
    assert (canceller.warning or "").startswith(warning or "")
    assert (canceller.warning is None) == (warning is None)


async def test_a_server_that_does_not_respond_to_a_cancellation_is_unavailable() -> None:
    settings = BatchSettings.model_validate({"system": "pbs", "directory": "/pilots"})
    stderr = "Connection refused\nqdel: cannot connect to server pbs01 (errno=111)"
    canceller = BatchBackend(CEDescription("batch", 9, 1.0), settings, Says(Completed(1, "", stderr)))
    with pytest.raises(CEUnavailableError, match="cannot connect to server"):
        await canceller.cancel_jobs([Job("1234", "RUNNING", "", "")])


@given(text=st.text(), system=st.sampled_from(["pbs", "lsf"]))
def test_malformed_output_is_ignored(text: str, system: str) -> None:
    assert all(job.number.isdecimal() for jobs in SYSTEMS[system].parse(text).values() for job in jobs)


@pytest.mark.parametrize(
    ("said", "code", "numbers", "is_known"),
    [
        ("Welcome\n1234", 0, ["1234"], True),
        ("1234", 0, ["1234"], True),
        (f"Job <p{STAMP}> is not found", 255, [], True),
        ("LSF is down. Please wait ...", 255, [], False),
        ("Failed in an LSF library call: Slave LIM configuration is not ready yet.", 255, [], False),
    ],
)
def test_an_unavailable_queue_of_lsf_leaves_the_outcome_unknown(
    tmp_path: Path, said: str, code: int, numbers: list[str], is_known: bool
) -> None:
    (tmp_path / "bjobs").write_text(f"#!/bin/sh\necho '{said}'{' >&2' if code else ''}\nexit {code}\n")
    (tmp_path / "bjobs").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = ["/bin/sh", "-c", SYSTEMS["lsf"].find(STAMP)]
    done = subprocess.run(argv, env=path, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode == 0) == (numbers, is_known)
