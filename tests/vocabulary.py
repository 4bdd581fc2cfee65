"""Refuses words of our own where the field has one: `make lint` counts them, and no count may rise.

Where a count has fallen, lower its bound here: the bounds only go down, and a word with bound 0 is gone for good.
The standard terms are in docs/reference/glossary.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".lua", ".md", ".html", ".js", ".css", ".toml", ".yaml", ".yml", ".sh", ".conf", ".acl", ".ini"}
#: What quotes the words, is history, or is not ours.
EXCLUDED = ("tests/vocabulary.py", "CHANGELOG.md", "/vendor/")


class Word(NamedTuple):
    """A word that is not to be used."""

    pattern: str
    instead: str
    bound: int  # occurrences that are left


WORDS = (
    Word(r"\bwhoever\b", "who or what it is", 0),
    Word(r"\bsomebody\b", "who it is: a user, a worker, an operator", 0),
    Word(r"\bsuspects?\b|is_suspect|_suspects\b", "poison candidate", 0),
    # `burial`, `buried` and `buried_at` are fields of a dead letter in JSON.
    Word(r"(?<![\"'_])burial(?!: str)", "delivery id", 0),
    Word(r"\bbury\b|(?<!\")\bburied\b(?![=:])", "stored as a dead letter; reclaimed", 0),
    Word(r"condemn", "mark_cancelled", 0),
    Word(r"\blapsed\b|lapsed_since", "expired", 0),
    Word(
        r"(?i)(?<!dead )(?<!dead-)(?<!dead_)(?<!dead)(?<!capital )(?<!small )\bletters?\b"
        r"(?!, digits| or a digit|-spacing)",
        "dead letter",
        0,
    ),
    Word(r"\bledgers?\b", "held-locks record", 0),
    Word(r"\b(hand_on|pass_on)\b", "grant_next", 0),
    Word(r"\bsign(s|ed)?[ _]on\b", "heartbeat", 0),
    # In quotes or backticks: `woken` and `deaths` are fields of an entry of a stream.
    Word(r"(?<![`'\"])\bwoken\b", "grant, reservation", 0),
    Word(r"(?<!:)\bhand[- ]?overs?\b", "resumed queue; release of the leadership", 0),
    Word(r"\bpatien(ce|tly)\b", "retry_until_available", 0),
    Word(r"\b[Dd]eeds?\b", "audited action", 0),
    Word(r"\btroubles?\b", "health check", 0),
    Word(r"\bgrave\b", "severity", 0),
    Word(r"\b[Cc]hapter", "failure history", 0),
    Word(r"\bby_hand\b", "admin", 0),
    Word(r"\bon_trial\b", "half_open", 0),
    Word(r"\b[Cc]omplaints?\b|complaints", "error_parsing, error", 0),
    Word(r"\b[Nn]onsense", "invalid_response", 0),
    Word(r"\b_?courses\b", "statistics", 0),
    Word(r"\bTold\b|\b_told\b", "ErrorInfo; on_outcome", 0),
    Word(r"(?<!task\.)\bgiven_up\b", "abandoned_outcome", 0),
    Word(r"(?<![`'\"])\bdeaths\b", "redelivery_count", 0),
    Word(r"(?<!since the )(?<!tasks:)(?<!\")\bepoch\b", "dataset_id", 0),
    Word(r"\bput_aside\b|\btake_up\b", "defer, requeue", 0),
    Word(r"\bDeadLetterOffice\b", "DeadLetterStore", 0),
    Word(r"\bTakenOver\b", "LeaseLost", 0),
    Word(r"\bBlueprint\b|\bblueprint\b", "TaskSpec", 0),
    Word(r"\bAnnouncements?\b", "ControlChannel", 0),
    Word(r"\bfall_silent\b", "stop_renewing", 0),
    Word(r"_LAST_WORDS", "SHUTDOWN_FLUSH_SECONDS", 0),
    Word(r"_or_die_with", "run_supervised", 0),
    Word(r"\b_Written\b", "ResolvedOverride", 0),
    Word(r"\bheard_since\b", "cancelled_since", 0),
    Word(r"\bmakes_room\b|\b_makes_room\b", "draining", 0),
    Word(r"\bquota_returns\b", "retry_after", 0),
    Word(r"\bPauses\b", "Backoff", 0),
    Word(r"\bis_passing\b", "is_transient", 0),
    Word(r"\bConfigFollower\b", "ConfigWatcher", 0),
    Word(r"\bLazyFollower\b", "CachedConfig", 0),
    Word(r"\bInForce\b", "ActiveConfig", 0),
    Word(r"\bbound_by\b", "use_broker", 0),
    Word(r"\b_Submitter\b", "Client", 0),
    Word(r"\b_Shape\b|\bShape\b", "TaskSignature", 0),
    Word(r"\bknows_its_future\b", "deterministic", 0),
    Word(r"\bStillWaiting\b", "AlreadyQueued", 0),
    Word(r"\btold_running\b|\b_told_running\b", "reported_running", 0),
    Word(r"\bInstallation\b", "AppContext", 0),
    Word(r"\b(Verdict|Fate)\b", "ResubmitResult", 0),
    Word(r"\basked_at\b", "reserved_after, requested_at", 0),
    Word(r"\boverrun\b", "deadline_exceeded", 0),
    Word(r"\b_ignorant\b", "unresponsive", 0),
    Word(r"\b_were_running\b", "mark_running", 0),
    Word(r"\bwhat_follows\b", "effects", 0),
    Word(r"\bevery_instance\b", "iter_schedules", 0),
    Word(r"\boff_by\b", "disabled_by", 0),
    Word(r"\bwhy_no_pilots\b", "submission_blocker", 0),
    Word(r"\bRecorder\b", "AuditLogger", 0),
    Word(r"\b_SAID\b", "flash message", 0),
    Word(r"\bRest\b", "PendingAck", 0),
    Word(r"\bchild_(lives|ended)\b", "touch_group, group_effect", 0),
    Word(r"\bhand_over\b|\bhand_on\b", "release, grant_next", 0),
    Word(r"\b_?take_in\b", "fetch_loop", 0),
    Word(r"\bTURN\b", "reservation", 0),
    Word(r"\bSTAGED\b", "group_outbox", 0),
    Word(r"\bFLOW\b", "throughput", 0),
    Word(r"\breasons\(", "explain", 0),
    Word(r"\bwhose\(", "owner", 0),
    Word(r"\b(fitting|storable)\b", "truncate, sanitize", 0),
    Word(r"\b(Finding|Offer|Deeds|Claim)\b", "Alert, LoginOptions, AuditedActions, demand", 0),
    Word(r"\bon_to\b", "redirect", 0),
    Word(r"\bSums\b(?=[(.,\]])", "TaskCounters", 0),
    Word(r"\bthere\(", "or_404", 0),
    Word(r"\b_Search\b", "CancellationSearch", 0),
    Word(r"\b(_Question|_Findings)\b", "PollRequest, StatusChanges", 0),
    Word(r"\bunit\(\)", "transaction()", 0),
    Word(r"\bstored_result\b", "result_effect", 0),
    Word(r"\bmakes? room\b|\bmade room\b", "drain", 0),
    Word(r"\bconvict", "poison; poison candidate", 0),
    Word(r"\bfor good\b", "permanently; say what ends it", 0),
    Word(r"\bdear\b", "expensive", 0),
    Word(
        r"\b(by_hand|places|counted|typed|watching|measured|asking|families|exporting|sharing|recording|troubles|deeds"
        r"|claims|courses|complaints|answers|following|patience|ending|door|live|guard|letter)\.py\b",
        "the field's name of the module",
        0,
    ),
)

#: Docstrings that begin with a question or a person. A first line says what the thing is or does.
OPENINGS = re.compile(
    r'"""(What|Who|Whoever|Whose|Where|How|Why|Which|Those|Somebody|Nobody|Whether|When|Something|These|They)\b'
)
OPENINGS_BOUND = 0


