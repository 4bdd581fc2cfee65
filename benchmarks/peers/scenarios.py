"""Scenarios, each on an empty server: a function from a peer to its figures."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from . import environments
from .adapters.base import NAP_SECONDS
from .catalogue import Command, Peer
from .meter import Meter, Reading, percentiles
from .processes import FailedError, Service

#: A slow peer is not waited for: its rate is that of the first seconds.
CUT_SECONDS = 4.0
_START_SECONDS = 20.0
_CLIENT_SECONDS = 60.0
#: Tasks per second that the slowest client submits.
_LEAST_SUBMITTED = 200
_LOOK_SECONDS = 0.01
CONCURRENCY = 100
WORKERS = 4
BEHIND_ONE_MUTEX = 200
_ONE_MUTEX_SECONDS = 15.0
_NAPS_SECONDS = 20.0
#: Longer than what any of them does seldom, such as a look for dead workers.
_IDLE_SECONDS = 21.0
_MEMORY_SECONDS = 120.0
_WORKERS_SECONDS = 3.0
#: Less than this for each task is no result.
_LEAST_RESULT_BYTES = 20
#: A backlog that takes longer to submit is left out, unless it is ours.
_BACKLOG_SECONDS = 100.0

Figures = dict[str, float]


class SkippedError(Exception):
    """A peer does not take part, for the reason given."""


@dataclass
class Bench:
    """A server, and shared state of the runs of one round."""

    redis: Redis
    url: str
    scale: float = 1.0
    """Less than 1 makes all numbers of tasks smaller: to see whether everything works."""
    rates: dict[str, float] = field(default_factory=dict)
    """Peer -> its drain rate in this round, tasks per second."""
    bulk_rates: dict[str, float] = field(default_factory=dict)

    def count(self, number: int, least: int = 20) -> int:
        return max(least, int(number * self.scale))

    def enough(self, peer: Peer, number: int, *, seconds: float = 1.3 * CUT_SECONDS) -> int:
        """`number` tasks, or fewer for a slow peer."""
        rate = self.rates.get(peer.name)
        return self.count(number if rate is None else min(number, int(rate * seconds)))

    def empty(self) -> None:
        self.redis.flushall()
        self.redis.script_flush()

    def bytes_used(self) -> int:
        """Memory of all keys, their names and their entries in the keyspace."""
        total = 0
        batch: list[Any] = []
        for key in [*self.redis.scan_iter(count=1000), None]:
            if key is not None:
                batch.append(key)
            if batch and (key is None or len(batch) == 1000):
                with self.redis.pipeline(transaction=False) as pipe:
                    for each in batch:
                        pipe.memory_usage(each, samples=0)
                    total += sum(used or 0 for used in pipe.execute())
                batch = []
        return total

    def requests(self) -> tuple[int, int]:
        """Commands that the server has executed, those within scripts included; and how often it read some."""
        information: dict[str, Any] = self.redis.info("stats")
        return int(information["total_commands_processed"]), int(information["total_reads_processed"])


class Run:
    """One peer on an empty server."""

    def __init__(self, bench: Bench, peer: Peer, directory: Path, *, results: bool = False) -> None:
        self.bench = bench
        self.peer = peer
        self._directory = directory
        self._results = results
        self._home = environments.ENVIRONMENTS / peer.environment
        meter = directory / "meter"
        meter.mkdir()
        self.meter = Meter(meter)
        self._environment = environments.variables(bench.url, meter, results=results)

    # --- submitting -------------------------------------------------------------------------------------

    def submit(self, task: str, number: int, *, bulk: bool = True) -> float:
        """Submit through the peer's client. Returns tasks per second."""
        do = "bulk" if bulk and self.peer.bulk else "one"
        order = {"do": do, "task": task, "number": number}
        return (number - 1) / self.order(order, _CLIENT_SECONDS + number / _LEAST_SUBMITTED)

    def order(self, order: dict[str, Any], timeout: float = _CLIENT_SECONDS) -> float:
        """Let the client do something. Returns its seconds."""
        client = ("python", "-m", "benchmarks.peers.client", self.peer.adapter, json.dumps(order))
        try:
            done = subprocess.run(
                environments.command_in(self._home, client),
                env=self._environment,
                cwd=environments.ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise FailedError(f"its client did not end within {timeout:g} s") from None
        if done.returncode:
            raise FailedError(f"its client: {done.stderr.strip().splitlines()[-1:]}")
        seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
        return seconds

    # --- working ----------------------------------------------------------------------------------------

    def worker(self, *, naps: bool = False) -> Service:
        command = self.peer.naps if naps and self.peer.naps else self.peer.worker
        return self._service((*command, *self.peer.storing) if self._results else command)

    def scheduler(self) -> Service | None:
        return self._service(self.peer.scheduler) if self.peer.scheduler else None

    def _service(self, command: Command) -> Service:
        filled = tuple(part.format(concurrency=CONCURRENCY, url=self.bench.url) for part in command)
        log = self._directory / f"{time.monotonic_ns()}.log"
        return Service(environments.command_in(self._home, filled), self._environment, environments.ROOT, log)

    def wait_for(
        self, number: int, *workers: Service, seconds: float = CUT_SECONDS, series: list[Any] | None = None
    ) -> Reading:
        """Wait until so many have been executed, or some seconds after the first.

        Args:
            series: gets the moment and the count of each look.

        Raises:
            FailedError: when nothing is executed at all, or a worker ends.
        """
        deadline = time.monotonic() + _START_SECONDS
        while True:
            reading = self.meter.read()
            if series is not None and reading.count:
                series.append((time.monotonic(), reading.count))
            if reading.count >= number:
                return reading
            now = time.monotonic()
            if not reading.count and now > deadline:
                raise FailedError(f"executed nothing in {_START_SECONDS:g} s: {workers[0].last_words()}")
            if reading.count and now > reading.first + seconds:
                return reading
            for worker in workers:
                worker.check()
            time.sleep(_LOOK_SECONDS if series is None else _LOOK_SECONDS / 5)


@contextmanager
def run(bench: Bench, peer: Peer, *, results: bool = False) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="diracx-bench-") as directory:
        bench.empty()
        yield Run(bench, peer, Path(directory), results=results)


