"""The dashboard of the demo: the command `dashboard`, bound to the supervisor of the demo."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from contextlib import suppress

from diracx.tasks.cli import main
from diracx.tasks.cli.runtime.supervisor import report_to_supervisor

PORT_VARIABLE = "DEMO_DASHBOARD_PORT"
TOKEN_VARIABLE = "DIRACX_TASKS_DASHBOARD_TOKEN"  # noqa: S105  # the name of a variable
_LOOK_SECONDS = 0.1


async def _report(port: int) -> None:
    ready = asyncio.Event()
    reporting = asyncio.create_task(report_to_supervisor(ready, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    while not ready.is_set():
        await asyncio.sleep(_LOOK_SECONDS)
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            ready.set()
    await reporting


if __name__ == "__main__":
    number = os.environ[PORT_VARIABLE]
    threading.Thread(target=lambda: asyncio.run(_report(int(number))), daemon=True).start()
    sys.argv = ["diracx-task-run", "dashboard", "--port", number]
    main()
