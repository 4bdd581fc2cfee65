"""Leader election of several scheduler processes, without duplicate runs."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from diracx.tasks.plumbing.broker import keys
from diracx.tasks.plumbing.broker.labels import LABEL_DUE
from diracx.tasks.plumbing.broker.models import TaskMessage
from redis import Redis

STREAM = "diracx:tasks:normal:medium"
PERIOD_MS = 200


class Submissions(threading.Thread):
    """Takes occurrences out of the queue as workers would, and notes when each was due and submitted."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._over = threading.Event()
        self.dues: list[int] = []

    def run(self) -> None:
        with Redis.from_url(self._url) as client:
            while not self._over.is_set():
                for entry, fields in client.xrange(STREAM):
                    message = TaskMessage.loadb(fields[b"data"])
                    if message.task_name == "my_tasks:Tick":
                        self.dues.append(message.labels[LABEL_DUE])
                    client.xdel(STREAM, entry)
                time.sleep(0.005)

    def finish(self) -> None:
        self._over.set()
        self.join()


@pytest.fixture
def submissions(redis_url: str) -> Iterator[Submissions]:
    running = Submissions(redis_url)
    running.start()
    yield running
    running.finish()
    with Redis.from_url(redis_url) as client:
        client.delete(STREAM)


def test_P42_a_standby_leads_soon_and_no_occurrence_is_submitted_twice(served, redis_url, submissions, wait_until):
    server = Redis.from_url(redis_url, decode_responses=True)

    def more() -> None:
        """A few more occurrences."""
        before = len(submissions.dues)
        wait_until(lambda: len(submissions.dues) >= before + 5, "occurrences are submitted")

    def changes_hands(token: str | None, within: float) -> str:
        """Wait until another scheduler leads."""
        wait_until(lambda: server.get(keys.LEADER) not in (None, token), "another leads", within)
        return server.get(keys.LEADER)

    first = served.start("scheduler", "--module", "my_tasks.py")
    first.until("leading")
    second = served.start("scheduler", "--module", "my_tasks.py")
    second.until("ready")
    more()
    of_first = server.get(keys.LEADER)

    # It is only paused, and goes on in the belief that it leads.
    first.process.send_signal(signal.SIGSTOP)
    of_second = changes_hands(of_first, 30)
    more()
    first.process.send_signal(signal.SIGCONT)
    first.until("lost the lead")
    assert server.get(keys.LEADER) == of_second
    more()

    # Paused for less than its lease, it leads on.
    second.process.send_signal(signal.SIGSTOP)
    time.sleep(1)
    second.process.send_signal(signal.SIGCONT)
    more()
    assert server.get(keys.LEADER) == of_second

    second.process.kill()
    assert changes_hands(of_second, 30) == of_first
    more()

    third = served.start("scheduler", "--module", "my_tasks.py")
    third.until("ready")
    wait_until(lambda: server.pubsub_numsub(keys.LEADER)[0][1] == 1, "it stands by")
    first.process.terminate()
    wait_until(lambda: server.get(keys.LEADER) != of_first, "the lead is given up")
    changes_hands(of_first, 3)  # not when the lease would have ended: 4 s or more
    more()
    third.process.terminate()
    assert (first.ends(), third.ends()) == (0, 0)

    submissions.finish()
    assert [due for due, number in Counter(submissions.dues).items() if number > 1] == []
    phases = {(due - submissions.dues[0]) % PERIOD_MS for due in submissions.dues}
    assert phases == {0}, "the phase is kept throughout"
    server.close()