def _rate(reading: Reading) -> float:
    if reading.count < 2 or reading.last <= reading.first:
        raise FailedError(f"executed {reading.count} tasks only")
    return (reading.count - 1) / (reading.last - reading.first)


def _rested(*services: Service) -> None:
    """Wait until processes have started: until they need next to no time on a processor."""
    deadline = time.monotonic() + _START_SECONDS
    before = math.inf
    quiet = 0
    while quiet < 2 and time.monotonic() < deadline:
        time.sleep(0.4)
        for service in services:
            service.check()
        now = sum(service.cpu_seconds() for service in services)
        quiet = quiet + 1 if now - before <= 0.05 * len(services) else 0
        before = now


# --- the scenarios --------------------------------------------------------------------------------------------


def drain(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer) as it:
        number = bench.enough(peer, 20_000)
        it.submit("noop", number)
        with it.worker() as worker:
            rate = _rate(it.wait_for(number, worker))
        bench.rates[peer.name] = rate
        return {"drain": rate}


def mutex(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer) as it:
        number = bench.enough(peer, 20_000)
        it.submit("mutex", number)
        with it.worker() as worker:
            return {"mutex": _rate(it.wait_for(number, worker))}


def results(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer, results=True) as it:
        number = bench.enough(peer, 20_000)
        it.submit("return_one", number)
        with it.worker() as worker:
            reading = it.wait_for(number, worker)
            worker.stop()
        if reading.count == number and bench.bytes_used() < _LEAST_RESULT_BYTES * number:
            raise FailedError("stored no results")
        return {"results": _rate(reading)}


