"""A task that fails at first, and is retried."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from diracx.tasks.plumbing import BaseTask, ExponentialBackoff, UnretryableError


@dataclass
class Download(BaseTask):
    """Pretends to fetch a file from a server that responds only the third time."""

    url: str

    retry_policy = ExponentialBackoff(base_delay_seconds=0.5, max_retries=3)
    dlq_eligible = True

    async def execute(self) -> str:
        if not self.url.startswith("https://"):
            raise UnretryableError(f"will not fetch {self.url!r}: only https")
        attempt = _count(self.url)
        if attempt < 3:
            raise ConnectionError(f"no response to attempt {attempt}")
        return f"got it at attempt {attempt}"


def _count(url: str) -> int:
    """Count the attempts in a file, since the next attempt may run in another process."""
    counter = Path(gettempdir()) / f"attempts-{url.encode().hex()[-40:]}"
    attempt = int(counter.read_text()) + 1 if counter.exists() else 1
    if attempt < 3:
        counter.write_text(str(attempt))
    else:
        counter.unlink()
    return attempt
