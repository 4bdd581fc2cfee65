"""Responses of Slurm and the resulting states of pilots."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.paths import ROOT

from gubbins.ces import Observation, Observed, PilotAtCE
from gubbins.ces.slurm import SlurmSettings
from gubbins.ces.slurm.batch import batch_script, sbatch_options
from gubbins.ces.slurm.error_parsing import error_line, is_unreachable, submission_error
from gubbins.ces.slurm.jobs import (
    Job,
    Record,
    observe_jobs,
    parse_accounts,
    parse_completions,
    parse_queue,
    parse_records,
)
from gubbins.ces.slurm.submit_host import jobs_of
from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError

DOCS = ROOT / "docs"
DOWN = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n"
REFUSED = """\
sbatch: error: Memory specification can not be satisfied
sbatch: error: Batch job submission failed: Requested node configuration is not available
"""


def job(state: str, reason: str = "None", number: str = "7", exit_code: str = "0") -> Job:
    return Job(number, state, exit_code, reason)


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("PENDING", "Priority", Observation(Observed.WAITING)),
        ("PENDING", "JobHeldAdmin", Observation(Observed.WAITING, "Slurm: JobHeldAdmin")),
        ("PENDING", "burst_buffer/lua: a|b", Observation(Observed.WAITING, "Slurm: burst_buffer/lua: a|b")),
        ("CONFIGURING", "None", Observation(Observed.WAITING)),
        ("RUNNING", "None", Observation(Observed.RUNNING)),
        ("SUSPENDED", "None", Observation(Observed.RUNNING)),
        ("COMPLETING", "None", Observation(Observed.RUNNING)),
        ("COMPLETED", "None", Observation(Observed.DONE)),
        ("TIMEOUT", "TimeLimit", Observation(Observed.FAILED, "it ran longer than it may (TIMEOUT)")),
        ("OUT_OF_MEMORY", "OutOfMemory", Observation(Observed.FAILED, None)),
        ("NODE_FAIL", "None", Observation(Observed.FAILED, "its node failed (NODE_FAIL)")),
        ("PREEMPTED", "None", Observation(Observed.FAILED, None)),
        ("CANCELLED", "None", Observation(Observed.FAILED, "cancelled at the site (CANCELLED)")),
        ("FAILED", "NonZeroExitCode", Observation(Observed.FAILED, "it failed (FAILED)")),
        ("A_STATE_OF_TOMORROW", "None", Observation(Observed.NO_NEWS, "unknown state A_STATE_OF_TOMORROW")),
    ],
)
def test_each_state_of_a_job_maps_to_a_state_of_a_pilot(state: str, reason: str, expected: Observation) -> None:
    jobs = parse_queue(f"7|{state}|0|{reason}|one|c|\n")["one"]
    seen = observe_jobs(jobs, None, reference="7")
    assert seen is not None
    assert seen.state is expected.state
    if expected.reason is not None or expected.state is not Observed.FAILED:
        assert seen.reason == expected.reason
    else:
        assert seen.reason


def test_a_job_that_slurm_does_not_know_is_unknown_and_not_completed() -> None:
    assert observe_jobs([], None, reference="7") is None
    assert observe_jobs([], Record("7", "", False, ""), reference="7") is None


def test_an_exit_code_in_the_directory_is_the_end_of_a_removed_job() -> None:
    assert observe_jobs([], Record("7", "0", False, ""), reference=None) == (Observed.DONE, None, "7")
    assert observe_jobs([], Record("7", "3", False, "no luck"), reference="7") == (
        Observed.FAILED,
        "exit code 3: no luck",
        None,
    )
    assert observe_jobs([], Record("7", "143", True, ""), reference="7") == (Observed.FAILED, "cancelled", None)


def test_of_two_jobs_of_one_stamp_the_running_one_is_the_pilot() -> None:
    jobs = [job("PENDING", number="9"), job("RUNNING", number="10")]
    assert observe_jobs(jobs, None, reference=None) == (Observed.RUNNING, None, "10")


def test_a_job_revoked_for_another_cluster_has_not_ended() -> None:
    taken = job("REVOKED")
    assert observe_jobs([taken, job("RUNNING")], None, reference="7") == (Observed.RUNNING, None, None)
    assert observe_jobs([taken, job("COMPLETED")], None, reference="7") == (Observed.DONE, None, None)
    seen = observe_jobs([taken], None, reference="7")
    assert seen is not None
    assert seen.state is Observed.NO_NEWS
    assert observe_jobs([taken], Record("7", "0", False, ""), reference="7") == (Observed.DONE, None, None)


def test_of_two_ended_jobs_the_one_with_an_exit_code_was_the_pilot() -> None:
    jobs = [job("COMPLETED", number="9"), job("FAILED", number="10")]
    assert observe_jobs(jobs, Record("10", "3", False, ""), reference=None) == (
        Observed.FAILED,
        "exit code 3",
        "10",
    )


def test_the_signal_of_a_killed_job_is_read_from_the_accounting() -> None:
    (killed,) = parse_accounts("7|FAILED|0:9|one\n")["one"]
    assert observe_jobs([killed], None, reference="7") == (Observed.FAILED, "ended by signal 9", None)
    (bad,) = parse_accounts("7|FAILED|3:0|one\n")["one"]
    assert observe_jobs([bad], None, reference="7") == (Observed.FAILED, "exit code 3", None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("7|CANCELLED by 1234|0:15", (Observed.FAILED, "cancelled at the site (CANCELLED)")),
        ("7|OUT_OF_MEMORY|0:125", (Observed.FAILED, "it used more memory than it may (OUT_OF_MEMORY)")),
        ("7|NODE_FAIL|1:0", (Observed.FAILED, "its node failed (NODE_FAIL)")),
        ("7|BOOT_FAIL|0:0", (Observed.FAILED, "its node could not be started (BOOT_FAIL)")),
        ("7|DEADLINE|0:0", (Observed.FAILED, "it could not end before its deadline (DEADLINE)")),
        ("7|PREEMPTED|0:15", (Observed.FAILED, "it had to make way for other jobs (PREEMPTED)")),
        ("7|FAILED|256:0", (Observed.FAILED, "exit code 256")),
        ("7|COMPLETED|0:0", (Observed.DONE, None)),
        *(
            (f"7|{state}|0:0", None)
            for state in ("REQUEUED", "REVOKED", "RESIZING", "STAGE_OUT", "STOPPED", "RUNNING")
        ),
        *((f"{number}|FAILED|1:0", None) for number in ("7.batch", "7.extern", "7_4", "7_[1-3]", "7+0")),
    ],
)
def test_the_accounting_knows_ends_and_no_other_states(fields: str, expected: tuple[Any, ...] | None) -> None:
    seen = observe_jobs(parse_accounts(f"{fields}|one\n").get("one", []), None, reference="7")
    assert (None if seen is None else seen[:2]) == expected


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("256", "exit code 1"),
        ("35072", "exit code 137"),
        ("9", "ended by signal 9"),
        ("139", "ended by signal 11"),  # with a dump of its memory
        ("3:0", "exit code 3"),
    ],
)
def test_the_status_that_squeue_prints_is_reported_as_an_exit_code_or_a_signal(status: str, reason: str) -> None:
    (ended,) = parse_queue(f"7|FAILED|{status}|NonZeroExitCode|one|c|\n")["one"]
    assert observe_jobs([ended], None, reference="7") == (Observed.FAILED, reason, None)


@given(st.text())
def test_malformed_lines_are_ignored(text: str) -> None:
    for jobs in (parse_queue(text), parse_completions(text)):
        for each in jobs.values():
            observe_jobs(each, None, reference=None)
    for record in parse_records(text)[0].values():
        observe_jobs([], record, reference=None)


@given(st.lists(st.tuples(*[st.text(st.characters(exclude_characters="|\n"), max_size=30)] * 3), min_size=1))
def test_a_reason_is_one_short_line_for_any_fields(fields: list[Any]) -> None:
    jobs = [Job(str(number), state, code, reason) for number, (state, code, reason) in enumerate(fields)]
    seen = observe_jobs(jobs, Record("", "x" * 999, False, "y\n" * 999), reference=None)
    assert seen is not None
    if seen.state is Observed.FAILED:
        assert seen.reason
        assert "\n" not in seen.reason
        assert len(seen.reason) <= 300


@pytest.mark.parametrize("separator", ["\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\r"])
def test_lines_of_other_pilots_and_users_cannot_be_forged_with_separators_of_unicode(separator: str) -> None:
    records, _ = parse_records(f"one|7|3||no luck{separator}two|8|0||\n")
    assert records == {"one": Record("7", "3", False, f"no luck{separator}two|8|0||")}
    forged = "JobId=8 Name=two JobState=COMPLETED ExitCode=0:0"
    theirs = f"JobId=5 Name=one JobState=FAILED WorkDir=/x{separator}{forged} ExitCode=3:0"
    assert set(parse_completions(f"{theirs}\n")) == {"one"}


def test_a_completed_job_is_found_by_name_with_any_directory_name() -> None:
    forged = "WorkDir=/x JobId=1 Name=two JobState=FAILED ExitCode=9:9 y"
    line = (
        f"JobId=5 UserId=me(1) Name=one JobState=COMPLETED Partition=p {forged} DerivedExitCode=0:0 ExitCode=0:0 "
    )
    requeued = line.replace("COMPLETED", "PENDING")
    assert parse_completions(f"{requeued}\n{line}\nx{line}\nJobId=6 Name=a JobState=b\n") == {
        "one": [job("COMPLETED", "", "5", "0:0")]
    }


def test_parsing_a_completed_job_takes_linear_time() -> None:
    begun = time.process_time()
    assert parse_completions("JobId=5 " + "x Name=a JobState=b " * 100_000) == {}
    assert time.process_time() - begun < 10  # a quadratic search takes minutes


def test_jobs_of_a_queue_are_parsed_by_name() -> None:
    text = "5|FAILED|256|BadConstraints|one|c|\n6|PENDING|0|None|two|c|\nslurm_load_jobs error\n"
    assert [each.reference for each in parse_queue(text, clusters=True)["two"]] == ["6;c"]
    assert parse_queue(text) == {
        "one": [Job("5", "FAILED", "1:0", "BadConstraints")],
        "two": [job("PENDING", number="6", exit_code="0:0")],
    }


def said(stderr: str, stdout: str = "") -> Completed:
    return Completed(1, stdout, stderr)


FAILED = "sbatch: error: Batch job submission failed: "
QUOTA = FAILED + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)\n"


@pytest.mark.parametrize(
    "stderr",
    [
        DOWN,
        "sbatch: fatal: Could not establish a configuration source\n",
        "/bin/sh: 1: sbatch: not found\n",
        "",
        FAILED + 'Socket timed out on send/recv operation\nTry "sbatch --help" for more information\n',
        "sbatch: error: invalid thing said before\n" + FAILED + "Socket timed out on send/recv operation\n",
        FAILED + "Message receive failure\n",
        FAILED + "Unexpected message received\n",
        FAILED + "Zero Bytes were transmitted or received\n",
        FAILED + "Unable to contact slurm controller (receive failure)\n",
        FAILED + "Invalid authentication credential\n",
        FAILED + "Resource temporarily unavailable\n",
        FAILED + "Slurm backup controller in standby mode\n",
        FAILED + "An error of tomorrow\n",
        "site-sbatch[12]: sbatch: error: Invalid user for SlurmUser slurm, ignored\n"
        "site-sbatch[12]: " + FAILED + "Socket timed out on send/recv operation\n",
    ],
)
def test_an_unknown_error_leaves_the_outcome_unknown(stderr: str) -> None:
    assert submission_error(said(stderr)) is None


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (REFUSED, "Memory specification can not be satisfied; Requested node configuration is not available"),
        (
            "sbatch: unrecognized option '--frob'\nTry \"sbatch --help\" for more information\n",
            "unrecognized option '--frob'",
        ),
        (FAILED + "Invalid account or account/partition combination specified\n", "Invalid account"),
        (FAILED + "User's group not permitted to use this partition\n", "User's group not permitted"),
        (FAILED + "Access/permission denied\n", "Access/permission denied"),
        (FAILED + "Requested time limit is invalid (missing or exceeds some limit)\n", "Requested time limit"),
        ("sbatch: error: no project\n" + FAILED + "Unspecified error\n", "no project; Unspecified error"),
        ("sbatch: error: cli_filter plugin terminated with error\n", "cli_filter plugin"),
        (
            "sbatch: error: Contact us\nsbatch: error: cli_filter plugin terminated with error\n",
            "Contact us; cli_filter",
        ),
        ("site-sbatch[12]: " + FAILED + "Invalid qos specification\n", "Invalid qos specification"),
        (FAILED + "Invalid qos specification\nand a line below it\n", "Invalid qos specification"),
        (QUOTA, "Job violates accounting/QOS policy"),
    ],
)
def test_a_definite_refusal_has_the_complete_message(stderr: str, message: str) -> None:
    outcome = submission_error(said(stderr))
    assert outcome is not None
    assert str(outcome.error).startswith(f"Slurm: {message}")
    assert not outcome.quota


@pytest.mark.parametrize(
    "limit", ["AssocMaxSubmitJobLimit", "QOSMaxSubmitJobPerUserLimit", "AssocGrpSubmitJobsLimit"]
)
def test_a_limit_on_submitted_jobs_is_a_quota(limit: str) -> None:
    outcome = submission_error(said(f"sbatch: error: {limit}\n{QUOTA}"))
    assert outcome is not None
    assert outcome.quota
    assert str(outcome.error).startswith(f"Slurm: {limit}; Job violates")


def test_messages_of_a_command_are_quoted_from_stdout_and_stderr() -> None:
    assert error_line(said("")) == "no message"
    assert error_line(said("", "no budget left\n")) == "no budget left"
    assert error_line(said("Welcome\nsqueue: error: Invalid user\n")) == "Invalid user"
    assert is_unreachable(said(DOWN))
    assert is_unreachable(said("slurm_load_jobs error: Socket timed out on send/recv operation\n"))
    assert not is_unreachable(said(REFUSED))


@pytest.mark.parametrize(
    ("stdout", "stderr", "is_response"),
    [
        ("", "", True),
        ("", "sacct: warning: deprecated\n", True),
        ("", "sacct: error: Sending PersistInit msg: Connection refused\n", False),
        ("", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", False),
        ("Maintenance on Tuesday\n", "squeue: error: Unable to contact slurm controller\n", False),
        ("Maintenance on Tuesday\n", "", True),
        ("Maintenance on Tuesday\n", "Please contact the help desk\n", True),
        ("", "squeue: warning: slow connection\n", True),
        ("7|PENDING|0|None|one|c|\n", "squeue: error: Unable to contact the primary controller\n", True),
    ],
)
def test_a_response_without_jobs_and_with_an_error_is_a_failure_despite_exit_code_0(
    stdout: str, stderr: str, is_response: bool
) -> None:
    done = Completed(0, stdout, stderr)
    if is_response:
        assert jobs_of(done, "squeue", parse_queue) == parse_queue(stdout)
    else:
        with pytest.raises(CEUnavailableError, match=r"(Connection refused|Unable to contact)"):
            jobs_of(done, "squeue", parse_queue)


@pytest.mark.parametrize(
    "wrong",
    [
        {"directory": "relative"},
        {"directory": "/with%percent"},
        {"extra_options": ["--array=1-100"]},
        {"extra_options": ["--wrap=rm"]},
        {"extra_options": ["--arr=1-10"]},  # sbatch takes the beginning of a name for the name
        {"extra_options": ["--wra=id"]},
        {"extra_options": ["--o=/dev/null"]},
        {"extra_options": ["--clusters=b"]},
        {"extra_options": ["--cluster=b"]},
        {"extra_options": ["-p short"]},
        {"partition": "short; rm"},
        {"environment": {"A B": "c"}},
        {"cpus": 0},
        {"speed": 1},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmSettings.model_validate({"directory": "/pilots", **wrong})


def test_resources_become_options_of_sbatch() -> None:
    settings = SlurmSettings(
        directory=Path("/pilots"),
        partition="short,long",
        account="atlas",
        qos="grid",
        cpus=8,
        memory_mb=2000,
        wall_minutes=90,
        extra_options=["--constraint=avx2"],
    )
    options = sbatch_options(settings, PilotAtCE("s", "vo"))
    assert {"--partition=short,long", "--account=atlas", "--qos=grid", "--cpus-per-task=8"} < set(options)
    assert {"--mem=2000M", "--time=90", "--constraint=avx2", "--output=/pilots/s/stdout"} < set(options)
    unseen = settings.model_copy(update={"nodes_see_directory": False})
    assert "--output=/dev/null" in sbatch_options(unseen, PilotAtCE("s", "vo"))


def test_no_setting_can_inject_a_command_into_the_batch_script() -> None:
    settings = SlurmSettings(
        directory=Path("/pi lots'"), default_script="SCRIPT\n@job@", environment={"A": "'; rm -rf /\n@script@"}
    )
    text = batch_script(settings, "ce", PilotAtCE("s", "vo'")).decode()
    assert "export A=''\"'\"'; rm -rf /\n@script@'" in text
    assert "export PILOT_VO='vo'\"'\"''" in text
    assert text.count("\nSCRIPT\n") == 1


def test_the_documentation_has_every_setting_and_every_reason() -> None:
    page = (DOCS / "how-to/connect-a-slurm-site.md").read_text()
    for name, field in SlurmSettings.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \|", page, re.MULTILINE)
        assert row, name
        if isinstance(field.default, int | float | str):
            assert str(field.default).lower() in row[1].lower(), name
    example = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0])
    SlurmSettings.model_validate(example["compute_elements"][0]["settings"])
    reasons = (DOCS / "reference/pilot-states.md").read_text()
    for state in ("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"):
        seen = observe_jobs([job(state)], None, reference="7")
        assert seen is not None
        assert f"({state})`" in reasons
        assert str(seen.reason).removeprefix("its node ") in reasons, seen.reason
