"""Validation of the responses of back ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gubbins.ces import Observation, Observed, PilotOutput, SubmitOutcome
from gubbins.ces.protocol import OUTPUT_LIMIT_BYTES
from gubbins.db.sql.schema import MAX_REASON_CHARS, MAX_REFERENCE_CHARS
from gubbins.domain.exceptions import CEUnavailableError
from gubbins.domain.text import one_line


def check_observations(ce: Mapping[str, Any], response: object, stamps: Iterable[str]) -> dict[str, Observation]:
    """Validate the response to a poll; returns the observations of these pilots, with reasons of one line.

    Raises:
        CEUnavailableError: the response is invalid.
    """
    if not isinstance(response, Mapping):
        raise _invalid_response(ce, f"{_kind(response)} in place of an observation of each pilot")
    checked = {}
    for stamp in stamps:
        if stamp not in response:
            continue
        seen = response[stamp]
        if not isinstance(seen, Observation) or not isinstance(seen.state, Observed):
            raise _invalid_response(ce, f"{one_line(repr(seen), 80)} in place of an observation of pilot {stamp}")
        _check_reference(ce, stamp, seen.reference)
        # Only the few with a reason are copied.
        checked[stamp] = seen if seen.reason is None else seen._replace(reason=_reason(ce, stamp, seen.reason))
    return checked


def check_outcome(ce: Mapping[str, Any], response: object, stamp: str) -> SubmitOutcome:
    """Validate the response to a submission; returns the outcome of this pilot, with an error of one line.

    Raises:
        CEUnavailableError: the response is invalid: the pilot may or may not have been submitted.
    """
    if not isinstance(response, Mapping):
        raise _invalid_response(ce, f"{_kind(response)} in place of an outcome of each submission")
    outcome = response.get(stamp)
    if outcome is None:
        raise CEUnavailableError(f"did not respond about the pilot; {_report(ce)}")
    if not isinstance(outcome, SubmitOutcome):
        raise _invalid_response(ce, f"{one_line(repr(outcome), 80)} in place of a reference or an error")
    _check_reference(ce, stamp, outcome.reference)
    return SubmitOutcome(outcome.reference, _reason(ce, stamp, outcome.error), outcome.quota is True)


def check_output(ce: Mapping[str, Any], response: object, stamp: str) -> PilotOutput:
    """Validate the output of this pilot; returns the last `OUTPUT_LIMIT_BYTES` of each stream.

    Raises:
        CEUnavailableError: the response is invalid.
    """
    if isinstance(response, PilotOutput) and isinstance(response.stdout, str) and isinstance(response.stderr, str):
        return PilotOutput(*(each[-OUTPUT_LIMIT_BYTES:] for each in response))
    raise _invalid_response(ce, f"{_kind(response)} in place of the output of pilot {stamp}")


def _check_reference(ce: Mapping[str, Any], stamp: str, reference: object) -> None:
    if reference is None:
        return
    if not isinstance(reference, str) or not reference or not reference.isprintable():
        raise _invalid_response(ce, f"{one_line(repr(reference), 80)} in place of the reference of pilot {stamp}")
    if len(reference) > MAX_REFERENCE_CHARS:
        raise _invalid_response(
            ce,
            f"a reference of {len(reference)} characters for pilot {stamp}, "
            f"and no more than {MAX_REFERENCE_CHARS} can be kept",
        )


def _reason(ce: Mapping[str, Any], stamp: str, reason: object) -> str | None:
    if reason is not None and not isinstance(reason, str):
        raise _invalid_response(ce, f"{one_line(repr(reason), 80)} in place of a reason for pilot {stamp}")
    return None if reason is None else one_line(reason, MAX_REASON_CHARS) or None


def _kind(response: object) -> str:
    return "nothing" if response is None else f"a value of type {type(response).__name__}"


def _invalid_response(ce: Mapping[str, Any], what: str) -> CEUnavailableError:
    return CEUnavailableError(f"invalid response: {what}; {_report(ce)}")


def _report(ce: Mapping[str, Any]) -> str:
    return f"report that to the maintainers of the back end {ce['backend']!r}"
