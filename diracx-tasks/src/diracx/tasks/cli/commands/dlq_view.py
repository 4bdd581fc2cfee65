"""How dead letters look: as a table, as a page, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...plumbing._util.printable import printable_line
from ..errors import CliError, mask, one_line, shortened_line
from ..output import echo, echo_json, show_table, table

if TYPE_CHECKING:
    from ...plumbing.persistence.resubmission import Verdict

_LONGEST_DETAIL = 80
#: Refusals that are told one by one; the rest is a number.
_REFUSALS_SHOWN = 10


def print_table(letters: Sequence[Mapping[str, Any]], total: int) -> None:
    """One line for each, and how many there are."""
    rows = [
        (
            str(letter["id"]),
            f"{letter['buried_at']:%Y-%m-%d %H:%M:%S}",
            letter["task_name"] or "-",
            letter["task_id"],
            letter["reason"],
            str(letter["status"]).lower(),
            str(letter["failed_attempts"]),
            f"{letter['message_bytes'] / 1e6:,.1f} MB" if letter["message_bytes"] >= 50_000 else "",
            shortened_line(letter["detail"], _LONGEST_DETAIL),
        )
        for letter in letters
    ]
    columns = ("number", "buried (UTC)", "task", "task id", "reason", "status", "attempts", "size", "detail")
    show_table(table(columns, rows, unbroken=columns[:2]), "no dead letters")
    if 0 < len(letters) < total:
        echo(f"{len(letters)} of {total}; --limit shows more", err=True)


def print_letter(letter: Mapping[str, Any]) -> None:
    """All about one letter, for reading."""
    from ...operations.dead_letters import letter_record

    shown = letter_record(letter)
    message = shown["message"]
    rows = {
        "number": shown["id"],
        "task": shown["task_name"] or "-",
        "task id": shown["task_id"],
        "status": f"{shown['status'].lower()} since {shown['changed_at']}",
        "buried": f"{shown['buried_at']} from {shown['burial']}",
        "reason": shown["reason"],
        "detail": one_line(shown["detail"]),
    }
    if message is None:
        rows["raw"] = shown["raw"]
    else:
        rows |= {"args": json.dumps(message["task_args"]), "kwargs": json.dumps(message["task_kwargs"])}
        if message["labels"]:
            rows["labels"] = json.dumps(message["labels"])
    lines = [f"{name:8} {printable_line(str(value))}" for name, value in rows.items()]
    for number, chapter in enumerate(shown["history"], 1):
        lines += [
            "",
            f"burial {number}, {chapter['buried_at']}: {chapter['reason']}: {one_line(chapter['detail'])}",
        ]
        lines += _attempts(chapter["attempts"])
    if shown["history"]:
        lines += ["", "since then"]
    echo("\n".join(lines + _attempts(shown["attempts"])))


def _attempts(attempts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for number, attempt in enumerate(attempts, 1):
        where = f"{attempt.get('started', '?')} on {attempt.get('host', '?')}"
        failure = f"{attempt.get('type', '?')}: {attempt.get('message', '')}"
        lines += ["", one_line(f"attempt {number}, {where}: {failure}")]
        lines += [f"  {line}" for line in str(attempt.get("traceback", "")).splitlines()]
    return lines


def report_retry(verdicts: Sequence[Verdict], as_json: bool) -> None:
    """Say what became of each.

    Raises:
        CliError: when one of them was refused.
    """
    from ...plumbing.persistence.resubmission import Fate

    done = {fate: [verdict.letter for verdict in verdicts if verdict.fate is fate] for fate in Fate}
    refused = [(verdict.letter, verdict.why) for verdict in verdicts if verdict.fate is Fate.REFUSED]
    if as_json:
        _print_json(resubmitted=done[Fate.RESUBMITTED], already=done[Fate.ALREADY], refused=refused)
    else:
        counts = [f"{len(done[Fate.RESUBMITTED])} submitted again"]
        if done[Fate.ALREADY]:
            counts.append(f"{len(done[Fate.ALREADY])} had been already")
        if verdicts and len(refused) < len(verdicts):
            echo(", ".join(counts))
        elif not verdicts:
            echo("no dead letters", err=True)
    _tell_refusals(refused, "submitted again")


def report_discard(
    discarded: Sequence[Mapping[str, Any]], refused: Sequence[tuple[Mapping[str, Any], str]], as_json: bool
) -> None:
    """Say what became of each.

    Raises:
        CliError: when one of them was refused.
    """
    if as_json:
        _print_json(discarded=discarded, refused=refused)
    elif discarded:
        echo(f"{len(discarded)} discarded")
    elif not refused:
        echo("no dead letters", err=True)
    _tell_refusals(refused, "discarded")


def _print_json(*, refused: Sequence[tuple[Mapping[str, Any], str]], **done: Sequence[Mapping[str, Any]]) -> None:
    report: dict[str, Any] = {
        name: [{"id": letter["id"], "task_id": letter["task_id"]} for letter in letters]
        for name, letters in done.items()
    }
    report["refused"] = [
        {"id": letter["id"], "task_id": letter["task_id"], "why": mask(why)} for letter, why in refused
    ]
    echo_json(report)


def _tell_refusals(refused: Sequence[tuple[Mapping[str, Any], str]], what: str) -> None:
    if not refused:
        return
    *others, (letter, why) = refused[:_REFUSALS_SHOWN]
    for other, why_not in others:
        echo(one_line(f"dead letter {other['id']} ({other['task_id']}): {why_not}"), err=True)
    if len(refused) == 1:
        raise CliError(f"dead letter {letter['id']} ({letter['task_id']}) was not {what}: {why}")
    echo(one_line(f"dead letter {letter['id']} ({letter['task_id']}): {why}"), err=True)
    raise CliError(f"{len(refused)} dead letters were not {what}")