def texts() -> dict[str, str]:
    """Return the text of each file of the repository, by its path."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [path for path in listed.splitlines() if Path(path).suffix in SUFFIXES and (ROOT / path).exists()]
    return {path: (ROOT / path).read_text() for path in paths if not any(each in path for each in EXCLUDED)}


def main() -> int:
    """Print each word that is used more often than its bound allows, with the places; 1 if there is one."""
    found = texts()
    total, exceeded = 0, False
    for word in WORDS:
        pattern = re.compile(word.pattern)
        places = [
            f"{path}:{number}"
            for path, text in found.items()
            for number, line in enumerate(text.splitlines(), 1)
            for _ in pattern.findall(line)
        ]
        total += len(places)
        if len(places) > word.bound:
            exceeded = True
            print(f"{word.pattern}: {len(places)} times, {word.bound} allowed; write {word.instead}")
            print("   ", " ".join(places[:20]))
        elif "--lower" in sys.argv and len(places) < word.bound:
            print(f"{word.pattern}: the bound can be {len(places)} (now {word.bound})")
    riddles = [
        f"{path}:{number}"
        for path, text in found.items()
        if path.endswith(".py")
        for number, line in enumerate(text.splitlines(), 1)
        if OPENINGS.search(line)
    ]
    if len(riddles) > OPENINGS_BOUND:
        exceeded = True
        print(f"riddles as docstrings: {len(riddles)}, {OPENINGS_BOUND} allowed; say what it is or does")
        print("   ", " ".join(riddles[:20]))
    elif "--lower" in sys.argv and len(riddles) < OPENINGS_BOUND:
        print(f"OPENINGS_BOUND can be {len(riddles)} (now {OPENINGS_BOUND})")
    print(f"words to be replaced: {total} in {len(found)} files")
    return int(exceeded)


if __name__ == "__main__":
    sys.exit(main())
