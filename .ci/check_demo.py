"""Does the report of `make demo ARGS="--seconds N --json"` say what it should? One line for each finding."""

from __future__ import annotations

import json
import sys


def findings(report: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    found = []
    pilots, ces = report["pilots"], report["ces"]
    if len(pilots) != 3:
        found.append(f"three VOs were expected, not {sorted(pilots)}")
    for vo, states in pilots.items():
        if not states.get("DONE"):
            found.append(f"no pilot of {vo} has come to DONE: {states}")
    if len(ces) < 3:
        found.append(f"a reliable, a flaky and a local CE were expected, not {sorted(ces)}")
    for ce, numbers in ces.items():
        if not 0 < numbers["max_active_seen"] <= numbers["capacity"]:
            found.append(f"{ce} had {numbers['max_active_seen']} active pilots with {numbers['capacity']} slots")
    if report["illegal_transitions"] != 0:
        found.append(f"{report['illegal_transitions']} illegal transitions")
    return found


if __name__ == "__main__":
    problems = findings(json.loads(sys.argv[1]))
    print("\n".join(problems) or "the demo kept every promise")
    sys.exit(bool(problems))
