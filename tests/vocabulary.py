"""Refuses words of our own where the field has one; `make lint` runs it.

The standard terms are in docs/reference/glossary.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".lua", ".md", ".html", ".js", ".css", ".toml", ".yaml", ".yml", ".sh", ".conf", ".acl", ".ini"}
#: What quotes the words, is history, or is not ours.
EXCLUDED = ("tests/vocabulary.py", "CHANGELOG.md", "/vendor/")
#: Words that are legitimate in prose of ADRs and tests are refused in this code only.
SOURCE = ("diracx-tasks/src/", "gubbins/src/")


#: Replaces underscores, in patterns and texts, so that they separate words: names are checked like prose.
SEPARATOR = "¬"


class Word(NamedTuple):
    """A word that is not to be used."""

    pattern: str
    instead: str
    within: tuple[str, ...] = ()  # only in these folders


WORDS = (
    Word(r"(?i)\bwhoever\b", "who or what it is"),
    Word(r"(?i)\bsomebody\b", "who it is: a user, a worker, an operator"),
    Word(r"\bsuspects?\b|is_suspect|_suspects\b", "poison candidate"),
    # `burial`, `buried` and `buried_at` are fields of a dead letter in JSON.
    Word(r"(?<![\"'_])burial(?!: str)", "delivery id"),
    Word(r"\bbury(ing)?\b|\bburies\b|(?<!\")\bburied\b(?![=:]|_at)", "stored as a dead letter; reclaimed"),
    Word(r"condemn", "mark_cancelled"),
    Word(r"\blapsed\b|lapsed_since", "expired"),
    Word(
        r"(?i)(?<!dead )(?<!dead-)(?<!dead_)(?<!dead)(?<!capital )(?<!small )\bletters?\b"
        r"(?!, digits| or a digit|-spacing)",
        "dead letter",
    ),
    Word(r"\bledgers?\b", "held-locks record"),
    Word(r"\b(hand_on|pass_on)\b", "grant_next"),
    Word(r"\bsign(s|ed)?[ _]on\b", "heartbeat"),
    # In quotes or backticks: `woken` and `deaths` are fields of an entry of a stream.
    Word(r"(?<![`'\"])\bwoken\b", "grant, reservation"),
    Word(r"(?<!:)\bhand[- ]?overs?\b", "resumed queue; release of the leadership"),
    Word(r"\bpatien(ce|tly)\b", "retry_until_available"),
    Word(r"\b[Dd]eeds?\b", "audited action"),
    Word(r"\btroubles?\b", "health check"),
    Word(r"\bgrave\b", "severity"),
    Word(r"\b[Cc]hapter", "failure history"),
    Word(r"\bby_hand\b", "admin"),
    Word(r"\bon_trial\b", "half_open"),
    Word(r"\b[Cc]omplaints?\b|complaints", "error_parsing, error"),
    Word(r"\b[Nn]onsense", "invalid_response"),
    Word(r"\b_?courses\b", "statistics"),
    Word(r"\bTold\b|\b_told\b", "ErrorInfo; on_outcome"),
    Word(r"(?<!task\.)(?<!tasks_)\bgiven_up\b", "abandoned_outcome"),
    Word(r"(?<![`'\"])\bdeaths\b", "redelivery_count"),
    Word(r"(?<!since the )(?<!tasks:)(?<!\")\bepoch\b", "dataset_id"),
    Word(r"\bput_aside\b|\btake_up\b", "defer, requeue"),
    Word(
        r"\b(look_after|leave_to_newer|begun_before|ask_for_audit|impatiently|missing_in_row|ScheduleInForce)\b",
        "track, defer, possibly started, request, short timeouts, never seen, settings",
    ),
    Word(r"\bDeadLetterOffice\b", "DeadLetterStore"),
    Word(r"\bTakenOver\b", "LeaseLost"),
    Word(r"\bBlueprint\b|\bblueprint\b", "TaskSpec"),
    Word(r"\bAnnouncements?\b", "ControlChannel"),
    Word(r"\bfall_silent\b", "stop_renewing"),
    Word(r"_LAST_WORDS", "SHUTDOWN_FLUSH_SECONDS"),
    Word(r"_or_die_with", "run_supervised"),
    Word(r"\b_Written\b", "ResolvedOverride"),
    Word(r"\bheard_since\b", "cancelled_since"),
    Word(r"\bmakes_room\b|\b_makes_room\b", "draining"),
    Word(r"\bquota_returns\b", "retry_after"),
    Word(r"\bPauses\b", "Backoff"),
    Word(r"\bis_passing\b", "is_transient"),
    Word(r"\bConfigFollower\b", "ConfigWatcher"),
    Word(r"\bLazyFollower\b", "CachedConfig"),
    Word(r"\bInForce\b", "ActiveConfig"),
    Word(r"\bbound_by\b", "use_broker"),
    Word(r"\b_Submitter\b", "Client"),
    Word(r"\b_Shape\b|\bShape\b", "TaskSignature"),
    Word(r"\bknows_its_future\b", "deterministic"),
    Word(r"\bStillWaiting\b", "AlreadyQueued"),
    Word(r"\btold_running\b|\b_told_running\b", "reported_running"),
    Word(r"\bInstallation\b", "AppContext"),
    Word(r"\b(Verdict|Fate)\b", "ResubmitResult"),
    Word(r"\basked_at\b", "reserved_after, requested_at"),
    Word(r"\boverrun\b", "deadline_exceeded"),
    Word(r"\b_ignorant\b", "unresponsive"),
    Word(r"\b_were_running\b", "mark_running"),
    Word(r"\bwhat_follows\b", "effects"),
    Word(r"\bevery_instance\b", "iter_schedules"),
    Word(r"\boff_by\b", "disabled_by"),
    Word(r"\bwhy_no_pilots\b", "submission_blocker"),
    Word(r"\bRecorder\b", "AuditLogger"),
    Word(r"\b_SAID\b", "flash message"),
    Word(r"\bRest\b", "PendingAck"),
    Word(r"\bchild_(lives|ended)\b", "touch_group, group_effect"),
    Word(r"\bhand_over\b|\bhand_on\b", "release, grant_next"),
    Word(r"\b_?take_in\b", "fetch_loop"),
    Word(r"\bTURN\b", "reservation"),
    Word(r"\bSTAGED\b", "group_outbox"),
    Word(r"\bFLOW\b", "throughput"),
    Word(r"(?<!_)\breasons\(", "explain"),
    Word(r"\bwhose\(", "owner"),
    Word(r"\b(fitting|storable)\b", "truncate, sanitize"),
    Word(r"\b(Finding|Offer|Deeds|Claim)\b", "Alert, LoginOptions, AuditedActions, demand"),
    Word(r"\bon_to\b", "redirect"),
    Word(r"\bSums\b(?=[(.,\]])", "TaskCounters"),
    Word(r"(?<!_)\bthere\(", "or_404"),
    Word(r"\b_Search\b", "CancellationSearch"),
    Word(r"\b(_Question|_Findings)\b", "PollRequest, StatusChanges"),
    Word(r"\bunit\(\)", "transaction()"),
    Word(r"\bstored_result\b", "result_effect"),
    Word(r"\bmakes? room\b|\bmade room\b", "drain"),
    Word(r"\bconvict", "poison; poison candidate"),
    Word(r"\bfor good\b", "permanently; say what ends it"),
    Word(r"\bdear\b", "expensive"),
    Word(
        r"\b(Announcer|asks_for_results|counts_from_nowhere)\b",
        "publisher, needs_results, lacks_dtstart",
    ),
    Word(r"\bplace_in_(stream|order)\b", "check_stream_cursor, parse_cursor"),
    Word(r"\b(context_)?of_environment\b|\bat_command_line\b|\bas_ours\b", "from_environment, for_command_line"),
    Word(r"\bknows_vo\b|\b_?(check|read)_written\b|\.written\(\)", "may_have_vo, check_config, configured"),
    Word(r"(?i)\blast good\b", "last valid"),
    Word(r"\bUNHEARD\b|\bunheard_ms\b", "outage"),
    Word(r"(?i)\b(un)?(told|heard)\b", "notified, reported, received, renewed"),
    Word(r"(?i)\b(tells?|hears?)\b(?!\(\))", "notifies, reports, receives, renews", SOURCE),
    Word(r"(?i)(?<!Schedd )\b(said|says|asked|asks)\b", "reported, replied, requested, has", SOURCE),
    Word(
        r"(?i)\bnobody\b|\bmend(s|ing)?\b|(?<!\.)\bmended\b(?!: int)|\bours\b",
        "no worker, no user; repair",
        SOURCE,
    ),
    Word(
        r"(?i)(?<!:)\bturns?\b|\brecovers?\b|\bhand(ed|s)?_back\b",
        "grant, fetch_unacknowledged, requeue",
        SOURCE,
    ),
    Word(r"\bkinds? of (lockable |locked )?objects?\b", "object type"),
    # A question of the dashboard or the command line has an answer.
    Word(
        r"(?i)(?<!database_)(?<!\.)(?<!def )(?<!for )(?<!\{)(un)?answer(?!s\|| a question)",
        "response (of an HTTP server, a site, a database), reply (of Redis)",
    ),
    Word(
        r"\b(by_hand|places|counted|typed|watching|measured|asking|families|exporting|sharing|recording|troubles|deeds"
        r"|claims|courses|complaints|answers|following|patience|ending|door|live|guard|letter)\.py\b",
        "the field's name of the module",
    ),
)

#: Docstrings that begin with a question or a person. A first line says what the thing is or does.
OPENINGS = (
    r'"""(What|Whatever|Who|Whoever|Whose|Where|How|Why|Which|Those|These|They|Somebody|Nobody|Whether|When'
    r"|Something|Everything|Of)\b"
)
#: Names of tests that begin with a question. A name states the promise.
TEST_NAMES = r"def test_(P\d+_)*(what|whatever|who|whoever|where|when|why|how)_"


