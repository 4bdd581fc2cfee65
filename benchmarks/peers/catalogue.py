"""The task systems to compare: how each is started, and its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: `python` is that of the environment; other programs are looked for beside it.
Command = tuple[str, ...]
_ADAPTERS = "benchmarks.peers.adapters"


@dataclass(frozen=True)
class Peer:
    """One contestant, or one loop of the bare client."""

    name: str
    title: str
    adapter: str
    """Module in `adapters`."""
    environment: str
    """Directory of its virtual environment, and suffix of its requirements."""
    worker: Command
    """Starts one worker process; `{concurrency}` and `{url}` are filled in."""
    naps: Command | None = None
    """Starts the worker for tasks that sleep, where another one suits them better."""
    storing: Command = ()
    """Further arguments of a worker that stores results; the adapters of the others look at BENCH_RESULTS."""
    scheduler: Command | None = None
    """Further process that delayed tasks need."""
    bulk: str | None = None
    """Number of tasks that are submitted at once; None: not at all."""
    unable: Mapping[str, str] = field(default_factory=dict)
    """Scenario -> why it is left out."""
    only: frozenset[str] | None = None
    """Scenarios it is there for; None: all."""

    @property
    def is_bare(self) -> bool:
        return self.environment == "bare"

    @property
    def is_ours(self) -> bool:
        return self.environment == "ours"

    def takes_part(self, scenario: str) -> bool:
        return scenario not in self.unable and (self.only is None or scenario in self.only)


def _bare(name: str, title: str, mode: str, *scenarios: str) -> Peer:
    return Peer(
        name=name,
        title=title,
        adapter="bare",
        environment="bare",
        worker=("python", "-m", f"{_ADAPTERS}.bare", mode),
        bulk="a pipeline",
        only=frozenset(scenarios),
    )


_NO_LOCKS = {"mutex": "has no locks", "one-mutex": "has no locks"}
_NO_WAITING = {"one-mutex": "a task that is refused its lock fails"}
#: For systems that leave the choice of the event loop to the program that starts them.
_ON_UVLOOP = ("python", "-m", "benchmarks.peers.with_uvloop")
_CELERY = (
    *("celery", "-A", f"{_ADAPTERS}.celery", "worker", "--pool", "threads", "--loglevel", "WARNING"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat"),
)
_OURS = ("diracx-task-run", "worker", "--max-concurrent-tasks", "{concurrency}", "--log-level", "warning")

PEERS = (
    Peer(
        name="ours",
        title="diracx-tasks (this tree)",
        adapter="ours",
        environment="ours",
        worker=_OURS,
        storing=("--result-ttl", "3600"),
        scheduler=("diracx-task-run", "scheduler", "--log-level", "warning"),
        bulk="schedule_many",
    ),
    Peer(
        name="ours-alone",
        title="the same, a worker alone",
        adapter="ours",
        environment="ours",
        worker=_OURS,
        only=frozenset({"delayed"}),
    ),
    Peer(
        name="ours-labelled",
        title="the same, with labels",
        adapter="ours_labelled",
        environment="ours",
        worker=_OURS,
        bulk="schedule_many",
        only=frozenset({"drain"}),
    ),
    Peer(
        name="reference",
        title="diracx-tasks 0.7.0",
        adapter="reference",
        environment="reference",
        worker=(
            *(*_ON_UVLOOP, "diracx-tasks", "worker", "--max-concurrent-tasks", "{concurrency}"),
            *("--worker-size", "medium", "--redis-url", "{url}"),
        ),
        scheduler=("diracx-tasks", "scheduler", "--redis-url", "{url}"),
        bulk="concurrent calls",
        unable={"results": "its worker stores none"},
    ),
    Peer(
        name="taskiq",
        title="taskiq-redis, streams",
        adapter="taskiq_streams",
        environment="taskiq",
        worker=(
            *("taskiq", "worker", f"{_ADAPTERS}.taskiq_streams:broker", "--workers", "1"),
            *("--max-async-tasks", "{concurrency}", "--no-parse", "--log-level", "WARNING"),
        ),
        scheduler=(
            *("taskiq", "scheduler", f"{_ADAPTERS}.taskiq_streams:scheduler"),
            *("--update-interval", "1"),  # by default it looks once a minute
        ),
        bulk="concurrent calls",
        unable=_NO_LOCKS,
    ),
    Peer(
        name="saq",
        title="SAQ",
        adapter="saq",
        environment="saq",
        worker=(*_ON_UVLOOP, "saq", f"{_ADAPTERS}.saq.settings", "--quiet"),
        bulk="concurrent calls",
        unable=_NO_LOCKS,
    ),
    Peer(
        name="arq",
        title="arq",
        adapter="arq",
        environment="arq",
        worker=(*_ON_UVLOOP, "arq", f"{_ADAPTERS}.arq.WorkerSettings"),
        bulk="concurrent calls",
        unable=_NO_LOCKS,
    ),
    Peer(
        name="streaq",
        title="streaq",
        adapter="streaq",
        environment="streaq",
        worker=("streaq", "run", f"{_ADAPTERS}.streaq:worker"),
        bulk="enqueue_many",
        unable=_NO_LOCKS,
    ),
    Peer(
        name="docket",
        title="pydocket",
        adapter="docket",
        environment="docket",
        worker=("python", "-m", f"{_ADAPTERS}.docket", "{concurrency}"),
        bulk="add_many",
    ),
    Peer(
        name="dramatiq",
        title="dramatiq",
        adapter="dramatiq",
        environment="dramatiq",
        worker=("dramatiq", f"{_ADAPTERS}.dramatiq", "--processes", "1", "--threads", "32"),
        naps=("dramatiq", f"{_ADAPTERS}.dramatiq", "--processes", "1", "--threads", "{concurrency}"),
        unable=_NO_WAITING,
    ),
    Peer(
        name="celery",
        title="Celery, threads",
        adapter="celery",
        environment="celery",
        worker=(*_CELERY, "--concurrency", "8"),
        naps=(*_CELERY, "--concurrency", "{concurrency}"),
        unable=_NO_LOCKS,
    ),
    Peer(
        name="huey",
        title="huey",
        adapter="huey",
        environment="huey",
        worker=("huey_consumer", f"{_ADAPTERS}.huey.huey", "--workers", "2", "-k", "thread", "--quiet"),
        naps=("huey_consumer", f"{_ADAPTERS}.huey.huey", "--workers", "{concurrency}", "-k", "thread", "--quiet"),
        unable=_NO_WAITING,
    ),
    _bare("bare-await", "redis-py, the no-op awaited", "await", "drain"),
    _bare(
        *("bare-task", "redis-py, an asyncio task per message", "task"),
        *("drain", "enqueue", "latency", "sleep", "memory", "startup", "backlog", "workers", "idle"),
    ),
    _bare("bare-locks", "redis-py, locks in pipelines", "locks", "mutex"),
    _bare("bare-serial", "redis-py, one after another", "serial", "one-mutex"),
)

BY_NAME = {peer.name: peer for peer in PEERS}
