"""Rate at which pilots are submitted to real sites with 200 ms of added latency: `make bench-pilot-rate-far`.

One by one (`max_batch` 1), as before requests were combined, and 100 in a call. A TCP proxy delays all that goes
to the site's sshd, and comes from it, by 100 ms each.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from examples.demo.slurm import SlurmSite

from .pilot_rate import rate
from .results import write_section

sys.path.append(str(Path(__file__).parents[1] / "tests"))

DELAY_SECONDS = 0.1
ONE_BY_ONE, TOGETHER = 10, 100


@contextmanager
def far_host() -> Iterator[dict[str, Any]]:
    """Settings of a real sshd of this host that is far away."""
    from network import Network
    from sites.sshd import Sshd

    with tempfile.TemporaryDirectory(prefix="gubbins-far-") as name:
        Path(name).chmod(0o755)
        sshd = Sshd("/usr/sbin/sshd", Path(name))
        network = Network(f"tcp://127.0.0.1:{sshd.port}")
        try:
            sshd.start()
            network.start()
            network.delay_seconds = DELAY_SECONDS
            port = int(network.url.rpartition(":")[2])
            hosts = Path(name) / "far_hosts"
            hosts.write_text(f"[127.0.0.1]:{port} {sshd.host_key()}\n")
            yield {**sshd.settings, "port": port, "known_hosts": str(hosts), "max_sessions": 10}
        finally:
            network.stop()
            sshd.stop()


@contextmanager
def sites() -> Iterator[dict[str, Mapping[str, Any]]]:
    """The sites by name: back end and settings."""
    with ExitStack() as stack:
        host = stack.enter_context(far_host())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gubbins-slurm-")))
        slurm = SlurmSite(directory, cpus=32)
        slurm.start()
        stack.callback(slurm.stop)
        behind = {"ssh": host, "directory": str(directory / "pilots"), "slurm_conf": str(slurm.slurm_conf)}
        yield {
            "SSH": {
                "backend": "ssh",
                "settings": {**host, "workdir": str(directory / "ssh"), "default_script": "true"},
            },
            "Slurm behind SSH": {
                "backend": "slurm",
                "settings": {**behind, "default_script": "true", "concurrent_submissions": 10},
            },
        }


async def main() -> None:
    load = os.getloadavg()[0]
    lines = [
        f"Load average when it began: {load:.1f} on {os.cpu_count()} CPUs.\n",
        "| site, 200 ms away | one by one, pilots/s | 100 in a call, pilots/s | ratio |",
        "|---|---|---|---|",
    ]
    with sites() as there:
        for name, site in there.items():
            alone = await rate(1, ONE_BY_ONE, max_batch=1, site=site)
            together = await rate(1, TOGETHER, max_batch=100, site=site)
            ratio = together.per_second / alone.per_second
            lines.append(f"| {name} | {alone.per_second:.2f} | {together.per_second:.1f} | {ratio:.0f} |")
            print(lines[-1], flush=True)
    write_section("make bench-pilot-rate-far", "\n".join(lines))


if __name__ == "__main__":
    uvloop.run(main())