def texts() -> dict[str, str]:
    """Return the text of each file of the repository, by its path."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if Path(path).suffix in SUFFIXES and (ROOT / path).exists()]
    return {path: (ROOT / path).read_text() for path in paths if not any(each in path for each in EXCLUDED)}


def places(pattern: str, texts: Mapping[str, str]) -> list[str]:
    """Return the places of a pattern, as `path:line`."""
    compiled = re.compile(pattern.replace(" ", r"\s"))  # words may be on two lines
    return [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in texts.items()
        for match in compiled.finditer(text)
    ]


def main() -> int:
    """Print each refused word with its places; 1 if there is one."""
    found = {path: text.replace("_", SEPARATOR) for path, text in texts().items()}
    source = {path: text for path, text in found.items() if path.startswith(SOURCE)}
    code = {path: text for path, text in found.items() if path.endswith(".py")}
    refused = {
        word: places(word.pattern.replace("_", SEPARATOR), source if word.within == SOURCE else found)
        for word in WORDS
    }
    refused[Word(OPENINGS, "as first line of a docstring what the thing is or does")] = places(OPENINGS, code)
    refused[Word(TEST_NAMES, "the promise of the test")] = places(TEST_NAMES.replace("_", SEPARATOR), code)
    for word, occurrences in refused.items():
        if occurrences:
            print(f"{word.pattern}: write {word.instead}\n    {' '.join(occurrences[:20])}")
    total = sum(map(len, refused.values()))
    print(f"words to be replaced: {total} in {len(found)} files")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
