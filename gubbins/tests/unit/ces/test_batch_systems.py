"""Templates of batch systems that cannot be had here: their answers as the manuals show them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gubbins.ces import CEDescription, PilotAtCE
from gubbins.ces.batch import BatchBackend, BatchSettings
from gubbins.ces.batch.systems import SYSTEMS
from gubbins.ces.slurm.jobs import Job
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
    ("pbs", "Connection refused\nqsub: cannot connect to server pbs01 (errno=111)", "unknown"),
    ("lsf", "nosuch: No such queue. Job not submitted.", "refused"),
    ("lsf", "User cannot use the queue. Job not submitted.", "refused"),
    ("lsf", "Request aborted by esub. Job not submitted.", "refused"),
    ("lsf", "Pending job threshold reached. Retrying in 60 seconds...", "quota"),
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
    ("gridengine", "error: commlib error: got select error (Connection refused)", "unknown"),
    ("gridengine", 'Unable to run job: warning: x\nYour job 2 ("p") has been submitted\nExiting.', "unknown"),
]


def backend(system: str) -> BatchBackend:
    settings = BatchSettings.model_validate(
        {"system": system, "directory": "/pilots", "wall_minutes": 90, "cpus": 2}
    )
    return BatchBackend(CEDescription("batch", 9, 1.0), settings)


def test_jobs_of_pbs_are_known_by_the_stamp_in_their_environment() -> None:
    assert dict(SYSTEMS["pbs"].parse(PBS_QSTAT)) == {
        STAMP: [Job("1234", "RUNNING", "", "")],
        "held": [Job("1235", "PENDING", "", "PBS: Job held by root on Mon Jun  1 10:00:00")],
    }


def test_jobs_of_lsf_are_known_by_their_names_and_say_what_they_wait_for() -> None:
    assert dict(SYSTEMS["lsf"].parse(LSF_BJOBS)) == {
        STAMP: [Job("101", "RUNNING", "", "")],
        "waits": [Job("102", "PENDING", "", "")],
        "held": [Job("103", "PENDING", "", "LSF: The job was suspended by the user while pending;")],
        "done": [Job("104", "COMPLETED", "", "")],
        "failed": [Job("105", "FAILED", "3", "")],
        "suspended": [Job("106", "RUNNING", "", "")],
    }


def test_an_answer_of_grid_engine_that_was_cut_off_is_none() -> None:
    with pytest.raises(CEUnavailableError, match="cut off"):
        SYSTEMS["gridengine"].parse("<?xml version='1.0'?><job_info><queue_info>")


@pytest.mark.parametrize(
    ("system", "line", "number"), [(name, line, n) for name, lines in NUMBERS.items() for line, n in lines.items()]
)
def test_only_what_the_system_says_is_a_number(system: str, line: str, number: str) -> None:
    done = subprocess.run(
        ["sed", "-n", SYSTEMS[system].number], input=f"{line}\n", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == number


@pytest.mark.parametrize(("system", "said", "what"), SAID)
def test_a_refusal_is_told_from_a_quota_and_from_what_nobody_knows(system: str, said: str, what: str) -> None:
    outcome = backend(system).refusal(Completed(1, "", said))
    assert what == ("unknown" if outcome is None else "quota" if outcome.quota else "refused")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_submission_names_the_pilot_and_its_limits(system: str) -> None:
    how = backend(system).submission(PilotAtCE(STAMP, "vo"))
    words = " ".join(how.argv)
    assert f"p{STAMP}"[:15] in words
    assert {"gridengine": "h_rt=1:30:00", "pbs": "walltime=1:30:00", "lsf": "-W 90"}[system] in words
    assert SYSTEMS[system].variable in how.script.decode()
    assert subprocess.run(["/bin/sh", "-n"], input=how.script, check=True).returncode == 0
    assert subprocess.run(["/bin/sh", "-n", "-c", how.find], check=True).returncode == 0


@given(text=st.text(), system=st.sampled_from(["pbs", "lsf"]))
def test_answers_of_another_shape_are_no_jobs_and_no_error(text: str, system: str) -> None:
    assert all(job.number.isdecimal() for jobs in SYSTEMS[system].parse(text).values() for job in jobs)


@pytest.mark.parametrize(
    ("said", "code", "numbers", "is_known"),
    [
        ("1234", 0, ["1234"], True),
        (f"Job <p{STAMP}> is not found", 255, [], True),
        ("LSF is down. Please wait ...", 255, [], False),
        ("Failed in an LSF library call: Slave LIM configuration is not ready yet.", 255, [], False),
    ],
)
def test_a_queue_of_lsf_that_does_not_answer_leaves_open_if_there_is_a_job(
    tmp_path: Path, said: str, code: int, numbers: list[str], is_known: bool
) -> None:
    (tmp_path / "bjobs").write_text(f"#!/bin/sh\necho '{said}'{' >&2' if code else ''}\nexit {code}\n")
    (tmp_path / "bjobs").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = ["/bin/sh", "-c", SYSTEMS["lsf"].find(STAMP)]
    done = subprocess.run(argv, env=path, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode == 0) == (numbers, is_known)