def enqueue(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer) as it:
        figures = {"one_by_one": it.submit("noop", bench.count(3_000, 500), bulk=False)}
    if peer.bulk:
        with run(bench, peer) as it:
            figures["bulk"] = bench.bulk_rates[peer.name] = it.submit("noop", bench.count(10_000, 2_000))
    return figures


def latency(bench: Bench, peer: Peer) -> Figures:
    number = bench.count(300, 100)
    with run(bench, peer) as it, it.worker() as worker:
        _rested(worker)
        it.order({"do": "paced", "number": number, "interval": 0.01})
        samples = _samples(it, number, 5.0, worker)
    p50, p99 = percentiles(samples)
    return {"latency_p50": p50 * 1000, "latency_p99": p99 * 1000}


def _samples(it: Run, number: int, seconds: float, *services: Service) -> list[float]:
    """The latencies that tasks have noted, when all have."""
    deadline = time.monotonic() + seconds
    while len(samples := it.meter.samples()) < number:
        if time.monotonic() > deadline:
            raise FailedError(f"{len(samples)} of {number} were executed: {services[0].last_words()}")
        for service in services:
            service.check()
        time.sleep(0.05)
    return samples


def sleep(bench: Bench, peer: Peer) -> Figures:
    number = 1_000
    with run(bench, peer) as it:
        it.submit("nap", number)
        with it.worker(naps=True) as worker:
            reading = it.wait_for(number, worker, seconds=_NAPS_SECONDS)
        if reading.count < number:
            raise FailedError(f"{reading.count} of {number} in {_NAPS_SECONDS:g} s")
        return {"sleep": reading.last - reading.first + NAP_SECONDS}


def delayed(bench: Bench, peer: Peer) -> Figures:
    number = bench.count(300, 100)
    with ExitStack() as stack:
        it = stack.enter_context(run(bench, peer))
        services = [stack.enter_context(it.worker())]
        if (scheduler := it.scheduler()) is not None:
            services.append(stack.enter_context(scheduler))
        _rested(*services)
        it.order({"do": "later", "number": number, "after": 1.0, "within": 2.5})
        samples = _samples(it, number, 10.0, *services)
    p50, p99 = percentiles(samples)
    return {"late_p50": p50 * 1000, "late_p99": p99 * 1000, "early": max(0.0, -min(samples)) * 1000}


def memory(bench: Bench, peer: Peer) -> Figures:
    number, more = bench.enough(peer, 20_000), bench.enough(peer, 20_000) // 2
    with run(bench, peer) as it:

        def left_when_done(done: int) -> int:
            with it.worker() as worker:
                if it.wait_for(done, worker, seconds=_MEMORY_SECONDS).count < done:
                    raise FailedError(f"did not execute {done} tasks in {_MEMORY_SECONDS:g} s")
                _rested(worker)
                worker.stop()
            return bench.bytes_used()

        it.submit("noop", number)
        queued = bench.bytes_used() / number
        left = left_when_done(number)
        it.submit("noop", more)
        # What does not grow with the tasks is not of the tasks.
        of_each = max(0.0, (left_when_done(number + more) - left) / more)
    return {"queued_bytes": queued, "left_bytes": of_each, "left_fixed": max(0.0, left - of_each * number) / 1000}


def startup(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer) as it:
        it.submit("noop", 1, bulk=False)
        with it.worker() as worker:
            reading = it.wait_for(1, worker)
            time.sleep(0.3)
            return {"start": reading.first - worker.started, "rss": worker.rss_bytes() / 1e6}


def idle(bench: Bench, peer: Peer) -> Figures:
    seconds = _IDLE_SECONDS
    with run(bench, peer) as it, it.worker() as worker:
        _rested(worker)
        (commands, reads), processor, begin = bench.requests(), worker.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        spent, used = time.monotonic() - begin, worker.cpu_seconds() - processor
        commands_after, reads_after = bench.requests()
        worker.check()
        return {
            "idle_processor": 100 * used / spent,
            "idle_commands": (commands_after - commands - 1) / spent,  # without the one that asks
            "idle_requests": (reads_after - reads - 1) / spent,
        }


