"""Rate at which pilots are submitted to real sites with 200 ms of added latency: `make bench-pilot-rate-far`.

One by one (`max_batch` 1), as before requests were combined, and 100 in a call. A TCP proxy delays all that goes
to the site (its sshd, A-REX, or what listens for HTCondor's daemons), and comes from it, by 100 ms each.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
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
def far(port: int) -> Iterator[int]:
    """A port of this host behind which the one of a site is, far away."""
    from support.network import Direction, Network

    class FarNetwork(Network):  # type: ignore[misc]  # mypy does not follow imports of tests
        """Delays each piece by as much, also one that is sent while another is on its way."""

        async def _pass(
            self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: Direction
        ) -> None:
            on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

            async def arrive() -> None:
                data = b"-"
                while data:
                    at, data = await on_its_way.get()
                    await asyncio.sleep(at - time.monotonic())
                    sink.write(data)
                    await sink.drain()
                sink.close()

            with suppress(ExceptionGroup):  # broken off
                async with asyncio.TaskGroup() as both:
                    both.create_task(arrive())
                    data = b"-"
                    while data:
                        data = await source.read(65536)
                        on_its_way.put_nowait((time.monotonic() + DELAY_SECONDS, data))

    network = FarNetwork(f"tcp://127.0.0.1:{port}")
    network.start()
    try:
        yield int(network.url.rpartition(":")[2])
    finally:
        network.stop()


@contextmanager
def far_host() -> Iterator[dict[str, Any]]:
    """Settings of a real sshd of this host that is far away."""
    from support.sites.sshd import Sshd

    with tempfile.TemporaryDirectory(prefix="gubbins-far-") as name:
        Path(name).chmod(0o755)
        sshd = Sshd("/usr/sbin/sshd", Path(name))
        try:
            sshd.start()
            with far(sshd.port) as port:
                hosts = Path(name) / "far_hosts"
                hosts.write_text(f"[127.0.0.1]:{port} {sshd.host_key()}\n")
                yield {**sshd.settings, "port": port, "known_hosts": str(hosts), "max_sessions": 10}
        finally:
            sshd.stop()


@contextmanager
def ssh() -> Iterator[Mapping[str, Any]]:
    """A host with a shell."""
    with far_host() as host, tempfile.TemporaryDirectory(prefix="gubbins-ssh-") as name:
        yield {"backend": "ssh", "settings": {**host, "workdir": f"{name}/ssh", "default_script": "true"}}


@contextmanager
def slurm() -> Iterator[Mapping[str, Any]]:
    """Slurm, whose commands are called on such a host."""
    with ExitStack() as stack:
        host = stack.enter_context(far_host())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gubbins-slurm-")))
        site = SlurmSite(directory, cpus=32)
        site.start()
        stack.callback(site.stop)
        behind = {"ssh": host, "directory": str(directory / "pilots"), "slurm_conf": str(site.slurm_conf)}
        yield {
            "backend": "slurm",
            "settings": {**behind, "default_script": "true", "concurrent_submissions": 10},
        }


@contextmanager
def arc() -> Iterator[Mapping[str, Any]]:
    """A-REX, by its REST interface."""
    from support.sites.arc import ArcSite

    with tempfile.TemporaryDirectory(prefix="gubbins-arc-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        site = ArcSite(Path(name))
        try:
            site.start()
            with far(site.port) as port:
                known = {"certificate": str(site.certificate), "key": str(site.key), "ca": str(site.ca_file)}
                url = f"https://localhost:{port}/arex"
                yield {"backend": "arc", "settings": {"url": url, **known, "default_script": "true"}}
        finally:
            site.stop()


@contextmanager
def htcondor() -> Iterator[Mapping[str, Any]]:
    """A schedd of HTCondor."""
    from support.sites.htcondor import HTCondorSite

    with tempfile.TemporaryDirectory(prefix="gubbins-htcondor-", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o755)
        site = HTCondorSite(Path(name))
        try:
            site.start()
            near = site.run("condor_status", "-schedd", "-af", "MyAddress").strip()
            real = int(near.partition("?")[0].rpartition(":")[2])
            with far(real) as port:
                # Without `addrs`, which would lead past the proxy.
                socket = next(part for part in near.strip("<>").split("?")[1].split("&") if "sock=" in part)
                address = f"<127.0.0.1:{port}?{socket}>"
                settings = {"address": address, "token": str(site.token), "default_script": "true"}
                yield {"backend": "htcondor", "settings": settings}
        finally:
            site.stop()


SITES: Mapping[str, Callable[[], Any]] = {
    "SSH": ssh,
    "Slurm behind SSH": slurm,
    "ARC": arc,
    "HTCondor": htcondor,
}


async def main() -> None:
    load = os.getloadavg()[0]
    lines = [
        f"Load average at the start: {load:.1f} on {os.cpu_count()} CPUs. SSH with `max_sessions: 10` "
        "(default 4) and Slurm with `concurrent_submissions: 10` (default 8), too; rule `timeout_seconds: 300` "
        "(default 60).\n",
        "| site, 200 ms away | one by one, pilots/s | 100 in a call, pilots/s | ratio |",
        "|---|---|---|---|",
    ]
    for name in sys.argv[1:] or SITES:
        with SITES[name]() as site:
            alone = await rate(1, ONE_BY_ONE, max_batch=1, site=site)
            together = await rate(1, TOGETHER, max_batch=100, site=site)
            ratio = together.per_second / alone.per_second
            lines.append(f"| {name} | {alone.per_second:.2f} | {together.per_second:.1f} | {ratio:.0f} |")
            print(lines[-1], flush=True)
    if not sys.argv[1:]:
        write_section("make bench-pilot-rate-far", "\n".join(lines))


if __name__ == "__main__":
    uvloop.run(main())
