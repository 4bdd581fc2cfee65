"""The HTTP API of the demo: the DiracX application in uvicorn, bound to the supervisor of the demo."""

from __future__ import annotations

import asyncio
import os
import socket

from diracx.tasks.cli.runtime.supervisor import report_to_supervisor

PORT_VARIABLE = "DEMO_API_PORT"


async def serve() -> None:
    """Serve until SIGTERM or the end of the demo."""
    import uvicorn

    ready = asyncio.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready.set()

    server = Server(
        uvicorn.Config(
            "diracx.routers.factory:create_app",
            factory=True,
            host="127.0.0.1",
            port=int(os.environ[PORT_VARIABLE]),
            log_level="warning",
        )
    )

    def stop() -> None:
        server.should_exit = True

    reporting = asyncio.create_task(report_to_supervisor(ready, stop))
    try:
        await server.serve()
    finally:
        reporting.cancel()


if __name__ == "__main__":
    asyncio.run(serve())