def one_mutex(bench: Bench, peer: Peer) -> Figures:
    with run(bench, peer) as it:
        it.submit("alone", BEHIND_ONE_MUTEX)
        with it.worker() as worker:
            reading = it.wait_for(BEHIND_ONE_MUTEX, worker, seconds=_ONE_MUTEX_SECONDS)
    if reading.count < BEHIND_ONE_MUTEX:
        raise FailedError(f"{reading.count} of {BEHIND_ONE_MUTEX} in {_ONE_MUTEX_SECONDS:g} s")
    return {"one_mutex": reading.last - reading.first}


def backlog(bench: Bench, peer: Peer) -> Figures:
    number, short, long = bench.count(1_000_000), bench.count(10_000), bench.count(60_000)
    bulk = bench.bulk_rates.get(peer.name)
    if bulk is None:
        with run(bench, peer) as it:
            bulk = it.submit("noop", bench.count(10_000))
    if number / bulk > _BACKLOG_SECONDS and not peer.is_ours:
        raise SkippedError(f"would take {number / bulk:,.0f} s to submit, more than {_BACKLOG_SECONDS:.0f} s")

    def measured(it: Run, submitted: int, until: int) -> float:
        it.submit("noop", submitted)
        series: list[tuple[float, int]] = []
        with it.worker() as worker:
            it.wait_for(until, worker, series=series)
        warm = [look for look in series if look[1] >= short // 5]
        (begin, first), (end, last) = warm[0], warm[-1]
        if end <= begin:
            raise FailedError("drained too fast to be seen")
        return (last - first) / (end - begin)

    rates = []
    for _ in range(3):
        with run(bench, peer) as it:
            rates.append(measured(it, short, short))
    with run(bench, peer) as it:
        full = measured(it, number, long)
    return {"backlog": full, "backlog_short": statistics.median(rates)}


def workers(bench: Bench, peer: Peer) -> Figures:
    if peer.name not in bench.rates:
        drain(bench, peer)
    # Enough for all to have started long before the end.
    number = bench.enough(peer, 100_000, seconds=12.0)
    with ExitStack() as stack:
        it = stack.enter_context(run(bench, peer))
        it.submit("noop", number)
        crew = [stack.enter_context(it.worker()) for _ in range(WORKERS)]
        deadline = time.monotonic() + _START_SECONDS
        while (begun := it.meter.read()).processes < WORKERS:
            if begun.count >= number or time.monotonic() > deadline:
                raise FailedError(f"{begun.processes} of {WORKERS} workers had begun after {begun.count} tasks")
            for worker in crew:
                worker.check()
            time.sleep(_LOOK_SECONDS)
        begin = time.monotonic()
        first = begun.count
        while (reading := it.meter.read()).count < number and time.monotonic() < begin + _WORKERS_SECONDS:
            time.sleep(_LOOK_SECONDS)
        return {"workers": (reading.count - first) / (max(reading.last, begin + _LOOK_SECONDS) - begin)}


@dataclass(frozen=True)
class Scenario:
    """One way of measuring."""

    name: str
    measure: Callable[[Bench, Peer], Figures]
    once: bool = False
    """True if one round is enough: it gives the same every time, or takes too long."""


SCENARIOS = (
    Scenario("drain", drain),
    Scenario("mutex", mutex),
    Scenario("results", results),
    Scenario("enqueue", enqueue),
    Scenario("latency", latency),
    Scenario("sleep", sleep),
    Scenario("delayed", delayed),
    Scenario("memory", memory, once=True),
    Scenario("startup", startup),
    Scenario("idle", idle, once=True),
    Scenario("one-mutex", one_mutex),
    Scenario("workers", workers),
    Scenario("backlog", backlog, once=True),
)
