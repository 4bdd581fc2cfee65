"""Any response of a batch system or a shell: back ends report only pilots that they were called for, or an error
in one line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gubbins.ces import CEDescription, Observation, Observed, PilotAtCE, SubmitOutcome
from gubbins.ces.slurm import SlurmBackend, SlurmSettings
from gubbins.ces.ssh import SSHBackend, SSHSettings
from gubbins.ces.transports.shell import Completed
from gubbins.domain.exceptions import CEUnavailableError, OutputUnavailableError
from gubbins.domain.pilot_states import MyPilotStatus

CE = CEDescription("ce", 10, 1.0)
KNOWN = PilotAtCE("s", "vo", "7")
LOST = PilotAtCE("t", "vo")

_garbage = st.text(max_size=40) | st.sampled_from(["", "0", "7", "-1", "s", "two words", "9" * 5000, "\0", "²"])
_state = st.sampled_from(["PENDING", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL"]) | _garbage
_number = st.sampled_from(["7", "8", "0", "9" * 5000]) | _garbage
_stamp = st.sampled_from(["s", "t"]) | _garbage
#: As `squeue`, the script that looks into directories, `sacct` and the completion log say it.
_lines = st.one_of(
    st.tuples(_number, _state, _garbage, _garbage, _stamp, st.just("|")).map("|".join),
    st.tuples(_stamp, _number, _garbage, _garbage, _garbage).map("|".join),
    st.tuples(_number, _state, _garbage, _stamp).map("|".join),
    st.tuples(_number, _stamp, _state).map(
        lambda job: f"JobId={job[0]} UserId=x Name={job[1]} JobState={job[2]} Partition=p ExitCode=1:0"
    ),
    st.just("JOBID|STATE|EXIT_CODE|REASON|NAME|CLUSTER|"),
    _garbage,
)
_words = ["prepared", "running", "elsewhere", "restarted", "ended", "submitted", "refused", "unreadable"]
_record = st.tuples(st.sampled_from(_words) | _garbage, _stamp, _garbage).map(" ".join)
_errors = st.sampled_from(["", "sbatch: error: Batch job submission failed: no", "slurm_load_jobs error: x"])


def _responses(said: st.SearchStrategy[str]) -> st.SearchStrategy[list[Completed]]:
    codes = st.sampled_from([0] * 8 + [1, 66, 69, 73, 255])
    return st.lists(st.builds(Completed, codes, said, _errors | _garbage), max_size=4)


_of_slurm = _responses(st.lists(_lines, max_size=4).map("\n".join))
_of_a_shell = _responses(st.lists(_record, max_size=4).map("\n".join) | _garbage)


class Babbler:
    """A shell that gives the responses, one after the other, and then nothing."""

    def __init__(self) -> None:
        self._responses: Iterator[Completed] = iter(())

    def begin(self, responses: Sequence[Completed]) -> None:
        """Give these from now on."""
        self._responses = iter(responses)

    async def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 0) -> Completed:
        return next(self._responses, Completed(0, "", ""))

    async def close(self) -> None:
        pass


async def _ask(backend: Any, shell: Babbler, responses: Sequence[Completed]) -> None:
    calls: list[Callable[[], Awaitable[Any]]] = [
        lambda: backend.submit([LOST, KNOWN]),
        lambda: backend.poll([LOST, KNOWN]),
        lambda: backend.cancel([LOST, KNOWN]),
        lambda: backend.output(KNOWN),
        lambda: backend.cleanup([KNOWN._replace(status=MyPilotStatus.DONE)]),
    ]
    for call in calls:
        shell.begin(responses)
        response, message = None, "none"
        try:
            response = await call()
        except (CEUnavailableError, OutputUnavailableError) as error:
            message = str(error)
        assert message
        assert message.isprintable()
        for stamp in ("s", "t") if isinstance(response, dict) else ():
            _look(response.get(stamp))


def _look(said: Observation | SubmitOutcome | None) -> None:
    if isinstance(said, SubmitOutcome):
        assert bool(said.reference) != bool(said.error), said
    words = said.reason if isinstance(said, Observation) else said.error if said else None
    assert words is None or (len(words) <= 500 and words.isprintable()), words
    if isinstance(said, Observation):
        assert isinstance(said.state, Observed)
        assert said.state is not Observed.FAILED or said.reason


_often = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@_often
@given(_of_slurm, st.booleans())
def test_any_response_of_slurm_is_a_result_or_an_error_of_one_line(responses: list[Completed], seen: bool) -> None:
    directory = Path("/pilots")
    log = directory / "log"
    shell = Babbler()
    backend = SlurmBackend(
        CE,
        SlurmSettings(
            directory=directory, nodes_see_directory=seen, completion_log=log, accounting=True, keep="none"
        ),
        shell,
    )
    asyncio.run(_ask(backend, shell, responses))


@_often
@given(_of_a_shell)
def test_any_response_of_a_shell_is_a_result_or_an_error_of_one_line(responses: list[Completed]) -> None:
    shell = Babbler()
    backend = SSHBackend(CE, SSHSettings(host="h", keep="none"), shell)
    asyncio.run(_ask(backend, shell, responses))
