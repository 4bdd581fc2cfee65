"""Run chaos for every profile and configuration with several seeds, and write the figures into RESULTS.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, NamedTuple

from benchmarks.results import RESULTS, machine, write_section

from .plan import CONFIGURATIONS, PROFILES

RAW = RESULTS.with_name("chaos")
_EPILOG = """\
Each run leaves benchmarks/chaos/PROFILE-REDIS-SEED.json. What is there and was of the same length is not run
again, unless it failed; so an interrupted series goes on where it was. The report names runs that failed.

example: make chaos-figures ARGS="--cases net,sql,server:rdb --seeds 2 --seconds 60"
"""
#: Beyond its disturbances, a run may take so long: servers start, the system comes to rest, processes stop.
_BEYOND_SECONDS = 400
_DOUBLED = "— "


class Case(NamedTuple):
    """A profile on a configuration of Redis."""

    profile: str
    redis: str

    def __str__(self) -> str:
        return f"{self.profile} on {self.redis}"


#: The profiles on their own configuration, and those that disturb the server on every other.
CASES = [
    *(Case(profile, redis) for profile, (_, redis, _) in PROFILES.items()),
    *(Case("server", redis) for redis in ("none", "rdb", "everysec")),
    Case("sentinel", "sentinel"),
]


def _case(text: str) -> Case:
    profile, _, redis = text.partition(":")
    if profile not in PROFILES or (redis and redis not in CONFIGURATIONS):
        raise argparse.ArgumentTypeError(f"no PROFILE or PROFILE:REDIS: {text!r}")
    return Case(profile, redis or PROFILES[profile][1])


def run(case: Case, seed: int, seconds: float) -> dict[str, Any]:
    """The figures of one run, from its file or a new run."""
    path = RAW / f"{case.profile}-{case.redis}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found.get("seconds") == seconds and "failed" not in found:
            return found
    command = [sys.executable, "-m", "chaos", "--json", "--profile", case.profile, "--redis", case.redis]
    command += ["--seed", str(seed), "--seconds", str(seconds)]
    print(f"{case}, seed {seed}", flush=True)
    failure = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            output, errors = process.communicate(timeout=seconds + _BEYOND_SECONDS)
            found = json.loads(output.splitlines()[-1])
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends what it has started
            failure = "did not end"
        except (IndexError, ValueError):
            failure = f"exit code {process.returncode}: {(errors.strip().splitlines() or ['no output'])[-1]}"
    if failure:
        found = {**case._asdict(), "seed": seed, "seconds": seconds, "failed": failure}
    path.write_text(json.dumps(found, indent=1) + "\n")
    result = failure or f"broken: {', '.join(found['broken']) or 'nothing'}"
    print(f"{case}, seed {seed}: {result}", flush=True)
    return found


def row(case: Case, runs: list[dict[str, Any]]) -> str:
    """All seeds of a case as one row of the table."""
    good = [found for found in runs if "failed" not in found]
    total: Counter[str] = Counter()
    for found in good:
        total.update({name: value for name, value in found.items() if isinstance(value, int)})
    reasons = [
        f"{total[name]} {name.removeprefix(_DOUBLED)}"
        for name in total
        if name.startswith(
            (f"{_DOUBLED}its worker", f"{_DOUBLED}the server was", f"{_DOUBLED}the server lost data")
        )
        and total[name]
    ]
    unexplained = total["executed more than once without a reason"]
    with_data = total["acknowledged tasks lost with the server's data"]
    first = min((found.get("— the first was acknowledged", 0.0) for found in good), default=0.0)
    last = max((found.get("— the last was acknowledged", 0.0) for found in good), default=0.0)
    recovery = []
    for name in dict.fromkeys(name for found in good for name in found if name.startswith("recovery, ")):
        each = [found[name] for found in good if name in found]
        p50, p99 = statistics.median(one["p50"] for one in each), max(one["p99"] for one in each)
        recovery.append(f"{name.removeprefix('recovery, ').partition(':')[0]} {p50:g} / {p99:g}")
    cells = [
        str(case),
        f"{len(good)} of {len(runs)}",
        f"{total['tasks submitted']:,}",
        str(total["acknowledged tasks lost"]),
        f"{with_data}, acknowledged {first:+.1f} to {last:+.1f} s" if with_data else "0",
        "; ".join(reasons) or "0",
        str(unexplained),
        str(total["overlaps of mutually exclusive executions"]),
        str(total["— after a paused process was resumed (SIGCONT)"]),
        str(total["— after the server lost the lock"]),
        "; ".join(recovery) or "—",
        str(sum(bool(found["broken"]) for found in good)),
    ]
    return f"| {' | '.join(cells)} |"


def report(results: dict[Case, list[dict[str, Any]]], seconds: float) -> str:
    rows = "\n".join(row(case, runs) for case, runs in results.items())
    broken = [
        f"- {case}, seed {found['seed']}: {found.get('failed') or ', '.join(found['broken'])}"
        for case, runs in results.items()
        for found in runs
        if found.get("failed") or found["broken"]
    ]
    return f"""## Chaos

Measured by `make chaos-figures` on {datetime.now(UTC):%Y-%m-%d}: {machine()}.
Disturbances for {seconds:g} s, leases of 2 s, sums over all seeds; `chaos/verdict.py` defines each figure. *Lost
with the server's data* are acknowledged tasks that the configuration could not keep, with when they were
acknowledged, counted from the disturbance of the server. *After SIGCONT* are overlaps of at most 250 ms by a
process that had been stopped, *lock lost* those of a server that had lost the lock. Recovery: the median of the
runs' p50 / the greatest p99 in seconds from the disturbance (of the server: from its end) to the next execution.
The raw figures of each run are in `benchmarks/chaos/`.

| case | runs | tasks | lost | lost with the server's data | executed again, by reason | without a reason \
| overlaps | after SIGCONT | lock lost | recovery p50 / p99 s | runs that broke a promise |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

{chr(10).join(broken) or "No run broke a promise."}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m chaos.figures",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        type=lambda text: [_case(each) for each in text.split(",")],
        default=CASES,
        help="PROFILE or PROFILE:REDIS, separated by commas (default: all)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each case (default 5)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="duration of the disturbances of each run (default 120)"
    )
    parser.add_argument("--jobs", type=int, choices=(1, 2, 3), default=1, help="runs at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the section, leave RESULTS.md as it is")
    arguments = parser.parse_args()
    RAW.mkdir(exist_ok=True)
    wanted = [(case, seed) for seed in range(1, arguments.seeds + 1) for case in arguments.cases]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda each: run(each[0], each[1], arguments.seconds), wanted))
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in arguments.cases}
    for (case, _), figures in zip(wanted, found, strict=True):
        results[case].append(figures)
    text = report(results, arguments.seconds)
    if arguments.dry_run:
        print(text)
    else:
        write_section("make chaos-figures", text)
        print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
