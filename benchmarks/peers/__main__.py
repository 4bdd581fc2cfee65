"""Measure other task systems and ours, interleaved, and write the section of RESULTS.md: `make bench-peers`.

A selection is printed only, unless --write asks for more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time

from diracx.tasks.testing import embedded_redis
from redis import Redis

from ..results import RESULTS, write_section
from . import environments, report
from .catalogue import BY_NAME, Peer
from .processes import FailedError
from .report import Measurements, Problem
from .scenarios import SCENARIOS, Bench, Figures, Scenario, SkippedError

_NAMES = [scenario.name for scenario in SCENARIOS]


def say(line: str) -> None:
    """Print progress to stderr; results go to stdout."""
    print(line, file=sys.stderr, flush=True)


def measure(peers: list[Peer], scenarios: list[Scenario], rounds: int, scale: float) -> Measurements:
    taken = Measurements(peers, rounds, load=os.getloadavg()[0])
    begin = time.monotonic()
    for number in range(1, rounds + 1):
        with embedded_redis() as url, Redis.from_url(url) as redis:
            bench = Bench(redis, url, scale)
            for scenario in scenarios:
                if scenario.once and number > 1:
                    continue
                turn = (number - 1) % len(peers)
                for peer in peers[turn:] + peers[:turn]:
                    _measure_one(taken, bench, scenario, peer, number, begin)
    taken.seconds = time.monotonic() - begin
    return taken


def _measure_one(
    taken: Measurements, bench: Bench, scenario: Scenario, peer: Peer, number: int, begin: float
) -> None:
    where = f"{time.monotonic() - begin:6.0f} s  round {number}  {scenario.name:9} {peer.name:11} "
    if not peer.takes_part(scenario.name):
        if scenario.name in peer.unable:
            taken.problems.append(
                Problem(peer.name, scenario.name, number, peer.unable[scenario.name], skipped=True)
            )
        return
    try:
        figures: Figures = scenario.measure(bench, peer)
    except SkippedError as reason:
        say(f"{where} left out: {reason}")
        taken.problems.append(Problem(peer.name, scenario.name, number, str(reason), skipped=True))
    except FailedError as error:
        say(f"{where} FAILED: {error}")
        taken.problems.append(Problem(peer.name, scenario.name, number, str(error)))
    else:
        say(where + "  ".join(f"{figure} {value:,.5g}" for figure, value in figures.items()))
        taken.add(peer.name, figures)


def plots(taken: Measurements) -> list[str]:
    """Draw, beside RESULTS.md. Returns the names of the files without their endings."""
    home = environments.prepare("plot")
    command = environments.command_in(home, ("python", "-m", "benchmarks.peers.plot", str(RESULTS.parent)))
    done = subprocess.run(
        command,
        cwd=environments.ROOT,
        input=json.dumps(report.as_json(taken)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.split()


def _chosen(text: str | None, known: list[str], parser: argparse.ArgumentParser, what: str) -> list[str]:
    if text is None:
        return known
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown {what}: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and nothing it started is left
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--peers", metavar="A,B", help=f"of {', '.join(BY_NAME)}; by default all")
    parser.add_argument("--scenarios", metavar="A,B", help=f"of {', '.join(_NAMES)}; by default all")
    parser.add_argument("--rounds", type=int, default=3, help="the medians count (default: 3)")
    parser.add_argument("--scale", type=float, default=1.0, help="e.g. 0.05: fewer tasks, to see whether it works")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md even of a selection")
    arguments = parser.parse_args()
    peers = report.in_order(_chosen(arguments.peers, list(BY_NAME), parser, "peers"))
    names = _chosen(arguments.scenarios, _NAMES, parser, "scenarios")
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in names]

    ready, broken = [], []
    for peer in peers:
        try:
            environments.prepare(peer.environment)
            ready.append(peer)
        except environments.EnvironmentFailedError as error:
            say(f"{peer.name}: no environment: {error}")
            broken.append(Problem(peer.name, "installation", 0, " ".join(str(error).split())))
    if not ready:
        sys.exit("none of the environments could be made")
    taken = measure(ready, scenarios, arguments.rounds, arguments.scale)
    taken.peers, taken.problems = peers, [*broken, *taken.problems]
    if arguments.json:
        print(json.dumps(report.as_json(taken), indent=1))
    else:
        print(f"{report.tables(taken)}\n\n{report.targets_table(taken)}\n\n{report.problems(taken)}")
    everything = not arguments.peers and not arguments.scenarios and arguments.scale == 1.0
    if everything or arguments.write:
        write_section("make bench-peers", report.section(taken, plots(taken)))
        say(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
